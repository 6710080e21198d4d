"""Seconds of one call: device time on a GPU (CUDA events, a full queue), wall time on a CPU; contestants take turns.

Device time is what a call costs in a loop that keeps the GPU busy. A loop that waits for each result pays the wall time
of a synchronised call, with the launches: that is measured beside it.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

# A burst of calls takes about this long, so that an event's half microsecond does not matter, and has at most as many
# calls as fit the driver's queue of 1024 launches.
BURST_SECONDS, MOST_CALLS = 2e-3, 32
# Unit of torch.cuda._sleep; a faster clock only makes the sleep shorter.
CYCLES_PER_SECOND = 2e9


class Clock:
    """A clock that is advanced by the measured seconds, for pytest-benchmark to read."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def advance(self, seconds: float) -> None:
        """Add seconds to the clock."""
        self.seconds += seconds

    def now(self) -> float:
        """Return the seconds of the clock."""
        return self.seconds


CLOCK = Clock()


def median(seconds: Sequence[float]) -> float:
    """Return the median of the samples."""
    return statistics.median(seconds)


def spread(seconds: Sequence[float]) -> float:
    """Return half the distance between the quartiles, as a share of the median."""
    if len(seconds) < 3:
        return 0.0
    first, middle, third = statistics.quantiles(seconds, n=4)
    return (third - first) / 2 / middle


def interval(seconds: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the median, by the order of the samples; None for fewer than six."""
    from fastvae.report.timing import FEWEST_ROUNDS, median_interval

    return median_interval(seconds) if len(seconds) >= FEWEST_ROUNDS else None


class Stopwatch:
    """Times named contestants in turns. Each is a list of calls on different inputs, made one after the other."""

    def __init__(
        self, device: torch.device, rounds: int, now: Callable[[], float] = time.perf_counter, warm: bool = True
    ):
        self.device, self.rounds, self.now, self.warm = device, rounds, now, warm
        self.host_seconds: dict[str, float] = {}
        self._contestants: dict[str, tuple[Iterator[Callable[[], Any]], int]] = {}

    def warm_up(self, contestants: Mapping[str, Sequence[Callable[[], Any]]]) -> None:
        """Compile, fill the allocator, and choose the number of calls in a burst; earlier contestants are dropped."""
        self._contestants, self.host_seconds = {}, {}
        for name, calls in contestants.items():
            turns = itertools.cycle(calls)
            if self.warm or self.device.type == "cuda":
                next(turns)()
            self.host_seconds[name] = 0.0
            if self.device.type != "cuda":
                self._contestants[name] = turns, 1
                continue
            once = min(self._burst(name, turns, 1) for _ in range(2))
            count = max(1, min(MOST_CALLS, int(BURST_SECONDS / once)))
            self._contestants[name] = turns, count
            self._burst(name, turns, count)

    def one_round(self) -> dict[str, float]:
        """Return seconds of a call of each contestant; the order rotates from round to round."""
        names = list(self._contestants)
        taken = {name: self._burst(name, *self._contestants[name]) for name in names}
        # The first becomes the last, so that no contestant always follows the same one.
        self._contestants[names[0]] = self._contestants.pop(names[0])
        return taken

    def one_wall_round(self) -> dict[str, float]:
        """Return wall seconds of one call of each contestant, from an idle device to a finished one, in this order."""
        taken = {}
        for name, (turns, _) in self._contestants.items():
            self._wait()
            begin = self.now()
            next(turns)()
            self._wait()
            taken[name] = self.now() - begin
        return taken

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def interleaved(self, contestants: Mapping[str, Sequence[Callable[[], Any]]]) -> dict[str, list[float]]:
        """Warm up, and return the samples of all rounds."""
        self.warm_up(contestants)
        rounds = [self.one_round() for _ in range(self.rounds)]
        return {name: [taken[name] for taken in rounds] for name in contestants}

    def _burst(self, name: str, turns: Iterator[Callable[[], Any]], count: int) -> float:
        if self.device.type != "cuda":
            begin = self.now()
            for _ in range(count):
                next(turns)()
            self.host_seconds[name] = (self.now() - begin) / count
            return self.host_seconds[name]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        # The device sleeps until the host has queued the burst, so that launches follow each other without gaps.
        torch.cuda._sleep(int(1.5 * self.host_seconds[name] * count * CYCLES_PER_SECOND) + 100_000)
        start.record()
        begin = time.perf_counter()
        for _ in range(count):
            next(turns)()
        self.host_seconds[name] = (time.perf_counter() - begin) / count
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count
