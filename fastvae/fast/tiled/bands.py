"""Bands of rows that flow through layers. A band [rows, W, C] is valid until the next one is asked for.

Each 3x3 convolution keeps the rows that its next call needs again, so no halo is computed twice. It yields whole tiles
of its form, and the rest with the last band. A residual block keeps its input's rows until its output is there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastvae.fast.tiled.operators import BandConvolution
from fastvae.fast.tiled.steps import Size


class Workspace:
    """Memory of one pass: each stage takes its rows at its start, ``reset`` takes all of them back."""

    def __init__(self, values: Tensor):
        self.values, self.used = values, 0

    def take(self, rows: int, width: int, channels: int) -> Tensor:
        """Return unwritten rows [rows, W, C]."""
        count = rows * width * channels
        taken = self.values[self.used : self.used + count].view(rows, width, channels)
        self.used += aligned(count)
        return taken

    def reset(self) -> None:
        """Take everything back."""
        self.used = 0


def aligned(values: int) -> int:
    """Return the number of values from which a next tensor begins at 64 bytes, in any dtype."""
    return -(-values // 32) * 32


class Stage:
    """A source of bands of an activation of this ``size``, of at most ``most`` rows each.

    ``values`` of workspace, ``transient`` bytes of its largest call, ``packed`` bytes and ``cost`` in weighed products
    include those of the stages before it. A stage can be run again.
    """

    def __init__(self, size: Size, most: int, *before: Stage):
        self.size, self.most = size, min(most, size.height)
        self.values = sum(stage.values for stage in before)
        self.transient = max((stage.transient for stage in before), default=0)
        self.packed = sum(stage.packed for stage in before)
        self.cost: float = sum(stage.cost for stage in before)

    def bands(self, memory: Workspace, into: Tensor | None = None) -> Iterator[Tensor]:
        """Yield the bands from the first row to the last. into: rows [H, W, C] in which they may be computed."""
        raise NotImplementedError

    def _count(self, convolution: BandConvolution, made: Size, rows: int, width: int) -> None:
        self.transient = max(self.transient, convolution.transient_bytes(rows, width))
        self.packed += convolution.packed_bytes
        self.cost += convolution.cost(made)


class Stored(Stage):
    """The rows of a stored activation, or of a picture, [H, W, C]; None while a plan is made."""

    def __init__(self, rows: Tensor | None, size: Size, most: int):
        super().__init__(size, most)
        self.rows = rows

    def bands(self, memory: Workspace, into: Tensor | None = None) -> Iterator[Tensor]:
        assert self.rows is not None
        yield from self.rows.split(self.most)


class Residual:
    """Rows that a residual block adds at its end, kept from when they pass until then, and its shortcut.

    feed: the stage that gives them, if they do not pass by themselves (``put``).
    """

    def __init__(self, size: Size, waiting: int, shortcut: BandConvolution | None, feed: Stage | None = None):
        self.size, self.shortcut, self.feed = size, shortcut, feed
        self.capacity = waiting
        self.rows, self.count = torch.empty(0), 0
        self.source: Iterator[Tensor] = iter(())

    def begin(self, memory: Workspace) -> None:
        """Take memory for a pass."""
        self.rows, self.count = memory.take(self.capacity, self.size.width, self.size.channels), 0
        if self.feed is not None:
            self.source = self.feed.bands(memory)

    def put(self, band: Tensor) -> None:
        """Keep a band's rows."""
        self.rows[self.count : self.count + len(band)] = band
        self.count += len(band)

    def take(self, rows: int, y: Tensor) -> Tensor:
        """Return the next rows, behind the shortcut in y."""
        while self.count < rows:
            self.put(next(self.source))
        taken = self.rows[:rows]
        if self.shortcut is None:
            return taken
        self.shortcut(taken, y)
        return y

    def drop(self, rows: int) -> None:
        """Forget the next rows."""
        _shift(self.rows, rows, self.count)
        self.count -= rows


class Tap(Stage):
    """Bands that pass to the next stage and into a residual."""

    def __init__(self, source: Stage, residual: Residual):
        super().__init__(source.size, source.most, source)
        self.source, self.residual = source, residual

    def bands(self, memory: Workspace, into: Tensor | None = None) -> Iterator[Tensor]:
        for band in self.source.bands(memory):
            self.residual.put(band)
            yield band


