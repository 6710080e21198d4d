"""Tiles of a [length, CHANNELS] matrix, rounds of launches and checks, which the attention kernels share.

A tile is [ROWS, WIDTH], WIDTH the power of two that holds the channels; values outside the matrix read as zero and are
never written. A round is as many images as fit in WORKSPACE with a chunk of their queries each.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae_kernels.shared.runtime import tl, triton

MOST_CHANNELS = 512
LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# 4096 queries of one image make 128 programs of a product at d = 512: one wave of 132 multiprocessors. In half
# precision the scores of a chunk are then 8 KiB for each key, 512 MiB at 65,536 keys: linear in the sequence.
CHUNK = 4096
# Bytes that a round may write to its workspace, or one chunk of one image if that alone is more: at 4096 tokens in half
# precision a batch of eight is one round of three launches instead of eight. Larger rounds gain nothing: each product
# is then a thousand programs.
WORKSPACE = 256 * 2**20


class Round(NamedTuple):
    """One round: ``images`` images from ``begin`` on, with ``count`` queries of each from ``first`` on."""

    begin: int
    images: int
    first: int
    count: int


def rounds_of(images: int, length: int, row_bytes: int, image_bytes: int = 0) -> list[Round]:
    """Return the rounds in order, the largest first, from the bytes that a query and an image need in the workspace."""
    rows = max(1, min(CHUNK, length))
    together = max(1, min(images, WORKSPACE // max(1, rows * row_bytes + image_bytes)))
    return [
        Round(begin, min(together, images - begin), first, min(rows, length - first))
        for begin in range(0, images, together)
        for first in range(0, length, rows)
    ]


@triton.jit
def place_of(down, across):
    """Return (image, tile down, tile across) of this program in a grid of images x down x across; image is int64."""
    program = tl.program_id(0)
    return (program // (down * across)).to(tl.int64), program // across % down, program % across


@triton.jit
def load_tile(ptr, rows, length, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the rows of a matrix as [ROWS, WIDTH]; int32 is enough, since length * CHANNELS is below 2^31."""
    channels = tl.arange(0, WIDTH)
    inside = (rows < length)[:, None]
    if CHANNELS < WIDTH:
        inside &= (channels < CHANNELS)[None, :]
    return tl.load(ptr + rows[:, None] * CHANNELS + channels[None, :], mask=inside, other=0.0)


@triton.jit
def add_product(left, right, total):
    """Return total + left right in fp32, for the argument of an exponential.

    fp32 values as a sum of sums: tl.dot with an accumulator, or with a plain + after it, becomes one chain of
    multiply-adds, and the error of a chain of 512 is three times as large (an H100, logits of hundreds).
    """
    return (
        tl.fma(tl.dot(left, right, input_precision="ieee"), 1.0, total)
        if left.dtype == tl.float32
        else tl.dot(left, right, total, input_precision="ieee")
    )


def width_of(channels: int) -> int:
    """Return the power of two that holds the channels, at least the 16 that tl.dot takes."""
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
