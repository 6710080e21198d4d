"""Pillow's ``Image.resize(size, LANCZOS, box=...)``, then mirror and crop, of a ragged batch: uint8 [N, H, W, 3].

Every byte is Pillow's. Pictures of any sizes lie in one flat buffer; ``plan`` makes the tables of a launch on the CPU,
with weights in Pillow's roundings. Sums are integers, and values between the horizontal and the vertical pass have 8
bits. Pillow 13 begins with the vertical pass for a picture that loses more than twice as many lines as columns; every
other begins with the horizontal one. A pass that Pillow skips has one weight, of 1.
Traffic: the pixels that a crop needs read, 8-bit lines of its width written and read, the result written.
Source: Pillow, src/libImaging/Resample.c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae_kernels.parts.lanczos import BITS
from fastvae_kernels.parts.resize_tables import FIELDS, Crop, Tables, plan
from fastvae_kernels.shared.ops import fake, op
from fastvae_kernels.shared.runtime import Cost, size_in_bytes

__all__ = ["Crop", "Tables", "cost", "plan", "reference", "resize_lanczos"]


def reference(
    buffer: Tensor, rows: Tensor, blocks: Tensor, weights: Tensor, extent: int, columns: int, height: int, width: int
) -> Tensor:
    """Return resize_lanczos in torch's integer arithmetic."""
    _check(buffer, rows, blocks, weights, extent, columns, height, width)
    out = buffer.new_empty(rows.shape[0], height, width, 3)
    for index, row in enumerate(rows.tolist()):
        offset, stride, lines, between, _, vertical_first, x, x_taps, y, y_taps = row
        horizontal, vertical = _axis(weights, x, x_taps, width), _axis(weights, y, y_taps, height)
        if vertical_first:
            lines = int(vertical[0].max()) + y_taps
        else:
            between = int(horizontal[0].max()) + x_taps
        picture = torch.as_strided(buffer, (lines, between, 3), (stride, 3, 1), buffer.storage_offset() + offset)
        for along in (0, 1) if vertical_first else (1, 0):
            swapped = picture.transpose(0, along)
            picture = _weigh(swapped, *(horizontal if along else vertical)).transpose(0, along)
        out[index] = picture
    return out


def _axis(weights: Tensor, place: int, taps: int, outputs: int) -> tuple[Tensor, Tensor]:
    table = weights[place : place + (1 + taps) * outputs].view(1 + taps, outputs)
    return table[0], table[1:]


def _weigh(values: Tensor, first: Tensor, weights: Tensor) -> Tensor:
    """Return uint8 sums of values along their first axis, [outputs, ...]."""
    total = torch.full((len(first), *values.shape[1:]), 1 << (BITS - 1), dtype=torch.int32, device=values.device)
    for tap, weight in enumerate(weights):
        total += values[first + tap].int() * weight[:, None, None]
    return (total >> BITS).clamp_(0, 255).to(torch.uint8)


def cost(
    buffer: Tensor, rows: Tensor, blocks: Tensor, weights: Tensor, extent: int, columns: int, height: int, width: int
) -> Cost:
    """Return the cost: pixels that the crops need, those between the passes twice, the tables, the result."""
    moved, operations = size_in_bytes(rows, blocks, weights), 0
    for _, _, lines, between, _, vertical_first, x, x_taps, y, y_taps in rows.tolist():
        if vertical_first:
            lines_read, read = int(weights[y : y + height].max()) + y_taps, between
            taps = lines * between * y_taps + height * width * x_taps
        else:
            lines_read, read = lines, int(weights[x : x + width].max()) + x_taps
            taps = lines * between * x_taps + height * width * y_taps
        moved += 3 * (lines_read * read + 2 * lines * between + height * width)
        operations += 2 * 3 * taps
    return Cost(moved, operations, 2)


def _check(
    buffer: Tensor, rows: Tensor, blocks: Tensor, weights: Tensor, extent: int, columns: int, height: int, width: int
) -> None:
    if buffer.ndim != 1 or buffer.dtype != torch.uint8 or not buffer.is_contiguous():
        raise ValueError(f"buffer must be contiguous uint8 [bytes], got {buffer.dtype} of shape {tuple(buffer.shape)}")
    if buffer.shape[0] < extent:
        raise ValueError(f"buffer must have the {extent} bytes of its pictures, got {buffer.shape[0]}")
    if rows.ndim != 2 or rows.shape[1] != len(FIELDS) or rows.dtype != torch.int64:
        raise ValueError(f"rows must be int64 [N, {len(FIELDS)}], got {rows.dtype} of shape {tuple(rows.shape)}")
    if blocks.ndim != 2 or blocks.shape[1] != 2 or blocks.dtype != torch.int32:
        raise ValueError(f"blocks must be int32 [B, 2], got {blocks.dtype} of shape {tuple(blocks.shape)}")
    if weights.ndim != 1 or weights.dtype != torch.int32:
        raise ValueError(f"weights must be int32 [M], got {weights.dtype} of shape {tuple(weights.shape)}")
    if min(height, width) < 1:
        raise ValueError(f"height and width must be at least 1, got {height} and {width}")


@op
def resize_lanczos(
    buffer: Tensor, rows: Tensor, blocks: Tensor, weights: Tensor, extent: int, columns: int, height: int, width: int
) -> Tensor:
    """Return the crops of ``plan``'s tables, uint8 [N, height, width, 3]: ``resize_lanczos(buffer, *tables)``.

    buffer: uint8 [bytes], where the picture of a crop lies as [H, W, 3] from ``Crop.offset``. The other arguments are
    Tables', on the buffer's device: ``plan(crops, (height, width)).to(device)``; plan checks what they hold. Raises
    ValueError for a buffer shorter than ``extent``, and for other shapes and dtypes.
    """
    return reference(buffer, rows, blocks, weights, extent, columns, height, width)


@fake(resize_lanczos)
def _(buffer, rows, blocks, weights, extent, columns, height, width):
    _check(buffer, rows, blocks, weights, extent, columns, height, width)
    return buffer.new_empty(rows.shape[0], height, width, 3)
