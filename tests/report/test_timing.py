"""Turns of contestants, and the interval of a median by the binomial distribution."""

import itertools
import math

import pytest
import torch

from fastvae.report import timing
from fastvae.report.timing import FEWEST_ROUNDS, MOST_ROUNDS, interleaved, median_interval


def coverage(n, cut):
    """Return the probability that the median is between the samples of rank cut and n - 1 - cut."""
    return 1 - 2 * sum(math.comb(n, k) for k in range(cut + 1)) / 2**n


@pytest.mark.parametrize("n", range(FEWEST_ROUNDS, MOST_ROUNDS + 1))
def test_the_interval_is_the_narrowest_that_holds_95_percent(n):
    low, high = median_interval([float(i) for i in reversed(range(n))])
    assert low + high == n - 1
    assert coverage(n, int(low)) >= 0.95
    assert coverage(n, int(low) + 1) < 0.95


def test_too_few_samples_have_no_interval():
    with pytest.raises(ValueError, match="samples must be at least 6 for an interval of 95 %, got 5"):
        median_interval([1.0] * 5)


@pytest.fixture
def watched(monkeypatch):
    """Calls in their order, and a clock on which each takes a fixed number of seconds."""
    calls, clock = [], itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))

    def take(seconds):
        for _ in range(seconds - 1):
            next(clock)

    return calls, {name: lambda name=name, s=s: (calls.append(name), take(s)) for name, s in (("a", 3), ("b", 5))}


def test_contestants_take_turns_and_none_is_always_first(watched):
    calls, contestants = watched
    samples = interleaved(contestants, torch.device("cpu"), budget=0)
    assert {name: len(taken) for name, taken in samples.items()} == {"a": FEWEST_ROUNDS, "b": FEWEST_ROUNDS}
    assert (set(samples["a"]), set(samples["b"])) == ({3.0}, {5.0})
    assert "".join(calls) == "ab" + "abba" * (FEWEST_ROUNDS // 2)


def test_rounds_end_with_the_budget_and_have_a_maximum(watched):
    _, contestants = watched
    few = interleaved(contestants, torch.device("cpu"), budget=100)
    # A round takes 8 seconds, and each reading of the clock takes one.
    assert FEWEST_ROUNDS < len(few["a"]) < 100 / 8
    assert len(interleaved(contestants, torch.device("cpu"), budget=1e9)["b"]) == MOST_ROUNDS


def test_on_a_gpu_short_calls_come_in_bursts(monkeypatch):
    calls, ticks = [], itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 1e-3 * next(ticks))
    monkeypatch.setattr(timing, "synchronised", lambda device: calls.append("wait"))
    samples = interleaved({"a": lambda: calls.append("a")}, torch.device("cuda"), budget=0)
    # One call takes one tick of the clock, so twenty fill a burst, without waiting between them.
    assert "".join(calls).startswith("waitawait" + "wait" + 20 * "a" + "wait")
    assert samples["a"] == pytest.approx([1e-3 / 20] * FEWEST_ROUNDS)


def test_no_calls():
    assert interleaved({}, torch.device("cpu"), budget=1) == {}
