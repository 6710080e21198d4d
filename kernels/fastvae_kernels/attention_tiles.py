"""What the attention kernels share: tiles of a [length, CHANNELS] matrix in memory, and what the ops take.

A tile is [ROWS, WIDTH], WIDTH the power of two that holds the channels; what lies outside reads as zero and is never
written.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvae_kernels.runtime import tl, triton

MOST_CHANNELS = 512
LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def load_tile(ptr, rows, length, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    """The rows of a matrix as [ROWS, WIDTH]; int32 is enough, since length * CHANNELS stays below 2^31."""
    channels = tl.arange(0, WIDTH)
    inside = (rows < length)[:, None]
    if CHANNELS < WIDTH:
        inside &= (channels < CHANNELS)[None, :]
    return tl.load(ptr + rows[:, None] * CHANNELS + channels[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(ptr, tile, rows, length, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    """The rows [ROWS, WIDTH] of a matrix, in the dtype of the pointer."""
    channels = tl.arange(0, WIDTH)
    inside = (rows < length)[:, None] & (channels < CHANNELS)[None, :]
    place = ptr + rows[:, None] * CHANNELS + channels[None, :]
    tl.store(place, tile.to(ptr.dtype.element_ty), mask=inside)


def width_of(channels: int) -> int:
    """The power of two that holds the channels, at least the 16 that tl.dot takes."""
    return max(16, 2 ** math.ceil(math.log2(channels)))


def check(query: Tensor, **others: Tensor) -> None:
    """Raise ValueError unless all are [N, S, d] alike, d a multiple of 8 up to 512 and S * d below 2^31."""
    if query.ndim != 3:
        raise ValueError(f"query must be [N, S, d], got shape {tuple(query.shape)}")
    _, length, channels = query.shape
    if channels % 8 or not 8 <= channels <= MOST_CHANNELS:
        raise ValueError(f"query must have a multiple of 8 up to {MOST_CHANNELS} channels, got {channels}")
    if length * channels >= 2**31:
        raise ValueError(f"query must have fewer than 2^31 elements a row, got {length} x {channels}")
    if query.dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"query must be float32, float16, bfloat16 or float64, got {query.dtype}")
    for name, other in others.items():
        if other.shape != query.shape or other.dtype != query.dtype:
            raise ValueError(
                f"{name} must be like query, {query.dtype} of shape {tuple(query.shape)}, "
                f"got {other.dtype} of shape {tuple(other.shape)}"
            )
