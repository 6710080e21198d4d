"""Partial statistics: per image, chunk of pixels and channel the fp32 triple (count, mean, sum of squared deviations).

Layout: [N, chunks, 3, C], contiguous. A chunk is ``chunk_pixels(C)`` consecutive pixels in row-major order, the last
one the rest; its size depends on the channels alone, so neither batch nor device changes the order of the sums.
Triples are merged by Chan's rule (Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing
sample variances", 1979). The squares are of deviations from the mean, so the variance keeps its digits where the mean
is a thousand times the deviation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae_kernels.shared import tiles
from fastvae_kernels.shared.runtime import tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# One program merges up to MERGED chunks of a group (512² at 128 channels: 48 KiB). If there are more, as at 1024², FOLD
# of them are merged into one first: a single program reads at a few GB/s.
MERGED, FOLD = 1024, 64


def chunk_pixels(channels: int) -> int:
    """Return the pixels of one chunk: the power of two that makes it about 65,536 values, from 32 to 256."""
    return min(256, max(32, 1 << (65_536 // channels).bit_length() - 1)) if channels <= 65_536 else 32


def chunk_count(pixels: int, channels: int) -> int:
    """Return the number of chunks of an image of so many pixels."""
    chunk = chunk_pixels(channels)
    return (pixels + chunk - 1) // chunk


def new_partials(x: Tensor) -> Tensor:
    """Return uninitialized partials for x [N, C, H, W]."""
    batch, channels, height, width = x.shape
    chunks = chunk_count(height * width, channels)
    return torch.empty(batch, chunks, 3, channels, device=x.device, dtype=torch.float32)


def new_channels_last(batch: int, channels: int, height: int, width: int, like: Tensor, dtype=None) -> Tensor:
    """Return an uninitialized [batch, channels, height, width] in channels_last, strides of sizes 0 and 1 included."""
    strides = (height * width * channels, 1, width * channels, channels)
    return torch.empty_strided((batch, channels, height, width), strides, device=like.device, dtype=dtype or like.dtype)


def same_layout(x: Tensor) -> Tensor:
    """Return the values of x [N, C, H, W] in a new tensor with the strides of ``new_channels_last``."""
    return new_channels_last(*x.shape, like=x).copy_(x)


def check_image(name: str, x: Tensor) -> None:
    """Raise ValueError unless x is a floating-point [N, C, H, W] with at least one pixel and channel."""
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{name} must be [N, C, H, W] with C, H, W of at least 1, got shape {tuple(x.shape)}")
    if x.dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {x.dtype}")


def check_vector(name: str, vector: Tensor | None, channels: int) -> None:
    """Raise ValueError for a per-channel vector of another length."""
    if vector is not None and tuple(vector.shape) != (channels,):
        raise ValueError(f"{name} must have one value for each of {channels} channels, got {tuple(vector.shape)}")


def partial_counts(chunks: int) -> list[int]:
    """Return the numbers of partials that an image may have: one for each chunk, or those after each fold."""
    counts = [chunks]
    while counts[-1] > MERGED:
        counts.append((counts[-1] + FOLD - 1) // FOLD)
    return counts


def check_partials(partials: Tensor | None, x: Tensor) -> None:
    """Raise ValueError unless partials have a shape for x [N, C, H, W], folded or not."""
    if partials is None:
        return
    batch, channels, height, width = x.shape
    counts = partial_counts(chunk_count(height * width, channels))
    # Only the references take float64.
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rest = (partials.shape[0], *partials.shape[2:])
    if partials.ndim != 4 or partials.dtype != wide or rest != (batch, 3, channels) or partials.shape[1] not in counts:
        raise ValueError(
            f"partials must be {wide} [{batch}, {' or '.join(map(str, counts))}, 3, {channels}] for such an x, got "
            f"{partials.dtype} of shape {tuple(partials.shape)}"
        )


def check_kernel_dtype(name: str, x: Tensor) -> None:
    """Raise ValueError for a dtype that no kernel takes; only the references take float64."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, float16 or bfloat16 on {x.device}, got {x.dtype}")


