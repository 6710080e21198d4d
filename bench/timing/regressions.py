"""Compare the speed of this tree with another commit on this machine, in turns; exit 1 if a case became slower.

    python -m bench.timing.regressions BASE [--threshold R] [--rounds N] [--only TEXT] [--dry]     (make bench-compare)


BASE is checked out into a temporary folder. Each tree has a process that prepares a case (ops are checked first) and
then waits; the two are called in turns, the base first in every other round, so that one works while the other sleeps.
A case is slower if the median of the rounds' ratios is above the threshold and their 95 % interval is above 1. On a
GPU: every op at its first shape, and the encoder; on a CPU: two ops, and encoder and decoder in fp32 at 256² and 512².
test_networks.py checks their accuracy. Exit 1: slower, or this tree cannot run a case; exit 2: no case ran in both.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.timing.stopwatch import interval, median

ROOT = Path(__file__).resolve().parents[2]
THRESHOLD, ROUNDS = 1.10, 21
# A sample on a CPU takes at least this long.
SAMPLE_SECONDS = 0.05
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def table(dry: bool) -> dict[str, Any]:
    """Return name -> case for this device; with ``dry`` the encoder is a miniature."""
    import torch

    from bench.timing import cases

    if dry:
        chosen = [*cases.CPU, cases.Network("encoder", cases.TINY, 64, dtype="float32")]
    elif torch.cuda.is_available():
        first = {case.op: case for case in reversed(cases.CASES)}
        chosen = [*first.values(), cases.ENCODERS["cuda"][0]]
    else:
        names = ("group_norm_silu", "residual_add")
        ops = {case.op: case for case in reversed(cases.CPU) if case.op in names}
        networks = [(part, side) for side in (256, 512) for part in ("encoder", "decoder")]
        chosen = [*ops.values(), *(cases.Network(part, "sd15", side, dtype="float32") for part, side in networks)]
    return {case.name: case for case in chosen}


class Bench:
    """State of a tree's process: the prepared case and its stopwatch."""

    def __init__(self, clock: str, dry: bool):
        import torch

        from bench.timing.stopwatch import Stopwatch

        torch.set_grad_enabled(False)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.stopwatch = Stopwatch(self.device, rounds=1, now=CLOCKS[clock])
        self.cases = table(dry)

    def ready(self, name: str) -> dict[str, Any]:
        """Check a case, call it once, and choose the number of calls in a sample."""
        import torch

        from bench.timing import cases

        torch.manual_seed(0)
        case = self.cases[name]
        call = self._network(case) if isinstance(case, cases.Network) else self._op(case)
        self.stopwatch.warm_up({name: [call]})
        once = min(self.stopwatch.one_round()[name] for _ in range(2))
        self.calls = 1 if self.device.type == "cuda" else max(1, int(SAMPLE_SECONDS / max(once, 1e-6)))
        return {"calls": self.calls}

    def sample(self, calls: int) -> dict[str, float]:
        """Return the mean seconds of one call."""
        taken = [next(iter(self.stopwatch.one_round().values())) for _ in range(calls)]
        return {"seconds": sum(taken) / calls}

    def _op(self, case: Any) -> Any:
        import torch
        from fastvae_kernels.shared.runtime import KERNEL_DEVICES

        from bench.timing import gate
        from bench.timing.operations import OPERATIONS

        operation = OPERATIONS[case.op]
        run = operation.ours if self.device.type in KERNEL_DEVICES else operation.reference
        inputs = operation.make(case, self.device)
        with torch.enable_grad():
            gate.check(operation, run, inputs, torch.float64 if self.device.type == "cpu" else torch.float32)
        return run(*inputs)

    def _network(self, case: Any) -> Any:
        from bench.timing.contestants import Job, fastvae_accelerated

        job = Job(case, self.device, Path(tempfile.gettempdir()))  # this contestant writes no file
        ready = fastvae_accelerated(job)
        x = ready.given(job.inputs())
        return lambda: ready.run(x)


