"""Program of test_failures_kills.py: encodes in children, kills them, and prints the result of each kill.

Arguments: "random", "points" or "workers", how many kills ("workers": how many images), the seconds between two kills
of workers, a seed, the source folder and a folder for the stores. Prints one JSON object for each kill, and for
"workers" one for the whole. Every kill is a SIGKILL of a running process. After each, what is committed is read by
store_checks, which knows nothing of the package, and by verify --deep.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from support.small_store import SIDE, small_vae
from support.store_checks import committed

import fastvae.data.encoding.pipeline as pipeline
import fastvae.data.encoding.worker
import fastvae.data.store.store as store_module
import fastvae.system.atomic_files as atomic
from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.encoder import MomentEncoder
from fastvae.data.store.store import Store
from fastvae.data.store.verify import verify

WORKERS = 1
OPTIONS = {"buckets": SIDE, "dtype": "fp32", "device": "cpu", "shard_mb": 0.002, "workers": WORKERS, "progress": False}


def start(source: Path, out: Path, prepare=lambda: None) -> int:
    """Start a process that encodes ``source`` to ``out`` and logs rows and units beside it; return its number."""
    child = os.fork()
    if child:
        return child
    log = os.open(f"{out}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    finish, commit = pipeline.finish_chunk, Store.commit

    def logged_finish(chunk, *rest):
        done = finish(chunk, *rest)
        os.write(log, b"row\n" * len(done.rows))
        return done

    def logged_commit(store, unit, *rest, **facts):
        record = commit(store, unit, *rest, **facts)
        os.write(log, f"unit {unit.number}\n".encode())
        return record

    pipeline.finish_chunk, Store.commit = logged_finish, logged_commit
    # No unit causes these deaths, however often they meet the same one.
    fastvae.data.encoding.worker.MAX_DEATHS = 10**6
    prepare()
    encode(source, out, vae=small_vae(), **OPTIONS)
    os._exit(0)


def end(child: int) -> int:
    """Kill ``child``, wait for it, and return its exit code, -9 if it was still running."""
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def look(out: Path) -> set:
    """Return the committed rows; raises AssertionError if store_checks or verify finds a bad one."""
    rows = set(committed(out))
    if (out / "store.json").exists():
        found = verify(out, deep=True).damaged
        assert not found, f"verify --deep: {found}"
    return rows


def log_of(out: Path) -> list[str]:
    """Return the log of the processes that wrote to ``out``."""
    path = Path(f"{out}.log")
    return path.read_text().splitlines() if path.exists() else []


def wait_for_commits(out: Path, more: int, patience: float) -> None:
    """Return when ``more`` records have been added to ``out``, or after ``patience`` seconds."""

    def count() -> int:
        return sum(name.endswith(".json") for name in os.listdir(out / "shards")) if (out / "shards").is_dir() else 0

    before, until = count(), time.monotonic() + patience
    while count() < before + more and time.monotonic() < until:
        time.sleep(0.0005)


def result_of(out: Path, code: int, before: set, rows_before: int, **facts) -> tuple[dict, set]:
    """Return the result of a kill, as a line, and the rows that are committed now."""
    after, rows = look(out), log_of(out).count("row") - rows_before
    assert before <= after, "a row that was committed is gone"
    lost = rows - (len(after) - len(before))
    line = {
        "killed": code == -9,
        "committed": len(after),
        "before": len(before),
        "encoded": rows,
        "lost": lost,
        **facts,
    }
    return line, after


def random_kills(count: int, generator: random.Random, source: Path, stores: Path) -> None:
    """Kill at random moments, three times of four after a random number of commits."""
    whole, started = stores / "whole", time.monotonic()
    assert os.waitpid(start(source, whole), 0)[1] == 0
    patience, wanted = time.monotonic() - started, committed(whole)
    kills, number, before = 0, 0, set()
    while kills < count:
        out, rows_before = stores / f"{number}", log_of(stores / f"{number}").count("row")
        child = start(source, out)
        if generator.random() < 0.75:
            wait_for_commits(out, generator.randrange(1, 4), patience)
            time.sleep(generator.uniform(0, patience / 20))
        else:
            time.sleep(generator.uniform(0, patience))
        line, before = result_of(out, end(child), before, rows_before, store=number)
        kills += line["killed"]
        print(json.dumps(line), flush=True)  # noqa: T201
        if kills == count and line["killed"]:
            assert os.waitpid(start(source, out), 0)[1] == 0
        if len(before) == len(wanted) or kills == count:
            assert committed(out) == wanted, "the union is another than a run's that was not killed"
            number, before = number + 1, set()


POINTS = ("in the temporary write", "before the rename", "before the folder's fsync", "between rename and record")


def die() -> None:
    """Kill this process with SIGKILL: nothing is flushed, no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def prepare_death(point: str, number: int) -> None:
    """Let this process die the ``number``-th time that it reaches ``point``."""
    left = [number]

    def comes() -> bool:
        left[0] -= 1
        return left[0] == 0

    class Torn:
        """A file that writes half of its last block."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, view):
            if not comes():
                return self.file.write(view)
            self.file.write(view[: len(view) // 2])
            self.file.flush()
            return die()

    def before(module, name, is_it=lambda *arguments: True):
        real = getattr(module, name)

        def called(*arguments, **named):
            if is_it(*arguments) and comes():
                die()
            return real(*arguments, **named)

        setattr(module, name, called)

    if point == POINTS[0]:
        real = os.fdopen
        atomic.os.fdopen = lambda *arguments: Torn(real(*arguments))
    elif point == POINTS[1]:
        before(atomic.os, "replace")
    elif point == POINTS[2]:
        before(atomic, "synchronise_folder")
    else:
        before(
            store_module, "write_atomically", lambda path, *_: path.suffix == ".json" and path.parent.name == "shards"
        )


def point_kills(count: int, generator: random.Random, source: Path, stores: Path) -> None:
    """Kill at the named points in turn, each the first to seventh time that a run reaches it."""
    assert os.waitpid(start(source, stores / "whole"), 0)[1] == 0
    wanted = committed(stores / "whole")
    for number in range(count):
        out, point = stores / f"{number}", POINTS[number % len(POINTS)]
        times = generator.randrange(1, 8)
        child = start(source, out, lambda point=point, times=times: prepare_death(point, times))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        line, _ = result_of(out, code, set(), 0, point=point, times=times)
        print(json.dumps(line), flush=True)  # noqa: T201
        assert os.waitpid(start(source, out), 0)[1] == 0
        assert committed(out) == wanted
        look(out)
        assert not list(out.rglob("*.tmp.*"))


def worker_kills(period: float, generator: random.Random, source: Path, stores: Path) -> None:
    """Run four processes on one output; kill and restart one every ``period`` seconds."""
    out, ranks = stores / "shared", 4

    def prepare(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
        fastvae.data.encoding.worker.POLL_SECONDS = 0.05
        real = MomentEncoder.start

        def slow(encoder, pixels):
            time.sleep(0.05 * len(pixels))  # as a GPU takes
            return real(encoder, pixels)

        MomentEncoder.start = slow

    def begin(rank: int) -> int:
        return start(source, out, lambda: prepare(rank))

    started, kills, done = time.monotonic(), 0, set()
    running, due = {begin(rank): rank for rank in range(ranks)}, time.monotonic() + period
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            assert status == 0, f"a worker ended with {status}"
            done.add(running.pop(child))
        elif time.monotonic() >= due and not done:
            victim = generator.choice(sorted(running))
            rank = running.pop(victim)
            kills += end(victim) == -9
            look(out)
            running[begin(rank)] = rank
            due = time.monotonic() + period
        else:
            time.sleep(0.005)
    log, rows = log_of(out), look(out)
    units = [line for line in log if line.startswith("unit")]
    facts = {"kills": kills, "rows": len(rows), "encoded": log.count("row"), "units": len(units)}
    facts |= {"units_twice": len(units) - len(set(units)), "seconds": round(time.monotonic() - started, 1)}
    print(json.dumps(facts))  # noqa: T201


def main() -> None:
    """Run the series that the arguments name."""
    torch.set_num_threads(1)
    what, count, period, seed, source, stores = sys.argv[1:]
    generator, places = random.Random(int(seed)), (Path(source), Path(stores))
    places[1].mkdir(parents=True, exist_ok=True)
    if what == "workers":
        worker_kills(float(period), generator, *places)
    else:
        {"random": random_kills, "points": point_kills}[what](int(count), generator, *places)


main()
