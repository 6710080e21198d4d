"""repair: encodes the damaged units of a store again, with retry_failed also the images that failed, and no others."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastvae.data.encoding.batch_size import check_memory
from fastvae.data.encoding.model import load_model, named_model
from fastvae.data.encoding.options import RunOptions
from fastvae.data.encoding.planning import orphan_records, plan_rows, with_sha256
from fastvae.data.encoding.report import DEFAULT_LIMIT, EncodeReport, Interrupted
from fastvae.data.encoding.run import EncodeJob, check_buckets, prepare, rows_per_unit, run_job
from fastvae.data.encoding.settings import check_layout, stored_settings, tar_rule_of
from fastvae.data.images.read import DEFAULT_MAX_PIXELS
from fastvae.data.rows import SourceFile
from fastvae.data.sources.changes import keep_planned_keys
from fastvae.data.sources.open import open_source
from fastvae.data.sources.source import Source
from fastvae.data.store.errors import StoreError, StoreLocked
from fastvae.data.store.layout import DERIVED_NAMES, STORE, check_kinds
from fastvae.data.store.leases import Leases
from fastvae.data.store.lock import locked
from fastvae.data.store.plan import Unit
from fastvae.data.store.store import Store
from fastvae.data.store.verify import Damage, verify
from fastvae.system.atomic_files import check_room, synchronise_folder
from fastvae.system.devices import resolve_device


@dataclass
class RepairReport:
    """Damage that was found, numbers of the units that were encoded again, and images that were tried again.

    After an interruption, those of the units that were committed.
    ``missing``: images that failed, are not in the source, and so were not tried. ``pending``: units that were never
    encoded, which is left to encode. ``report``: of what was encoded; None if nothing was.
    """

    store: str
    damaged: list[Damage] = field(default_factory=list)
    units: list[int] = field(default_factory=list)
    retried: int = 0
    missing: int = 0
    pending: int = 0
    report: EncodeReport | None = None

    def facts(self) -> dict[str, Any]:
        """Return the report as a dict of JSON values."""
        return {**asdict(self), "report": self.report and self.report.facts()}

    def count_done(self, work: _Work, done: set[int], units: Sequence[Unit]) -> None:
        """Count only what is in the units ``done``, after an interruption."""
        self.units = sorted(work.damaged & done)
        tried = {row.file.key for unit in units if unit.number in done - work.damaged for row in unit.rows}
        self.retried = len(tried & work.retried)


def repair(
    store: str | os.PathLike[str],
    src: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    *,
    vae: str | os.PathLike[str] | torch.nn.Module | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    preset: str | None = None,
    retry_failed: bool = False,
    batch: int | str = "auto",
    workers: int | str = "auto",
    max_failures: str | float | int = DEFAULT_LIMIT,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    image_column: str | None = None,
    key_column: str | None = None,
    schemes: Collection[str] = (),
    device: str | torch.device | None = None,
    deterministic: bool = False,
    progress: bool = True,
) -> RepairReport:
    """Encode the damaged units of ``store`` again, as verify(deep=True) finds them; every other file stays as it is.

    src: where the images come from, as encode takes it. The store does not name it: a plan may have been edited, so
    only what the caller names is opened. It may be left out where nothing has to be encoded. vae, subfolder, revision,
    preset: the model; by default the one that the store names, which is printed on stderr. All settings of the store's
    identity are taken from the store. retry_failed: also try images again whose last try failed, in units of their own,
    among them those of a repair that was interrupted. The other options: see encode. Commit records of no unit are
    deleted unless there is a shard beside them. An image that is missing is quarantined.
    Raises ValueError for an argument, for a ``src`` that is needed and not given, that holds none of the images, or one
    that is not as it was planned; StoreError for what is no store, has a store.json that its shards contradict, a
    folder instead of a file, or a shard of no unit; StoreLocked while a run is writing it; IdentityMismatch for another
    model; OSError, ENOSPC when the disk is full; and Interrupted, a KeyboardInterrupt with a report, for Ctrl-C while
    rows are encoded: finished rows are committed, except those of a damaged unit that is not complete.
    After any error, what was sound stays so, and the same call resumes.
    """
    options = RunOptions(
        device=device,
        batch=batch,
        workers=workers,
        max_failures=max_failures,
        max_pixels=max_pixels,
        deterministic=deterministic,
        retry_failed=retry_failed,
        progress=progress,
    )
    path = Path(store)
    opened = Store.open(path)
    check_kinds(path)
    leases = Leases(path / "leases")
    if leases.folder.is_dir():
        _check_unused(opened, leases)
    found = verify(path, deep=True, progress=progress)
    _check_repairable(path, found.damaged)
    orphan_records(opened)
    work = _find_work(opened, found.damaged, retry_failed)
    result = RepairReport(
        os.fspath(store), found.damaged, sorted(work.damaged), pending=found.pending - len(work.begun)
    )
    if not (work.damaged or work.failed or work.begun):
        with locked(path):
            _delete_orphans(opened, leases)
            if any(damage.file in DERIVED_NAMES for damage in found.damaged):
                opened.write_derived()
        return result
    if src is None:
        raise ValueError(_needs_source(path, work))
    source = open_source(
        src, image_column=image_column, key_column=key_column, schemes=schemes, tar_rule=tar_rule_of(path)
    )
    job = _job(opened, source, named_model(opened, vae, subfolder, revision, preset), work.failed, options)
    _check_source(_planned_files(opened, work.damaged), work.retried, job)
    check_memory(job.model, job.settings, options.batch)
    report = result.report = job.report()
    result.missing = len(work.failed.difference(job.reader.listed or {}))
    result.retried = len(work.retried) - result.missing
    try:
        run_job(job, report, lambda leases: _plan(job, leases, work, report), redo=work.damaged)
    except Interrupted as stopped:
        result.count_done(work, {*stopped.done}, Store.open(path).units())
        stopped.report = result
        raise
    return result


@dataclass(frozen=True)
class _Work:
    """Numbers of the damaged units, keys of failed images to try again, and units that a killed repair had planned."""

    damaged: set[int]
    failed: set[str]
    begun: dict[int, set[str]]  # keys by unit

    @property
    def retried(self) -> set[str]:
        """Keys of the failed images, those of ``begun`` included."""
        return self.failed.union(*self.begun.values())


def _find_work(store: Store, damaged: Sequence[Damage], retry_failed: bool) -> _Work:
    bad = {damage.unit for damage in damaged if damage.unit is not None}
    if not retry_failed:
        return _Work(bad, set(), {})
    failed = {failure.key for failure, commit in store.latest_failures() if commit.unit not in bad}
    return _Work(bad, failed, _begun(store, bad))


def _needs_source(path: Path, work: _Work) -> str:
    what = [f"{len(work.damaged)} units"] * bool(work.damaged)
    what += [f"{len(work.retried)} images that failed"] * bool(work.retried)
    return (
        f"src must be named, since {' and '.join(what)} of {path} are encoded again from their images: "
        f"fastvae repair {path} SRC"
    )


def _check_repairable(path: Path, damaged: Sequence[Damage]) -> None:
    """Raise StoreError for an edited store.json, before anything is written.

    store.json is never rewritten from the shards: it would then no longer be independent evidence.
    """
    if edited := [damage.what for damage in damaged if damage.file == STORE]:
        raise StoreError(f"{path / STORE} {'; '.join(edited)}: set it back to that, nothing was repaired")


def _job(
    store: Store,
    source: Source,
    named: tuple[Any, str | None, str | None, str | None],
    failed: Collection[str],
    options: RunOptions,
) -> EncodeJob:
    target = resolve_device(options.device)
    listing = source.listing(exclude=store.path)
    keep_planned_keys(listing, store.planned_files())
    loaded = load_model(*named)
    job = prepare(store.path, source, listing, loaded, stored_settings(store, loaded[0], target), options)
    Store.check(store.path, job.identity)
    check_layout(store, job.layout)
    return replace(job, files=[file for file in listing.files if file.key in failed])


def _begun(store: Store, bad: Collection[int]) -> dict[int, set[str]]:
    """Return the units that an interrupted repair had planned, by number, with their keys.

    They have no record and hold only images whose last try failed.
    """
    commits = {number: commit for number, commit in store.commits().items() if number not in bad}
    failed: set[str] = set()
    for unit in store.units():
        if unit.number in commits:
            failed -= {row.file.key for row in unit.rows}
            failed |= {failure.key for failure in commits[unit.number].failed}
    keys = {unit.number: {row.file.key for row in unit.rows} for unit in store.units()}
    return {number: own for number, own in keys.items() if number not in {*commits, *bad} and own <= failed}


def _planned_files(store: Store, bad: Collection[int]) -> dict[str, SourceFile]:
    """Return the files of the units ``bad``, as planned, by key, without those that a later unit encodes again."""
    units = store.units()
    latest = store.latest()
    rows = [(unit.number, row) for unit in units if unit.number in bad for row in unit.rows]
    return {row.file.key: row.file for number, row in rows if latest.get(row.name) == number}


def _check_source(planned: Mapping[str, SourceFile], failed: Collection[str], job: EncodeJob) -> None:
    """Raise ValueError if the source has none of the ``planned`` files: all their rows would be quarantined.

    Also if a file is not as it was planned: its latents would replace those of the planned one. And if nothing is
    planned and the source has none of the files that ``failed``: nothing would be done.
    """
    places = [*planned.items()]
    listed = job.reader.listed or {}
    if failed and not places and listed.keys().isdisjoint(failed):
        raise ValueError(
            f"src must hold the images that {job.out} was made from: none of the {len(failed)} that failed is in "
            f"{job.reader.source.name}"
        )
    if places and not any(
        key in listed and (listed[key].place == file.place or listed[key].is_same_as(file)) for key, file in places
    ):
        raise ValueError(
            f"src must hold the images that {job.out} was made from: none of the {len(places)} that are damaged is in "
            f"{job.reader.source.name}"
        )
    files = [file for file in job.listing.files if file.key in planned]
    if any(file.sha256 for file in planned.values()):
        files = with_sha256(files, job.reader)
    if other := [file.key for file in files if not file.is_same_as(planned[file.key])]:
        raise ValueError(
            f"src must hold the images as they were planned: {len(other)} of {len(places)} in damaged units have "
            f"another size, time or content, such as {other[0]!r}: fastvae encode SRC {job.out} takes them as edited"
        )


def _plan(job: EncodeJob, leases: Leases, work: _Work, report: EncodeReport) -> tuple[Store, list[Unit]]:
    """Return the store and the units to encode, while it is locked."""
    numbers = {*work.damaged, *work.begun}
    store = Store.create_or_open(job.out, job.identity, {}, leases)
    report.identity = store.facts["identity_digest"]  # the job's may have other hints
    _delete_orphans(store, leases)
    todo = [unit for unit in store.units() if unit.number in numbers]
    check_buckets(todo, job.settings, job.out)
    fresh = plan_rows(job.files, job.reader)
    buckets = [unit.bucket for unit in todo for _ in unit.rows] + [bucket for bucket, _ in fresh]
    check_room(job.out, sum(map(job.settings.row_size, buckets)))
    added = store.extend_plan(fresh, rows_per_unit(job.settings, job.options.shard_mb))
    report.resumed = store.count_served({n: commit for n, commit in store.commits().items() if n not in numbers})
    return store, todo + added


def _check_unused(store: Store, leases: Leases) -> None:
    """Raise StoreLocked while another process writes the store: its unfinished units look damaged."""
    if live := leases.live():
        raise StoreLocked(f"{store.path} is being written, lease {live[0]}: let that run end first")


def _delete_orphans(store: Store, leases: Leases) -> None:
    """Delete the commit records of no unit that have no shard, while the store is locked."""
    if leases.folder.is_dir():
        _check_unused(store, leases)
    records = orphan_records(store)
    for path in records:
        path.unlink(missing_ok=True)
    if records:
        synchronise_folder(records[0].parent)
