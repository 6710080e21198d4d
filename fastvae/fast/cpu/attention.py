"""Self-attention of one image on a CPU, in the image's own memory: keys and values whole, queries in bands of tokens.

Beside x [N, C] it takes keys and values and a few bands, where torch's layer takes ten copies of x. The size of a band
depends on N alone, so bits do not depend on the memory that is there.

In fp32 products are oneDNN's 1x1 convolutions: on an AMD CPU (Zen 5, two cores) 400 to 440 GFLOP/s, where MKL's matrix
product, which torch's attention and linear layers call, has 200.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.fast.layer_checks import Layer
from fastvae.fast.packed_weights import takes_onednn, weights_of

# torch's kernel takes 256 queries at once where there are 768 or more.
QUERIES, FEWEST, BANDS = 256, 1024, 8
# Scores that are there at once: 64 MB.
SCORES = 2**24


def queries_at_once(tokens: int) -> int:
    """Return the tokens of a band: an eighth of them, and at least 1024."""
    return max(FEWEST, -(-tokens // (BANDS * QUERIES)) * QUERIES)


def keys_and_values(layer: Layer, tokens: int) -> int:
    """Return the number of values of keys and values."""
    return 2 * tokens * _inner(layer)


def of_a_band(layer: Layer, tokens: int) -> int:
    """Return the number of values of one band: tokens, queries, results and their projections; in fp32 its scores too.

    oneDNN copies the keys, or the values, into a layout of its own.
    """
    queries = min(queries_at_once(tokens), tokens)
    band = queries * 3 * (_inner(layer) + layer.group_norm.num_channels)
    is_wide = layer.to_out[0].weight.dtype == torch.float32
    return band + (min(queries * tokens, max(SCORES, tokens)) + tokens * _inner(layer) if is_wide else 0)


def _inner(layer: Layer) -> int:
    return layer.to_out[0].weight.shape[1]


def attend(layer: Layer, x: Tensor, norm: Any, memory: Tensor | None = None) -> None:
    """Add attention(norm(x)) to x [N, C]. norm: the layer's, closed. memory: for keys and values, flat."""
    step, inner = queries_at_once(len(x)), _inner(layer)
    if memory is None:
        memory = x.new_empty(keys_and_values(layer, len(x)))
    keys, values = memory.view(2, -1)
    keys = keys.view(-1, inner)
    # oneDNN reads values as the weights of a convolution, [inner, N].
    values = values.view(inner, -1).T if _by_onednn(x) else values.view(-1, inner)
    query, key, value = weights_of(layer)
    tokens = x.new_empty(min(step, len(x)), x.shape[1])
    for band, k, v in zip(x.split(step), keys.split(step), values.split(step), strict=True):
        norm.apply(band, tokens[: len(band)], silu=False)
        for (weight, bias), to in ((key, k), (value, v)):
            _project(tokens[: len(band)], weight, bias, to)
    attended = _attention(keys, values)
    out = layer.to_out[0]
    for band in x.split(step):
        norm.apply(band, tokens[: len(band)], silu=False)
        y = attended(_linear(tokens[: len(band)], *query))
        band += _linear(y, out.weight, out.bias)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    if _by_onednn(x):
        y.copy_(_linear(x, weight, bias))  # y may be a transposed view
    elif bias is None:
        torch.mm(x, weight.T, out=y)
    else:
        torch.addmm(bias, x, weight.T, out=y)


def _attention(keys: Tensor, values: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the attention of queries [n, D] to keys and values [N, D]."""
    if not _by_onednn(keys):
        return lambda q: F.scaled_dot_product_attention(q[None, None], keys[None, None], values[None, None])[0, 0]
    columns, at_once = values.T.contiguous(), max(1, SCORES // len(keys))  # a view in ``attend``

    def attended(q: Tensor) -> Tensor:
        parts = (q * keys.shape[1] ** -0.5).split(at_once)
        return torch.cat([_linear(_softmax(_linear(part, keys)), columns) for part in parts])

    return attended


def _softmax(scores: Tensor) -> Tensor:
    """Return softmax of each row, in the scores' own memory: 64 MB fewer."""
    return torch.softmax(scores, 1, out=scores)


def _by_onednn(x: Tensor) -> bool:
    return x.dtype == torch.float32 and takes_onednn(x)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weight^T + bias for x [n, C] and weight [D, C]."""
    if not _by_onednn(x):
        return F.linear(x, weight, bias)
    y = F.conv2d(x.view(1, len(x), 1, -1).permute(0, 3, 1, 2), weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(len(x), -1)
