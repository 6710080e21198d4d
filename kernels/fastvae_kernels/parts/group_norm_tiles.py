"""Tiles of x and vectors of a tile's channels, which GroupNorm's composite and its gradient share."""

from __future__ import annotations

from torch import Tensor

from fastvae_kernels.shared import statistics, tiles
from fastvae_kernels.shared.runtime import tl, triton


@triton.jit
def load_vectors(
    weight_ptr, bias_ptr, mean_ptr, inverse_ptr, image, channel, CHANNELS: tl.constexpr, GROUPS: tl.constexpr
):
    """Return weight, bias, mean and inverse of each channel, [1, COLUMNS]."""
    inside = channel < CHANNELS
    group = image * GROUPS + channel // (CHANNELS // GROUPS)
    weight = tl.load(weight_ptr + channel, inside, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, inside, 0.0).to(tl.float32)
    mean = tl.load(mean_ptr + group, inside, 0.0)
    inverse = tl.load(inverse_ptr + group, inside, 0.0)
    return weight[None, :], bias[None, :], mean[None, :], inverse[None, :]


def pointwise(op: str, x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Return the grid over tiles of x, and the arguments that define a tile."""
    batch, channels, height, width = x.shape
    tile = tiles.choose(op, dtype=x.dtype, channels=channels, target=tiles.target_of(x.device))
    columns = statistics.block_columns(tile.columns, channels)
    chunks = triton.cdiv(height * width, tile.rows)
    named = {"chunks": chunks, "CHANNELS": channels, "ROWS": tile.rows, "COLUMNS": columns}
    grid = (batch * chunks * triton.cdiv(channels, columns),)
    return grid, named | {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
