"""The work of a run: units that are free, claimed one after another, encoded, written and committed."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from fastvae._version import __version__
from fastvae.data.encoding.image_reader import ImageReader
from fastvae.data.encoding.pipeline import Chunk, Encoding, chunks_of, encoded_chunks
from fastvae.data.encoding.planning import rotated_for_rank
from fastvae.data.encoding.report import EncodeReport
from fastvae.data.encoding.salvage import sound_rows
from fastvae.data.encoding.settings import Settings
from fastvae.data.images.errors import ImageError
from fastvae.data.store.commits import Failure
from fastvae.data.store.leases import Leases
from fastvae.data.store.plan import Unit
from fastvae.data.store.shard import ShardRow
from fastvae.data.store.store import Store
from fastvae.system.terminal import Stderr
from fastvae.system.threads import BackgroundWriter

# How often units that other processes hold are looked at again, in seconds.
LOOK_AGAIN = 0.5
# Processes that may die of a unit before its rows are given up.
MOST_DEATHS = 3


@dataclass(frozen=True)
class Run:
    """One run's resolved settings and parts. ``again``: a repair's units, done whatever their records say."""

    store: Store
    leases: Leases
    settings: Settings
    reader: ImageReader
    encoding: Encoding
    report: EncodeReport
    on_error: str
    progress: bool
    again: Collection[int] | None = None
    lost: list[Unit] = field(default_factory=list)  # taken over while this process was stopped
    done: set[int] = field(default_factory=set)  # committed by this process


def execute(run: Run, todo: list[Unit]) -> None:
    """Encode the units ``todo``, those that other processes hold excepted, and wait until these are done too.

    A unit whose holder dies or gives up is taken over.
    """
    if not todo:
        return
    started, shown = time.perf_counter(), Stderr()
    count = sum(len(unit.rows) for unit in todo)
    hidden = not (run.progress and shown.is_there)
    rank, ranks = _rank()
    todo = rotated_for_rank(todo, rank, ranks)
    with tqdm(total=count, unit="image", disable=hidden, file=shown, dynamic_ncols=True) as bar:
        while todo:
            others: list[Unit] = []
            _encode(run, _claimed(run, todo, others, bar), bar)
            others += run.lost
            run.lost.clear()
            if len(others) == len(todo) and not _take_over_one(run, others, bar):
                time.sleep(LOOK_AGAIN)
            todo = others
    run.report.seconds = time.perf_counter() - started
    run.report.batches, run.report.halved = run.encoding.batches.as_dict(), run.encoding.batches.halved


def _claimed(run: Run, todo: list[Unit], others: list[Unit], bar: tqdm) -> Iterator[Unit]:
    """The units that are free, and now this process's; those that another has begun are added to ``others``."""
    for unit in todo:
        if run.leases.is_taken(unit.lease) or not run.leases.acquire(unit.lease):
            others.append(unit)
            continue
        if not _is_done(run, unit, bar):
            yield unit


def _is_done(run: Run, unit: Unit, bar: tqdm) -> bool:
    """Whether another process has committed the unit since the work list was made; its lease is given back then."""
    commit = None if unit.number in (run.again or ()) else run.store.commit_of(unit, with_keys=True)
    if commit is None:
        return False
    run.leases.release(unit.lease)
    run.report.elsewhere += commit.rows
    bar.update(len(unit.rows))
    return True


def _take_over_one(run: Run, others: list[Unit], bar: tqdm) -> bool:
    """Do one of ``others`` whose holder is dead, and take it out; False if there is none.

    By itself, so that a process that dies of it has nothing else begun that would be held to be guilty too; and not at
    all where MOST_DEATHS have died of it.
    """
    fewest = sorted(others, key=lambda unit: run.leases.deaths(unit.lease))  # who only stood by is done first
    unit = next((unit for unit in fewest if run.leases.acquire(unit.lease)), None)
    if unit is None:
        return False
    others.remove(unit)
    if _is_done(run, unit, bar):
        return True
    if (deaths := run.leases.deaths(unit.lease)) < MOST_DEATHS:
        _encode(run, iter([unit]), bar)
        return True
    said = f"{deaths} processes died while they encoded the unit of"
    if run.on_error == "fail":
        raise ImageError("worker_died", f"{said} {unit.rows[0].file.key}")
    failed = [Failure(row.file.key, "worker_died", f"{said} {row.file.key}", row.variant) for row in unit.rows]
    rows, failed, kept = _with_salvaged(run, unit, [], failed)
    run.report.add(run.store.commit(unit, rows, failed=failed), kept)
    run.done.add(unit.number)
    run.leases.release(unit.lease)
    bar.update(len(unit.rows))
    return True


