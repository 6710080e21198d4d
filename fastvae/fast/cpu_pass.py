"""Blocks without a gradient on a CPU: C kernels where they are built, else torch's own operators; in channels_last.

Norms and the convolutions whose form is Winograd's are C (fastvae_kernels.cpu), other convolutions oneDNN's. Memory is
reused: the second norm of a residual block overwrites its input, the second convolution adds into the residual, and
nearest 2x with its convolution is one. At 256² on two cores (AVX512, AMX) page faults of fresh memory were a fifth of a
bf16 encode. torch's GroupNorm is not used: in channels_last its error in fp32 grows with the image and with mean over
deviation (docs/numerics.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from fastvae_kernels.cpu import group_norm, winograd
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastvae.fast import layer_checks
from fastvae.fast.forms.form import DIRECT_ONLY, Form, Forms
from fastvae.fast.layer_checks import Layer
from fastvae.fast.network_walk import Activation, Pass
from fastvae.fast.packed_weights import PackedWeights, channels_last, takes_onednn

# Values of one strip: 1 MB in fp32, half of an L2 cache.
STRIP = 2**18
# Values of one row of a strip: rows of several pixels make torch's inner loops long for a few channels too.
ROW = 2048
SMALL = 2**17
# oneDNN's convolutions fused with an addition, which torch.compile calls too.
ONEDNN: Any = torch.ops.mkldnn


class CpuPass(Pass):
    """One forward pass without a gradient. Every activation owns its memory; none has a pending bias."""

    differentiable = False

    def __init__(self, packed: PackedWeights, forms: Forms = DIRECT_ONLY):
        self.packed = packed
        self.forms = forms
        # Memory of what is inside a residual block, by dtype: of its normalised input and of its first convolution.
        self.inside: dict[tuple[str, torch.dtype], Tensor] = {}

    def begin(self, part: Layer, x: Tensor) -> Activation:
        return Activation(self._convolve(part.conv_in, channels_last(x)))

    def resnet(self, block: Layer, activation: Activation, pad: bool) -> Activation:
        x = activation.x
        h = group_norm_silu(block.norm1, x, into=self._memory("normalized", x, x.shape[1]))
        h = self._convolve(block.conv1, h, "convolved")
        h = group_norm_silu(block.norm2, h, into=h)
        shortcut = block.conv_shortcut
        residual = activation.x if shortcut is None else self._convolve(shortcut, activation.x)
        return Activation(self._add_convolved(block.conv2, h, residual))

    def attention(self, layer: Layer, activation: Activation, pad: bool) -> Activation:
        with ContiguousGroupNorm():
            return Activation(channels_last(layer(activation.x)))

    def downsample(self, sampler: Layer, activation: Activation) -> Activation:
        return Activation(self._convolve(sampler.conv, _padded(activation.x)))

    def upsample(self, sampler: Layer, activation: Activation) -> Activation:
        form = self._form(sampler.conv, activation.x, "upsample")
        if form is not Form.DIRECT:
            batch, _, height, width = activation.x.shape
            y = _empty(activation.x, batch, sampler.conv.out_channels, 2 * height, 2 * width)
            return Activation(self._winograd(sampler.conv, activation.x, form, y))
        return Activation(F.conv_transpose2d(activation.x, self.packed.upsample(sampler.conv), sampler.conv.bias, 2, 1))

    def as_module(self, module: Layer, activation: Activation) -> Activation:
        # A copy: a hook may keep the module's output, and the next block writes into it.
        with ContiguousGroupNorm():
            y = layer_checks.as_module(module, activation.x)
        return Activation(y.clone(memory_format=torch.channels_last))

    def end(self, part: Layer, activation: Activation) -> Tensor:
        if activation.x.requires_grad:
            with ContiguousGroupNorm():
                return part.conv_out(part.conv_act(part.conv_norm_out(activation.x)))
        return self._convolve(part.conv_out, group_norm_silu(part.conv_norm_out, activation.x, into=activation.x))

    def _memory(self, name: str, x: Tensor, channels: int) -> Tensor:
        """Return memory [N, channels, H, W] in channels_last for what the next block overwrites."""
        batch, _, height, width = x.shape
        size, place = batch * height * width * channels, (name, x.dtype)
        if place not in self.inside or self.inside[place].numel() < size:
            self.inside[place] = x.new_empty(size)
        return self.inside[place][:size].view(batch, height, width, channels).permute(0, 3, 1, 2)

    def _form(self, conv: Layer, x: Tensor, kind: str = "conv") -> Form:
        """Return the form of a 3x3 convolution of x; the direct one where the C kernels cannot compute another."""
        if conv.kernel_size != (3, 3) or conv.stride != (1, 1) or x.shape[0] == 0 or not winograd.takes(conv.weight):
            return Form.DIRECT
        pixels = x.shape[2] * x.shape[3] * (4 if kind == "upsample" else 1)
        return self.forms.of(conv.weight, pixels, kind)

    def _winograd(self, conv: Layer, x: Tensor, form: Form, y: Tensor, residual: Tensor | None = None) -> Tensor:
        return winograd.convolve(x, self.packed.winograd_on_cpu(conv, form), conv.bias, form, y, residual)

    def _convolve(self, conv: Layer, x: Tensor, name: str = "") -> Tensor:
        """Return conv(x), in the memory of this name where the form can write there."""
        form = self._form(conv, x)
        if form is not Form.DIRECT:
            size = x.shape[0], conv.out_channels, *x.shape[2:]
            y = self._memory(name, x, conv.out_channels) if name else _empty(x, *size)
            return self._winograd(conv, x, form, y)
        weight = self.packed.onednn_weight(conv, x.shape)
        if not weight.is_mkldnn:
            y = F.conv2d(x, weight, conv.bias, conv.stride, conv.padding)
        else:
            y = ONEDNN._convolution_pointwise(x, weight, _bias(conv), *_geometry(conv), "none", [], None)
        return channels_last(y)  # images of one colour have both layouts, and torch takes the other one

    def _add_convolved(self, conv: Layer, x: Tensor, y: Tensor) -> Tensor:
        """Return y + conv(x), in the memory of one of them."""
        form = self._form(conv, x)
        if form is not Form.DIRECT:
            return self._winograd(conv, x, form, y, residual=y)
        if not takes_onednn(conv.weight):
            return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding).add_(y)
        given = x, self.packed.onednn_weight(conv, x.shape), _bias(conv), *_geometry(conv)
        return ONEDNN._convolution_pointwise_.binary(y, *given, "add", None, None, [], None)


class ContiguousGroupNorm(TorchFunctionMode):
    """Context in which torch's GroupNorm reads its input as NCHW, where it has full accuracy on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.group_norm:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


