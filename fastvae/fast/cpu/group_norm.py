"""GroupNorm with SiLU on a CPU, in channels_last: the C kernel where it is built, else torch's operators on strips.

torch's GroupNorm is not used: in channels_last its error in fp32 grows with the image and with mean over deviation
(docs/numerics.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fastvae_kernels.cpu import group_norm
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastvae.fast.layer_checks import Layer
from fastvae.fast.packed_weights import channels_last, is_channels_last

# Values of one strip: 1 MB in fp32, half of an L2 cache.
STRIP = 2**18
# Values of one row of a strip: rows of several pixels make torch's inner loops long for a few channels too.
ROW = 2048
SMALL = 2**17


class ContiguousGroupNorm(TorchFunctionMode):
    """Context in which torch's GroupNorm reads its input as NCHW, where it has full accuracy on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.group_norm:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


class AccurateGroupNorm(ContiguousGroupNorm):
    """Context in which torch's GroupNorm reads NCHW and writes the layout of its input, which convolutions then have.

    oneDNN's fp32 convolution in channels_last sums all products in one chain on CPUs with AVX512, and errs more than
    the one in NCHW: 1.4 times with 32 channels, 5 times with 512.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = super().__torch_function__(func, types, args, kwargs)
        return channels_last(y) if func is F.group_norm and is_channels_last(args[0]) else y


def in_both_layouts(eager: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Return what eager torch computes of x [N, C, H, W] in NCHW and in channels_last; a judge takes the larger error.

    On a CPU torch's GroupNorm in fp32 has up to a hundred times the error in channels_last, no measure of ours: it runs
    in NCHW in both.
    """
    with AccurateGroupNorm():
        return [eager(laid_out) for laid_out in (x.contiguous(), x.contiguous(memory_format=torch.channels_last))]


