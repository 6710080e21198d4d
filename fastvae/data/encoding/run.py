"""A run from its plan to its report: what encode and repair share, once each has settled what is to be made."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastvae.data.encoding.batch_size import MAX_BATCH, MAX_WORKERS, BatchSizes, choose_workers
from fastvae.data.encoding.encoder import MomentEncoder
from fastvae.data.encoding.image_reader import ImageReader
from fastvae.data.encoding.pipeline import Chunk, Encoding, decode_chunk
from fastvae.data.encoding.planning import count_by_bucket, needed_bytes
from fastvae.data.encoding.report import EncodeReport, parse_limit
from fastvae.data.encoding.self_check import check_fast_path
from fastvae.data.encoding.settings import Settings
from fastvae.data.encoding.worker import Run, execute
from fastvae.data.rows import SourceFile, size_name
from fastvae.data.sources.source import Listing
from fastvae.data.store.errors import StoreError
from fastvae.data.store.identity import digest
from fastvae.data.store.leases import Leases
from fastvae.data.store.lock import locked
from fastvae.data.store.plan import Unit
from fastvae.data.store.store import Store
from fastvae.system.arguments import parse_positive
from fastvae.system.atomic_files import free_bytes
from fastvae.system.terminal import format_bytes, print_stderr

# How many files may be unreadable before the dtype's error is measured on fewer images than a batch, or on none.
TRIED_IN_VAIN = 16


@dataclass(frozen=True)
class EncodeJob:
    """What is asked for, made definite, before the output is touched. ``files``: those that may need a unit."""

    out: Path
    model: Any
    made_with: dict[str, Any]
    settings: Settings
    reader: ImageReader
    listing: Listing
    files: list[SourceFile]
    identity: dict[str, Any]

    def report(self) -> EncodeReport:
        """The report of a run that has done nothing yet."""
        report = EncodeReport(os.fspath(self.out), digest(self.identity), str(self.settings.dtype), None)
        report.ignored_files, report.unreadable_places = self.listing.ignored, self.listing.unreadable
        report.duplicate_keys, report.notes = self.listing.duplicates, list(self.listing.notes)
        return report


@dataclass(frozen=True)
class RunOptions:
    """How a run works, of which a store's identity knows nothing; see encode."""

    batch: int | str = "auto"
    workers: int | str = "auto"
    on_error: str = "quarantine"
    max_failures: str | float | int = "0.1%"
    deterministic: bool = False
    progress: bool = True


def run_job(
    job: EncodeJob,
    options: RunOptions,
    report: EncodeReport,
    plan: Callable[[Leases], tuple[Store, list[Unit]]],
    again: Collection[int] | None = None,
) -> None:
    """Encode the units that ``plan`` gives, which is called by the holder of the output's lock, and fill ``report``.

    again: numbers of units that are done whatever their records say: a repair.
    """
    settings = job.settings
    with contextlib.ExitStack() as held:
        job.out.mkdir(parents=True, exist_ok=True)
        with locked(job.out):
            leases = held.enter_context(Leases(job.out / "leases"))
            store, todo = plan(leases)
            leases.sweep(keep={unit.lease for unit in todo})
        encoder = MomentEncoder(job.model, str(settings.dtype), settings.device, options.deterministic)
        batches = BatchSizes(options.batch, encoder)
        encoding = Encoding(encoder, settings.row_format, batches)
        run = Run(store, leases, settings, job.reader, encoding, report, options.on_error, options.progress, again)
        if todo and (wrong := check_fast_path(encoder)):
            print_stderr(f"fastvae: {wrong}\n")
            report.notes.append(wrong)
        choose_workers(report, batches, encoder, count_by_bucket(todo), options.workers)
        announce(run, todo, job.made_with["vae"], free_bytes(job.out))
        execute(run, todo)
        with locked(job.out):
            finish(run, options.max_failures)


