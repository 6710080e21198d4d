"""GroupNorm in pieces: act((x - mean) / deviation * weight + bias) as act(x * scale + shift), x in channels_last.

group_norm_statistics reads x once, unless the producer of x wrote the partials; group_norm_affine turns partials into
fp32 (scale, shift) [N, C], a few kilobytes; scale_shift and scale_shift_silu read x once and write y once.
The affine takes the bias of the convolution that made x: statistics and x are those without it, and it costs no pass.
These have no gradient: scale and shift serve the inference pass, which needs neither mean nor deviation. The training
pass takes group_norm_silu.py, whose gradient reads mean and 1 / deviation.
Source: torch.nn.GroupNorm; statistics.py has the layout of the partials.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae_kernels.shared import statistics, tiles
from fastvae_kernels.shared.ops import fake, kernel, op
from fastvae_kernels.shared.runtime import Cost, size_in_bytes, tl, triton


def statistics_reference(x: Tensor) -> Tensor:
    statistics.check_image("x", x)
    return statistics.reference(x)


def affine_reference(
    partials: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    conv_bias: Tensor | None = None,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    _check_affine(partials, weight, bias, groups, conv_bias)
    batch, _, _, channels = partials.shape
    added = torch.zeros_like(weight) if conv_bias is None else conv_bias
    weight, bias, added = (vector.to(partials.dtype) for vector in (weight, bias, added))
    added, eps = added * factor, eps * factor**2
    count, mean, deviations = statistics.merged_reference(partials, (1,))  # [N, 1, C]
    grouped = torch.stack([count, mean + added, deviations], dim=-2)
    grouped = grouped.view(batch, 3, groups, channels // groups).transpose(1, 2)
    count, mean, deviations = statistics.merged_reference(grouped, (-1,))  # [N, groups, 1]
    deviation = (deviations / count + eps).sqrt().expand(batch, groups, channels // groups).reshape(batch, channels)
    mean = mean.expand(batch, groups, channels // groups).reshape(batch, channels)
    scale = weight / deviation
    return scale, torch.addcmul(bias.expand_as(scale), added - mean, scale)


def scale_shift_reference(x: Tensor, scale: Tensor, shift: Tensor, factor: float = 1.0) -> Tensor:
    _check_scale_shift(x, scale, shift)
    y = torch.addcmul(shift[:, :, None, None], x.to(scale.dtype), scale[:, :, None, None])
    return statistics.same_layout((y * factor).to(x.dtype))


def scale_shift_silu_reference(x: Tensor, scale: Tensor, shift: Tensor, factor: float = 1.0) -> Tensor:
    _check_scale_shift(x, scale, shift)
    y = torch.addcmul(shift[:, :, None, None], x.to(scale.dtype), scale[:, :, None, None])
    return statistics.same_layout((F.silu(y) * factor).to(x.dtype))


def statistics_cost(x: Tensor) -> Cost:
    """Return the cost: x read, partials written."""
    return Cost(size_in_bytes(x, statistics.new_partials(x.to("meta"))), 5 * x.numel(), 1)


def affine_cost(partials: Tensor, weight: Tensor, bias: Tensor, conv_bias: Tensor | None = None) -> Cost:
    """Return the cost: partials and vectors read, scale and shift written, and the folds of more than MERGED chunks."""
    batch, chunks, _, channels = partials.shape
    total, launches = size_in_bytes(partials, weight, bias, conv_bias) + 8 * batch * channels, 1
    while chunks > statistics.MERGED:
        chunks = -(-chunks // statistics.FOLD)
        total, launches = total + 2 * 12 * batch * chunks * channels, launches + 1
    return Cost(total, 8 * partials.numel() // 3, launches)


def scale_shift_cost(x: Tensor, scale: Tensor, shift: Tensor) -> Cost:
    """Return the cost of scale_shift and scale_shift_silu: x read, y written."""
    return Cost(2 * size_in_bytes(x) + size_in_bytes(scale, shift), 2 * x.numel(), 1)


def _check_affine(partials: Tensor, weight: Tensor, bias: Tensor, groups: int, conv_bias: Tensor | None) -> None:
    if partials.ndim != 4 or partials.shape[2] != 3 or partials.shape[1] == 0:
        raise ValueError(f"partials must be [N, chunks, 3, C], got shape {tuple(partials.shape)}")
    channels = partials.shape[3]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels, got {groups}")
    for name, vector in (("weight", weight), ("bias", bias), ("conv_bias", conv_bias)):
        statistics.check_vector(name, vector, channels)


def _check_scale_shift(x: Tensor, scale: Tensor, shift: Tensor) -> None:
    statistics.check_image("x", x)
    for name, value in (("scale", scale), ("shift", shift)):
        if value.shape != x.shape[:2]:
            raise ValueError(f"{name} must be [N, C] = {tuple(x.shape[:2])}, got shape {tuple(value.shape)}")
        if value.dtype != (torch.float64 if x.dtype == torch.float64 else torch.float32):
            raise ValueError(f"{name} must be float32, got {value.dtype}")


@triton.jit(do_not_specialize=["chunks", "eps", "factor"])
def _affine_kernel(
    partials_ptr, weight_ptr, bias_ptr, conv_bias_ptr, scale_ptr, shift_ptr, chunks, eps, factor,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    PER_GROUP: tl.constexpr = CHANNELS // GROUPS
    image, group = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
    index = tl.arange(0, COLUMNS)
    channel, inside = group * PER_GROUP + index, index < PER_GROUP
    mean, inverse, added = statistics.group_moments(
        partials_ptr, conv_bias_ptr, factor, image, group, chunks, eps, CHANNELS, PER_GROUP, COLUMNS, STEP
    )
    scale = tl.load(weight_ptr + channel, inside, 0.0).to(tl.float32) * inverse
    shift = tl.fma(added - mean, scale, tl.load(bias_ptr + channel, inside, 0.0).to(tl.float32))
    tl.store(scale_ptr + image * CHANNELS + channel, scale, inside)
    tl.store(shift_ptr + image * CHANNELS + channel, shift, inside)


@triton.jit(do_not_specialize=["pixels", "chunks", "factor"])
def _scale_shift_kernel(
    x_ptr, scale_ptr, shift_ptr, y_ptr, pixels, chunks, factor,
    CHANNELS: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Last pixels first: the L2 cache still holds the end of x, and the convolution after this kernel begins at the
    # start of y. Predicted to save 3 to 8 % on an H200 at 512², batch 8; not measured.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    image, chunk, block = statistics.locate(program, chunks, tl.cdiv(CHANNELS, COLUMNS))
    channel = block * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    row = tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    inside = (row < statistics.rows_inside(chunk, pixels, ROWS)) & (channel < CHANNELS)
    first = statistics.first_value(image, pixels, chunk * ROWS, CHANNELS)
    scale = tl.load(scale_ptr + image * CHANNELS + channel, channel < CHANNELS, 0.0)
    shift = tl.load(shift_ptr + image * CHANNELS + channel, channel < CHANNELS, 0.0)
    x = tl.load(x_ptr + first + row * CHANNELS + channel, inside, 0.0).to(tl.float32)
    y = tl.fma(x, tl.broadcast_to(scale[None, :], x.shape), tl.broadcast_to(shift[None, :], x.shape))
    if SILU:
        y = y * tl.sigmoid(y)
    y *= factor
    tl.store(y_ptr + first + row * CHANNELS + channel, y.to(y_ptr.dtype.element_ty), inside)


@op
def group_norm_statistics(x: Tensor) -> Tensor:
    """Return partial statistics of x [N, C, H, W], fp32 [N, chunks, 3, C] (statistics.py), or raise ValueError."""
    return statistics_reference(x)


@kernel(group_norm_statistics)
def launch_statistics(x: Tensor) -> Tensor:
    statistics.check_image("x", x)
    statistics.check_kernel_dtype("x", x)
    return statistics.measure(x.contiguous(memory_format=torch.channels_last))


@fake(group_norm_statistics)
def _(x: Tensor) -> Tensor:
    statistics.check_image("x", x)
    return statistics.new_partials(x)


@op
def group_norm_affine(
    partials: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    conv_bias: Tensor | None = None,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return fp32 (scale, shift) [N, C] such that x * scale + shift is GroupNorm of x / factor + conv_bias.

    partials: those of x without conv_bias. weight, bias, conv_bias: [C] in any floating dtype. factor: the
    positive number that the stored x is multiplied by. Raises ValueError where shapes do not match.
    """
    return affine_reference(partials, weight, bias, groups, eps, conv_bias, factor)


