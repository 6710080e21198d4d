"""Attention over long sequences as two plain products, a chunk of queries at a time; memory linear in the sequence.

P = 2^(scale log2(e) q k^T - m) by tiles, each with its own whole-numbered m per query; then out = sum over tiles of
(2^(m - M) P) v / l. With d = 512 a score costs 2048 operations and P's 4 bytes of traffic are cheap beside them, while
neither product needs the 64 x 512 accumulator that fills a multiprocessor in the flash form. Since m is whole, scaling
P by 2^(m - M) is exact in half precision.
Traffic: q, k, v, out, and P [chunk, S] once written and read d / (columns of the second tile) times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae_kernels import tiles
from fastvae_kernels.attention_tiles import LN_2, LOG2_E
from fastvae_kernels.runtime import tl, triton

# 4096 queries make 128 programs of the second product at d = 512: one wave of 132 multiprocessors. P is then 8 KiB a
# token in half precision, 128 MiB at 16,384 tokens.
CHUNK = 4096

_LN_2 = tl.constexpr(LN_2)


@triton.jit(do_not_specialize=["length", "first", "count"])
def _scores_kernel(
    query_ptr,
    key_ptr,
    scores_ptr,
    largest_ptr,
    total_ptr,
    length,
    first,
    count,
    scale_log2,
    CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tiles = tl.cdiv(length, KEYS)
    tile = tl.program_id(0) % tiles
    rows = tl.program_id(0) // tiles * QUERIES + tl.arange(0, QUERIES)  # [QUERIES], in the chunk
    keys = tile * KEYS + tl.arange(0, KEYS)  # [KEYS]
    depth = tl.arange(0, DEPTH)  # [DEPTH]
    query_ptr += (first + rows)[:, None] * CHANNELS + depth[None, :]
    key_ptr += keys[None, :] * CHANNELS + depth[:, None]
    inside = keys < length
    scores = tl.zeros([QUERIES, KEYS], tl.float32)
    for start in range(0, CHANNELS, DEPTH):
        deep = depth < CHANNELS - start
        query = tl.load(query_ptr + start, mask=(rows < count)[:, None] & deep[None, :], other=0.0)
        key = tl.load(key_ptr + start, mask=inside[None, :] & deep[:, None], other=0.0)
        scores = tl.dot(query, key, scores, input_precision="ieee")
    scores = tl.where(inside[None, :], scores * scale_log2, -float("inf"))
    largest = tl.ceil(tl.max(scores, axis=1))
    scores = tl.exp2(scores - largest[:, None])
    tl.store(largest_ptr + tile * count + rows, largest, mask=rows < count)
    tl.store(total_ptr + tile * count + rows, tl.sum(scores, axis=1), mask=rows < count)
    # The tail of the last tile is written too, as zeros: the second product needs no mask for it.
    place = scores_ptr + rows.to(tl.int64)[:, None] * (tiles * KEYS) + keys[None, :]
    tl.store(place, scores.to(scores_ptr.dtype.element_ty), mask=(rows < count)[:, None])


@triton.jit(do_not_specialize=["length", "count"])
def _combine_kernel(largest_ptr, total_ptr, sum_ptr, lse_ptr, length, count, KEYS: tl.constexpr, QUERIES: tl.constexpr):
    rows = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)  # [QUERIES]
    inside = rows < count
    tiles = tl.cdiv(length, KEYS)
    largest = tl.full([QUERIES], -float("inf"), tl.float32)
    for tile in range(tiles):
        largest = tl.maximum(largest, tl.load(largest_ptr + tile * count + rows, mask=inside, other=0.0))
    total = tl.zeros([QUERIES], tl.float32)
    for tile in range(tiles):
        factor = tl.exp2(tl.load(largest_ptr + tile * count + rows, mask=inside, other=0.0) - largest)
        total += factor * tl.load(total_ptr + tile * count + rows, mask=inside, other=1.0)
        tl.store(largest_ptr + tile * count + rows, factor, mask=inside)
    tl.store(sum_ptr + rows, total, mask=inside)
    tl.store(lse_ptr + rows, (largest + tl.log2(total)) * _LN_2, mask=inside)


@triton.jit(do_not_specialize=["length", "first", "count"])
def _product_kernel(
    scores_ptr,
    factor_ptr,
    sum_ptr,
    value_ptr,
    out_ptr,
    length,
    first,
    count,
    CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tiles = tl.cdiv(length, KEYS)
    parts: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    rows = tl.program_id(0) // parts * QUERIES + tl.arange(0, QUERIES)  # [QUERIES], in the chunk
    channels = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    depth = tl.arange(0, DEPTH)  # [DEPTH]
    scores_ptr += rows.to(tl.int64)[:, None] * (tiles * KEYS) + depth[None, :]
    out = tl.zeros([QUERIES, COLUMNS], tl.float32)
    for start in range(0, length, DEPTH):
        keys = start + depth
        score = tl.load(scores_ptr + start, mask=(rows < count)[:, None], other=0.0)
        factor = tl.load(factor_ptr + start // KEYS * count + rows, mask=rows < count, other=0.0)
        inside = (keys < length)[:, None] & (channels < CHANNELS)[None, :]
        value = tl.load(value_ptr + keys[:, None] * CHANNELS + channels[None, :], mask=inside, other=0.0)
        score *= factor.to(score.dtype)[:, None]
        out = tl.dot(score, value, out, input_precision="ieee")
    out = out / tl.load(sum_ptr + rows, mask=rows < count, other=1.0)[:, None]
    place = out_ptr + (first + rows)[:, None] * CHANNELS + channels[None, :]
    inside = (rows < count)[:, None] & (channels < CHANNELS)[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=inside)


def attend_long(query: Tensor, key: Tensor, value: Tensor, scale: float, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Attention [N, S, d] and its log-sum-exp [N, S], of contiguous tensors; ``chunk`` queries at a time."""
    images, length, channels = query.shape
    target = tiles.target_of(query.device)
    first_tile = tiles.choose("attention_scores", dtype=query.dtype, channels=channels, target=target)
    second_tile = tiles.choose("attention_product", dtype=query.dtype, channels=channels, target=target)
    parts, tile_count = -(-channels // second_tile.columns), -(-length // first_tile.columns)
    rows = min(chunk, length)
    out = torch.empty_like(query)
    lse = torch.empty((images, length), dtype=torch.float32, device=query.device)
    scores = torch.empty((rows, tile_count * first_tile.columns), dtype=query.dtype, device=query.device)
    largest, total, sums = (
        torch.empty(size, dtype=torch.float32, device=query.device)
        for size in (tile_count * rows, tile_count * rows, rows)
    )
    for image in range(images):
        for first in range(0, length, rows):
            count = min(rows, length - first)
            _scores_kernel[(-(-count // first_tile.rows) * tile_count,)](
                query.select(0, image),
                key.select(0, image),
                scores,
                largest,
                total,
                length,
                first,
                count,
                scale * LOG2_E,
                CHANNELS=channels,
                QUERIES=first_tile.rows,
                KEYS=first_tile.columns,
                DEPTH=first_tile.depth,
                num_warps=first_tile.num_warps,
                num_stages=first_tile.num_stages,
            )
            _combine_kernel[(-(-count // 128),)](
                largest,
                total,
                sums,
                lse.select(0, image).narrow(0, first, count),
                length,
                count,
                KEYS=first_tile.columns,
                QUERIES=128,
                num_warps=4,
            )
            _product_kernel[(-(-count // second_tile.rows) * parts,)](
                scores,
                largest,
                sums,
                value.select(0, image),
                out.select(0, image),
                length,
                first,
                count,
                CHANNELS=channels,
                QUERIES=second_tile.rows,
                COLUMNS=second_tile.columns,
                KEYS=first_tile.columns,
                DEPTH=second_tile.depth,
                num_warps=second_tile.num_warps,
                num_stages=second_tile.num_stages,
            )
    return out, lse
