"""Attention up to 256 channels in one kernel: a program owns a tile of queries and walks the keys, P never in memory.

The exact online softmax: running maximum and sum in fp32, base-2 exponent; d is padded to a power of two by masks.
Traffic: q and out once, k and v once for every tile of queries (from L2: they are S * d elements an image).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae_kernels import tiles
from fastvae_kernels.attention_tiles import LN_2, LOG2_E, load_tile, place_of, store_tile, width_of
from fastvae_kernels.runtime import size_in_bytes, tl, triton

_LN_2 = tl.constexpr(LN_2)
_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit(do_not_specialize=["length"])
def _attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    lse_ptr,
    length,
    scale,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    image, tile, _ = place_of(tl.cdiv(length, QUERIES), 1)
    rows = tile * QUERIES + tl.arange(0, QUERIES)  # [QUERIES]
    base = image * length * CHANNELS
    key_ptr += base
    value_ptr += base
    query = load_tile(query_ptr + base, rows, length, WIDTH, CHANNELS)
    keys = tl.arange(0, KEYS)  # [KEYS], in the tile: the pointers walk on
    largest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, WIDTH], tl.float32)
    for start in range(0, length, KEYS):
        key = load_tile(key_ptr, keys, length - start, WIDTH, CHANNELS)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        scores = tl.where((keys < length - start)[None, :], scores * scale, -float("inf"))
        grown = tl.maximum(largest, tl.max(scores, axis=1))
        # To base 2 after the difference: logits of hundreds keep their last bits, and a lone key has weight 1.
        shrink = tl.exp2((largest - grown) * _LOG2_E)
        scores = tl.exp2((scores - grown[:, None]) * _LOG2_E)
        largest = grown
        total = total * shrink + tl.sum(scores, axis=1)
        if SHARED:
            value = key
        else:
            value = load_tile(value_ptr, keys, length - start, WIDTH, CHANNELS)
        weight = scores.to(value.dtype)
        out = tl.dot(weight, value, out * shrink[:, None], input_precision="ieee")
        key_ptr += KEYS * CHANNELS
        value_ptr += KEYS * CHANNELS
    store_tile(out_ptr + base, out / total[:, None], rows, length, WIDTH, CHANNELS)
    tl.store(lse_ptr + image * length + rows, largest + tl.log2(total) * _LN_2, mask=rows < length)


def attend(query: Tensor, key: Tensor, value: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention [N, S, d] and its log-sum-exp [N, S], of contiguous tensors; key serves as both where value is None."""
    images, length, channels = query.shape
    tile = tiles.choose("spatial_attention", dtype=query.dtype, channels=channels, target=tiles.target_of(query.device))
    out, lse = torch.empty_like(query), torch.empty((images, length), dtype=torch.float32, device=query.device)
    _attention_kernel[(images * -(-length // tile.rows),)](
        query,
        key,
        key if value is None else value,
        out,
        lse,
        length,
        scale,
        CHANNELS=channels,
        WIDTH=width_of(channels),
        SHARED=value is None,
        QUERIES=tile.rows,
        KEYS=tile.columns,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out, lse


def traffic(query: Tensor, shared: bool, target: tiles.Target) -> int:
    """The bytes that the programs load and store, each counting its own once: the formula is at attention.cost."""
    images, length, channels = query.shape
    tile = tiles.choose("spatial_attention", dtype=query.dtype, channels=channels, target=target)
    passes = 2 + (1 if shared else 2) * -(-length // tile.rows)
    return passes * size_in_bytes(query) + 4 * images * length
