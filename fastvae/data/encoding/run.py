"""A run from its plan to its report, for encode and repair: locks, plans, encodes, writes the report."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastvae.checkpoints.loading import full_name
from fastvae.data.encoding.batch_size import BatchSizes, choose_workers
from fastvae.data.encoding.encoder import MomentEncoder, forms_digest
from fastvae.data.encoding.image_reader import Chunk, ImageReader, decode_chunk
from fastvae.data.encoding.options import RunOptions
from fastvae.data.encoding.pipeline import Encoding
from fastvae.data.encoding.planning import count_by_bucket, needed_bytes
from fastvae.data.encoding.report import EncodeReport, Interrupted
from fastvae.data.encoding.self_check import check_fast_path
from fastvae.data.encoding.settings import Settings, identity_of, layout_of
from fastvae.data.encoding.worker import Worker, encode_units
from fastvae.data.images.on_device.resize import device_resize
from fastvae.data.rows import Size, SourceFile, size_name
from fastvae.data.sources.source import Listing, Source
from fastvae.data.store.errors import StoreError
from fastvae.data.store.identity import digest
from fastvae.data.store.leases import Leases
from fastvae.data.store.lock import locked
from fastvae.data.store.plan import PlannedRow, Unit
from fastvae.data.store.store import Store
from fastvae.system.atomic_files import free_bytes
from fastvae.system.terminal import format_bytes, print_stderr

# Files that may be unreadable before the dtype's error is measured on fewer images than a batch, or on none.
MAX_UNREADABLE = 16


@dataclass(frozen=True)
class EncodeJob:
    """A model, its settings and the files that may need a unit, resolved before the output is touched."""

    out: Path
    model: Any
    made_with: dict[str, Any]  # where the model came from
    settings: Settings
    options: RunOptions
    reader: ImageReader
    listing: Listing
    files: list[SourceFile]
    identity: dict[str, Any]
    layout: dict[str, Any]
    prune: bool = False  # take out the rows of images that the source no longer has

    def report(self) -> EncodeReport:
        """Return the report of a run that has done nothing yet."""
        report = EncodeReport(os.fspath(self.out), digest(self.identity), str(self.settings.dtype), None)
        report.ignored_files, report.unreadable_places = self.listing.ignored, self.listing.unreadable
        report.duplicate_keys, report.notes = self.listing.duplicates, list(self.listing.notes)
        report.excluded, report.passed_over = len(self.listing.excluded), dict(self.listing.passed_over)
        report.captions_not_utf8 = self.listing.captions_not_utf8
        return report


def prepare(
    out: Path,
    source: Source,
    listing: Listing,
    loaded: tuple[Any, dict[str, Any]],
    settings: Settings,
    options: RunOptions,
) -> EncodeJob:
    """Return the job of every file of ``listing``; ``loaded``: the model and where it came from, as load_model gives.

    ``settings``: with their dtype.
    """
    model, made_with = loaded
    listed = {file.key: file for file in listing.files}
    reader = ImageReader(
        source,
        settings.buckets,
        settings.variants,
        settings.alpha,
        settings.factor,
        options.max_pixels,
        listed,
        settings.animated,
        settings.size_rules,
        listing.excluded,
    )
    identity, layout = identity_of(model, settings), layout_of(model, made_with, settings)
    return EncodeJob(out, model, made_with, settings, options, reader, listing, listing.files, identity, layout)


def run_job(
    job: EncodeJob,
    report: EncodeReport,
    plan: Callable[[Leases], tuple[Store, list[Unit]]],
    redo: Collection[int] | None = None,
) -> None:
    """Encode the units that ``plan`` returns, and fill ``report``. ``plan`` is called while the output is locked.

    redo: numbers of units that a repair encodes again although they have a record. Raises Interrupted for Ctrl-C.
    """
    done: set[int] = set()
    try:
        _encode_planned(job, report, plan, redo, done)
    except KeyboardInterrupt:
        report.interrupted = True
        raise Interrupted(report, done) from None


def _encode_planned(
    job: EncodeJob,
    report: EncodeReport,
    plan: Callable[[Leases], tuple[Store, list[Unit]]],
    redo: Collection[int] | None,
    done: set[int],
) -> None:
    """Do what run_job does; ``done`` gets the numbers of the units that are committed."""
    settings, options = job.settings, job.options
    with contextlib.ExitStack() as held:
        job.out.mkdir(parents=True, exist_ok=True)
        with locked(job.out):
            leases = held.enter_context(Leases(job.out / "leases"))
            store, todo = plan(leases)
            leases.sweep(keep={unit.lease for unit in todo})
            plan_files = store.plan_files()
        encoder = MomentEncoder(job.model, str(settings.dtype), settings.device, options.deterministic)
        batches = BatchSizes(options.batch, encoder)
        resize, surprise = device_resize(settings.device) if todo else (None, None)
        encoding = Encoding(encoder, settings.row_format, batches, resize)
        worker = Worker(store, leases, settings, options, job.reader, encoding, report, redo, plan_files, done=done)
        for wrong in (surprise, check_fast_path(encoder) if todo else None):
            if wrong:
                print_stderr(f"fastvae: {wrong}\n")
                report.notes.append(wrong)
        report.forms = forms_digest(encoder.model, settings.device)
        choose_workers(report, batches, encoder, count_by_bucket(todo), options.workers)
        report.dtype_error = _dtype_error(worker, todo)
        if options.progress:
            _print_plan(worker, todo, job.made_with["vae"], free_bytes(job.out))
        encode_units(worker, todo)
        with locked(job.out):
            _complete(worker)


def check_buckets(units: list[Unit], settings: Settings, out: Path) -> None:
    """Raise StoreError for a unit whose bucket is not in the table: a plan may have been edited."""
    if strange := [size_name(unit.bucket) for unit in units if unit.bucket not in settings.buckets.sizes]:
        raise StoreError(f"{out} has a plan for {strange[0]}, and its table of buckets has no such size")


def rows_per_unit(settings: Settings, shard_mb: float) -> Callable[[tuple[int, int]], int]:
    """Return a function of a bucket: the number of its rows that make a shard of about ``shard_mb``."""
    return lambda bucket: max(1, int(shard_mb * 1e6) // settings.row_size(bucket))


def _print_plan(worker: Worker, todo: list[Unit], source: str, free: int) -> None:
    """Print what will be encoded on stderr; ``source``: the model's name, ``free``: bytes on the disk."""
    report, settings = worker.report, worker.settings
    counts = count_by_bucket(todo)
    needed = needed_bytes(counts, settings.row_size)
    error = "" if report.dtype_error is None else f" (error vs fp32 {100 * report.dtype_error:.2g} %)"
    names = settings.buckets.names
    table = f"bucket {names[0]}" if len(names) == 1 else f"buckets {settings.buckets.name} ({len(names)})"
    what = "images" if settings.variants.count == 1 else f"rows, {settings.variants.count} an image"
    batches = sorted({worker.encoding.batches.size_for(bucket) for bucket in counts}) or [1]
    batch = str(batches[0]) if len(batches) == 1 else f"{batches[0]} to {batches[-1]}"
    verb = "encode" if worker.redo is None else "repair"
    print_stderr(
        f"{verb}  {full_name(source)}  {report.dtype}{error}  {settings.row_format.posterior}  {table}  "
        f"{sum(counts.values())} {what}  ~{format_bytes(needed)} (free {format_bytes(free)})  "
        f"{report.workers} workers of batch {batch}\n"
    )
    for line in report.source_lines():
        print_stderr(f"{line}\n")
    if report.resumed:
        print_stderr(f"resume  {report.resumed} rows committed before (identity {report.identity[:8]})\n")


