"""Tiles of x and vectors of a tile's channels, which GroupNorm's composite and its gradient share."""

from __future__ import annotations

from torch import Tensor

from fastvae_kernels.shared import statistics, tiles
from fastvae_kernels.shared.runtime import tl, triton


@triton.jit
def load_of_group(values_ptr, image, channel, CHANNELS: tl.constexpr, GROUPS: tl.constexpr):
    """Return the value [1, COLUMNS] that each channel's group has in values [N, GROUPS]."""
    return tl.load(values_ptr + image * GROUPS + channel // (CHANNELS // GROUPS), channel < CHANNELS, 0.0)[None, :]


@triton.jit
def load_vectors(
    weight_ptr, bias_ptr, conv_bias_ptr, mean_ptr, inverse_ptr, image, channel,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Return weight, bias, conv_bias (0 without one), mean and inverse of each channel, [1, COLUMNS].

    The caller adds conv_bias to x before it takes off the mean: their difference, rounded once for all pixels of a
    channel, would shift each of them alike.
    """
    inside = channel < CHANNELS
    weight = tl.load(weight_ptr + channel, inside, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, inside, 0.0).to(tl.float32)
    added = tl.zeros_like(bias)
    if conv_bias_ptr is not None:
        added += tl.load(conv_bias_ptr + channel, inside, 0.0).to(tl.float32)
    mean = load_of_group(mean_ptr, image, channel, CHANNELS, GROUPS)
    inverse = load_of_group(inverse_ptr, image, channel, CHANNELS, GROUPS)
    return weight[None, :], bias[None, :], added[None, :], mean, inverse


def pointwise(op: str, x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Return the grid over tiles of x, and the arguments that define a tile."""
    batch, channels, height, width = x.shape
    tile = tiles.choose(op, dtype=x.dtype, channels=channels, target=tiles.target_of(x.device))
    columns = statistics.block_columns(tile.columns, channels)
    chunks = triton.cdiv(height * width, tile.rows)
    named = {"chunks": chunks, "CHANNELS": channels, "ROWS": tile.rows, "COLUMNS": columns}
    grid = (batch * chunks * triton.cdiv(channels, columns),)
    return grid, named | {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