class Convolved(Stage):
    """A 3x3 convolution, or nearest 2x and one, behind SiLU of a norm if there is one; adds a residual if there is one.

    norm: a function that returns it, closed.
    """

    def __init__(
        self,
        source: Stage,
        convolution: BandConvolution,
        norm: Any = None,
        residual: Residual | None = None,
    ):
        factor, size = convolution.factor, source.size
        made = Size(factor * size.height, factor * size.width, convolution.conv.out_channels)
        # Bands of whole tiles.
        self.rows = -(-source.most // convolution.tile) * convolution.tile
        super().__init__(made, factor * self.rows, source)
        self.source, self.convolution, self.norm, self.residual = source, convolution, norm, residual
        self.capacity = convolution.tile + 3 + source.most
        self.values += aligned(self.capacity * size.width * size.channels) + aligned(
            self.most * made.width * made.channels
        )
        self._count(convolution, made, self.rows, size.width)
        if norm is not None:
            self.cost += NORM_COST * size.values
        if residual is not None:
            self.values += aligned(residual.capacity * residual.size.width * residual.size.channels)
            if residual.shortcut is not None:
                self._count(residual.shortcut, made, self.rows, size.width)
            if residual.feed is not None:
                self.values += residual.feed.values
                self.cost += residual.feed.cost
                self.packed += residual.feed.packed
                self.transient = max(self.transient, residual.feed.transient)

    def bands(self, memory: Workspace, into: Tensor | None = None) -> Iterator[Tensor]:
        size, factor, tile = self.source.size, self.convolution.factor, self.convolution.tile
        window = memory.take(self.capacity, size.width, size.channels)
        out = memory.take(self.most, self.size.width, self.size.channels) if into is None else into
        if self.residual is not None:
            self.residual.begin(memory)
        window[0] = 0
        count, received, done = 1, 0, 0
        for band in self.source.bands(memory):
            self._receive(band, window[count : count + len(band)])
            count, received = count + len(band), received + len(band)
            is_last = received == size.height
            if is_last:
                window[count] = 0
                count += 1
            while True:
                ready = size.height - done if is_last else (received - 1 - done) // tile * tile
                rows = min(ready, self.rows)
                if rows <= 0:
                    break
                first = 0 if into is None else factor * done
                y = out[first : first + factor * rows]
                self._compute(window[: rows + 2], y)
                yield y
                _shift(window, rows, count)
                count, done = count - rows, done + rows

    def _receive(self, band: Tensor, to: Tensor) -> None:
        if self.norm is None:
            to.copy_(band)
        else:
            channels = self.source.size.channels
            self.norm().apply(band.view(-1, channels), to.view(-1, channels))

    def _compute(self, window: Tensor, y: Tensor) -> None:
        if self.residual is None:
            self.convolution(window, y)
            return
        self.convolution(window, y, self.residual.take(len(y), y))
        self.residual.drop(len(y))


class Downsampled(Stage):
    """A 3x3 convolution of stride 2 behind a row of zeros below and a column of zeros to the right."""

    def __init__(self, source: Stage, convolution: BandConvolution):
        size = source.size
        made = Size(size.height // 2, size.width // 2, convolution.conv.out_channels)
        self.tile = convolution.tile // 2
        # Bands of whole blocks.
        super().__init__(made, -(-source.most // convolution.tile) * self.tile, source)
        self.source, self.convolution = source, convolution
        self.capacity = convolution.tile + 4 + source.most
        self.values += aligned(self.capacity * (size.width + 1) * size.channels)
        self.values += aligned(self.most * made.width * made.channels)
        self._count(convolution, made, self.most, made.width)

    def bands(self, memory: Workspace, into: Tensor | None = None) -> Iterator[Tensor]:
        size, height = self.source.size, self.size.height
        window = memory.take(self.capacity, size.width + 1, size.channels)
        out = memory.take(self.most, self.size.width, self.size.channels) if into is None else into
        window[:, size.width] = 0
        count, received, done = 0, 0, 0
        for band in self.source.bands(memory):
            window[count : count + len(band), : size.width] = band
            count, received = count + len(band), received + len(band)
            if received == size.height:
                window[count] = 0
                count += 1
            while True:
                ready = (count - 1) // 2
                if received < size.height:
                    ready -= ready % self.tile
                rows = min(ready, self.most, height - done)
                if rows <= 0:
                    break
                first = 0 if into is None else done
                y = out[first : first + rows]
                self.convolution(window[: 2 * rows + 1], y)
                yield y
                _shift(window, 2 * rows, count)
                count, done = count - 2 * rows, done + rows


# What a norm costs for each value, in products of a direct convolution.
NORM_COST = 60.0


def _shift(rows: Tensor, first: int, count: int) -> None:
    """Move rows [first, count) to the beginning; both may overlap."""
    if first < count:
        move(rows, 0, rows[first:count])


def move(values: Tensor, to: int, given: Tensor) -> None:
    """Copy ``given``, contiguous and perhaps a piece of ``values``, to values[to:]."""
    target = values[to:]
    if given.device.type == "cpu":
        ctypes.memmove(target.data_ptr(), given.data_ptr(), given.numel() * given.itemsize)
    else:
        target[: len(given)] = given.clone()
