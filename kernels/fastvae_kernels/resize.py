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
from fastvae_kernels.parts.resize_tables import FIELDS, LINES, Crop, Tables, plan
from fastvae_kernels.shared.ops import fake, kernel, op
from fastvae_kernels.shared.runtime import Cost, size_in_bytes, tl, triton

__all__ = ["Crop", "Tables", "cost", "launch", "plan", "reference", "resize_lanczos"]

# Bytes of a line that a program computes at a time, in LINES lines.
BLOCK, NUM_WARPS = 256, 4

_BITS, _HALF, _FIELDS = tl.constexpr(BITS), tl.constexpr(1 << (BITS - 1)), tl.constexpr(len(FIELDS))


def reference(
    buffer: Tensor, rows: Tensor, blocks: Tensor, weights: Tensor, extent: int, columns: int, height: int, width: int
) -> Tensor:
    """Return resize_lanczos in torch's integer arithmetic."""
    _check(buffer, rows, blocks, weights, extent, columns, height, width)
    out = buffer.new_empty(rows.shape[0], height, width, 3)
    for index, row in enumerate(rows.tolist()):
        offset, stride, lines, between, _, vertical_first, y, y_taps, x, x_taps = row
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
    for _, _, lines, between, _, vertical_first, y, y_taps, x, x_taps in rows.tolist():
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


@triton.jit
def _store(out_ptr, total, inside):
    # total is signed, so the shift rounds down.
    tl.store(out_ptr, tl.minimum(tl.maximum(total >> _BITS, 0), 255).to(tl.uint8), inside)


@triton.jit
def _horizontal(source_ptr, out_ptr, first_ptr, taps, outputs, stride, out_stride, line, lines, place, columns):
    column, colour, there = place // 3, place % 3, place < 3 * columns  # [BLOCK]
    inside = (line < lines)[:, None] & there[None, :]
    source_ptr += (line.to(tl.int64) * stride)[:, None]
    source_ptr += (3 * tl.load(first_ptr + column, there, 0) + colour)[None, :]  # [LINES, BLOCK]
    total = tl.full(source_ptr.shape, _HALF, tl.int32)
    for tap in range(taps):
        weight = tl.load(first_ptr + outputs * (1 + tap) + column, there, 0)
        total += tl.load(source_ptr + 3 * tap, inside, 0).to(tl.int32) * weight[None, :]
    _store(out_ptr + (line.to(tl.int64) * out_stride)[:, None] + place[None, :], total, inside)


@triton.jit
def _vertical(source_ptr, out_ptr, first_ptr, taps, outputs, stride, out_stride, line, lines, place, columns):
    there = line < lines  # [LINES]
    inside = there[:, None] & (place < 3 * columns)[None, :]
    first = tl.load(first_ptr + line, there, 0)
    source_ptr += (first.to(tl.int64) * stride)[:, None] + place[None, :]  # [LINES, BLOCK]
    total = tl.full(source_ptr.shape, _HALF, tl.int32)
    for tap in range(taps):
        weight = tl.load(first_ptr + outputs * (1 + tap) + line, there, 0)
        total += tl.load(source_ptr + tap * stride, inside, 0).to(tl.int32) * weight[:, None]
    _store(out_ptr + (line.to(tl.int64) * out_stride)[:, None] + place[None, :], total, inside)


@triton.jit(do_not_specialize=["height"])
def _pass_kernel(
    source_ptr, out_ptr, rows_ptr, blocks_ptr, weights_ptr, between, height, width,
    FIRST: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if FIRST:
        row, start = tl.load(blocks_ptr + 2 * program).to(tl.int64), tl.load(blocks_ptr + 2 * program + 1)
    else:
        steps = tl.cdiv(height, LINES)
        row, start = program // steps, (program % steps).to(tl.int32) * LINES
    line = start + tl.arange(0, LINES)  # [LINES]
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], bytes of a line
    rows_ptr += row * _FIELDS
    base, vertical = tl.load(rows_ptr + 4) * between, tl.load(rows_ptr + 5).to(tl.int32)
    if FIRST:
        source_ptr, out_ptr = source_ptr + tl.load(rows_ptr), out_ptr + base
        stride, out_stride = tl.load(rows_ptr + 1), between
        lines, columns = tl.load(rows_ptr + 2).to(tl.int32), tl.load(rows_ptr + 3).to(tl.int32)
    else:
        source_ptr, out_ptr = source_ptr + base, out_ptr + row * height * width * 3
        stride, out_stride, lines, columns, vertical = between, width * 3, height, width, 1 - vertical
    axis_ptr = rows_ptr + 8 - 2 * vertical
    first_ptr, taps = weights_ptr + tl.load(axis_ptr), tl.load(axis_ptr + 1).to(tl.int32)
    if vertical:
        _vertical(source_ptr, out_ptr, first_ptr, taps, height, stride, out_stride, line, lines, place, columns)
    else:
        _horizontal(source_ptr, out_ptr, first_ptr, taps, width, stride, out_stride, line, lines, place, columns)


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


@kernel(resize_lanczos)
def launch(
    buffer: Tensor, rows: Tensor, blocks: Tensor, weights: Tensor, extent: int, columns: int, height: int, width: int
) -> Tensor:
    """Run resize_lanczos without the dispatcher."""
    _check(buffer, rows, blocks, weights, extent, columns, height, width)
    out = buffer.new_empty(rows.shape[0], height, width, 3)
    if out.numel():
        # Lines of 16-byte multiples, so that the second pass loads 16 bytes at a time.
        between = -(-3 * columns // 16) * 16
        temporary = buffer.new_empty(blocks.shape[0] * LINES, between)
        tables = rows.contiguous(), blocks.contiguous(), weights.contiguous(), between, height, width
        constants = {"LINES": LINES, "BLOCK": BLOCK, "num_warps": NUM_WARPS}
        across = triton.cdiv(3 * columns, BLOCK)
        _pass_kernel[(blocks.shape[0], across)](buffer, temporary, *tables, FIRST=True, **constants)
        down, across = triton.cdiv(height, LINES), triton.cdiv(3 * width, BLOCK)
        _pass_kernel[(rows.shape[0] * down, across)](temporary, out, *tables, FIRST=False, **constants)
    return out


@fake(resize_lanczos)
def _(buffer, rows, blocks, weights, extent, columns, height, width):
    _check(buffer, rows, blocks, weights, extent, columns, height, width)
    return buffer.new_empty(rows.shape[0], height, width, 3)


def audit_cases():
    """Yield (name, call) of launches for the compile audit (bench/kernels/audit.py)."""
    for name, width in {"any width": 520, "a width of 16-byte lines": 512}.items():

        def call(width=width):
            buffer, weights = torch.empty(2**20, dtype=torch.uint8), torch.empty(2**16, dtype=torch.int32)
            rows, blocks = torch.empty(2, len(FIELDS), dtype=torch.int64), torch.empty(64, 2, dtype=torch.int32)
            launch(buffer, rows, blocks, weights, 2**20, width, 512, width)

        yield name, call