@kernel(group_norm_affine)
def launch_affine(
    partials: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    conv_bias: Tensor | None = None,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    _check_affine(partials, weight, bias, groups, conv_bias)
    batch, _, _, channels = partials.shape
    scale, shift = partials.new_empty(batch, channels), partials.new_empty(batch, channels)
    if batch:
        folded = statistics.fold_chunks(partials.contiguous())
        columns, step = statistics.group_block(channels // groups)
        _affine_kernel[(batch * groups,)](
            folded, weight.contiguous(), bias.contiguous(), None if conv_bias is None else conv_bias.contiguous(),
            scale, shift, folded.shape[1], eps * factor**2, factor,
            CHANNELS=channels, GROUPS=groups, COLUMNS=columns, STEP=step, num_warps=8, num_stages=1,
        )  # fmt: skip
    return scale, shift


@fake(group_norm_affine)
def _(partials, weight, bias, groups, eps, conv_bias=None, factor=1.0):
    _check_affine(partials, weight, bias, groups, conv_bias)
    batch, _, _, channels = partials.shape
    return partials.new_empty(batch, channels), partials.new_empty(batch, channels)


def _launch(x: Tensor, scale: Tensor, shift: Tensor, factor: float, silu: bool) -> Tensor:
    _check_scale_shift(x, scale, shift)
    statistics.check_kernel_dtype("x", x)
    batch, channels, height, width = x.shape
    y = statistics.new_channels_last(batch, channels, height, width, like=x)
    if batch:
        tile = tiles.choose("scale_shift", dtype=x.dtype, channels=channels, target=tiles.target_of(x.device))
        columns = statistics.block_columns(tile.columns, channels)
        chunks = triton.cdiv(height * width, tile.rows)
        _scale_shift_kernel[(batch * chunks * triton.cdiv(channels, columns),)](
            x.contiguous(memory_format=torch.channels_last), scale.contiguous(), shift.contiguous(), y,
            height * width, chunks, factor, CHANNELS=channels, SILU=silu, ROWS=tile.rows, COLUMNS=columns,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return y


@op
def scale_shift(x: Tensor, scale: Tensor, shift: Tensor, factor: float = 1.0) -> Tensor:
    """Return (x * scale + shift) * factor in channels_last, rounded once; x [N, C, H, W], fp32 scale, shift [N, C].

    factor: the power of two that the stream after the next product is multiplied by. Raises ValueError for others.
    """
    return scale_shift_reference(x, scale, shift, factor)


@kernel(scale_shift)
def launch_scale_shift(x: Tensor, scale: Tensor, shift: Tensor, factor: float = 1.0) -> Tensor:
    return _launch(x, scale, shift, factor, silu=False)


@op
def scale_shift_silu(x: Tensor, scale: Tensor, shift: Tensor, factor: float = 1.0) -> Tensor:
    """Return silu(x * scale + shift) * factor in channels_last, rounded once; otherwise as scale_shift."""
    return scale_shift_silu_reference(x, scale, shift, factor)


@kernel(scale_shift_silu)
def launch_scale_shift_silu(x: Tensor, scale: Tensor, shift: Tensor, factor: float = 1.0) -> Tensor:
    return _launch(x, scale, shift, factor, silu=True)


@fake(scale_shift)
def _(x, scale, shift, factor=1.0):
    _check_scale_shift(x, scale, shift)
    return statistics.new_channels_last(*x.shape, like=x)


@fake(scale_shift_silu)
def _(x, scale, shift, factor=1.0):
    _check_scale_shift(x, scale, shift)
    return statistics.new_channels_last(*x.shape, like=x)


def audit_cases():
    """Yield (name, call) of launches for the compile audit (bench/kernels/audit.py)."""
    for name, dtype, channels in tiles.audited():

        def call(dtype=dtype, channels=channels):
            x = statistics.new_channels_last(2, channels, 96, 96, like=torch.empty(0, dtype=dtype))
            weight, groups = torch.empty(channels, dtype=dtype), math.gcd(32, channels)
            scale, shift = launch_affine(launch_statistics(x), weight, weight, groups, 1e-6, weight)
            launch_affine(torch.empty(1, 2000, 3, channels), weight, weight, groups, 1e-6)
            launch_scale_shift(x, scale, shift)
            launch_scale_shift_silu(x, scale, shift, 0.5)

        yield name, call

    def widest():
        weight = torch.empty(2048, dtype=torch.float16)
        launch_affine(torch.empty(1, 9, 3, 2048), weight, weight, 1, 1e-6, weight)

    yield "float16 C=2048 in one group", widest
