"""Self-attention of one image on a CPU, in the image's own memory: keys and values whole, queries in bands of tokens.

Beside x [N, C] it takes keys and values and a few bands, where torch's layer takes ten copies of x. The size of a band
depends on N alone, so bits do not depend on the memory that is there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.fast.layer_checks import Layer
from fastvae.fast.packed_weights import weights_of

# torch's kernel takes 256 queries at once where there are 768 or more.
QUERIES, FEWEST, BANDS = 256, 1024, 8


def queries_at_once(tokens: int) -> int:
    """Return the tokens of a band: an eighth of them, and at least 1024."""
    return max(FEWEST, -(-tokens // (BANDS * QUERIES)) * QUERIES)


def keys_and_values(layer: Layer, tokens: int) -> int:
    """Return the number of values of keys and values."""
    return 2 * tokens * _inner(layer)


def of_a_band(layer: Layer, tokens: int) -> int:
    """Return the number of values of one band: its tokens, queries, results and their projection."""
    return min(queries_at_once(tokens), tokens) * 2 * (_inner(layer) + layer.group_norm.num_channels)


def _inner(layer: Layer) -> int:
    return layer.to_out[0].weight.shape[1]


def attend(layer: Layer, x: Tensor, norm: Any, memory: Tensor | None = None) -> None:
    """Add attention(norm(x)) to x [N, C]. norm: the layer's, closed. memory: for keys and values, flat."""
    step, inner = queries_at_once(len(x)), _inner(layer)
    if memory is None:
        memory = x.new_empty(keys_and_values(layer, len(x)))
    keys, values = memory.view(2, -1, inner)
    query, key, value = weights_of(layer)
    tokens = x.new_empty(min(step, len(x)), x.shape[1])
    for band, k, v in zip(x.split(step), keys.split(step), values.split(step), strict=True):
        norm.apply(band, tokens[: len(band)], silu=False)
        for (weight, bias), to in ((key, k), (value, v)):
            _project(tokens[: len(band)], weight, bias, to)
    out = layer.to_out[0]
    for band in x.split(step):
        norm.apply(band, tokens[: len(band)], silu=False)
        q = F.linear(tokens[: len(band)], *query)
        y = F.scaled_dot_product_attention(q[None, None], keys[None, None], values[None, None])[0, 0]
        band += F.linear(y, out.weight, out.bias)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.T, out=y)
    else:
        torch.addmm(bias, x, weight.T, out=y)
