"""The gradients of GroupNorm with SiLU, or without: dx, dweight, dbias, for x [N, C, H, W] channels_last.

With dz = dy act'(z) and n the normalised x, one pass writes the sums of dz and dz n for each chunk and channel in fp32,
without atomics; folded they are dbias and dweight, and weighted and averaged over a group they give
dx = inverse (weight dz - average(weight dz) - n average(weight dz n)) in a second pass.
Traffic: x and dy read twice, dx written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae_kernels.parts.group_norm_tiles import load_vectors, pointwise
from fastvae_kernels.shared import statistics
from fastvae_kernels.shared.runtime import tl, triton


@triton.jit
def _pull_back(dy, normalized, weight, bias, SILU: tl.constexpr):
    """Return dz, the gradient before the activation."""
    if SILU:
        z = normalized * weight + bias
        opened = tl.sigmoid(z)
        dy = dy * opened * (1.0 + z * (1.0 - opened))
    return dy


@triton.jit(do_not_specialize=["pixels", "chunks"])
def _gradient_sums_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, inverse_ptr, sums_ptr, pixels, chunks,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, SILU: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    image, chunk, block = statistics.locate(tl.program_id(0), chunks, tl.cdiv(CHANNELS, COLUMNS))
    channel = block * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    weight, bias, mean, inverse = load_vectors(
        weight_ptr, bias_ptr, mean_ptr, inverse_ptr, image, channel, CHANNELS, GROUPS
    )
    row = tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    rows = statistics.rows_inside(chunk, pixels, CHUNK)
    first = statistics.first_value(image, pixels, chunk * CHUNK, CHANNELS)
    plain = tl.zeros([COLUMNS], tl.float32)
    along = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, rows, ROWS):
        inside = (start + row < rows) & (channel < CHANNELS)
        place = first + (start + row) * CHANNELS + channel
        normalized = (tl.load(x_ptr + place, inside, 0.0).to(tl.float32) - mean) * inverse
        # dy is 0 outside, and so are both products.
        dz = _pull_back(tl.load(dy_ptr + place, inside, 0.0).to(tl.float32), normalized, weight, bias, SILU)
        plain += tl.sum(dz, axis=0)
        along += tl.sum(dz * normalized, axis=0)
    target = sums_ptr + (image * chunks + chunk) * 2 * CHANNELS + channel
    tl.store(target, plain, channel < CHANNELS)
    tl.store(target + CHANNELS, along, channel < CHANNELS)


@triton.jit(do_not_specialize=["chunks", "folded"])
def _fold_sums_kernel(
    sums_ptr, folded_ptr, chunks, folded, VALUES: tl.constexpr, FOLD: tl.constexpr, COLUMNS: tl.constexpr
):
    image, target, block = statistics.locate(tl.program_id(0), folded, tl.cdiv(VALUES, COLUMNS))
    index = block * COLUMNS + tl.arange(0, COLUMNS)
    chunk = target * FOLD + tl.arange(0, FOLD)[:, None]
    inside = (chunk < chunks) & (index < VALUES)
    total = tl.sum(tl.load(sums_ptr + (image * chunks + chunk) * VALUES + index, inside, 0.0), axis=0)
    tl.store(folded_ptr + (image * folded + target) * VALUES + index, total, index < VALUES)


@triton.jit(do_not_specialize=["pixels", "chunks"])
def _input_gradient_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, inverse_ptr, sums_ptr, dx_ptr, pixels, chunks,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    MEMBERS: tl.constexpr,
):  # fmt: skip
    image, chunk, block = statistics.locate(tl.program_id(0), chunks, tl.cdiv(CHANNELS, COLUMNS))
    channel = block * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    weight, bias, mean, inverse = load_vectors(
        weight_ptr, bias_ptr, mean_ptr, inverse_ptr, image, channel, CHANNELS, GROUPS
    )
    # Every column sums the channels of its group: MEMBERS cached loads, and groups may straddle blocks.
    average = tl.zeros([COLUMNS], tl.float32)
    along = tl.zeros([COLUMNS], tl.float32)
    for index in range(MEMBERS):
        member = channel // MEMBERS * MEMBERS + index
        member_weight = tl.load(weight_ptr + member, channel < CHANNELS, 0.0).to(tl.float32)
        sums = sums_ptr + image * 2 * CHANNELS + member
        average += tl.load(sums, channel < CHANNELS, 0.0) * member_weight
        along += tl.load(sums + CHANNELS, channel < CHANNELS, 0.0) * member_weight
    members = pixels.to(tl.float32) * MEMBERS
    average, along = (average / members)[None, :], (along / members)[None, :]
    row = tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    inside = (row < statistics.rows_inside(chunk, pixels, ROWS)) & (channel < CHANNELS)
    place = statistics.first_value(image, pixels, chunk * ROWS, CHANNELS) + row * CHANNELS + channel
    normalized = (tl.load(x_ptr + place, inside, 0.0).to(tl.float32) - mean) * inverse
    dz = _pull_back(tl.load(dy_ptr + place, inside, 0.0).to(tl.float32), normalized, weight, bias, SILU)
    dx = inverse * (weight * dz - average - normalized * along)
    tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), inside)


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dweight, dbias) from the gradient of y and the forward pass's mean and inverse [N, groups]."""
    batch, channels, height, width = x.shape
    groups = mean.shape[1]
    dx = statistics.new_channels_last(batch, channels, height, width, like=x)
    if not batch:
        return dx, torch.zeros_like(weight), torch.zeros_like(bias)
    x, dy = (value.contiguous(memory_format=torch.channels_last) for value in (x, dy))
    saved = [value.contiguous() for value in (weight, bias, mean, inverse)]
    grid, tile = pointwise("group_norm_gradient", x)
    chunk, chunks = statistics.chunk_pixels(channels), statistics.chunk_count(height * width, channels)
    sums = mean.new_empty(batch, chunks, 2, channels)
    per_chunk = tile | {"chunks": chunks, "CHUNK": chunk, "ROWS": min(tile["ROWS"], chunk)}
    _gradient_sums_kernel[(batch * chunks * triton.cdiv(channels, tile["COLUMNS"]),)](
        dy, x, *saved, sums, height * width, GROUPS=groups, SILU=silu, **per_chunk
    )
    while chunks > 1:
        folded = mean.new_empty(batch, triton.cdiv(chunks, statistics.FOLD), 2, channels)
        columns = statistics.block_columns(64, 2 * channels)
        _fold_sums_kernel[(batch * folded.shape[1] * triton.cdiv(2 * channels, columns),)](
            sums, folded, chunks, folded.shape[1],
            VALUES=2 * channels, FOLD=statistics.FOLD, COLUMNS=columns, num_warps=4, num_stages=1,
        )  # fmt: skip
        sums, chunks = folded, folded.shape[1]
    _input_gradient_kernel[grid](
        dy, x, *saved, sums, dx, height * width, GROUPS=groups, SILU=silu, MEMBERS=channels // groups, **tile
    )
    # Two sums in two tensors: outputs of an op may not share memory.
    plain, along = sums.squeeze(1).unbind(1)
    return dx, along.sum(0).to(weight.dtype), plain.sum(0).to(bias.dtype)
