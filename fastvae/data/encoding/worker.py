"""Worker: one process's part of a run. Claims free units, encodes, writes and commits them, one after another."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import PIL
import torch
from tqdm import tqdm

from fastvae._version import __version__
from fastvae.data.encoding.image_reader import Chunk, ImageReader
from fastvae.data.encoding.options import RunOptions
from fastvae.data.encoding.pipeline import Encoding, chunks_apart, chunks_of, encoded_chunks
from fastvae.data.encoding.report import EncodeReport
from fastvae.data.encoding.salvage import sound_rows
from fastvae.data.encoding.settings import Settings
from fastvae.data.images.errors import ImageError
from fastvae.data.store.commits import Failure
from fastvae.data.store.errors import StoreLocked
from fastvae.data.store.leases import Leases
from fastvae.data.store.lock import locked
from fastvae.data.store.plan import Unit
from fastvae.data.store.shard import ShardRow
from fastvae.data.store.store import Store
from fastvae.system.terminal import Stderr
from fastvae.system.threads import BackgroundWriter

# Seconds between two looks at the units that other processes hold.
POLL_SECONDS = 0.5
# After this many processes died while they encoded a unit, its images are decoded in a child process, one by one. After
# as many more its rows are given up: what ends the processes is then not a decoder.
MAX_DEATHS = 3
# Seconds that an interrupted run waits for the plan of another, to commit the unit that it has begun.
LAST_WAIT = 5.0


@dataclass
class Worker:
    """Parts that a process encodes with, and what it has done.

    ``redo``: numbers of the units that a repair encodes again although they have a record; None for encode.
    ``plan_files``: number of plan files that ``units``, all units by number, were read from; empty until it grows.
    """

    store: Store
    leases: Leases
    settings: Settings
    options: RunOptions
    reader: ImageReader
    encoding: Encoding
    report: EncodeReport
    redo: Collection[int] | None = None
    plan_files: int = 0
    units: dict[int, Unit] = field(default_factory=dict)
    lost: list[Unit] = field(default_factory=list)  # taken over while this process was stopped
    done: set[int] = field(default_factory=set)  # committed by this process


def encode_units(worker: Worker, todo: list[Unit]) -> None:
    """Encode the units ``todo`` that no other process holds, and wait until the others are done too.

    A unit whose holder dies or gives up is taken over. So is the rest of a unit that its holder has cut.
    """
    if not todo:
        return
    started, shown = time.perf_counter(), Stderr()
    count = sum(len(unit.rows) for unit in todo)
    hidden = not (worker.options.progress and shown.is_there)
    rank, ranks = _rank()
    todo = rotated_for_rank(todo, rank, ranks)
    try:
        with tqdm(total=count, unit="image", disable=hidden, file=shown, dynamic_ncols=True) as bar:
            _encode_all(worker, todo, bar)
    finally:
        worker.report.seconds = time.perf_counter() - started
        worker.report.batches, worker.report.halved = worker.encoding.batches.as_dict(), worker.encoding.batches.halved


def rotated_for_rank(units: list[Unit], rank: int, ranks: int) -> list[Unit]:
    """Return ``units`` rotated so that process ``rank`` of ``ranks`` starts at its own share."""
    start = len(units) * rank // ranks
    return units[start:] + units[:start]


def _encode_all(worker: Worker, todo: list[Unit], bar: tqdm) -> None:
    planned, seen = todo, {unit.number for unit in todo}
    while todo:
        others: list[Unit] = []
        _encode_claimed(worker, _claim(worker, todo, others, bar), bar)
        others += worker.lost
        worker.lost.clear()
        if len(others) == len(todo) and not _take_over_one(worker, others, bar):
            time.sleep(POLL_SECONDS)
        seen |= worker.done | {unit.number for unit in others}
        todo = others + _rests(worker, planned, seen)


def _claim(worker: Worker, todo: list[Unit], others: list[Unit], bar: tqdm) -> Iterator[Unit]:
    """Yield the units that are free, with their leases acquired; add those that another process holds to ``others``."""
    for unit in todo:
        if worker.leases.is_taken(unit.lease) or not worker.leases.acquire(unit.lease):
            others.append(unit)
            continue
        unit = _current(worker, unit)
        if not _is_done(worker, unit, bar):
            yield unit


def _current(worker: Worker, unit: Unit) -> Unit:
    """Return ``unit`` as it is planned now: its last holder may have cut it. The caller holds its lease."""
    if (count := worker.store.plan_files()) != worker.plan_files:
        worker.units, worker.plan_files = {other.number: other for other in worker.store.units()}, count
    return worker.units.get(unit.number, unit)


def _rests(worker: Worker, planned: list[Unit], seen: Collection[int]) -> list[Unit]:
    """Return the units, not yet ``seen``, that other processes cut from the ``planned`` ones."""
    _current(worker, planned[0])
    new = [unit for number, unit in worker.units.items() if number not in seen]
    files = {row.name: row.file for unit in planned for row in unit.rows} if new else {}
    return [unit for unit in new if all(row.file.is_same_as(files.get(row.name)) for row in unit.rows)]


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

    One unit at a time, so that if it crashes the process, no other unit is blamed. After MAX_DEATHS of them the unit's
    images are decoded in a child process; after twice as many its rows fail as worker_died.
    """
    fewest = sorted(others, key=lambda unit: worker.leases.deaths(unit.lease))  # units that were only held come first
    unit = next((unit for unit in fewest if worker.leases.acquire(unit.lease)), None)
    if unit is None:
        return False
    others.remove(unit)
    unit = _current(worker, unit)
    if _is_done(worker, unit, bar):
        return True
    if (deaths := worker.leases.deaths(unit.lease)) < MAX_DEATHS:
        _encode_claimed(worker, iter([unit]), bar)
        return True
    if deaths < 2 * MAX_DEATHS:
        worker.report.notes.append(
            f"{deaths} processes died while they encoded the unit of {unit.rows[0].file.key}: its images were decoded "
            "one by one in a child process"
        )
        _encode_claimed(worker, iter([unit]), bar, apart=True)
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


