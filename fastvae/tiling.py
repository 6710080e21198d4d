"""Blended tiling: plans of tiles that cover an image, and the mixture of their overlaps, bit for bit as in diffusers.

Along each axis a tile starts at every stride. ``limit`` rows of each result are kept; its first ``blend`` rows are a
linear mixture with the last rows of the tile before. Source: AutoencoderKL._tiled_encode and tiled_decode of
diffusers.models.autoencoders.autoencoder_kl.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TilePlan:
    """Tiles of one axis: ``tile`` and ``stride`` in input elements, ``blend`` and ``limit`` in output elements."""

    tile: int
    stride: int
    blend: int
    limit: int
    slivers: bool = True

    @classmethod
    def of(cls, tile: int, output_tile: int, overlap_factor: float, slivers: bool = True) -> TilePlan:
        """Return the plan for tiles of ``tile`` elements that become ``output_tile``, overlap ``overlap_factor``.

        Raises ValueError if such tiles do not advance.
        """
        stride = int(tile * (1 - overlap_factor))
        blend = int(output_tile * overlap_factor)
        if stride < 1 or output_tile < 1 or not 0 <= overlap_factor < 1:
            raise ValueError(
                f"tiles of {tile} (giving {output_tile}) with tile_overlap_factor={overlap_factor} do not advance: "
                "take a factor of at least 0 and under 1, and a larger tile size"
            )
        return cls(tile, stride, blend, output_tile - blend, slivers)

    def starts(self, size: int) -> list[int]:
        """Return the starts of the tiles on an axis of ``size`` elements.

        Without slivers, a tile that is wholly inside the one before is left out, so that every tile is wider than the
        overlap.
        """
        starts = list(range(0, size, self.stride))
        if not self.slivers:
            starts = [start for start in starts if start == 0 or start - self.stride + self.tile < size]
        return starts


def apply_tiled(function: Callable[[Tensor], Tensor], x: Tensor, plan: TilePlan) -> Tensor:
    """Apply ``function`` to overlapping tiles of ``x`` [B, C, H, W], and blend them into one result [B, C', H', W']."""
    tops, lefts = plan.starts(x.shape[2]), plan.starts(x.shape[3])
    bands: list[Tensor] = []
    above: list[Tensor] = []
    for i, top in enumerate(tops):
        row: list[Tensor] = []
        for j, left in enumerate(lefts):
            tile = function(x[:, :, top : top + plan.tile, left : left + plan.tile])
            if i > 0:
                tile = blend(above[j], tile, plan.blend, dim=2)
            if j > 0:
                tile = blend(row[j - 1], tile, plan.blend, dim=3)
            row.append(tile)
        kept = [_kept(tile, plan, dim=3, last=j == len(lefts) - 1) for j, tile in enumerate(row)]
        bands.append(_kept(torch.cat(kept, dim=3), plan, dim=2, last=i == len(tops) - 1))
        above = row
    return torch.cat(bands, dim=2)


def blend(before: Tensor, tile: Tensor, extent: int, dim: int) -> Tensor:
    """Return ``tile`` [B, C, H, W], its first ``extent`` rows (dim 2) or columns (dim 3) faded in over those before.

    ``before``: the tile whose last rows or columns overlap them.
    """
    extent = min(before.shape[dim], tile.shape[dim], extent)
    if extent == 0:
        return tile
    fade = torch.arange(extent, dtype=torch.float64, device=tile.device) / extent
    fade = fade.view([-1 if axis == dim else 1 for axis in range(tile.ndim)])
    # Half-precision products are rounded before the sum, with weights in fp32, as torch does for a Python scalar.
    wide = torch.promote_types(tile.dtype, torch.float32)
    old = (before.narrow(dim, before.shape[dim] - extent, extent).to(wide) * (1 - fade).to(wide)).to(tile.dtype)
    new = (tile.narrow(dim, 0, extent).to(wide) * fade.to(wide)).to(tile.dtype)
    # A copy has the tile's strides, on which the last bits of later computations depend.
    blended = tile.clone()
    blended.narrow(dim, 0, extent).copy_(old + new)
    return blended


def _kept(tile: Tensor, plan: TilePlan, dim: int, last: bool) -> Tensor:
    # With slivers the next tiles have the rows beyond the limit; without them the last tile keeps all of its rows.
    limit = tile.shape[dim] if last and not plan.slivers else min(plan.limit, tile.shape[dim])
    return tile.narrow(dim, 0, limit)