def _dtype_error(worker: Worker, todo: list[Unit]) -> float | None:
    """Return the dtype's error against fp32 on the first batch of readable images; None in fp32 or without images."""
    if worker.report.dtype == "fp32" or not todo:
        return None
    pixels: list[np.ndarray] = []
    bucket, batch = todo[0].bucket, worker.encoding.batches.size_for(todo[0].bucket)
    leased: list[Unit] = []
    for unit, row in itertools.islice(_free_rows(worker, todo, bucket, leased), batch + MAX_UNREADABLE):
        chunk = decode_chunk(Chunk(unit, (row,), True), worker.reader)
        pixels += [item.pixels for item in chunk.decoded if isinstance(item.pixels, np.ndarray)]
        if len(pixels) == batch:
            break
    for unit in leased:
        worker.leases.release(unit.lease)
    return worker.encoding.encoder.error_against_fp32(np.stack(pixels)) if pixels else None


def _free_rows(worker: Worker, todo: list[Unit], bucket: Size, leased: list[Unit]) -> Iterator[tuple[Unit, PlannedRow]]:
    """Yield the rows of ``bucket`` in units that no process has, with their leases acquired and added to ``leased``.

    An image that ends this process is thereby counted against its unit, and the next run does not begin with it.
    """
    for unit in todo:
        if unit.bucket == bucket and not worker.leases.is_taken(unit.lease) and worker.leases.acquire(unit.lease):
            leased.append(unit)
            yield from ((unit, row) for row in unit.rows)


def _complete(worker: Worker) -> None:
    """Write the derived files and complete the report, while the store is locked."""
    report, store = worker.report, worker.store
    store.write_derived()
    report.count_failures(store.failures().values(), len(store.resolve()), worker.options.max_failures)
    report.failed_before = sum(commit.unit not in worker.done for _, commit in store.latest_failures())
    report.judge(on_cpu=worker.settings.device.type == "cpu")
