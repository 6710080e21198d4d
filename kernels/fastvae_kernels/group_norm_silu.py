"""GroupNorm with SiLU, or without: y = act((x - mean_g) * inverse_g * weight_c + bias_c), x [N, C, H, W] channels_last.

Forward: x read twice and y written once; read once if the producer of x wrote its partials. Backward: x and dy read
twice, dx written once. With dz = dy act'(z) and n the normalised x, one pass writes the sums of dz and dz n for each
chunk and channel (fp32, no atomics). They are dbias and dweight; weighted and averaged over the group they give
dx = inverse (weight dz - average(weight dz) - n average(weight dz n)). Source: torch.nn.GroupNorm.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae_kernels.parts.group_norm_gradient import count_launches, gradients
from fastvae_kernels.parts.group_norm_tiles import load_vectors, pointwise
from fastvae_kernels.shared import statistics, tiles
from fastvae_kernels.shared.ops import differentiate, fake, kernel, op
from fastvae_kernels.shared.runtime import Cost, size_in_bytes, tl, triton


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool = True, conv_bias: Tensor | None = None
) -> Tensor:
    _check(x, weight, bias, groups, conv_bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.group_norm(_added(x, conv_bias), groups, weight.to(wide), bias.to(wide), eps)
    return statistics.same_layout((F.silu(y) if silu else y).to(x.dtype))


def _added(x: Tensor, conv_bias: Tensor | None) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if conv_bias is None else x + conv_bias.to(x.dtype)[:, None, None]


def moments_reference(x: Tensor, groups: int, eps: float, conv_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (mean, 1 / deviation) [N, groups] of x + conv_bias."""
    batch, channels, height, width = x.shape
    values = _added(x, conv_bias).reshape(batch, groups, channels // groups * height * width)
    if batch == 0:
        return values.new_empty(0, groups), values.new_empty(0, groups)
    variance, mean = torch.var_mean(values, dim=2, correction=0)
    return mean, (variance + eps).rsqrt()


def backward_reference(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, silu: bool,
    conv_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, channels = x.shape[:2]
    groups = mean.shape[1]
    grouped = (batch, groups, channels // groups, *x.shape[2:])
    mean, inverse = mean[:, :, None, None, None], inverse[:, :, None, None, None]
    normalized = ((_added(x, conv_bias).reshape(grouped) - mean) * inverse).reshape(x.shape)
    weight_, bias_ = (vector.to(mean.dtype)[:, None, None] for vector in (weight, bias))
    dz = dy.to(mean.dtype)
    if silu:
        z = normalized * weight_ + bias_
        opened = z.sigmoid()
        dz = dz * opened * (1 + z * (1 - opened))
    pulled, normalized_ = (dz * weight_).reshape(grouped), normalized.reshape(grouped)
    average = pulled.mean((2, 3, 4), keepdim=True)
    along = (pulled * normalized_).mean((2, 3, 4), keepdim=True)
    dx = (inverse * (pulled - average - normalized_ * along)).reshape(x.shape)
    sums = (dz * normalized).sum((0, 2, 3)), dz.sum((0, 2, 3))
    dconv_bias = weight.new_empty(0) if conv_bias is None else dx.sum((0, 2, 3)).to(conv_bias.dtype)
    return statistics.same_layout(dx.to(x.dtype)), sums[0].to(weight.dtype), sums[1].to(bias.dtype), dconv_bias


def cost(x: Tensor, weight: Tensor, bias: Tensor, *, measured: bool = False) -> Cost:
    """Return the cost: x read twice (once where the statistics are ``measured`` already), y written."""
    vectors = size_in_bytes(weight, bias)
    return Cost((2 if measured else 3) * size_in_bytes(x) + vectors, (6 if measured else 11) * x.numel(), 3 - measured)


def backward_cost(x: Tensor, weight: Tensor, bias: Tensor) -> Cost:
    """Return the cost: x and dy read twice, dx written, and the gradients of weight and bias."""
    return Cost(5 * size_in_bytes(x) + 2 * size_in_bytes(weight, bias), 30 * x.numel(), count_launches(x))


def _check(x: Tensor, weight: Tensor, bias: Tensor, groups: int, conv_bias: Tensor | None) -> None:
    statistics.check_image("x", x)
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups must divide the {x.shape[1]} channels of x, got {groups}")
    statistics.check_vector("weight", weight, x.shape[1])
    statistics.check_vector("bias", bias, x.shape[1])
    statistics.check_vector("conv_bias", conv_bias, x.shape[1])


@triton.jit(do_not_specialize=["chunks", "eps"])
def _moments_kernel(
    partials_ptr, conv_bias_ptr, mean_ptr, inverse_ptr, chunks, eps,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    image, group = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
    mean, inverse, _ = statistics.group_moments(
        partials_ptr, conv_bias_ptr, 1.0, image, group, chunks, eps, CHANNELS, CHANNELS // GROUPS, COLUMNS, STEP
    )
    tl.store(mean_ptr + tl.program_id(0), mean)
    tl.store(inverse_ptr + tl.program_id(0), inverse)


@triton.jit(do_not_specialize=["pixels", "chunks"])
def _normalize_kernel(
    x_ptr, weight_ptr, bias_ptr, conv_bias_ptr, mean_ptr, inverse_ptr, y_ptr, pixels, chunks,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Last pixels first, as in group_norm.py: the L2 cache still holds the end of x.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    image, chunk, block = statistics.locate(program, chunks, tl.cdiv(CHANNELS, COLUMNS))
    channel = block * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    weight, bias, added, mean, inverse = load_vectors(
        weight_ptr, bias_ptr, conv_bias_ptr, mean_ptr, inverse_ptr, image, channel, CHANNELS, GROUPS
    )
    row = tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    inside = (row < statistics.rows_inside(chunk, pixels, ROWS)) & (channel < CHANNELS)
    place = statistics.first_value(image, pixels, chunk * ROWS, CHANNELS) + row * CHANNELS + channel
    y = (tl.load(x_ptr + place, inside, 0.0).to(tl.float32) + added - mean) * inverse * weight + bias
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), inside)


@op
def group_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, partials: Tensor | None = None,
    conv_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (y, mean, inverse); the backward pass needs mean and inverse [N, groups]."""
    statistics.check_partials(partials, x)
    y = reference(x, weight, bias, groups, eps, silu, conv_bias)
    return y, *moments_reference(x, groups, eps, conv_bias)


@kernel(group_norm_forward)
def launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, partials: Tensor | None = None,
    conv_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check(x, weight, bias, groups, conv_bias)
    statistics.check_partials(partials, x)
    statistics.check_kernel_dtype("x", x)
    batch, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = weight.contiguous(), bias.contiguous()
    conv_bias = None if conv_bias is None else conv_bias.contiguous()
    folded = statistics.fold_chunks(statistics.measure(x) if partials is None else partials.contiguous())
    y = statistics.new_channels_last(batch, channels, height, width, like=x)
    mean, inverse = folded.new_empty(batch, groups), folded.new_empty(batch, groups)
    if batch:
        columns, step = statistics.group_block(channels // groups)
        # 4 warps spill 8 bytes on sm_90 under Triton 3.9 where a group has 2048 channels; 1 spills 280 and more.
        _moments_kernel[(batch * groups,)](
            folded, conv_bias, mean, inverse, folded.shape[1], eps,
            CHANNELS=channels, GROUPS=groups, COLUMNS=columns, STEP=step, num_warps=8, num_stages=1,
        )  # fmt: skip
        grid, tile = pointwise("scale_shift", x)
        _normalize_kernel[grid](
            x, weight, bias, conv_bias, mean, inverse, y, height * width, GROUPS=groups, SILU=silu, **tile
        )
    return y, mean, inverse


@fake(group_norm_forward)
def _(x, weight, bias, groups, eps, silu, partials=None, conv_bias=None):
    _check(x, weight, bias, groups, conv_bias)
    statistics.check_partials(partials, x)
    moments = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, inverse = (x.new_empty(x.shape[0], groups, dtype=moments) for _ in range(2))
    return statistics.new_channels_last(*x.shape, like=x), mean, inverse


@op
def group_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, silu: bool,
    conv_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dx, dweight, dbias, dconv_bias), the last empty where there is no conv_bias."""
    return backward_reference(dy, x, weight, bias, mean, inverse, silu, conv_bias)


@kernel(group_norm_backward)
def launch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, silu: bool,
    conv_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return gradients(dy, x, weight, bias, mean, inverse, silu, conv_bias)


@fake(group_norm_backward)
def _(dy, x, weight, bias, mean, inverse, silu, conv_bias=None):
    vectors = (torch.empty_like(v) for v in (weight, bias, weight[:0] if conv_bias is None else conv_bias))
    return statistics.new_channels_last(*x.shape, like=x), *vectors


def _keep(ctx, inputs, output):
    x, weight, bias, _, _, ctx.silu, _, conv_bias = inputs
    _, mean, inverse = output
    ctx.mark_non_differentiable(mean, inverse)
    ctx.save_for_backward(x, weight, bias, mean, inverse, conv_bias)


def _backward(ctx, dy, dmean, dinverse):
    *saved, conv_bias = ctx.saved_tensors
    dx, dweight, dbias, dconv_bias = group_norm_backward(dy, *saved, ctx.silu, conv_bias)
    return dx, dweight, dbias, None, None, None, None, None if conv_bias is None else dconv_bias


differentiate(group_norm_forward, _backward, _keep)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, partials: Tensor | None = None,
    conv_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return silu(GroupNorm(x + conv_bias)) in channels_last, differentiable in x, weight, bias and conv_bias.

    x: [N, C, H, W] in any strides. weight, bias: [C] in any floating dtype. conv_bias: [C], of the convolution that
    made x: added here, it costs no pass over x, and neither does its gradient. partials: written by the producer of x
    (without conv_bias), they save a pass over x. Raises ValueError where shapes do not match.
    """
    return group_norm_forward(x, weight, bias, groups, eps, True, _detached(partials), conv_bias)[0]


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, partials: Tensor | None = None
) -> Tensor:
    """Return GroupNorm(x) without an activation; otherwise as group_norm_silu."""
    return group_norm_forward(x, weight, bias, groups, eps, False, _detached(partials))[0]


def _detached(partials: Tensor | None) -> Tensor | None:
    # The gradient of x already goes through its statistics, wherever they were computed.
    return None if partials is None else partials.detach()


def audit_cases():
    """Yield (name, call) of launches for the compile audit (bench/kernels/audit.py)."""

    def case(dtype, channels, groups):
        # So many chunks that their sums are folded.
        shape = 2, channels, statistics.MERGED + 1, statistics.chunk_pixels(channels)
        x = statistics.new_channels_last(*shape, like=torch.empty(0, dtype=dtype))
        weight = torch.empty(channels, dtype=dtype)
        y, mean, inverse = launch_forward(x, weight, weight, groups, 1e-6, True, statistics.new_partials(x))
        launch_backward(y, x, weight, weight, mean, inverse, True)
        launch_forward(x, weight, weight, groups, 1e-6, True, None, weight)
        launch_backward(y, x, weight, weight, mean, inverse, True, weight)

    for name, dtype, channels in tiles.audited():
        yield name, functools.partial(case, dtype, channels, math.gcd(32, channels))
    # As many channels as one program merges in practice.
    yield "float16 C=2048 in one group", functools.partial(case, torch.float16, 2048, 1)