def reference(x: Tensor) -> Tensor:
    """Return partials of x [N, C, H, W]; fp32, float64 for float64."""
    batch, channels = x.shape[:2]
    chunk = chunk_pixels(channels)
    values = x.to(torch.promote_types(x.dtype, torch.float32)).permute(0, 2, 3, 1)
    values = values.reshape(batch, x.shape[2] * x.shape[3], channels)
    whole = values.shape[1] // chunk * chunk
    pieces = [values[:, :whole].reshape(batch, whole // chunk, chunk, channels), values[:, None, whole:]]
    described = []
    for piece in pieces:
        if piece.shape[1] * piece.shape[2]:
            mean = piece.mean(2, keepdim=True)
            deviations = (piece - mean).square().sum(2)
            count = torch.full_like(deviations, piece.shape[2])
            described.append(torch.stack([count, mean.squeeze(2), deviations], dim=2))
    return torch.cat(described, dim=1)


def merged_reference(partials: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (count, mean, sum of squared deviations) of triples [..., 3, C] merged over ``dims`` of [..., C]."""
    count, mean, deviations = partials.unbind(-2)
    total = count.sum(dims, keepdim=True)
    center = (count * mean).sum(dims, keepdim=True) / total
    deviations = (deviations + count * (mean - center).square()).sum(dims, keepdim=True)
    return total, center, deviations


@triton.jit
def locate(program, chunks, BLOCKS: tl.constexpr):
    """Return (image, chunk, channel block) of a program; the first two are int64: their products may pass 2^31."""
    block = program % BLOCKS
    program = program // BLOCKS
    return (program // chunks).to(tl.int64), (program % chunks).to(tl.int64), block


@triton.jit
def first_value(image, pixels, pixel, CHANNELS: tl.constexpr):
    """Return the offset of a pixel of an image in a channels_last tensor, in values, as int64."""
    return (image.to(tl.int64) * pixels + pixel.to(tl.int64)) * CHANNELS


@triton.jit
def rows_inside(chunk, pixels, CHUNK: tl.constexpr):
    """Return the pixels of a chunk: CHUNK, or the rest in the last one."""
    return tl.minimum(pixels - chunk * CHUNK, CHUNK).to(tl.int32)


@triton.jit
def line_and_column(line, column, row, width):
    """Return line (int64) and column (int32) of the pixels ``row`` [ROWS, 1] after the one at (line, column).

    The caller divides the first pixel of its chunk once, in 64 bits, which takes a hundred instructions: the compiler
    would leave that division in the loop. Here 32 bits are enough.
    """
    along = column + row
    return line + along // width, along % width


@triton.jit
def nothing_yet(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the state before the first rows of a chunk: anchor [COLUMNS], and zero sums [ROWS, COLUMNS]."""
    zeros = tl.zeros([ROWS, COLUMNS], tl.float32)
    return tl.zeros([COLUMNS], tl.float32), zeros, zeros


@triton.jit
def take(anchor, total, squares, x, inside, start, rows, ROWS: tl.constexpr):
    """Add the rows from ``start`` on to the sums: x [ROWS, COLUMNS], those ``inside`` [ROWS, 1], of ``rows``.

    The sums are of differences from the anchor, the rounded mean of the first rows, so a mean far from 0 costs no
    digits. Each element of the tile has its own sums, so no step of the loop waits for other threads: with three
    reductions a step this pass took 2 to 5 times as long as its memory traffic on an H100.
    """
    if start == 0:
        anchor = tl.sum(tl.where(inside, x, 0.0), axis=0) / tl.minimum(ROWS, rows).to(tl.float32)
    x = tl.where(inside, x - anchor[None, :], 0.0)
    return anchor, total + x, tl.fma(x, x, squares)


@triton.jit
def described(anchor, count, total, squares):
    """Return (mean, sum of squared deviations) [COLUMNS] from the sums of ``count`` differences from the anchor.

    The squares exceed the deviations by count * (mean - anchor)^2. The anchor is the mean of a part of the values, so
    that is at most count / (the part's count) times the deviations: few digits are lost for any values.
    """
    total, squares = tl.sum(total, axis=0), tl.sum(squares, axis=0)
    center = total / count
    # Rounding can make the variance of a constant slightly negative: clamp to zero, keep NaN.
    deviations = tl.maximum(squares - total * center, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return anchor + center, deviations


@triton.jit
def store_partials(partials_ptr, image, chunk, chunks, channel, count, mean, deviations, CHANNELS: tl.constexpr):
    """Write the triples of one chunk for the channels [COLUMNS]."""
    target = partials_ptr + (image * chunks + chunk) * 3 * CHANNELS + channel
    inside = channel < CHANNELS
    tl.store(target, tl.zeros_like(mean) + count, inside)
    tl.store(target + CHANNELS, mean, inside)
    tl.store(target + 2 * CHANNELS, deviations, inside)


@triton.jit
def store_sums(partials_ptr, image, chunk, chunks, channel, rows, anchor, total, squares, CHANNELS: tl.constexpr):
    """Write the triples of one chunk of ``rows`` pixels from the sums of ``take``."""
    count = rows.to(tl.float32)
    mean, deviations = described(anchor, count, total, squares)
    store_partials(partials_ptr, image, chunk, chunks, channel, count, mean, deviations, CHANNELS)


@triton.jit
def merge_chunks(partials_ptr, image, first, last, chunks, channel, inside, CHANNELS: tl.constexpr, STEP: tl.constexpr):
    """Return the triple of each channel [COLUMNS] over the chunks from ``first`` up to ``last`` of an image."""
    triples = partials_ptr + (image * chunks + first) * 3 * CHANNELS + channel
    # As in take: differences from the mean of the first chunks, and no reduction inside the loop.
    anchor = tl.zeros_like(channel).to(tl.float32)  # [COLUMNS]
    count = tl.zeros([STEP, 1], tl.float32) + anchor[None, :]
    total = count
    squares = count
    for start in range(0, (last - first).to(tl.int32), STEP):
        chunk = (start + tl.arange(0, STEP)[:, None]).to(tl.int64)
        valid = (chunk < last - first) & inside[None, :]
        triple = triples[None, :] + chunk * 3 * CHANNELS
        step_count = tl.load(triple, valid, 0.0)  # [STEP, COLUMNS]
        step_mean = tl.load(triple + CHANNELS, valid, 0.0)
        step_deviations = tl.load(triple + 2 * CHANNELS, valid, 0.0)
        if start == 0:
            anchor = tl.sum(step_count * step_mean, axis=0) / tl.maximum(tl.sum(step_count, axis=0), 1.0)
        apart = tl.where(valid, step_mean - anchor[None, :], 0.0)
        count += step_count
        total = tl.fma(step_count, apart, total)
        squares += tl.fma(step_count * apart, apart, step_deviations)
    count = tl.sum(count, axis=0)
    mean, deviations = described(anchor, tl.maximum(count, 1.0), total, squares)
    return count, mean, deviations


@triton.jit
def merge_channels(count, mean, deviations, first):
    """Return the triple of a group from those of its channels [COLUMNS]; ``first`` is true for its first channel."""
    anchor = tl.sum(tl.where(first, mean, 0.0), axis=0)
    total = tl.sum(count, axis=0)
    apart = tl.where(count > 0, mean - anchor, 0.0)
    center = tl.sum(count * apart, axis=0) / total
    apart = apart - center
    return total, anchor + center, tl.sum(deviations + count * apart * apart, axis=0)


@triton.jit
def group_moments(
    partials_ptr, bias_ptr, factor, image, group, chunks, eps,
    CHANNELS: tl.constexpr, PER_GROUP: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Return (mean, 1 / deviation) of a group of an image, and the bias times factor [COLUMNS] that its means include.

    The bias is loaded behind the loop: held over it, it spilled 8 bytes on sm_80 under Triton 3.9.
    """
    index = tl.arange(0, COLUMNS)
    inside = index < PER_GROUP
    channel = group * PER_GROUP + index
    none = chunks * 0
    count, mean, deviations = merge_chunks(partials_ptr, image, none, chunks, chunks, channel, inside, CHANNELS, STEP)
    bias = tl.zeros([COLUMNS], tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + channel, inside, 0.0).to(tl.float32) * factor
    total, mean, deviations = merge_channels(count, mean + bias, deviations, index == 0)
    return mean, tl.div_rn(1.0, tl.sqrt_rn(deviations / total + eps)), bias


@triton.jit(do_not_specialize=["pixels", "chunks"])
def _measure_kernel(
    x_ptr, partials_ptr, pixels, chunks,
    CHANNELS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    image, chunk, block = locate(tl.program_id(0), chunks, tl.cdiv(CHANNELS, COLUMNS))
    channel = block * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    row = tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    rows = rows_inside(chunk, pixels, CHUNK)
    source = x_ptr + first_value(image, pixels, chunk * CHUNK, CHANNELS)
    anchor, total, squares = nothing_yet(ROWS, COLUMNS)
    x = tl.load(source + row * CHANNELS + channel, (row < rows) & (channel < CHANNELS), 0.0)
    for start in range(0, rows, ROWS):
        # The next rows are on their way while these are added: the arithmetic alone left memory idle for a third of
        # the time on an H100.
        later = start + ROWS + row
        following = tl.load(source + later * CHANNELS + channel, (later < rows) & (channel < CHANNELS), 0.0)
        inside = start + row < rows
        anchor, total, squares = take(anchor, total, squares, x.to(tl.float32), inside, start, rows, ROWS)
        x = following
    store_sums(partials_ptr, image, chunk, chunks, channel, rows, anchor, total, squares, CHANNELS)


@triton.jit(do_not_specialize=["chunks", "folded"])
def _fold_kernel(
    partials_ptr, folded_ptr, chunks, folded,
    CHANNELS: tl.constexpr, FOLD: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    image, target, block = locate(tl.program_id(0), folded, tl.cdiv(CHANNELS, COLUMNS))
    channel = block * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    last = tl.minimum((target + 1) * FOLD, chunks.to(tl.int64))
    count, mean, deviations = merge_chunks(
        partials_ptr, image, target * FOLD, last, chunks, channel, channel < CHANNELS, CHANNELS, STEP
    )
    store_partials(folded_ptr, image, target, folded, channel, count, mean, deviations, CHANNELS)


def block_columns(columns: int, channels: int) -> int:
    """Return the channels of one program: a tile's columns, or the next power of two if there are fewer channels."""
    return min(columns, triton.next_power_of_2(channels))


def group_block(per_group: int) -> tuple[int, int]:
    """Return (channels, chunks at a time) of a program that merges a group: about 2048 triples, 8 for each thread."""
    columns = triton.next_power_of_2(per_group)
    return columns, max(1, min(512, 2048 // columns))


def measure(x: Tensor) -> Tensor:
    """Run the kernel that measures x [N, C, H, W] in channels_last, and return its partials."""
    batch, channels, height, width = x.shape
    partials = new_partials(x)
    if batch:
        tile = tiles.choose("statistics", dtype=x.dtype, channels=channels, target=tiles.target_of(x.device))
        columns = block_columns(tile.columns, channels)
        chunks, chunk = partials.shape[1], chunk_pixels(channels)
        _measure_kernel[(batch * chunks * triton.cdiv(channels, columns),)](
            x, partials, height * width, chunks,
            CHANNELS=channels, CHUNK=chunk, ROWS=min(tile.rows, chunk), COLUMNS=columns,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return partials


def fold_chunks(partials: Tensor) -> Tensor:
    """Return the same statistics in at most MERGED chunks, by as many launches as needed (none up to MERGED)."""
    while partials.shape[1] > MERGED and partials.shape[0]:
        batch, chunks, _, channels = partials.shape
        columns = block_columns(32, channels)
        folded = partials.new_empty(batch, triton.cdiv(chunks, FOLD), 3, channels)
        _fold_kernel[(batch * folded.shape[1] * triton.cdiv(channels, columns),)](
            partials, folded, chunks, folded.shape[1],
            CHANNELS=channels, FOLD=FOLD, COLUMNS=columns, STEP=32, num_warps=8, num_stages=1,
        )  # fmt: skip
        partials = folded
    return partials
