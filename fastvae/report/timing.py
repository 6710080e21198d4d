"""Seconds of one call as a user's loop would see them, rivals in turns, and how sure their median is."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

FEWEST_ROUNDS, MOST_ROUNDS = 6, 60
# A GPU is waited for once a burst of about this long: waiting then costs next to nothing, launching what it costs.
BURST_SECONDS, MOST_CALLS = 20e-3, 32


def synchronised(device: torch.device) -> None:
    """Wait until ``device`` has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def burst(call: Callable[[], Any], count: int, device: torch.device) -> float:
    """Seconds of one of ``count`` calls that follow each other, by the wall, until the device has finished."""
    synchronised(device)
    begin = time.perf_counter()
    for _ in range(count):
        call()
    synchronised(device)
    return (time.perf_counter() - begin) / count


def interleaved(calls: Mapping[str, Callable[[], Any]], device: torch.device, budget: float) -> dict[str, list[float]]:
    """Seconds of a call of each rival, one sample a round: A B, B A, A B, for ``budget`` seconds.

    Everything must have been called before, so that nothing is compiled here. Fewer than FEWEST_ROUNDS rounds, of
    which no interval can be told, are never made, however long they take, and more than MOST_ROUNDS neither.
    """
    counts = {}
    for name, call in calls.items():
        once = burst(call, 1, device)
        counts[name] = 1 if device.type == "cpu" else max(1, min(MOST_CALLS, int(BURST_SECONDS / once)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    begin = time.perf_counter()
    for number in range(MOST_ROUNDS if calls else 0):
        if number >= FEWEST_ROUNDS and time.perf_counter() - begin > budget:
            break
        for name in order:
            samples[name].append(burst(calls[name], counts[name], device))
        # Whoever came first now comes last: none is always behind the same neighbour.
        order.append(order.pop(0))
    return samples


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Where the true median lies with a probability of 95 %, by the order of the samples alone.

    No distribution is assumed: the number of samples below the median is binomial. Raises ValueError for fewer than
    six samples, of which even the smallest and the largest enclose it more seldom.
    """
    n = len(samples)
    if n < FEWEST_ROUNDS:
        raise ValueError(f"samples must be at least {FEWEST_ROUNDS} for an interval of 95 %, got {n}")
    below, cut = 0.5**n, 0
    while below + math.comb(n, cut + 1) * 0.5**n <= 0.025:
        cut += 1
        below += math.comb(n, cut) * 0.5**n
    ordered = sorted(samples)
    return ordered[cut], ordered[n - 1 - cut]


def median(samples: Sequence[float]) -> float:
    """The middle of the samples."""
    return statistics.median(samples)
