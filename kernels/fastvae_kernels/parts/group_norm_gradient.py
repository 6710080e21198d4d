"""The gradients of GroupNorm with SiLU, or without: dx, dweight, dbias, dconv_bias, for x [N, C, H, W] channels_last.

With dz = dy act'(z) and n the normalised x + conv_bias, one pass writes the sums of dz, dz n and n for each chunk and
channel in fp32, without atomics. Merged, the first two are dbias and dweight, and weighted and averaged over a group
they give dx = inverse (weight dz - average(weight dz) - n average(weight dz n)) in a second pass. dconv_bias is the
sum of dx, which follows from the three sums.
Traffic: x and dy read twice, dx written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae_kernels.parts.group_norm_tiles import load_of_group, load_vectors, pointwise
from fastvae_kernels.shared import statistics, tiles
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
    dy_ptr, x_ptr, weight_ptr, bias_ptr, conv_bias_ptr, mean_ptr, inverse_ptr, sums_ptr, pixels, chunks,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, SILU: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    image, chunk, block = statistics.locate(tl.program_id(0), chunks, tl.cdiv(CHANNELS, COLUMNS))
    channel = block * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    weight, bias, added, mean, inverse = load_vectors(
        weight_ptr, bias_ptr, conv_bias_ptr, mean_ptr, inverse_ptr, image, channel, CHANNELS, GROUPS
    )
    row = tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    rows = statistics.rows_inside(chunk, pixels, CHUNK)
    place = statistics.first_value(image, pixels, chunk * CHUNK, CHANNELS) + row * CHANNELS + channel
    # As in statistics.take, each element of the tile has its own sums, so that no step waits for other threads; as in
    # the statistics pass, the next rows are on their way while these are added.
    plain = tl.zeros([ROWS, COLUMNS], tl.float32)
    along, normal = plain, plain
    inside = (row < rows) & (channel < CHANNELS)
    x, dy = tl.load(x_ptr + place, inside, 0.0), tl.load(dy_ptr + place, inside, 0.0)
    for start in range(0, rows, ROWS):
        inside = (start + row < rows) & (channel < CHANNELS)
        later = (start + ROWS + row < rows) & (channel < CHANNELS)
        place += ROWS * CHANNELS
        next_x, next_dy = tl.load(x_ptr + place, later, 0.0), tl.load(dy_ptr + place, later, 0.0)
        normalized = tl.where(inside, (x.to(tl.float32) + added - mean) * inverse, 0.0)
        # dy is 0 outside, and so are both products.
        dz = _pull_back(dy.to(tl.float32), normalized, weight, bias, SILU)
        plain += dz
        along = tl.fma(dz, normalized, along)
        normal += normalized
        x, dy = next_x, next_dy
    target = sums_ptr + (image * chunks + chunk) * 3 * CHANNELS + channel
    tl.store(target, tl.sum(plain, axis=0), channel < CHANNELS)
    tl.store(target + CHANNELS, tl.sum(along, axis=0), channel < CHANNELS)
    tl.store(target + 2 * CHANNELS, tl.sum(normal, axis=0), channel < CHANNELS)


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
def _averages_kernel(
    sums_ptr, weight_ptr, inverse_ptr, totals_ptr, average_ptr, along_ptr, pixels, chunks,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    # One program a group of an image: its averages, and each channel's part of dbias, dweight and dconv_bias.
    PER_GROUP: tl.constexpr = CHANNELS // GROUPS
    image, group = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
    index = tl.arange(0, COLUMNS)
    channel, inside = group * PER_GROUP + index, index < PER_GROUP
    plain = tl.zeros([STEP, COLUMNS], tl.float32)
    along, normal = plain, plain
    for start in range(0, chunks, STEP):
        chunk = start + tl.arange(0, STEP)[:, None]
        sums, valid = sums_ptr + (image * chunks + chunk) * 3 * CHANNELS + channel, (chunk < chunks) & inside
        plain += tl.load(sums, valid, 0.0)
        along += tl.load(sums + CHANNELS, valid, 0.0)
        normal += tl.load(sums + 2 * CHANNELS, valid, 0.0)
    plain, along, normal = tl.sum(plain, axis=0), tl.sum(along, axis=0), tl.sum(normal, axis=0)
    weight = tl.load(weight_ptr + channel, inside, 0.0).to(tl.float32)
    # Of a channel; the averages are of a pixel.
    mean = tl.sum(weight * plain, axis=0) / PER_GROUP
    average_along = tl.sum(weight * along, axis=0) / (pixels.to(tl.float32) * PER_GROUP)
    tl.store(average_ptr + tl.program_id(0), mean / pixels.to(tl.float32))
    tl.store(along_ptr + tl.program_id(0), average_along)
    total_dx = tl.fma(weight, plain, -mean) - normal * average_along
    total_dx *= tl.load(inverse_ptr + tl.program_id(0))
    totals = totals_ptr + image * 3 * CHANNELS + channel
    tl.store(totals, plain, inside)
    tl.store(totals + CHANNELS, along, inside)
    tl.store(totals + 2 * CHANNELS, total_dx, inside)


@triton.jit(do_not_specialize=["images"])
def _vector_gradients_kernel(
    totals_ptr, dweight_ptr, dbias_ptr, dconv_bias_ptr, images,
    CHANNELS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    plain = tl.zeros([STEP, COLUMNS], tl.float32)
    along, total_dx = plain, plain
    for start in range(0, images, STEP):
        image = start + tl.arange(0, STEP)[:, None]
        totals = totals_ptr + image * 3 * CHANNELS + channel
        inside = (image < images) & (channel < CHANNELS)
        plain += tl.load(totals, inside, 0.0)
        along += tl.load(totals + CHANNELS, inside, 0.0)
        total_dx += tl.load(totals + 2 * CHANNELS, inside, 0.0)
    inside = channel < CHANNELS
    tl.store(dbias_ptr + channel, tl.sum(plain, axis=0).to(dbias_ptr.dtype.element_ty), inside)
    tl.store(dweight_ptr + channel, tl.sum(along, axis=0).to(dweight_ptr.dtype.element_ty), inside)
    if dconv_bias_ptr is not None:
        tl.store(dconv_bias_ptr + channel, tl.sum(total_dx, axis=0).to(dconv_bias_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["pixels", "chunks"])
def _input_gradient_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, conv_bias_ptr, mean_ptr, inverse_ptr, average_ptr, along_ptr, dx_ptr,
    pixels, chunks,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    image, chunk, block = statistics.locate(tl.program_id(0), chunks, tl.cdiv(CHANNELS, COLUMNS))
    channel = block * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    weight, bias, added, mean, inverse = load_vectors(
        weight_ptr, bias_ptr, conv_bias_ptr, mean_ptr, inverse_ptr, image, channel, CHANNELS, GROUPS
    )
    average = load_of_group(average_ptr, image, channel, CHANNELS, GROUPS)
    along = load_of_group(along_ptr, image, channel, CHANNELS, GROUPS)
    row = tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    inside = (row < statistics.rows_inside(chunk, pixels, ROWS)) & (channel < CHANNELS)
    place = statistics.first_value(image, pixels, chunk * ROWS, CHANNELS) + row * CHANNELS + channel
    normalized = (tl.load(x_ptr + place, inside, 0.0).to(tl.float32) + added - mean) * inverse
    dz = _pull_back(tl.load(dy_ptr + place, inside, 0.0).to(tl.float32), normalized, weight, bias, SILU)
    dx = inverse * (weight * dz - average - normalized * along)
    tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), inside)


def count_launches(x: Tensor) -> int:
    """Return the number of kernels that ``gradients`` launches."""
    return 3 + len(statistics.partial_counts(statistics.chunk_count(x.shape[2] * x.shape[3], x.shape[1])))


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, silu: bool,
    conv_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dx, dweight, dbias, dconv_bias) from the gradient of y and the forward pass's mean and inverse.

    mean, inverse: [N, groups]. dconv_bias is empty where there is no conv_bias.
    """
    batch, channels, height, width = x.shape
    dx = statistics.new_channels_last(batch, channels, height, width, like=x)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    dconv_bias = weight.new_empty(0) if conv_bias is None else torch.empty_like(conv_bias)
    x, dy = (value.contiguous(memory_format=torch.channels_last) for value in (x, dy))
    weight, mean, inverse = weight.contiguous(), mean.contiguous(), inverse.contiguous()
    saved = (weight, bias.contiguous(), None if conv_bias is None else conv_bias.contiguous(), mean, inverse)
    shape = {"CHANNELS": channels, "GROUPS": mean.shape[1]}
    totals, average, along = mean.new_empty(batch, 3, channels), torch.empty_like(mean), torch.empty_like(mean)
    if batch:
        sums = _sums(dy, x, saved, mean.shape[1], silu)
        columns, step = statistics.group_block(channels // mean.shape[1])
        _averages_kernel[(mean.numel(),)](
            sums, weight, inverse, totals, average, along, height * width, sums.shape[1],
            **shape, COLUMNS=columns, STEP=step, num_warps=8, num_stages=1,
        )  # fmt: skip
        grid, tile = pointwise("group_norm_gradient", x)
        _input_gradient_kernel[grid](
            dy, x, *saved, average, along, dx, height * width, SILU=silu, **(shape | tile)
        )  # fmt: skip
    columns = statistics.block_columns(32, channels)
    _vector_gradients_kernel[(triton.cdiv(channels, columns),)](
        totals, dweight, dbias, None if conv_bias is None else dconv_bias, batch,
        CHANNELS=channels, STEP=32, COLUMNS=columns, num_warps=4, num_stages=1,
    )  # fmt: skip
    return dx, dweight, dbias, dconv_bias


def _sums(dy: Tensor, x: Tensor, saved: tuple[Tensor | None, ...], groups: int, silu: bool) -> Tensor:
    """Return the sums of dz, dz n and n [N, chunks, 3, C], in at most MERGED chunks."""
    batch, channels, height, width = x.shape
    tile = tiles.choose("group_norm_sums", dtype=x.dtype, channels=channels, target=tiles.target_of(x.device))
    columns, chunk = statistics.block_columns(tile.columns, channels), statistics.chunk_pixels(channels)
    sums = statistics.new_partials(x)
    _gradient_sums_kernel[(batch * sums.shape[1] * triton.cdiv(channels, columns),)](
        dy, x, *saved, sums, height * width, sums.shape[1], CHANNELS=channels, GROUPS=groups, SILU=silu,
        CHUNK=chunk, ROWS=min(tile.rows, chunk), COLUMNS=columns,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    while sums.shape[1] > statistics.MERGED:
        folded = sums.new_empty(batch, triton.cdiv(sums.shape[1], statistics.FOLD), 3, channels)
        columns = statistics.block_columns(64, 3 * channels)
        _fold_sums_kernel[(batch * folded.shape[1] * triton.cdiv(3 * channels, columns),)](
            sums, folded, sums.shape[1], folded.shape[1],
            VALUES=3 * channels, FOLD=statistics.FOLD, COLUMNS=columns, num_warps=4, num_stages=1,
        )  # fmt: skip
        sums = folded
    return sums
