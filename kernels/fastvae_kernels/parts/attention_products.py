"""Attention as two plain products, some images and a chunk of their queries at a time.

P = 2^(scale log2(e) q k^T - m) by tiles, each with its own integer m per query; then out = sum over tiles of (2^(m - M)
P) v / l. With d = 512 a score costs 2048 operations, which take longer than moving the 4 bytes of P. Neither product
keeps all channels in its accumulator, as a flash kernel must. They reach 352 TFLOP/s with one image of 4,096 tokens of
512 channels on an H100, 460 with eight. Since m is an integer, scaling P by 2^(m - M) is exact in bf16, and in fp16
down to 2^-14: below it a weight loses digits, and below 2^-25 of its row's largest it is 0. Memory is linear in the
sequence.
Traffic: q, k, v, out, and P [chunk, S] once written and read d / (columns of the second tile) times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae_kernels.parts.attention_tiles import LN_2, LOG2_E, Round, add_product, place_of, rounds_of
from fastvae_kernels.shared import tiles
from fastvae_kernels.shared.runtime import size_in_bytes, tl, triton

_LN_2 = tl.constexpr(LN_2)
_LOWEST = tl.constexpr(-3.4e38)


@triton.jit(do_not_specialize=["length", "begin", "first", "count"])
def _scores_kernel(
    query_ptr,
    key_ptr,
    scores_ptr,
    largest_ptr,
    total_ptr,
    length,
    begin,
    first,
    count,
    scale_log2,
    CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tiles = tl.cdiv(length, KEYS)
    image, block, tile = place_of(tl.cdiv(count, QUERIES), tiles)
    rows = block * QUERIES + tl.arange(0, QUERIES)  # [QUERIES], in the chunk
    keys = tile * KEYS + tl.arange(0, KEYS)  # [KEYS]
    depth = tl.arange(0, DEPTH)  # [DEPTH]
    query_ptr += (begin + image) * length * CHANNELS
    key_ptr += (begin + image) * length * CHANNELS
    scores_ptr += image * count * (tiles * KEYS) + tile * KEYS
    largest_ptr += (image * tiles + tile) * count
    total_ptr += (image * tiles + tile) * count
    query_ptr += (first + rows)[:, None] * CHANNELS + depth[None, :]
    key_ptr += keys[None, :] * CHANNELS + depth[:, None]
    inside = keys < length
    scores = tl.zeros([QUERIES, KEYS], tl.float32)
    for start in range(0, CHANNELS, DEPTH):
        deep = depth < CHANNELS - start
        query = tl.load(query_ptr + start, mask=(rows < count)[:, None] & deep[None, :], other=0.0)
        key = tl.load(key_ptr + start, mask=inside[None, :] & deep[:, None], other=0.0)
        scores = add_product(query, key, scores)
    # At least the lowest number: in a row that is all -inf here, -inf minus -inf would be NaN.
    top = tl.maximum(tl.max(tl.where(inside[None, :], scores, -float("inf")), axis=1), _LOWEST)
    largest = tl.maximum(tl.ceil(top * scale_log2), _LOWEST)
    # Differences before products: rounded separately, a product of hundreds costs the weight five digits. From 2^23 on
    # products are integers, and the rounding of the top would be a power of two.
    above = tl.where(tl.abs(largest) < 8388608.0, tl.fma(top, scale_log2, -largest), 0.0)
    exponents = tl.fma(scores - top[:, None], scale_log2, above[:, None])
    scores = tl.exp2(tl.where(inside[None, :], exponents, -float("inf")))
    tl.store(largest_ptr + rows, largest, mask=rows < count)
    tl.store(total_ptr + rows, tl.sum(scores, axis=1), mask=rows < count)
    # The tail of the last tile is written too, as zeros: the second product needs no mask for it.
    place = scores_ptr + rows.to(tl.int64)[:, None] * (tiles * KEYS) + tl.arange(0, KEYS)[None, :]
    tl.store(place, scores.to(scores_ptr.dtype.element_ty), mask=(rows < count)[:, None])


@triton.jit(do_not_specialize=["length", "begin", "first", "count"])
def _combine_kernel(
    largest_ptr,
    total_ptr,
    sum_ptr,
    lse_ptr,
    length,
    begin,
    first,
    count,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    image, block, _ = place_of(tl.cdiv(count, QUERIES), 1)
    rows = block * QUERIES + tl.arange(0, QUERIES)  # [QUERIES]
    inside = rows < count
    tiles = tl.cdiv(length, KEYS)
    largest_ptr += image * tiles * count
    total_ptr += image * tiles * count
    largest = tl.full([QUERIES], -float("inf"), tl.float32)
    for tile in range(tiles):
        largest = tl.maximum(largest, tl.load(largest_ptr + tile * count + rows, mask=inside, other=0.0))
    total = tl.zeros([QUERIES], tl.float32)
    for tile in range(tiles):
        factor = tl.exp2(tl.load(largest_ptr + tile * count + rows, mask=inside, other=0.0) - largest)
        total += factor * tl.load(total_ptr + tile * count + rows, mask=inside, other=1.0)
        tl.store(largest_ptr + tile * count + rows, factor, mask=inside)
    tl.store(sum_ptr + image * count + rows, total, mask=inside)
    tl.store(lse_ptr + (begin + image) * length + first + rows, (largest + tl.log2(total)) * _LN_2, mask=inside)


@triton.jit(do_not_specialize=["length", "begin", "first", "count"])
def _product_kernel(
    scores_ptr,
    factor_ptr,
    sum_ptr,
    value_ptr,
    out_ptr,
    length,
    begin,
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
    image, block, part = place_of(tl.cdiv(count, QUERIES), parts)
    rows = block * QUERIES + tl.arange(0, QUERIES)  # [QUERIES], in the chunk
    channels = part * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    depth = tl.arange(0, DEPTH)  # [DEPTH]
    scores_ptr += (image * count + rows)[:, None] * (tiles * KEYS) + depth[None, :]
    factor_ptr += image * tiles * count + rows
    value_ptr += (begin + image) * length * CHANNELS
    out_ptr += (begin + image) * length * CHANNELS
    out = tl.zeros([QUERIES, COLUMNS], tl.float32)
    for start in range(0, length, DEPTH):
        keys = start + depth
        score = tl.load(scores_ptr + start, mask=(rows < count)[:, None], other=0.0)
        factor = tl.load(factor_ptr + start // KEYS * count, mask=rows < count, other=0.0)
        inside = (keys < length)[:, None] & (channels < CHANNELS)[None, :]
        value = tl.load(value_ptr + keys[:, None] * CHANNELS + channels[None, :], mask=inside, other=0.0)
        score *= factor.to(score.dtype)[:, None]
        out = tl.dot(score, value, out, input_precision="ieee")
    out = out / tl.load(sum_ptr + image * count + rows, mask=rows < count, other=1.0)[:, None]
    place = out_ptr + (first + rows)[:, None] * CHANNELS + channels[None, :]
    inside = (rows < count)[:, None] & (channels < CHANNELS)[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=inside)


# Queries of a program that combines the tiles of its rows.
COMBINED = 128


def _plan(query: Tensor, target: tiles.Target) -> tuple[tiles.Tile, tiles.Tile, int, list[Round]]:
    # The tiles of both products, tiles of keys along the sequence, and the rounds.
    images, length, channels = query.shape
    square, tile = (
        tiles.choose(op, dtype=query.dtype, channels=channels, target=target)
        for op in ("attention_scores", "attention_product")
    )
    across = -(-length // square.columns)
    return square, tile, across, rounds_of(images, length, across * square.columns * query.element_size())


def count_launches(query: Tensor) -> int:
    """Return the number of kernels that attend launches."""
    return 3 * len(_plan(query, tiles.target_of(query.device))[-1])


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return attention [N, S, d] and its log-sum-exp [N, S], of contiguous tensors of any d."""
    if scale < 0:  # to the kernels the largest score has the largest weight
        query, scale = -query, -scale
    images, length, channels = query.shape
    square, tile, across, rounds = _plan(query, tiles.target_of(query.device))
    parts, rows = -(-channels // tile.columns), rounds[0].images * rounds[0].count
    out, scores = torch.empty_like(query), query.new_empty(rows * across * square.columns)
    lse, sums, largest, total = (
        torch.empty(size, dtype=torch.float32, device=query.device)
        for size in ((images, length), rows, rows * across, rows * across)
    )
    for begin, together, first, count in rounds:
        where = (length, begin, first, count)
        _scores_kernel[(together * -(-count // square.rows) * across,)](
            query,
            key,
            scores,
            largest,
            total,
            *where,
            scale * LOG2_E,
            CHANNELS=channels,
            QUERIES=square.rows,
            KEYS=square.columns,
            DEPTH=square.depth,
            num_warps=square.num_warps,
            num_stages=square.num_stages,
        )
        _combine_kernel[(together * -(-count // COMBINED),)](
            largest, total, sums, lse, *where, KEYS=square.columns, QUERIES=COMBINED, num_warps=4
        )
        _product_kernel[(together * -(-count // tile.rows) * parts,)](
            scores,
            largest,
            sums,
            value,
            out,
            *where,
            CHANNELS=channels,
            QUERIES=tile.rows,
            COLUMNS=tile.columns,
            KEYS=square.columns,
            DEPTH=tile.depth,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out, lse


def traffic(query: Tensor, target: tiles.Target) -> int:
    """Return the bytes that the programs load and store, each program's own once; attention.cost has the formula."""
    images, length, channels = query.shape
    square, tile, across, rounds = _plan(query, target)
    parts, tokens, item = -(-channels // tile.columns), images * length, query.element_size()
    blocks, second_blocks = (sum(r.images * -(-r.count // rows) for r in rounds) for rows in (square.rows, tile.rows))
    matrix, steps = length * channels * item, -(-length // tile.depth) * tile.depth
    first = size_in_bytes(query) * across + matrix * blocks + tokens * across * (square.columns * item + 8)
    combined = tokens * (12 * across + 8)
    second = parts * tokens * (steps * item + 4 * across + 4) + matrix * second_blocks + size_in_bytes(query)
    return first + combined + second