def _encode_claimed(worker: Worker, units: Iterator[Unit], bar: tqdm, apart: bool = False) -> None:
    """Encode, write and commit ``units``, whose leases this process has; ``apart``: decode in a child process."""
    report = worker.report
    with BackgroundWriter() as writer:
        begun = _BegunUnits(worker, writer, bar)
        chunks = begun.handed_out(chunks_of(units, worker.encoding.batches))
        parts, threads = (chunks, worker.reader, worker.encoding), report.threads_per_worker
        encoded = chunks_apart(*parts, threads) if apart else encoded_chunks(*parts, report.workers, threads)
        try:
            # The threads end before the begun unit is cut; complete units are written, also after an error.
            with contextlib.closing(encoded) as done:
                for chunk in done:
                    if begun.must_stop(chunk):
                        raise ImageError(chunk.failures[0].reason, chunk.failures[0].detail)
                    begun.add()
        except KeyboardInterrupt:
            begun.commit_part()
            report.lost += begun.lost()
            raise
    report.write_seconds += writer.seconds


class _BegunUnits:
    """Chunks from the moment that the threads get them until their unit is written.

    A unit that takes too long, or that an interruption ends, is cut: its finished rows are written under its number,
    and its other rows become a unit of their own.
    """

    def __init__(self, worker: Worker, writer: BackgroundWriter, bar: tqdm):
        self.worker, self.writer, self.bar = worker, writer, bar
        self._out: deque[Chunk] = deque()  # handed out and not gathered, in order
        self._gathered: list[Chunk] = []
        self._unit: Unit | None = None  # that the gathered rows belong to: the chunks' own, or what a cut left of it
        self._began = 0.0

    def handed_out(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """Yield the chunks, and remember them."""
        for chunk in chunks:
            self._out.append(chunk)
            yield chunk

    def must_stop(self, chunk: Chunk) -> bool:
        """Return True if the run ends at this chunk: a row failed, with on_error="fail"."""
        return bool(chunk.failures) and self.worker.options.on_error == "fail"

    def add(self) -> None:
        """Gather the first chunk that was handed out, and write its unit if that is complete or takes too long."""
        if self._unit is None:
            self._unit, self._began = self._out[0].unit, time.monotonic()
        chunk = self._out.popleft()
        self._gathered.append(chunk)
        self.bar.update(len(chunk.planned))
        limit = 0 if self.worker.options.deterministic else self.worker.options.commit_seconds
        if chunk.last:
            self._write(self._unit, None)
        elif limit and time.monotonic() - self._began >= limit:
            self._cut(wait=0)

    def commit_part(self) -> None:
        """Write what is finished, in the order of the plan, after an interruption."""
        while self._out and self._out[0].finished and not self.must_stop(self._out[0]):
            self.add()
        if self._gathered:
            self._cut(wait=LAST_WAIT)

    def lost(self) -> int:
        """Return the number of rows that were read and will not be written."""
        return sum(len(chunk.planned) for chunk in (*self._gathered, *self._out) if chunk.decode_seconds)

    def _cut(self, wait: float) -> None:
        """Cut the unit, unless it is one that a repair encodes again: its damaged shard may have rows to save."""
        worker, unit = self.worker, self._unit
        if unit is None or unit.number in (worker.redo or ()) or not worker.leases.holds(unit.lease):
            return
        done = {row.name for chunk in self._gathered for row in chunk.planned}
        try:
            with locked(worker.store.path, wait):
                halves = worker.store.split(unit, done)
                if halves is None:
                    return
                worker.leases.acquire(halves[1].lease)
        except StoreLocked:  # another run is planning: tried again at the next chunk
            return
        self._began = time.monotonic()
        self._write(*halves)

    def _write(self, unit: Unit, rest: Unit | None) -> None:
        """Hand the gathered rows, all of ``unit``, to the writer; go on with ``rest``."""
        gathered, self._gathered, self._unit = self._gathered, [], rest
        self.writer.submit(_write(self.worker, unit, gathered))


def _write(worker: Worker, unit: Unit, gathered: list[Chunk]) -> Callable[[], None]:
    """Return a function that writes and commits one finished unit, for the writer's thread."""
    names = {row.name for row in unit.rows}  # a cut leaves out rows that were planned again since

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
        rows = [row for chunk in gathered for row in chunk.rows if (row.key, row.variant) in names]
        failed = [f for chunk in gathered for f in chunk.failures if (f.key, f.variant) in names]
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
            versions={"fastvae": __version__, "torch": str(torch.__version__), "pillow": PIL.__version__},
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
