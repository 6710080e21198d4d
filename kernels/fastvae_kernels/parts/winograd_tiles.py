"""Tiles of an image for Winograd's convolution: how many, in which groups, and what is computed at a time.

A tile is m x m results, from a window of (m + 2) x (m + 2) pixels. The tiles of an image are counted row by row, in
groups of about 128 results; the last group of an image is filled with empty tiles, so that no group has tiles of two
images. A strip is a number of groups, counted through the batch, whose transformed windows and products fit in the
workspace.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastvae_kernels.shared.runtime import tl, triton
from fastvae_kernels.shared.winograd_matrices import F2, F4, Winograd

PRODUCTS = tuple(form.window**2 for form in (F2, F4))
GROUP = 128
INPUT2, INPUT4 = tl.constexpr(F2.input), tl.constexpr(F4.input)
OUTPUT2, OUTPUT4 = tl.constexpr(F2.output), tl.constexpr(F4.output)


class Tiling(NamedTuple):
    """Tiles of one image: ``across`` in a row, ``down`` rows, in ``groups`` groups of ``size`` tiles."""

    across: int
    down: int
    groups: int
    size: int


def form_of(products: int) -> Winograd:
    """Return the form that has so many products a tile, one of PRODUCTS."""
    return F4 if products == F4.window**2 else F2  # not by a dictionary: in a trace the number may be symbolic


def tiling(form: Winograd, height: int, width: int) -> Tiling:
    """Return the tiles of an image of height x width results."""
    across, down = -(-width // form.tile), -(-height // form.tile)
    size = GROUP // form.tile**2
    return Tiling(across, down, -(-across * down // size), size)


def strips(groups: int, group_bytes: int, workspace: int) -> list[tuple[int, int]]:
    """Return (first group, groups) of each strip, as equal as can be; a strip has at least one group."""
    most = max(1, workspace // group_bytes)
    count = -(-groups // most)
    size = -(-groups // count) if count else 1
    return [(first, min(size, groups - first)) for first in range(0, groups, size)]


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the products for an image of ``dtype``: fp16 for half precision, else its own.

    bf16 has 8 bits, and the transforms would multiply its rounding; fp16 has 11.
    """
    return torch.float16 if dtype == torch.bfloat16 else dtype


@triton.jit
def combined(values, MATRIX: tl.constexpr, ROW: tl.constexpr):
    """Return the sum of ``values`` times row ROW of a matrix; a coefficient of 0 costs nothing."""
    total = tl.full(values[0].shape, -0.0, tl.float32)  # x + -0.0 is x, which the compiler may drop
    for index in tl.static_range(len(MATRIX[ROW])):
        if MATRIX[ROW][index] != 0:
            total = tl.fma(values[index], MATRIX[ROW][index], total)
    return total


@triton.jit
def places(group, across, down, start, TILE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Return (line, column, inside) [ROWS, 1] of the first results of the tiles from ``start`` on in a group."""
    tile = (group * GROUP + start).to(tl.int32) + tl.arange(0, ROWS)[:, None]
    return tile // across * TILE, tile % across * TILE, tile < across * down