def work(clock: str, dry: bool) -> None:
    """Run a tree's process: read a request a line, write an answer a line."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of libraries goes to stderr
    bench = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            bench = bench or Bench(clock, dry)
            answer = bench.ready(request["ready"]) if "ready" in request else bench.sample(request["calls"])
        except Exception as error:  # noqa: BLE001  the parent prints it and exits 1
            lines = str(error).strip().splitlines() or ["no message"]
            answer = {"error": f"{type(error).__name__}: {lines[0]}"}
        answers.write(json.dumps(answer) + "\n")


class Tree:
    """Handle of one tree's process."""

    def __init__(self, root: Path, scripts: Path, clock: str, dry: bool):
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        # The scripts come first: root may have a bench/ of its own.
        environment["PYTHONPATH"] = os.pathsep.join(map(str, (scripts, root, root / "kernels")))
        # -P: without it Python puts the working directory before PYTHONPATH.
        command = [sys.executable, "-P", "-m", "bench.timing.regressions", "--work", "--clock", clock]
        self.process = subprocess.Popen(
            command + ["--dry"] * dry, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer; an "error" if the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return json.loads(answer) if answer else {"error": "its process ended"}

    def close(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.communicate()


@dataclass(frozen=True)
class Verdict:
    """Ratios head / base of a case, one a round; or the reason why there is none."""

    name: str
    ratios: Sequence[float] = ()
    base_seconds: float = 0.0
    no_base: str = ""
    no_head: str = ""

    def slower(self, threshold: float) -> bool:
        """Return True if the median is above the threshold and the interval above 1."""
        if not self.ratios:
            return False
        ends = interval(self.ratios)
        return median(self.ratios) > threshold and (ends is None or ends[0] > 1)

    def line(self, threshold: float) -> str:
        """Return the case as one line of text."""
        if self.no_base or self.no_head:
            reason = f"this tree cannot run it: {self.no_head}" if self.no_head else f"not in the base: {self.no_base}"
            return f"{self.name:48} {reason}"
        ends = interval(self.ratios)
        interval_text = f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""
        verdict = f"SLOWER, more than x{threshold:.2f}" if self.slower(threshold) else "ok"
        return f"{self.name:48} {1e3 * self.base_seconds:10.3f} ms x{median(self.ratios):.3f}{interval_text} {verdict}"


def compared(name: str, base: Tree, head: Tree, rounds: int) -> Verdict:
    """Take samples of one case in both trees, in turns."""
    prepared = {"base": base.ask(ready=name), "head": head.ask(ready=name)}
    if "error" in prepared["head"]:
        return Verdict(name, no_head=prepared["head"]["error"])
    if "error" in prepared["base"]:
        return Verdict(name, no_base=prepared["base"]["error"])
    calls = prepared["base"]["calls"]
    ratios, seconds = [], []
    for number in range(rounds):
        order = [("base", base), ("head", head)][:: 1 if number % 2 else -1]
        taken = {which: tree.ask(calls=calls) for which, tree in order}
        for which, answer in taken.items():
            if "error" in answer:
                return Verdict(name, **{f"no_{which}": answer["error"]})
        seconds.append(taken["base"]["seconds"])
        ratios.append(taken["head"]["seconds"] / taken["base"]["seconds"])
    return Verdict(name, ratios, median(seconds))


@contextlib.contextmanager
def linked_scripts() -> Iterator[Path]:
    """A folder with links to this tree's bench/ and tests/support/, and no link to its packages."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "bench").symlink_to(ROOT / "bench")
        Path(folder, "support").symlink_to(ROOT / "tests" / "support")
        yield Path(folder)


@contextlib.contextmanager
def checked_out(root: Path, commit: str) -> Iterator[Path]:
    """Check ``commit`` out into a worktree, and remove it. Raises CalledProcessError for an unknown commit."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "base")
        git = ["git", "-C", str(root), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(place), commit], check=True)
        try:
            yield place
        finally:
            subprocess.run([*git, "remove", "--force", str(place)], check=True)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default="HEAD", help="a commit, branch or tag (default: HEAD)")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="a ratio above this is slower")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="samples of each tree; networks take a third")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: on a machine with other processes")
    parser.add_argument("--dry", action="store_true", help="on a CPU: the ops of its table, and a miniature encoder")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.work:
        work(chosen.clock, chosen.dry)
        return 0
    names = [name for name in table(chosen.dry) if chosen.only in name]
    verdicts: list[Verdict] = []
    try:
        with checked_out(root, chosen.base) as place, linked_scripts() as scripts, contextlib.ExitStack() as stack:
            base, head = (Tree(tree, scripts, chosen.clock, chosen.dry) for tree in (place, root))
            for tree in (base, head):
                stack.callback(tree.close)
            for name in names:
                rounds = chosen.rounds if not name.startswith(("encoder", "decoder")) else max(7, chosen.rounds // 3)
                verdicts.append(compared(name, base, head, rounds))
                print(verdicts[-1].line(chosen.threshold), flush=True)
    except subprocess.CalledProcessError as error:
        print(f"{chosen.base} could not be checked out: git exits {error.returncode}", file=sys.stderr)
        return 2
    return verdict_of(verdicts, chosen.threshold)


def verdict_of(verdicts: Sequence[Verdict], threshold: float) -> int:
    """Return the exit status and print its reason."""
    broken = [verdict.name for verdict in verdicts if verdict.no_head]
    slower = [verdict.name for verdict in verdicts if verdict.slower(threshold)]
    if broken or slower:
        print(
            f"red: slower than x{threshold:.2f}: {', '.join(slower) or 'none'}; broken: {', '.join(broken) or 'none'}"
        )
        return 1
    if not any(verdict.ratios for verdict in verdicts):
        print("red: no case ran in both trees")
        return 2
    print(f"{sum(bool(verdict.ratios) for verdict in verdicts)} cases, none slower than x{threshold:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
