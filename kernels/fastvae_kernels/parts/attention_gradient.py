"""Gradients of attention: dv = P^T do, dq = scale ds k, dk = scale ds^T q, for q, k, v [N, S, d].

P = exp(scale q k^T - lse), ds = P (do v^T - delta), delta = the sum over channels of do * out. At d = 512 the flash
form has no room (two accumulators of 512 channels and four operands), so P and ds are written a round at a time and
plain products do the rest: every kernel is an ordinary tiled product with fp32 sums, and no two programs add to one
value. dk and dv are summed over the chunks in their order, in fp32. Memory is linear in the sequence.
Traffic: q, k, v, do, and P and ds [chunk, S] once written and read d / (columns of a tile) and twice that many times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae_kernels.parts.attention_tiles import LOG2_E, Round, add_product, load_tile, place_of, rounds_of, width_of
from fastvae_kernels.shared import tiles
from fastvae_kernels.shared.runtime import tl, triton

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit(do_not_specialize=["length"])
def _delta_kernel(
    grad_ptr, out_ptr, delta_ptr, length, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    image, block, _ = place_of(tl.cdiv(length, ROWS), 1)
    rows = block * ROWS + tl.arange(0, ROWS)  # [ROWS]
    grad_ptr += image * length * CHANNELS
    out_ptr += image * length * CHANNELS
    grad = load_tile(grad_ptr, rows, length, WIDTH, CHANNELS).to(tl.float32)
    delta = tl.sum(grad * load_tile(out_ptr, rows, length, WIDTH, CHANNELS).to(tl.float32), axis=1)
    tl.store(delta_ptr + image * length + rows, delta, mask=rows < length)


@triton.jit(do_not_specialize=["length", "begin", "first", "count"])
def _weights_kernel(
    grad_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    lse_ptr,
    delta_ptr,
    weight_ptr,
    slope_ptr,
    length,
    begin,
    first,
    count,
    scale,
    CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    across = tl.cdiv(length, KEYS)
    image, block, tile = place_of(tl.cdiv(count, QUERIES), across)
    rows = block * QUERIES + tl.arange(0, QUERIES)  # [QUERIES], in the chunk
    keys = tile * KEYS + tl.arange(0, KEYS)  # [KEYS]
    depth = tl.arange(0, DEPTH)  # [DEPTH]
    row_place = (first + rows)[:, None] * CHANNELS + depth[None, :]
    key_place = keys[None, :] * CHANNELS + depth[:, None]
    query_ptr += (begin + image) * length * CHANNELS
    grad_ptr += (begin + image) * length * CHANNELS
    key_ptr += (begin + image) * length * CHANNELS
    value_ptr += (begin + image) * length * CHANNELS
    scores = tl.zeros([QUERIES, KEYS], tl.float32)
    slope = tl.zeros([QUERIES, KEYS], tl.float32)
    for start in range(0, CHANNELS, DEPTH):
        row_inside = (rows < count)[:, None] & (depth < CHANNELS - start)[None, :]
        key_inside = (keys < length)[None, :] & (depth < CHANNELS - start)[:, None]
        query = tl.load(query_ptr + start + row_place, mask=row_inside, other=0.0)
        key = tl.load(key_ptr + start + key_place, mask=key_inside, other=0.0)
        scores = add_product(query, key, scores)
        grad = tl.load(grad_ptr + start + row_place, mask=row_inside, other=0.0)
        value = tl.load(value_ptr + start + key_place, mask=key_inside, other=0.0)
        slope = tl.dot(grad, value, slope, input_precision="ieee")
    place = (begin + image) * length + first + rows
    lse = tl.load(lse_ptr + place, mask=rows < count, other=0.0)
    delta = tl.load(delta_ptr + place, mask=rows < count, other=0.0)
    inside = (rows < count)[:, None] & (keys < length)[None, :]
    weight = tl.exp2(tl.where(inside, scores * scale - lse[:, None], -float("inf")) * _LOG2_E)
    slope = tl.where(inside, weight * (slope - delta[:, None]), 0.0)
    # The tails are written as zeros: the products need no mask for them.
    out_place = (image * count + rows)[:, None] * (across * KEYS) + keys[None, :]
    tl.store(weight_ptr + out_place, weight.to(weight_ptr.dtype.element_ty), mask=(rows < count)[:, None])
    tl.store(slope_ptr + out_place, slope.to(slope_ptr.dtype.element_ty), mask=(rows < count)[:, None])


@triton.jit(do_not_specialize=["length", "begin", "first", "count", "stride"])
def _grad_query_kernel(
    slope_ptr,
    key_ptr,
    grad_query_ptr,
    length,
    begin,
    first,
    count,
    stride,
    scale,
    CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    parts: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    image, block, part = place_of(tl.cdiv(count, QUERIES), parts)
    rows = block * QUERIES + tl.arange(0, QUERIES)  # [QUERIES], in the chunk
    channels = part * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    depth = tl.arange(0, DEPTH)  # [DEPTH]
    slope_ptr += (image * count + rows)[:, None] * (stride * ALIGNED) + depth[None, :]
    key_ptr += (begin + image) * length * CHANNELS
    total = tl.zeros([QUERIES, COLUMNS], tl.float32)
    for start in range(0, length, DEPTH):
        slope = tl.load(slope_ptr + start, mask=(rows < count)[:, None], other=0.0)
        inside = (depth < length - start)[:, None] & (channels < CHANNELS)[None, :]
        key = tl.load(key_ptr + (start + depth)[:, None] * CHANNELS + channels[None, :], mask=inside, other=0.0)
        total = tl.dot(slope, key, total, input_precision="ieee")
    place = (begin + image) * length * CHANNELS + (first + rows)[:, None] * CHANNELS + channels[None, :]
    inside = (rows < count)[:, None] & (channels < CHANNELS)[None, :]
    tl.store(grad_query_ptr + place, (total * scale).to(grad_query_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "begin", "first", "count", "stride", "fresh", "done"])
def _grad_keys_kernel(
    weight_ptr,
    matrix_ptr,
    total_ptr,
    result_ptr,
    length,
    begin,
    first,
    count,
    stride,
    scale,
    fresh,
    done,
    CHANNELS: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    # weight^T matrix over the chunk's queries: ds^T q or P^T do, added to the total of earlier chunks.
    parts: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    image, block, part = place_of(tl.cdiv(length, KEYS), parts)
    keys = block * KEYS + tl.arange(0, KEYS)  # [KEYS]
    channels = part * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    depth = tl.arange(0, DEPTH)  # [DEPTH], queries in the chunk
    matrix_ptr += ((begin + image) * length + first) * CHANNELS
    weight_ptr += image * count * (stride * ALIGNED)
    product = tl.zeros([KEYS, COLUMNS], tl.float32)
    for start in range(0, count, DEPTH):
        rows = start + depth
        inside = (rows < count)[None, :] & (keys < length)[:, None]
        place = rows.to(tl.int64)[None, :] * (stride * ALIGNED) + keys[:, None]
        weight = tl.load(weight_ptr + place, mask=inside, other=0.0)
        inside = (rows < count)[:, None] & (channels < CHANNELS)[None, :]
        matrix = tl.load(matrix_ptr + rows[:, None] * CHANNELS + channels[None, :], mask=inside, other=0.0)
        product = tl.dot(weight, matrix, product, input_precision="ieee")
    product *= scale
    place = keys[:, None] * CHANNELS + channels[None, :]
    total_ptr += image * length * CHANNELS
    result_ptr += (begin + image) * length * CHANNELS
    inside = (keys < length)[:, None] & (channels < CHANNELS)[None, :]
    if fresh == 0:
        product += tl.load(total_ptr + place, mask=inside, other=0.0)
    if done == 0:
        tl.store(total_ptr + place, product, mask=inside)
    else:
        tl.store(result_ptr + place, product.to(result_ptr.dtype.element_ty), mask=inside)


def _plan(query: Tensor) -> tuple[tiles.Tile, tiles.Tile, int, list[Round]]:
    # The tiles of weights and of products, tiles of keys along the sequence, and the rounds.
    images, length, channels = query.shape
    square, tile = (
        tiles.choose(op, dtype=query.dtype, channels=channels, target=tiles.target_of(query.device))
        for op in ("attention_weights", "attention_product")
    )
    across = -(-length // square.columns)
    row_bytes = 2 * across * square.columns * query.element_size()
    # The fp32 sums of dk and dv (half of that where keys are values): at 64 tokens of 512 channels more than eight
    # times the bytes of P and ds.
    return square, tile, across, rounds_of(images, length, row_bytes, image_bytes=8 * length * channels)


def count_launches(query: Tensor) -> int:
    """Return the number of kernels that gradients launches."""
    return 1 + 4 * len(_plan(query)[-1])


def gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> list[Tensor]:
    """Return [dq, dk, dv] of contiguous [N, S, d], or [dq, dx] where ``value`` is None and key is both."""
    results = [torch.empty_like(query) for _ in range(2 if value is None else 3)]
    images, length, channels = query.shape
    if not query.numel():
        return results
    square, tile, across, rounds = _plan(query)
    parts, stride = -(-channels // tile.columns), across * square.columns
    delta = torch.empty_like(lse)
    weight, slope = (query.new_empty(rounds[0].images * rounds[0].count * stride) for _ in range(2))
    sums = [query.new_empty((rounds[0].images, length, channels), dtype=torch.float32) for _ in results[1:]]
    # 16 rows of 256 channels in fp32 spill 24 bytes on sm_100 under Triton 3.6.
    _delta_kernel[(images * -(-length // 8),)](
        grad, out, delta, length, CHANNELS=channels, WIDTH=width_of(channels), ROWS=8, num_warps=4
    )
    # Strides are passed in units of 16: the compiler knows that rows begin on 32 bytes, without a variant for each.
    layout = {"CHANNELS": channels, "COLUMNS": tile.columns, "DEPTH": tile.depth, "ALIGNED": 16}
    warps = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    for begin, together, first, count in rounds:
        where = (length, begin, first, count)
        _weights_kernel[(together * -(-count // square.rows) * across,)](
            grad,
            query,
            key,
            key if value is None else value,
            lse,
            delta,
            weight,
            slope,
            *where,
            scale,
            CHANNELS=channels,
            QUERIES=square.rows,
            KEYS=square.columns,
            DEPTH=square.depth,
            num_warps=square.num_warps,
            num_stages=square.num_stages,
        )
        _grad_query_kernel[(together * -(-count // tile.rows) * parts,)](
            slope, key, results[0], *where, stride // 16, scale, QUERIES=tile.rows, **layout, **warps
        )
        for number, (left, right, factor) in enumerate(((slope, query, scale), (weight, grad, 1.0))):
            # Where keys are values, both products are added to one result.
            slot = 0 if value is None else number
            fresh = first == 0 and (number == 0 or value is not None)
            done = first + count == length and (number == 1 or value is not None)
            _grad_keys_kernel[(together * -(-length // tile.rows) * parts,)](
                left,
                right,
                sums[slot],
                results[1 + slot],
                *where,
                stride // 16,
                factor,
                int(fresh),
                int(done),
                KEYS=tile.rows,
                **layout,
                **warps,
            )
    return results