def _encode(run: Run, units: Iterator[Unit], bar: tqdm) -> None:
    report = run.report
    chunks = chunks_of(units, run.encoding.batches)
    encoded = encoded_chunks(chunks, run.reader, run.encoding, report.workers, report.threads_per_worker)
    # Left from right to left: the threads end, then the units that are complete are written, whatever happened.
    with BackgroundWriter() as writer, contextlib.closing(encoded) as done:
        gathered: list[Chunk] = []
        for chunk in done:
            if chunk.failures and run.on_error == "fail":
                raise ImageError(chunk.failures[0].reason, chunk.failures[0].detail)
            gathered.append(chunk)
            bar.update(len(chunk.planned))
            if chunk.last:
                writer.submit(_write(run, gathered))
                gathered = []
    report.write_seconds += writer.seconds


def _write(run: Run, gathered: list[Chunk]) -> Callable[[], None]:
    """The write of one finished unit, to be called by the writer's thread."""
    unit = gathered[0].unit

    def write() -> None:
        report = run.report
        for chunk in gathered:
            report.decode_seconds += chunk.decode_seconds
            report.encode_seconds += chunk.encode_seconds
        if not run.leases.holds(unit.lease):
            # Stopped for so long that another process took the unit over: it is that one's, if it does not die.
            report.taken_over += 1
            run.lost.append(unit)
            return
        rows = [row for chunk in gathered for row in chunk.rows]
        failed = [failure for chunk in gathered for failure in chunk.failures]
        rows, failed, kept = _with_salvaged(run, unit, rows, failed)
        flags = sum((chunk.flags for chunk in gathered), Counter())
        redone = sum(chunk.redone for chunk in gathered)
        commit = run.store.commit(
            unit,
            rows,
            failed=failed,
            redone=redone,
            flags=dict(flags),
            seconds=round(sum(chunk.decode_seconds + chunk.encode_seconds for chunk in gathered), 3),
            versions={"fastvae": __version__, "torch": str(torch.__version__)},
            max_pixels=int(run.reader.max_pixels),
        )
        run.leases.release(unit.lease)
        report.add(commit, kept)
        run.done.add(unit.number)

    return write


def _with_salvaged(
    run: Run, unit: Unit, rows: list[ShardRow], failed: list[Failure]
) -> tuple[list[ShardRow], list[Failure], int]:
    """``rows`` and ``failed``; in a repair with the rows that failed and are sound in the unit's damaged shard.

    And how many those are: what an image gives no more is not thrown away where it is still there.
    """
    if not failed or unit.number not in (run.again or ()):
        return rows, failed, 0
    lost = {(failure.key, failure.variant) for failure in failed}
    shard = run.store.path / "shards" / f"{unit.stem}.safetensors"
    sound = sound_rows(shard, unit, run.store.facts, run.settings)
    kept = {name: row for name, row in sound.items() if name in lost}
    order = {row.name: number for number, row in enumerate(unit.rows)}
    together = sorted([*rows, *kept.values()], key=lambda row: order[row.key, row.variant])
    return together, [failure for failure in failed if (failure.key, failure.variant) not in kept], len(kept)


def _rank() -> tuple[int, int]:
    """This process's number, and how many a launcher such as torchrun started: where they begin, and no more."""
    rank, ranks = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if not (rank.isdecimal() and ranks.isdecimal() and int(rank) < int(ranks)):
        return 0, 1
    return int(rank), int(ranks)
