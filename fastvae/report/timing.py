"""Seconds of one call as in a user's loop, contestants in turns, and the interval of their median."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

FEWEST_ROUNDS, MOST_ROUNDS = 6, 60
# A burst takes about this long and waits for the GPU once: the wait is negligible, the launches are included.
BURST_SECONDS, MOST_CALLS = 20e-3, 32


def synchronised(device: torch.device) -> None:
    """Wait until ``device`` has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def burst(call: Callable[[], Any], count: int, device: torch.device) -> float:
    """Return the mean wall seconds of ``count`` calls in a row, until the device has finished."""
    synchronised(device)
    begin = time.perf_counter()
    for _ in range(count):
        call()
    synchronised(device)
    return (time.perf_counter() - begin) / count


def interleaved(calls: Mapping[str, Callable[[], Any]], device: torch.device, budget: float) -> dict[str, list[float]]:
    """Return seconds of a call of each contestant, one sample a round: A B, B A, A B, for ``budget`` seconds.

    Call every contestant once before, so that nothing is compiled here. The rounds are at least FEWEST_ROUNDS, which an
    interval needs, and at most MOST_ROUNDS.
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
        # The first becomes the last, so that no contestant always follows the same one.
        order.append(order.pop(0))
    return samples


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the median, from the order of the samples.

    No distribution is assumed: the number of samples below the median is binomial. Raises ValueError for fewer than
    six samples: the smallest and the largest of five enclose the median with less than 95 %.
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
    """Return the median of the samples."""
    return statistics.median(samples)