def check_amounts(batch: int | str, workers: int | str, max_failures: str | float | int, max_pixels: int) -> None:
    """Raises ValueError for an amount that no run can work by; to be asked before anything else is done."""
    for name, value, most in (("batch", batch, MAX_BATCH), ("workers", workers, MAX_WORKERS)):
        if value != "auto":
            parse_positive(name, value, most)
    if not (max_pixels >= 1 and math.isfinite(max_pixels)):
        raise ValueError(f"max_pixels must be at least 1 and finite, got {max_pixels!r}")
    parse_limit(max_failures, 1)


def check_buckets(units: list[Unit], settings: Settings, out: Path) -> None:
    """Raises StoreError for a unit of a size that the table has not: a plan may be another's."""
    if strange := [size_name(unit.bucket) for unit in units if unit.bucket not in settings.buckets.sizes]:
        raise StoreError(f"{out} has a plan for {strange[0]}, and its table of buckets has no such size")


def rows_per_unit(settings: Settings, shard_mb: float) -> Callable[[tuple[int, int]], int]:
    """How many rows of a bucket make a shard of about ``shard_mb``."""
    return lambda bucket: max(1, int(shard_mb * 1e6) // settings.row_size(bucket))


def announce(run: Run, todo: list[Unit], source: str, free: int) -> None:
    """Measure the dtype's error, and say what will be done; ``free``: bytes on the disk."""
    report, settings = run.report, run.settings
    report.dtype_error = _measured_error(run, todo)
    if not run.progress:
        return
    counts = count_by_bucket(todo)
    needed = needed_bytes(counts, settings.row_size)
    error = "" if report.dtype_error is None else f" (error vs fp32 {100 * report.dtype_error:.2g} %)"
    names = settings.buckets.names
    table = f"bucket {names[0]}" if len(names) == 1 else f"buckets {settings.buckets.name} ({len(names)})"
    what = "images" if settings.variants.count == 1 else f"rows, {settings.variants.count} an image"
    batches = sorted({run.encoding.batches.size_for(bucket) for bucket in counts}) or [1]
    batch = str(batches[0]) if len(batches) == 1 else f"{batches[0]} to {batches[-1]}"
    verb = "encode" if run.again is None else "repair"
    print_stderr(
        f"{verb}  {source}  {report.dtype}{error}  {settings.row_format.posterior}  {table}  "
        f"{sum(counts.values())} {what}  ~{format_bytes(needed)} (free {format_bytes(free)})  "
        f"{report.workers} workers of batch {batch}\n"
    )
    if report.resumed:
        print_stderr(f"resume  {report.resumed} rows committed before (identity {report.identity[:8]})\n")


def _measured_error(run: Run, todo: list[Unit]) -> float | None:
    """The dtype's error on the run's first batch of images that can be read, at their bucket's size."""
    if run.report.dtype == "fp32" or not todo:
        return None
    pixels: list[np.ndarray] = []
    bucket, batch = todo[0].bucket, run.encoding.batches.size_for(todo[0].bucket)
    rows = ((unit, row) for unit in todo if unit.bucket == bucket for row in unit.rows)
    for unit, row in itertools.islice(rows, batch + TRIED_IN_VAIN):
        chunk = decode_chunk(Chunk(unit, (row,), True), run.reader)
        pixels += [item.pixels for item in chunk.decoded]
        if len(pixels) == batch:
            break
    return run.encoding.encoder.error_against_fp32(np.stack(pixels)) if pixels else None


def finish(run: Run, max_failures: str | float | int) -> None:
    """Write the derived files and complete the report; by the holder of the store's lock."""
    report, store = run.report, run.store
    store.write_derived()
    failures, served = store.failures(), len(store.resolve())
    report.reasons = dict(Counter(failure.reason for failure in failures.values()))
    report.failed_before = sum(commit.unit not in run.done for _, commit in store.latest_failures())
    wanted = report.reasons.get("animated", 0)  # left out because that was asked for
    report.exceeded = len(failures) - wanted > parse_limit(max_failures, served + len(failures))
    report.judge(on_cpu=run.settings.device.type == "cpu")
