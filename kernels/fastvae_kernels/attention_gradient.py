"""Gradients of attention: dv = P^T do, dq = scale ds k, dk = scale ds^T q, for q, k, v [N, S, d].

P = exp(scale q k^T - lse), ds = P (do v^T - delta), delta = the sum over channels of do * out. At d = 512 the flash
form has no room (two accumulators of 512 channels and four operands), so a chunk of queries at a time P and ds are laid
down and plain products do the rest: every kernel is an ordinary tiled product, its sums in fp32, nothing added from two
programs. dk and dv are summed over the chunks in their order, in fp32. Memory is linear in the sequence.
Traffic: q, k, v, do, and P and ds [chunk, S] once written and read d / (columns of a tile) and twice that many times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae_kernels import tiles
from fastvae_kernels.attention_tiles import LOG2_E, load_tile, width_of
from fastvae_kernels.runtime import tl, triton

# Queries at a time, as in attention_long; and how many scores may lie in memory, so that small images go together.
CHUNK = 4096
SCORES = 2**26

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit(do_not_specialize=["length"])
def _delta_kernel(
    grad_ptr, out_ptr, delta_ptr, length, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    blocks = tl.cdiv(length, ROWS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    rows = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)  # [ROWS]
    grad_ptr += image * length * CHANNELS
    out_ptr += image * length * CHANNELS
    grad = load_tile(grad_ptr, rows, length, WIDTH, CHANNELS).to(tl.float32)
    delta = tl.sum(grad * load_tile(out_ptr, rows, length, WIDTH, CHANNELS).to(tl.float32), axis=1)
    tl.store(delta_ptr + image * length + rows, delta, mask=rows < length)


@triton.jit(do_not_specialize=["length", "first", "count"])
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
    first,
    count,
    scale,
    CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    across, down = tl.cdiv(length, KEYS), tl.cdiv(count, QUERIES)
    image = (tl.program_id(0) // (across * down)).to(tl.int64)
    rows = tl.program_id(0) // across % down * QUERIES + tl.arange(0, QUERIES)  # [QUERIES], in the chunk
    keys = tl.program_id(0) % across * KEYS + tl.arange(0, KEYS)  # [KEYS]
    depth = tl.arange(0, DEPTH)  # [DEPTH]
    row_place = (first + rows)[:, None] * CHANNELS + depth[None, :]
    key_place = keys[None, :] * CHANNELS + depth[:, None]
    query_ptr += image * length * CHANNELS
    grad_ptr += image * length * CHANNELS
    key_ptr += image * length * CHANNELS
    value_ptr += image * length * CHANNELS
    scores = tl.zeros([QUERIES, KEYS], tl.float32)
    slope = tl.zeros([QUERIES, KEYS], tl.float32)
    for start in range(0, CHANNELS, DEPTH):
        row_inside = (rows < count)[:, None] & (depth < CHANNELS - start)[None, :]
        key_inside = (keys < length)[None, :] & (depth < CHANNELS - start)[:, None]
        query = tl.load(query_ptr + start + row_place, mask=row_inside, other=0.0)
        key = tl.load(key_ptr + start + key_place, mask=key_inside, other=0.0)
        scores = tl.dot(query, key, scores, input_precision="ieee")
        grad = tl.load(grad_ptr + start + row_place, mask=row_inside, other=0.0)
        value = tl.load(value_ptr + start + key_place, mask=key_inside, other=0.0)
        slope = tl.dot(grad, value, slope, input_precision="ieee")
    place = image * length + first + rows
    lse = tl.load(lse_ptr + place, mask=rows < count, other=0.0)
    delta = tl.load(delta_ptr + place, mask=rows < count, other=0.0)
    inside = (rows < count)[:, None] & (keys < length)[None, :]
    weight = tl.exp2(tl.where(inside, scores * scale - lse[:, None], -float("inf")) * _LOG2_E)
    slope = tl.where(inside, weight * (slope - delta[:, None]), 0.0)
    # The tails are written as zeros: the products need no mask for them.
    out_place = (image * count + rows)[:, None] * (across * KEYS) + keys[None, :]
    tl.store(weight_ptr + out_place, weight.to(weight_ptr.dtype.element_ty), mask=(rows < count)[:, None])
    tl.store(slope_ptr + out_place, slope.to(slope_ptr.dtype.element_ty), mask=(rows < count)[:, None])


@triton.jit(do_not_specialize=["length", "first", "count", "stride"])
def _grad_query_kernel(
    slope_ptr,
    key_ptr,
    grad_query_ptr,
    length,
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
    across: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    down = tl.cdiv(count, QUERIES)
    image = (tl.program_id(0) // (across * down)).to(tl.int64)
    rows = tl.program_id(0) // across % down * QUERIES + tl.arange(0, QUERIES)  # [QUERIES], in the chunk
    channels = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    depth = tl.arange(0, DEPTH)  # [DEPTH]
    slope_ptr += (image * count + rows)[:, None] * (stride * ALIGNED) + depth[None, :]
    key_ptr += image * length * CHANNELS
    total = tl.zeros([QUERIES, COLUMNS], tl.float32)
    for start in range(0, length, DEPTH):
        slope = tl.load(slope_ptr + start, mask=(rows < count)[:, None], other=0.0)
        inside = (depth < length - start)[:, None] & (channels < CHANNELS)[None, :]
        key = tl.load(key_ptr + (start + depth)[:, None] * CHANNELS + channels[None, :], mask=inside, other=0.0)
        total = tl.dot(slope, key, total, input_precision="ieee")
    place = image * length * CHANNELS + (first + rows)[:, None] * CHANNELS + channels[None, :]
    inside = (rows < count)[:, None] & (channels < CHANNELS)[None, :]
    tl.store(grad_query_ptr + place, (total * scale).to(grad_query_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "first", "count", "stride", "fresh", "done"])
def _grad_keys_kernel(
    weight_ptr,
    matrix_ptr,
    total_ptr,
    result_ptr,
    length,
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
    # weight^T matrix over the chunk's queries: ds^T q or P^T do, on top of what earlier chunks left in total.
    across: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    down = tl.cdiv(length, KEYS)
    image = (tl.program_id(0) // (across * down)).to(tl.int64)
    keys = tl.program_id(0) // across % down * KEYS + tl.arange(0, KEYS)  # [KEYS]
    channels = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    depth = tl.arange(0, DEPTH)  # [DEPTH], queries in the chunk
    matrix_ptr += (image * length + first) * CHANNELS
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
    place = image * length * CHANNELS + keys[:, None] * CHANNELS + channels[None, :]
    inside = (keys < length)[:, None] & (channels < CHANNELS)[None, :]
    if fresh == 0:
        product += tl.load(total_ptr + place, mask=inside, other=0.0)
    if done == 0:
        tl.store(total_ptr + place, product, mask=inside)
    else:
        tl.store(result_ptr + place, product.to(result_ptr.dtype.element_ty), mask=inside)


def gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    chunk: int = CHUNK,
) -> list[Tensor]:
    """[dq, dk, dv] of contiguous [N, S, d], or [dq, dx] where ``value`` is None and key serves as both."""
    results = [torch.empty_like(query) for _ in range(2 if value is None else 3)]
    images, length, channels = query.shape
    if not query.numel():
        return results
    delta = torch.empty_like(lse)
    _delta_kernel[(images * -(-length // 16),)](
        grad, out, delta, length, CHANNELS=channels, WIDTH=width_of(channels), ROWS=16, num_warps=4
    )
    together = max(1, SCORES // (min(chunk, length) * length))
    for image in range(0, images, together):
        part = (0, image, min(together, images - image))
        _gradients_of(
            grad.narrow(*part),
            query.narrow(*part),
            key.narrow(*part),
            None if value is None else value.narrow(*part),
            lse.narrow(*part),
            delta.narrow(*part),
            [result.narrow(*part) for result in results],
            scale,
            chunk,
        )
    return results


def _gradients_of(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    results: list[Tensor],
    scale: float,
    chunk: int,
) -> None:
    images, length, channels = query.shape
    target, dtype = tiles.target_of(query.device), query.dtype
    square = tiles.choose("attention_weights", dtype=dtype, channels=channels, target=target)
    tile = tiles.choose("attention_product", dtype=dtype, channels=channels, target=target)
    across, parts, rows = -(-length // square.columns), -(-channels // tile.columns), min(chunk, length)
    stride = across * square.columns
    weight, slope = (torch.empty(images * rows * stride, dtype=dtype, device=query.device) for _ in range(2))
    totals = [torch.empty_like(result, dtype=torch.float32) for result in results[1:]]
    # Strides are handed over in units of 16, so that rows are known to begin on 32 bytes without a variant for each.
    layout = {"CHANNELS": channels, "COLUMNS": tile.columns, "DEPTH": tile.depth, "ALIGNED": 16}
    warps = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    for first in range(0, length, rows):
        count = min(rows, length - first)
        _weights_kernel[(images * -(-count // square.rows) * across,)](
            grad,
            query,
            key,
            key if value is None else value,
            lse,
            delta,
            weight,
            slope,
            length,
            first,
            count,
            scale,
            CHANNELS=channels,
            QUERIES=square.rows,
            KEYS=square.columns,
            DEPTH=square.depth,
            num_warps=square.num_warps,
            num_stages=square.num_stages,
        )
        _grad_query_kernel[(images * -(-count // tile.rows) * parts,)](
            slope, key, results[0], length, first, count, stride // 16, scale, QUERIES=tile.rows, **layout, **warps
        )
        for number, (left, right, factor) in enumerate(((slope, query, scale), (weight, grad, 1.0))):
            # Where keys are values, both products end in the one result.
            slot = 0 if value is None else number
            fresh = first == 0 and (number == 0 or value is not None)
            done = first + count == length and (number == 1 or value is not None)
            _grad_keys_kernel[(images * -(-length // tile.rows) * parts,)](
                left,
                right,
                totals[slot],
                results[1 + slot],
                length,
                first,
                count,
                stride // 16,
                factor,
                int(fresh),
                int(done),
                KEYS=tile.rows,
                **layout,
                **warps,
            )
