"""Measurement of an encoder or decoder case: checks every contestant, then times all in turns; one row each.

A contestant that is missing, fails or is wrong has a row with the reason and no time, and the case fails at its end.
One that takes no part has a row with the reason, and the case passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fastvae_kernels.shared.runtime import Cost
from support.accuracy import assert_as_accurate  # pyright: ignore[reportMissingImports]  (tests/ is on the path)

from bench.timing.cases import Network
from bench.timing.contestants import COMPARED, CONTESTANTS, EAGER, Job, LeftOut, Ready
from bench.timing.gate import in_full, sets_beyond_cache, truth_dtype
from bench.timing.stopwatch import CLOCK, Stopwatch, interval, median
from fastvae.checkpoints.presets import PRESETS
from fastvae.fast.survey import Survey
from fastvae.models import AutoencoderKL

# A case is measured for about this long, but in no fewer rounds than an interval of 95 % needs.
CASE_SECONDS, FEWEST_ROUNDS = 50.0, 7
# Limit for a truth in float64 on a GPU: at most two rows are compared.
MOST_FLOPS_IN_FLOAT64 = 10**13


class Line:
    """Contestants of one case, prepared and checked one after the other."""

    def __init__(self, job: Job, costs: Sequence[Cost]):
        self.job, self.rows, self.calls = job, {}, {}
        self.inputs = job.inputs()
        self.picked = sorted({0, job.case.batch - 1})  # rows that are compared
        flops = sum(cost.flops for cost in costs) * len(self.picked) // job.case.batch
        widest = 128 * job.case.side**2 * len(self.picked)
        self.wide = truth_dtype(widest, flops, job.device, MOST_FLOPS_IN_FLOAT64)
        self.truth = self._truth()
        self.yardstick: torch.Tensor | None = None
        self.sets = sets_beyond_cache(self.inputs.numel() * self.inputs.element_size(), job.device)

    def _truth(self) -> torch.Tensor:
        call = self.job.call(self.job.copy().to(self.wide))
        # One image after another: a batch in float64 might not fit.
        return torch.cat([in_full(lambda i=i: call(self.inputs[i : i + 1].to(self.wide)))[0] for i in self.picked])

    def admit(self, name: str, factory: Callable[[Job], Ready]) -> None:
        """Prepare and check a contestant; record its error and memory, or the reason why it has no time."""
        before = self._memory(reset=True)
        try:
            ready = factory(self.job)
            result = ready.result(ready.run(ready.given(self.inputs)))[self.picked].to(self.inputs.device)
            error = self._error(result)
            if name in EAGER and (self.yardstick is None or error > self._error(self.yardstick)):
                # The tolerance of the others: eager's error, in the layout where it is larger.
                self.yardstick = result
            assert self.yardstick is not None, "there is no eager result to compare with"
            assert_as_accurate(result, self.yardstick, self.truth)
            peak = self._peak(ready, before)
        except LeftOut as reason:
            self.rows[name] = {"left_out": str(reason)}
        except Exception as error:  # noqa: BLE001  any failure is the reason in its row, and the run fails
            lines = str(error).strip().splitlines() or ["no message"]
            self.rows[name] = {"failed": f"{type(error).__name__}: {lines[0]}"[:300]}
        else:
            self.rows[name] = {"error": error, "peak_bytes": peak}
            given = [ready.given(self.inputs.clone()) for _ in range(self.sets)]
            self.calls[name] = [lambda x=x: ready.run(x) for x in given]

    def _error(self, result: torch.Tensor) -> float:
        """Return the rms error as a share of the truth's standard deviation."""
        return ((result.double() - self.truth).square().mean().sqrt() / self.truth.std()).item()

    def _peak(self, ready: Ready, before: int | None) -> int | None:
        """Return the bytes that a call needs, with weights and graphs; None on a CPU, where torch does not count."""
        if before is None:
            return None
        x = ready.given(self.inputs)
        self._memory(reset=True)
        ready.run(x)
        torch.cuda.synchronize(self.job.device)
        return torch.cuda.max_memory_allocated(self.job.device) - before

    def _memory(self, reset: bool) -> int | None:
        if self.job.device.type != "cuda":
            return None
        if reset:
            torch.cuda.reset_peak_memory_stats(self.job.device)
        return torch.cuda.memory_allocated(self.job.device)


