"""Planner: the cheapest choice of what a run stores and what it computes again, within a budget; its memory.

A segment is a run of steps between two stored activations. *Fused*, nothing inside is stored: each norm inside takes
one more pass over the layers before it. *Split*, its last residual block stores its inner activation too, and no
convolution of that block runs twice. The result of a fused segment takes its source's place row by row, that of a split
segment the inner activation's. So a fused segment stores the larger of source and result, a split one both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

import torch

from fastvae.fast.cpu import attention
from fastvae.fast.tiled.bands import Stored, aligned
from fastvae.fast.tiled.chain import Chain
from fastvae.fast.tiled.operators import CpuOperators, statistics_bytes
from fastvae.fast.tiled.steps import Kind, Size, Step

# Values of a band for each thread: 1 MB in fp32. Smaller bands save memory, and cost calls.
BAND_VALUES = 2**18
MOST_ROWS, FEWEST_ROWS = 64, 4
# More products than these for a stored value: writing it, and reading it again.
STORE_COST = 20.0
# What torch's attention takes for each thread: 256 x 512 products, and 256 results of 512 channels.
ATTENTION_BYTES = 2**20
# What half of a band's height costs, as a share of a segment's cost.
SMALL_BAND_COST = 0.02


class Mode(StrEnum):
    """Kinds of segments, by what they store beside source and result."""

    FUSED = "fused"
    SPLIT = "split"
    ATTENTION = "attention"


@dataclass(frozen=True)
class Segment:
    """Steps [first, last) in bands of at most ``rows`` source rows, with their memory and cost."""

    first: int
    last: int
    mode: Mode
    rows: int
    stored: int
    """Values of stored activations, source and result included."""
    workspace: int = 0
    """Values of the rows that its stages keep."""
    other: int = 0
    """Bytes of operators, packed weights and statistics, and of the result of the last segment."""
    cost: float = 0.0


@dataclass(frozen=True)
class Plan:
    """The segments of one part for images of one size, in order, and what they take."""

    segments: tuple[Segment, ...]
    bytes: int
    """Bytes that a run takes beside its input, copies of frozen weights included."""
    cost: float


class _Path(NamedTuple):
    """Segments up to a step: values of the memory that is in use then, the most bytes so far, and the cost."""

    memory: int
    bytes: int
    cost: float
    segments: tuple[Segment, ...]

    def then(self, segment: Segment, source: int, itemsize: int) -> _Path:
        """Return the path with one more segment, whose source has so many values.

        Attention gets a memory of its own, into which its input is copied: what was used before is free then.
        """
        if segment.mode is Mode.ATTENTION:
            copied, attended = (self.memory + source) * itemsize, segment.stored * itemsize + segment.other
            memory, taken = source, max(copied, attended)
        else:
            memory = max(self.memory, segment.stored)
            taken = (memory + segment.workspace) * itemsize + segment.other
        return _Path(memory, max(self.bytes, taken), self.cost + segment.cost, (*self.segments, segment))


def plan(steps: Sequence[Step], operators: CpuOperators, budget: int, output: int = 0) -> Plan:
    """Return the cheapest plan whose bytes are at most ``budget``; if there is none, that of the fewest bytes.

    output: bytes of the result of one image.
    """
    segments = list(_segments(steps, operators, output))
    kept = operators.kept_bytes()
    found = _shortest(segments, steps, operators.dtype.itemsize, budget - kept)
    best = found or _shortest(segments, steps, operators.dtype.itemsize, None)
    assert best is not None
    return Plan(best.segments, best.bytes + kept, best.cost)


def _shortest(segments: Sequence[Segment], steps: Sequence[Step], itemsize: int, budget: int | None) -> _Path | None:
    """Return the path of the least cost within a budget, or without one that of the fewest bytes."""

    def weight(path: _Path) -> float:
        return path.cost if budget is not None else path.bytes

    by_first: dict[int, list[Segment]] = defaultdict(list)
    for segment in segments:
        by_first[segment.first].append(segment)
    reached: list[list[_Path]] = [[_Path(0, 0, 0.0, ())], *([] for _ in steps)]
    for place in range(len(steps)):
        source = steps[place].given.values
        for path in _not_worse(reached[place], weight):
            for segment in by_first[place]:
                longer = path.then(segment, source, itemsize)
                if budget is None or longer.bytes <= budget:
                    reached[segment.last].append(longer)
    return min(reached[-1], key=weight, default=None)


def _not_worse(paths: Sequence[_Path], weight: Callable[[_Path], float]) -> list[_Path]:
    """Return the paths of which no other has both less memory in use and less weight."""
    kept: list[_Path] = []
    for path in sorted(paths, key=lambda path: (path.memory, weight(path))):
        if not kept or weight(path) < weight(kept[-1]):
            kept.append(path)
    return kept


def _segments(steps: Sequence[Step], operators: CpuOperators, output: int) -> Iterator[Segment]:
    """Yield every segment that a plan may have."""
    for first, step in enumerate(steps):
        if step.kind is Kind.ATTENTION:
            yield _attention(first, step, operators.dtype.itemsize)
            continue
        for halvings, rows in enumerate(_heights(step)):
            weight = 1 + SMALL_BAND_COST * halvings
            for segment in _from(steps, first, rows, operators, output):
                yield replace(segment, cost=segment.cost * weight)


def _heights(step: Step) -> list[int]:
    """Return heights of bands, the best first, each half of the one before."""
    row = max(step.given.values, step.made.values) // step.given.height
    most = min(MOST_ROWS, max(FEWEST_ROWS, BAND_VALUES * torch.get_num_threads() // row))
    return [2**power for power in reversed(range(FEWEST_ROWS.bit_length() - 1, most.bit_length()))]


def _from(steps: Sequence[Step], first: int, rows: int, operators: CpuOperators, output: int) -> Iterator[Segment]:
    """Yield the segments that begin at a step, in bands of ``rows``."""
    source = Stored(None, steps[first].given, rows)
    begin = 0 if first == 0 else source.size.values
    chain = Chain(operators, source, norm_known=first > 0)
    for place, step in enumerate(steps[first:], first):
        if step.kind is Kind.ATTENTION:
            return
        if step.kind is Kind.RESNET:
            yield _split(chain, step, Segment(first, place + 1, Mode.SPLIT, rows, begin + step.made.values))
        chain.add(step)
        is_end = place + 1 == len(steps)
        made = 0 if is_end else step.made.values
        yield Segment(
            first,
            place + 1,
            Mode.FUSED,
            rows,
            max(begin, made),
            chain.stage.values,
            chain.stage.transient + chain.stage.packed + _statistics(chain, step.made) + (output if is_end else 0),
            sum(stage.cost for _, stage in chain.barriers) + chain.stage.cost + STORE_COST * made,
        )


def _split(chain: Chain, step: Step, segment: Segment) -> Segment:
    """Return the segment of the chain's steps and of a residual block that stores its inner activation."""
    before = len(chain.barriers)
    inner = chain.add_inner(step)
    outer = chain.add_outer(step, Stored(None, step.made, segment.rows))
    cost = sum(stage.cost for _, stage in chain.barriers) + inner.cost + outer.cost + 2 * STORE_COST * step.made.values
    other = max(inner.transient, outer.transient) + inner.packed + outer.packed + _statistics(chain, step.made)
    del chain.barriers[before:]
    chain.norm_known = before == 0 and segment.first > 0 and segment.last == segment.first + 1
    return replace(segment, workspace=max(inner.values, outer.values), other=other, cost=cost)


def _attention(first: int, step: Step, itemsize: int) -> Segment:
    """Return the segment of an attention layer, in place beside its keys and values."""
    tokens = step.given.pixels
    stored = aligned(step.given.values) + aligned(attention.keys_and_values(step.layer, tokens))
    other = attention.of_a_band(step.layer, tokens) * itemsize + ATTENTION_BYTES * torch.get_num_threads()
    return Segment(first, first + 1, Mode.ATTENTION, step.given.height, stored, 0, other + statistics_bytes(step.made))


def _statistics(chain: Chain, made: Size) -> int:
    """Return the bytes of the largest norm's sums in a chain, or of its result."""
    return max(map(statistics_bytes, (made, *(stage.size for _, stage in chain.barriers))))
