"""Worker: one process's part of a run. Claims free units, encodes, writes and commits them, one after another."""

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
from fastvae.data.encoding.options import RunOptions
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

# Seconds between two looks at the units that other processes hold.
POLL_SECONDS = 0.5
# A unit's rows are given up after this many processes died while they encoded it.
MAX_DEATHS = 3


@dataclass(frozen=True)
class Worker:
    """Parts that a process encodes with, and what it has done.

    ``redo``: numbers of the units that a repair encodes again although they have a record; None for encode.
    """

    store: Store
    leases: Leases
    settings: Settings
    options: RunOptions
    reader: ImageReader
    encoding: Encoding
    report: EncodeReport
    redo: Collection[int] | None = None
    lost: list[Unit] = field(default_factory=list)  # taken over while this process was stopped
    done: set[int] = field(default_factory=set)  # committed by this process


def encode_units(worker: Worker, todo: list[Unit]) -> None:
    """Encode the units ``todo`` that no other process holds, and wait until the others are done too.

    A unit whose holder dies or gives up is taken over.
    """
    if not todo:
        return
    started, shown = time.perf_counter(), Stderr()
    count = sum(len(unit.rows) for unit in todo)
    hidden = not (worker.options.progress and shown.is_there)
    rank, ranks = _rank()
    todo = rotated_for_rank(todo, rank, ranks)
    with tqdm(total=count, unit="image", disable=hidden, file=shown, dynamic_ncols=True) as bar:
        while todo:
            others: list[Unit] = []
            _encode_claimed(worker, _claim(worker, todo, others, bar), bar)
            others += worker.lost
            worker.lost.clear()
            if len(others) == len(todo) and not _take_over_one(worker, others, bar):
                time.sleep(POLL_SECONDS)
            todo = others
    worker.report.seconds = time.perf_counter() - started
    worker.report.batches, worker.report.halved = worker.encoding.batches.as_dict(), worker.encoding.batches.halved


def _claim(worker: Worker, todo: list[Unit], others: list[Unit], bar: tqdm) -> Iterator[Unit]:
    """Yield the units that are free, with their leases acquired; add those that another process holds to ``others``."""
    for unit in todo:
        if worker.leases.is_taken(unit.lease) or not worker.leases.acquire(unit.lease):
            others.append(unit)
            continue
        if not _is_done(worker, unit, bar):
            yield unit


def _is_done(worker: Worker, unit: Unit, bar: tqdm) -> bool:
    """Return True, and release the unit's lease, if another process has committed the unit since it was planned."""
    commit = None if unit.number in (worker.redo or ()) else worker.store.commit_of(unit, with_keys=True)
    if commit is None:
        return False
    worker.leases.release(unit.lease)
    worker.report.elsewhere += commit.rows
    bar.update(len(unit.rows))
    return True


def _take_over_one(worker: Worker, others: list[Unit], bar: tqdm) -> bool:
    """Encode one of ``others`` whose holder is dead, and remove it from the list; return False if there is none.

    One unit at a time, so that if it crashes the process, no other unit is blamed. A unit that MAX_DEATHS processes
    died in fails: its rows are listed as worker_died.
    """
    fewest = sorted(others, key=lambda unit: worker.leases.deaths(unit.lease))  # units that were only held come first
    unit = next((unit for unit in fewest if worker.leases.acquire(unit.lease)), None)
    if unit is None:
        return False
    others.remove(unit)
    if _is_done(worker, unit, bar):
        return True
    if (deaths := worker.leases.deaths(unit.lease)) < MAX_DEATHS:
        _encode_claimed(worker, iter([unit]), bar)
        return True
    detail = f"{deaths} processes died while they encoded the unit of"
    if worker.options.on_error == "fail":
        raise ImageError("worker_died", f"{detail} {unit.rows[0].file.key}")
    failed = [Failure(row.file.key, "worker_died", f"{detail} {row.file.key}", row.variant) for row in unit.rows]
    rows, failed, kept = _with_salvaged(worker, unit, [], failed)
    worker.report.add(worker.store.commit(unit, rows, failed=failed), kept)
    worker.done.add(unit.number)
    worker.leases.release(unit.lease)
    bar.update(len(unit.rows))
    return True


def _encode_claimed(worker: Worker, units: Iterator[Unit], bar: tqdm) -> None:
    report = worker.report
    chunks = chunks_of(units, worker.encoding.batches)
    encoded = encoded_chunks(chunks, worker.reader, worker.encoding, report.workers, report.threads_per_worker)
    # Closed from right to left: the threads end, then complete units are written, also after an error.
    with BackgroundWriter() as writer, contextlib.closing(encoded) as done:
        gathered: list[Chunk] = []
        for chunk in done:
            if chunk.failures and worker.options.on_error == "fail":
                raise ImageError(chunk.failures[0].reason, chunk.failures[0].detail)
            gathered.append(chunk)
            bar.update(len(chunk.planned))
            if chunk.last:
                writer.submit(_write(worker, gathered))
                gathered = []
    report.write_seconds += writer.seconds


def _write(worker: Worker, gathered: list[Chunk]) -> Callable[[], None]:
    """Return a function that writes and commits one finished unit, for the writer's thread."""
    unit = gathered[0].unit

    def write() -> None:
        report = worker.report
        for chunk in gathered:
            report.decode_seconds += chunk.decode_seconds
            report.encode_seconds += chunk.encode_seconds
        if not worker.leases.holds(unit.lease):
            # This process was stopped for so long that another took the unit over, and commits it.
            report.taken_over += 1
            worker.lost.append(unit)
            return
        rows = [row for chunk in gathered for row in chunk.rows]
        failed = [failure for chunk in gathered for failure in chunk.failures]
        rows, failed, kept = _with_salvaged(worker, unit, rows, failed)
        flags = sum((chunk.flags for chunk in gathered), Counter())
        redone = sum(chunk.redone for chunk in gathered)
        commit = worker.store.commit(
            unit,
            rows,
            failed=failed,
            redone=redone,
            flags=dict(flags),
            seconds=round(sum(chunk.decode_seconds + chunk.encode_seconds for chunk in gathered), 3),
            versions={"fastvae": __version__, "torch": str(torch.__version__)},
            max_pixels=int(worker.reader.max_pixels),
        )
        worker.leases.release(unit.lease)
        report.add(commit, kept)
        worker.done.add(unit.number)

    return write


def _with_salvaged(
    worker: Worker, unit: Unit, rows: list[ShardRow], failed: list[Failure]
) -> tuple[list[ShardRow], list[Failure], int]:
    """Return ``rows``, ``failed`` and how many rows were salvaged.

    In a repair, a row whose image failed is taken from the unit's damaged shard if it is sound there.
    """
    if not failed or unit.number not in (worker.redo or ()):
        return rows, failed, 0
    lost = {(failure.key, failure.variant) for failure in failed}
    shard = worker.store.path / "shards" / f"{unit.stem}.safetensors"
    sound = sound_rows(shard, unit, worker.store.facts, worker.settings)
    kept = {name: row for name, row in sound.items() if name in lost}
    order = {row.name: number for number, row in enumerate(unit.rows)}
    together = sorted([*rows, *kept.values()], key=lambda row: order[row.key, row.variant])
    return together, [failure for failure in failed if (failure.key, failure.variant) not in kept], len(kept)


def _rank() -> tuple[int, int]:
    """Return RANK and WORLD_SIZE of a launcher such as torchrun; they only decide which unit a process starts with."""
    rank, ranks = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if not (rank.isdecimal() and ranks.isdecimal() and int(rank) < int(ranks)):
        return 0, 1
    return int(rank), int(ranks)