def group_norm_silu(norm: Layer, x: Tensor, into: Tensor) -> Tensor:
    """Return silu(norm(x)) for x [N, C, H, W] in channels_last and a GroupNorm.

    into: memory for it, which may be x's own; without the C kernel a small result has its own.
    """
    if group_norm.takes(x):
        return group_norm.group_norm_silu(x, into, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return _group_norm_silu_in_torch(norm, x, into)


def band_norm(norm: Layer, dtype: torch.dtype, height: int, width: int) -> Any:
    """Return the norm of one image [height, width, C] whose rows come in bands: ``add``, ``close``, ``apply``."""
    like = norm.weight.new_empty(1, dtype=dtype).expand(1, norm.num_channels, 1, 1)
    if group_norm.takes(like):
        return group_norm.BandNorm(dtype, height * width, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return TorchBandNorm(norm, dtype, width)


class TorchBandNorm:
    """The same without the C kernel: sums in fp64, row by row, so that no bit depends on the bands."""

    def __init__(self, norm: Layer, dtype: torch.dtype, width: int):
        self.norm, self.width, self.rows = norm, width, 0
        self.wide = torch.promote_types(dtype, torch.float32)
        self.centre = self.scale = self.shift = norm.weight.double()
        self.sums = norm.weight.new_zeros(2, norm.num_channels, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Add the next pixels [pixels, C]: whole rows."""
        groups = self.norm.num_groups
        for row in x.split(self.width):
            d = row.double()
            if self.rows == 0:
                self.centre = d[0].view(groups, -1)[:, :1].expand(-1, d.shape[1] // groups).reshape(-1)
            d = d - self.centre
            self.sums[0] += d.sum(0)
            self.sums[1] += d.square_().sum(0)
            self.rows += 1

    def close(self) -> None:
        """Compute scale and shift of each channel."""
        groups, centre = self.norm.num_groups, self.centre
        sums, squares = self.sums.view(2, groups, -1).sum(2)
        count = self.rows * self.width * (len(centre) // groups)
        variance = ((squares - sums * sums / count) / count).clamp_min(0)
        mean = centre.view(groups, -1)[:, 0] + sums / count
        each = len(centre) // groups
        mean, inverse = (values.repeat_interleave(each) for values in (mean, (variance + self.norm.eps).rsqrt()))
        scale = self.norm.weight.double() * inverse
        # As in the C kernel: the mean rounded to fp32 is subtracted, the shift takes the rest of it.
        self.centre = mean.to(self.wide)
        self.scale = scale.to(self.wide)
        self.shift = (self.norm.bias.double() - (mean - self.centre.double()) * scale).to(self.wide)

    def apply(self, x: Tensor, y: Tensor, silu: bool = True) -> None:
        """Write silu(norm(x)), or norm(x), into y, which may be x: [pixels, C] both."""
        for part, into in zip(x.split(self.width), y.split(self.width), strict=True):
            d = torch.addcmul(self.shift, part.to(self.wide) - self.centre, self.scale)
            into.copy_(F.silu(d, inplace=True) if silu else d)


def _group_norm_silu_in_torch(norm: Layer, x: Tensor, y: Tensor) -> Tensor:
    """Return the same by torch's operators: strip by strip, in fp32 (fp64 for fp64).

    The mean is subtracted from x before the product with weight / deviation, so a mean of many deviations costs no
    digits. A small x is copied to NCHW for torch's GroupNorm instead: at [1, 32, 64, 64] the strips take 0.5 ms, the
    copies 0.3 ms.
    """
    if x.numel() <= SMALL:
        y = F.group_norm(x.contiguous(), norm.num_groups, norm.weight, norm.bias, norm.eps)
        return F.silu(channels_last(y), inplace=True)
    pixels_per_row = _pixels_per_row(x)
    rows, out = (_as_rows(values, pixels_per_row) for values in (x, y))
    wide = torch.promote_types(x.dtype, torch.float32)
    images, down = _strip_starts(rows)
    strip = torch.empty(images.step, down.step, rows.shape[2], dtype=wide, device=x.device)
    for image in images:
        batch = slice(image, image + images.step)
        parts = [rows[batch, row : row + down.step] for row in down]
        mean, variance = _merged([_statistics(part, norm.num_groups, pixels_per_row, strip) for part in parts])
        scale = (variance + norm.eps).rsqrt()[:, :, None] * norm.weight.double().view(norm.num_groups, -1)
        # The mean rounded to fp32 is subtracted from x; the bias takes the rest of the mean.
        centre = mean.to(wide)
        shift = norm.bias.double().view(norm.num_groups, -1) - (mean - centre.double())[:, :, None] * scale
        centre, scale, shift = (
            _along_row(values, rows, pixels_per_row, wide) for values in (centre[:, :, None], scale, shift)
        )
        for row, part in zip(down, parts, strict=True):
            z = out[batch, row : row + down.step]
            d = z if z.dtype == wide else strip[: part.shape[0], : part.shape[1]]
            # A subtraction of two dtypes would copy x into fresh memory first.
            torch.sub(part if part.dtype == wide else d.copy_(part), centre, out=d)
            F.silu(torch.addcmul(shift, d, scale, out=d), inplace=True)
            if d is not z:
                z.copy_(d)
    return y


def _pixels_per_row(x: Tensor) -> int:
    """Return the largest number of pixels of x that divides H * W and has at most ROW values, or 1."""
    pixels = x.shape[2] * x.shape[3]
    return next((count for count in range(ROW // x.shape[1], 1, -1) if pixels % count == 0), 1)


def _as_rows(x: Tensor, pixels_per_row: int) -> Tensor:
    """Return x [N, C, H, W] in channels_last seen as [N, rows, pixels_per_row * C]."""
    return x.permute(0, 2, 3, 1).view(x.shape[0], -1, pixels_per_row * x.shape[1])


def _strip_starts(rows: Tensor) -> tuple[range, range]:
    """Return the first images and the first rows of strips: several whole images, or a piece of one."""
    count, height, width = rows.shape
    images = range(0, count, min(count, max(1, STRIP // (height * width))))
    return images, range(0, height, min(height, max(1, STRIP // width)))


def _statistics(part: Tensor, groups: int, pixels_per_row: int, strip: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return mean and sum of squared deviations, fp64 [N, groups], and count of each group of rows [N, R, width].

    Sums are of x minus its mean in fp32, and correct that mean. For small images they are fp64: of few squares, one
    large and the rest tiny, each addition rounds.
    """
    exact = torch.float64 if part[0].numel() <= SMALL else strip.dtype
    d = strip[: part.shape[0], : part.shape[1]]
    x = part if part.dtype == d.dtype else d.copy_(part)
    centre = _by_group(x.mean(1), groups, pixels_per_row).mean((1, 3))  # [N, groups]
    torch.sub(x, _along_row(centre[:, :, None], part, pixels_per_row, d.dtype), out=d)
    sums = _by_group(d.sum(1, dtype=exact).double(), groups, pixels_per_row).sum((1, 3))
    squares = _by_group(d.square_().sum(1, dtype=exact).double(), groups, pixels_per_row).sum((1, 3))
    count = part.shape[1] * part.shape[2] // groups
    return centre.double() + sums / count, squares - sums * sums / count, count


def _merged(parts: list[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Return mean and variance [N, groups] of all parts: Chan, Golub and LeVeque 1983."""
    means, squares = (torch.stack(values) for values in list(zip(*parts, strict=True))[:2])
    counts = means.new_tensor([count for *_, count in parts]).view(-1, 1, 1)
    mean = (means * counts).sum(0) / counts.sum()
    squares = squares.sum(0) + ((means - mean).square() * counts).sum(0)
    return mean, squares.clamp_min(0) / counts.sum()


def _by_group(values: Tensor, groups: int, pixels_per_row: int) -> Tensor:
    """Return values [N, pixels_per_row * C] as [N, pixels_per_row, groups, C / groups]."""
    return values.view(values.shape[0], pixels_per_row, groups, -1)


def _along_row(values: Tensor, rows: Tensor, pixels_per_row: int, dtype: torch.dtype) -> Tensor:
    """Return values [N, groups, C / groups or 1] as [N, 1, width]: one for each value of a row of ``rows``."""
    count, groups, width = values.shape[0], values.shape[1], rows.shape[2]
    shape = count, pixels_per_row, groups, width // pixels_per_row // groups
    return values.to(dtype)[:, None].expand(shape).reshape(count, 1, width)
