"""A run from its plan to its report: what encode and repair share, once each has settled what is to be made."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvae.data.disk import free_bytes
from fastvae.data.encoding.batch_size import MAX_BATCH, MAX_WORKERS, Batches, positive, settle_workers
from fastvae.data.encoding.encoder import MomentEncoder
from fastvae.data.encoding.image_reader import Reading
from fastvae.data.encoding.pipeline import Encoding
from fastvae.data.encoding.planning import count_by_bucket
from fastvae.data.encoding.report import EncodeReport, parse_limit
from fastvae.data.encoding.self_check import check_fast_path
from fastvae.data.encoding.settings import Settings
from fastvae.data.encoding.worker import Run, announce, execute, finish
from fastvae.data.images.buckets import size_name
from fastvae.data.sources.source import Listing, SourceFile
from fastvae.data.store.commits import StoreError, Unit
from fastvae.data.store.identity import digest
from fastvae.data.store.leases import Leases
from fastvae.data.store.lock import locked
from fastvae.data.store.store import Store
from fastvae.system.terminal import say


@dataclass(frozen=True)
class Job:
    """What is asked for, made definite, before the output is touched. ``files``: those that may need a unit."""

    out: Path
    model: Any
    made_with: dict[str, Any]
    settings: Settings
    reading: Reading
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
class Manner:
    """How a run works, of which a store's identity knows nothing; see encode."""

    batch: int | str = "auto"
    workers: int | str = "auto"
    on_error: str = "quarantine"
    max_failures: str | float | int = "0.1%"
    deterministic: bool = False
    progress: bool = True


def perform(
    job: Job,
    manner: Manner,
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
        encoder = MomentEncoder(job.model, str(settings.dtype), settings.device, manner.deterministic)
        batches = Batches(manner.batch, encoder)
        encoding = Encoding(encoder, settings.storing, batches)
        run = Run(store, leases, settings, job.reading, encoding, report, manner.on_error, manner.progress, again)
        if todo and (wrong := check_fast_path(encoder)):
            say(f"fastvae: {wrong}\n")
            report.notes.append(wrong)
        settle_workers(report, batches, encoder, count_by_bucket(todo), manner.workers)
        announce(run, todo, job.made_with["vae"], free_bytes(job.out))
        execute(run, todo)
        with locked(job.out):
            finish(run, manner.max_failures)


def check_amounts(batch: int | str, workers: int | str, max_failures: str | float | int, max_pixels: int) -> None:
    """Raises ValueError for an amount that no run can work by; to be asked before anything else is done."""
    for name, value, most in (("batch", batch, MAX_BATCH), ("workers", workers, MAX_WORKERS)):
        if value != "auto":
            positive(name, value, most)
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