@torch.no_grad()
def measure(
    case: Network, device: torch.device, roof: Mapping[str, float], stopwatch: Stopwatch, benchmark: Any, scratch: Path,
    without: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Return the case's entry in the results file; rows of failed contestants have "failed"."""
    from bench.timing import roofline

    torch._dynamo.reset()
    job = Job(case, device, scratch)
    costs = roofline.count(case.part, case.side, case.batch, config=job.vae.config, dtype=job.dtype)
    line = Line(job, costs)
    for name, factory in CONTESTANTS.items():
        if name in without:
            line.rows[name] = {"left_out": "not asked for (--without)"}
        else:
            line.admit(name, factory)
    seconds = timed(line.calls, stopwatch, benchmark) if line.calls else {}
    # On a CPU the samples are wall times themselves.
    wall = wall_of(line.calls, stopwatch) if line.calls and device.type == "cuda" else {}
    # A CPU's caches hold an image's activations: only arithmetic sets the floor.
    bandwidth = roof["bytes"] if device.type == "cuda" else float("inf")
    floor = roofline.floor(costs, bandwidth, roof[case.dtype])
    total = sum(costs, Cost(0, 0, 0))
    compared = median(seconds[COMPARED]) if COMPARED in seconds else None
    for name, samples in seconds.items():
        middle = median(samples)
        line.rows[name] |= {
            "median_seconds": middle,
            "interval": interval(samples),
            "times_diffusers": compared / middle if compared else None,
            "share_of_floor": floor / middle,
            "seconds": samples,
        }
        if name in wall:
            line.rows[name]["wall_seconds"] = median(wall[name])
    return {
        "part": case.part, "preset": case.preset, "side": case.side, "batch": case.batch, "dtype": case.dtype,
        "compiled": case.compiled, "gate": str(line.wide).removeprefix("torch."),
        "rounds": len(next(iter(seconds.values()), [])), "bytes": total.bytes, "flops": total.flops,
        "floor_seconds": floor, "input_sets": line.sets, "contestants": line.rows,
    }  # fmt: skip


def timed(calls: Mapping[str, Sequence[Callable[[], Any]]], stopwatch: Stopwatch, benchmark: Any) -> dict[str, list]:
    """Return seconds of each contestant in turns, one sample a round, for about CASE_SECONDS."""
    stopwatch.warm_up(calls)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    shown = "fastvae" if "fastvae" in calls else next(iter(calls))
    rounds = stopwatch.rounds
    if rounds > FEWEST_ROUNDS:
        rounds = min(rounds, max(FEWEST_ROUNDS, int(CASE_SECONDS / sum(stopwatch.one_round().values()))))

    def one_round() -> None:
        for name, taken in stopwatch.one_round().items():
            seconds[name].append(taken)
        # pytest-benchmark reads this clock before and after.
        CLOCK.advance(seconds[shown][-1])

    benchmark.pedantic(one_round, rounds=rounds)
    return seconds


def wall_of(calls: Mapping[str, Sequence[Callable[[], Any]]], stopwatch: Stopwatch) -> dict[str, list[float]]:
    """Return wall seconds of synchronised calls of each contestant, in turns; after ``timed``, which warms up."""
    rounds = [stopwatch.one_wall_round() for _ in range(max(stopwatch.rounds, FEWEST_ROUNDS))]
    return {name: [taken[name] for taken in rounds] for name in calls}


def seconds_of_checks(rounds: int) -> dict[str, float]:
    """Return the least CPU seconds, of this thread, of the checks before each call of Stable Diffusion's parts."""
    with torch.device("meta"):
        vae = AutoencoderKL(**PRESETS["sd15"].config)
    taken = {}
    for name in ("encoder", "decoder"):
        part, samples = getattr(vae, name), []
        survey = Survey(part)
        for _ in range(rounds):
            begin = time.thread_time()
            survey.holds(part)
            samples.append(time.thread_time() - begin)
        taken[name] = min(samples)
    return taken


def failures(entry: Mapping[str, Any]) -> list[str]:
    """Return the contestants that should have a time and have none, with their reasons."""
    return [f"{name}: {row['failed']}" for name, row in entry["contestants"].items() if "failed" in row]