def group_norm_silu(norm: Layer, x: Tensor, into: Tensor) -> Tensor:
    """Return silu(norm(x)) for x [N, C, H, W] in channels_last and a GroupNorm.

    into: memory for it, which may be x's own; without the C kernel a small result has its own.
    """
    if group_norm.takes(x):
        return group_norm.group_norm_silu(x, into, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return _group_norm_silu_in_torch(norm, x, into)


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


def _padded(x: Tensor) -> Tensor:
    """Return x with a row of zeros below and a column to the right. F.pad would write zeros everywhere first."""
    batch, channels, height, width = x.shape
    y = _empty(x, batch, channels, height + 1, width + 1)
    y[:, :, :height, :width] = x
    y[:, :, height] = 0
    y[:, :, :, width] = 0
    return y


def _empty(x: Tensor, *size: int) -> Tensor:
    """Return memory of this size in channels_last, for values of x's dtype. Defaults of torch do not matter."""
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _bias(conv: Layer) -> Tensor | None:
    # oneDNN reads a bias as contiguous, past its end if it is not. F.conv2d handles that, these operators do not.
    return None if conv.bias is None else conv.bias.contiguous()


def _geometry(conv: Layer) -> tuple[list[int], list[int], list[int], int]:
    return list(conv.padding), list(conv.stride), [1, 1], 1
