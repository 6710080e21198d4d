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


def test_the_wall_time_is_that_of_synchronised_calls(monkeypatch):
    """A call that queues 2 ms of work in 0.5 ms takes 2.5 ms of the wall; the next contestant finds an idle device."""
    clock, queued = [0.0], [0.0]

    def call(host, device):
        clock[0] += host
        queued[0] += device

    def synchronize(device):
        clock[0], queued[0] = clock[0] + queued[0], 0.0

    watch = stopwatch.Stopwatch(torch.device("cuda"), rounds=5, now=lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    turns = {"a": (iter([lambda: call(5e-4, 2e-3)] * 2), 8), "b": (iter([lambda: call(1e-3, 1e-4)] * 2), 8)}
    watch._contestants = turns
    queued[0] = 1.0  # what came before is not counted
    for _ in range(2):
        assert watch.one_wall_round() == {"a": pytest.approx(2.5e-3), "b": pytest.approx(1.1e-3)}


def test_a_dry_run_calls_each_once():
    """In the interpreter a call takes seconds, and nobody reads its time; a measurement has a call before the first."""
    called = []
    for warm, calls in ((True, 2), (False, 1)):
        called.clear()
        watch = stopwatch.Stopwatch(torch.device("cpu"), rounds=1, warm=warm)
        samples = watch.interleaved({"one": [lambda: called.append(1)]})
        assert len(called) == calls
        assert len(samples["one"]) == 1
