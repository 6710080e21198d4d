"""Tables of a launch of resize_lanczos, made on the CPU: what the programs of each output read, by which weights.

``rows``, int64 [N, 10], has a row for each output, in the order of FIELDS. ``blocks``, int32 [B, 2], has an entry for
each LINES lines between the passes: the index of a row, and the first of the lines. ``weights``, int32, has for each
axis of each picture the first value of each output, then the weights [taps, outputs].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae_kernels.parts.lanczos import axis

LINES = 8
# offset: byte of the buffer where the pixels that the crop needs begin. stride: bytes of a line of the picture. lines,
# columns: size of the picture between the passes. base: its first line in the temporary. vertical_first: 1 or 0. y, x:
# place of each axis in ``weights``, and its taps.
FIELDS = ("offset", "stride", "lines", "columns", "base", "vertical_first", "y", "y_taps", "x", "x_taps")


@dataclass(frozen=True)
class Crop:
    """One output: a crop of a picture that is scaled and then mirrored, as fastvae/data/images/crop.py does.

    offset: the picture's first byte in the buffer, where it lies as uint8 [H, W, 3]; several crops may share it.
    size: its (H, W). scaled: (height, width) of the whole picture, or of its ``box``, after scaling. corner: (top,
    left) of the crop in the scaled and mirrored picture. box: (left, top, right, bottom) in pixels, as Pillow's
    ``Image.resize`` takes it; None is the whole picture.
    """

    offset: int
    size: tuple[int, int]
    scaled: tuple[int, int]
    corner: tuple[int, int] = (0, 0)
    mirrored: bool = False
    box: tuple[float, float, float, float] | None = None


class Tables(NamedTuple):
    """Arguments of resize_lanczos behind its buffer, in their order: ``resize_lanczos(buffer, *tables)``.

    extent: bytes that the buffer must have. columns: those of the widest picture between the passes. height, width:
    those of every output.
    """

    rows: Tensor
    blocks: Tensor
    weights: Tensor
    extent: int
    columns: int
    height: int
    width: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Tables:
        """Return the tables on this device."""
        rows, blocks, weights = (table.to(device, non_blocking=non_blocking) for table in self[:3])
        return self._replace(rows=rows, blocks=blocks, weights=weights)


def plan(crops: Sequence[Crop], size: tuple[int, int], pillow: int = 13) -> Tables:
    """Return the tables of these crops, each of ``size`` (height, width), on the CPU.

    ``pillow``: the major version whose order of passes is kept. From 13 on the vertical pass is first for a picture
    that loses more than twice as many lines as columns. Weights are cached by (old size, new size, box). Raises
    ValueError for a crop that is not inside its picture.
    """
    if min(size) < 1:
        raise ValueError(f"size must be (height, width) of at least 1 pixel, got {size}")
    axes: dict[_Wanted, _Outputs] = {}
    rows, pieces, length, base = [], [], 0, 0
    for crop in crops:
        _check(crop, size)
        keys = _axis_keys(crop, size)
        for key in keys:
            if key not in axes:
                axes[key] = _outputs(key, length)
                pieces += [axes[key].first, axes[key].weights.flatten()]
                length += sum(piece.numel() for piece in pieces[-2:])
        y, x = (axes[key] for key in keys)
        stride = 3 * crop.size[1]
        offset = crop.offset + y.begin * stride + 3 * x.begin
        first = pillow >= 13 and crop.size[0] - crop.scaled[0] > max(0, 2 * (crop.size[1] - crop.scaled[1]))
        between = (size[0], x.span) if first else (y.span, size[1])
        rows.append((offset, stride, *between, base, first, y.place, len(y.weights), x.place, len(x.weights)))
        base += -(-between[0] // LINES) * LINES
    table = torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, len(FIELDS))
    return Tables(
        table,
        _blocks(table[:, 2]),
        torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32, device="cpu"),
        max((crop.offset + 3 * crop.size[0] * crop.size[1] for crop in crops), default=0),
        max((row[3] for row in rows), default=0),
        *size,
    )


def _blocks(lines: Tensor) -> Tensor:
    counts = (lines + LINES - 1) // LINES
    starts = counts.cumsum(0) - counts
    # repeat_interleave and an index of two axes wake torch's threads, each of which then waits for 7 ms of CPU.
    row = torch.zeros(int(counts.sum()), dtype=torch.int64, device="cpu")
    row[starts[1:]] = 1
    row = row.cumsum(0)
    return torch.stack([row, (torch.arange(len(row), device="cpu") - starts[row]) * LINES], 1).int()


class _Outputs(NamedTuple):
    """Weights of some outputs of an axis, which read ``span`` values from ``begin``; ``first`` counts from there."""

    first: Tensor
    weights: Tensor
    begin: int
    span: int
    place: int


class _Wanted(NamedTuple):
    """``count`` outputs from ``corner`` on, of an axis whose values from ``low`` to ``high`` are scaled to ``new``."""

    old: int
    new: int
    low: float
    high: float
    corner: int
    count: int
    mirrored: bool


def _axis_keys(crop: Crop, size: tuple[int, int]) -> list[_Wanted]:
    """Return what is wanted of the lines and of the columns of a crop."""
    left, top, right, bottom = (0.0, 0.0, *reversed(crop.size)) if crop.box is None else crop.box
    return [
        _Wanted(crop.size[0], crop.scaled[0], top, bottom, crop.corner[0], size[0], False),
        _Wanted(crop.size[1], crop.scaled[1], left, right, crop.corner[1], size[1], crop.mirrored),
    ]


def _outputs(wanted: _Wanted, place: int) -> _Outputs:
    whole = axis(wanted.old, wanted.new, float(wanted.low), float(wanted.high))
    start = wanted.new - wanted.corner - wanted.count if wanted.mirrored else wanted.corner
    first, weights = (table[..., start : start + wanted.count] for table in whole)
    if wanted.mirrored:
        first, weights = first.flip(-1), weights.flip(-1)
    begin = int(first.min())
    return _Outputs(first - begin, weights, begin, int(first.max()) + len(weights) - begin, place)


def _check(crop: Crop, size: tuple[int, int]) -> None:
    if crop.offset < 0 or min(*crop.size, *crop.scaled) < 1:
        raise ValueError(f"a crop must have an offset of at least 0 and sizes of at least 1 pixel, got {crop}")
    if any(not 0 <= at <= new - count for at, new, count in zip(crop.corner, crop.scaled, size, strict=True)):
        raise ValueError(
            f"corner must leave (height, width) {size} inside the scaled size {crop.scaled}, got {crop.corner}"
        )
    if crop.box is not None:
        left, top, right, bottom = crop.box
        if not (0 <= left < right <= crop.size[1] and 0 <= top < bottom <= crop.size[0]):
            raise ValueError(f"box must be (left, top, right, bottom) inside (H, W) {crop.size}, got {crop.box}")
