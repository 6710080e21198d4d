"""A plan carried out: activations lie in one memory, and each is written over the one that it is computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvae.fast.cpu import attention
from fastvae.fast.layer_checks import Layer
from fastvae.fast.tiled.bands import Stage, Stored, Workspace, aligned, move
from fastvae.fast.tiled.chain import Chain
from fastvae.fast.tiled.operators import CpuOperators, fresh
from fastvae.fast.tiled.planner import Mode, Plan, Segment
from fastvae.fast.tiled.steps import Size, Step


@dataclass
class Activation:
    """An activation in the memory of a run: its first value and its size."""

    first: int
    size: Size


class Run:
    """The segments of a plan, one by one, in one memory; attention has a memory of its own."""

    def __init__(self, steps: Sequence[Step], plan: Plan, operators: CpuOperators, dtype: torch.dtype):
        self.steps, self.plan, self.operators, self.dtype = steps, plan, operators, dtype
        self.memory = fresh(0, self.dtype)
        self.workspace = Workspace(self.memory)

    def image(self, picture: Tensor, result: Tensor) -> None:
        """Write the part's output for a picture [H, W, C] into result [H', W', C'], both in any strides."""
        activation: Activation | None = None
        for together in self._stretches():
            activation = self._begin(activation, max(segment.stored for segment in together))
            for segment in together:
                activation = self._segment(segment, picture, activation, result)
                self.operators.drop_weights()
        self.memory = fresh(0, self.dtype)
        self.workspace = Workspace(self.memory)

    def _stretches(self) -> list[list[Segment]]:
        """Return the segments in runs of one memory: those up to an attention layer, it alone, and so on."""
        stretches: list[list[Segment]] = []
        for segment in self.plan.segments:
            if not stretches or Mode.ATTENTION in (segment.mode, stretches[-1][-1].mode):
                stretches.append([])
            stretches[-1].append(segment)
        return stretches

    def _begin(self, activation: Activation | None, values: int) -> Activation | None:
        """Replace the memory by one of so many values that begins with the activation."""
        before, self.memory = self.memory, fresh(values, self.dtype)
        if activation is None:
            return None
        count = activation.size.values
        self.memory[:count] = before[activation.first : activation.first + count]
        return Activation(0, activation.size)

    def _segment(
        self, segment: Segment, picture: Tensor, activation: Activation | None, result: Tensor
    ) -> Activation | None:
        """Run a segment; return its result, or None for the last one, which writes it into ``result``."""
        steps, is_end = self.steps[segment.first : segment.last], segment.last == len(self.steps)
        norm = None if is_end else self.steps[segment.last].norm
        if segment.mode is Mode.ATTENTION:
            assert activation is not None
            self._attend(steps[0], activation, norm)
            return activation
        if activation is None:
            rows, size = picture, Size(*picture.shape)
        else:
            self._make_room(segment, steps[-1].made, activation)
            rows, size = self._rows(activation), activation.size
        self.workspace = Workspace(fresh(0, self.dtype))  # its memory first
        self.workspace = Workspace(fresh(segment.workspace, self.dtype))
        chain = Chain(self.operators, Stored(rows, size, segment.rows), norm_known=activation is not None)
        if segment.mode is Mode.SPLIT:
            return self._split(chain, steps, segment, activation, norm)
        made = None if is_end else self._place_over(activation, steps[-1].made)
        self._fused(chain, steps, result if made is None else self._rows(made), norm)
        return made

    def _fused(self, chain: Chain, steps: Sequence[Step], to: Tensor, norm: Layer | None) -> None:
        for step in steps:
            chain.add(step)
        self._settle(chain)
        self._store(chain.stage, to, norm)

    def _split(
        self, chain: Chain, steps: Sequence[Step], segment: Segment, activation: Activation | None, norm: Layer | None
    ) -> Activation:
        """Return the result of a segment that stores the inner activation of its last block, which it takes over."""
        *before, block = steps
        for step in before:
            chain.add(step)
        stage = chain.add_inner(block)
        self._settle(chain)
        inner = Activation(self._beside(activation, block.made.values), block.made)
        self._store(stage, self._rows(inner), block.layer.norm2)
        source = Stored(self._rows(inner), inner.size, segment.rows)
        self._store(chain.add_outer(block, source), self._rows(inner), norm)
        return inner

    def _settle(self, chain: Chain) -> None:
        """Compute the statistics of each norm inside, in a pass over the layers before it."""
        for norm, stage in chain.barriers:
            statistics = self.operators.begin_norm(norm, stage.size)
            for band in stage.bands(self.workspace):
                statistics.add(band.reshape(-1, stage.size.channels))
            statistics.close()
            self.workspace.reset()

    def _store(self, stage: Stage, to: Tensor, norm: Layer | None) -> None:
        """Write the bands of a stage to rows [H, W, C], and compute the statistics of the norm that reads them."""
        statistics = None if norm is None else self.operators.begin_norm(norm, stage.size)
        into = to if to.is_contiguous() else None
        done = 0
        for band in stage.bands(self.workspace, into):
            if into is None:
                to[done : done + len(band)] = band
            if statistics is not None:
                statistics.add(band.view(-1, stage.size.channels))
            done += len(band)
        if statistics is not None:
            statistics.close()
        self.workspace.reset()

    def _attend(self, step: Step, activation: Activation, norm: Layer | None) -> None:
        """Add attention to an activation in its place, and compute the statistics of the norm behind it."""
        count = attention.keys_and_values(step.layer, step.given.pixels)
        first = aligned(activation.size.values)
        tokens = self._rows(activation).view(-1, activation.size.channels)
        attention.attend(step.layer, tokens, self.operators.norms[step.norm], self.memory[first : first + count])
        if norm is not None:
            statistics = self.operators.begin_norm(norm, activation.size)
            statistics.add(tokens)
            statistics.close()

    def _make_room(self, segment: Segment, made: Size, source: Activation) -> None:
        """Move the source of a segment where its result, or its inner activation, fits over it, or beside it."""
        if segment.mode is Mode.SPLIT:
            if max(source.first, len(self.memory) - source.first - source.size.values) < made.values:
                self._move(source, 0)
        elif segment.last < len(self.steps) and made.values > source.size.values:
            self._move(source, len(self.memory) - source.size.values)

    def _place_over(self, source: Activation | None, made: Size) -> Activation:
        """Return the place of a fused segment's result: over its source, of rows that were read before."""
        if source is None:
            return Activation(0, made)
        return Activation(source.first + min(0, source.size.values - made.values), made)

    def _beside(self, source: Activation | None, values: int) -> int:
        """Return the first value of a place beside an activation."""
        return 0 if source is None or source.first >= values else len(self.memory) - values

    def _move(self, activation: Activation, first: int) -> None:
        end = activation.first + activation.size.values
        move(self.memory, first, self.memory[activation.first : end])
        activation.first = first

    def _rows(self, activation: Activation) -> Tensor:
        return self.memory[activation.first : activation.first + activation.size.values].view(activation.size)
