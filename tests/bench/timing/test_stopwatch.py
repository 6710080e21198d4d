"""Stopwatch with a simulated device and clock."""

import pytest
import torch

from bench.timing import stopwatch


def test_the_stopwatch_on_a_gpu(monkeypatch):
    """Arithmetic with a device that takes 3 ms for a call of one contestant and 0.1 ms for the other's."""
    seconds = [0.0]

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = seconds[0]

        def synchronize(self):
            assert self.at is not None

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    def call(taken):
        seconds[0] += taken

    slept = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    watch = stopwatch.Stopwatch(torch.device("cuda"), rounds=5)
    samples = watch.interleaved({"slow": [lambda: call(3e-3)] * 2, "fast": [lambda: call(1e-4)]})
    assert samples == {"slow": pytest.approx([3e-3] * 5), "fast": pytest.approx([1e-4] * 5)}
    assert len(slept) == 2 * (3 + 5), "the queue is filled before every burst"


def test_a_dry_run_calls_each_once():
    """In the interpreter a call takes seconds, and nobody reads its time; a measurement has a call before the first."""
    called = []
    for warm, calls in ((True, 2), (False, 1)):
        called.clear()
        watch = stopwatch.Stopwatch(torch.device("cpu"), rounds=1, warm=warm)
        samples = watch.interleaved({"one": [lambda: called.append(1)]})
        assert len(called) == calls
        assert len(samples["one"]) == 1
