"""A damaged store made whole: the units that are damaged encoded again, on wish what failed too, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastvae.data.encoding.batch_size import check_memory
from fastvae.data.encoding.image_reader import ImageReader
from fastvae.data.encoding.model import load_model, named_model
from fastvae.data.encoding.planning import orphan_records, plan_rows, with_sha256
from fastvae.data.encoding.report import EncodeReport
from fastvae.data.encoding.run import EncodeJob, RunOptions, check_amounts, check_buckets, rows_per_unit, run_job
from fastvae.data.encoding.settings import check_layout, identity_of, layout_of, stored_settings
from fastvae.data.images.read import DEFAULT_MAX_PIXELS
from fastvae.data.rows import SourceFile
from fastvae.data.sources.open import open_source
from fastvae.data.sources.source import Source
from fastvae.data.store.errors import StoreError, StoreLocked
from fastvae.data.store.layout import DERIVED_NAMES, STORE, check_kinds
from fastvae.data.store.leases import Leases
from fastvae.data.store.lock import locked
from fastvae.data.store.plan import Unit
from fastvae.data.store.store import Store, latest_units
from fastvae.data.store.verify import Damage, verify
from fastvae.system.atomic_files import check_room, synchronise_folder
from fastvae.system.devices import resolve_device

SHARD_MB = 256  # of failures that are tried again


@dataclass
class RepairReport:
    """What was ``damaged``, which units were encoded again for it, and how many failed images were tried again.

    ``missing``: images that failed and are not in the source, which were not tried. ``pending``: units that no run has
    made yet, which are encode's. ``report``: of what was encoded, None for nothing.
    """

    store: str
    damaged: list[Damage] = field(default_factory=list)
    units: list[int] = field(default_factory=list)
    retried: int = 0
    missing: int = 0
    pending: int = 0
    report: EncodeReport | None = None


def repair(
    store: str | os.PathLike[str],
    src: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    *,
    vae: str | os.PathLike[str] | torch.nn.Module | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    retry_failed: bool = False,
    batch: int | str = "auto",
    workers: int | str = "auto",
    max_failures: str | float | int = "0.1%",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    image_column: str = "image",
    key_column: str = "key",
    schemes: Collection[str] = (),
    device: str | torch.device | None = None,
    deterministic: bool = False,
    progress: bool = True,
) -> RepairReport:
    """Encode the damaged units of ``store`` again, as verify(deep=True) finds them; every other file stays as it is.

    src: where the images come from, as encode takes it. The store does not name it: a plan may be another's, and
    nothing is opened but what the caller names. It may be left out where nothing has to be encoded. vae, subfolder,
    revision: the model; by default the one that the store names, which is said on stderr. All that counts in the
    store's identity is taken from the store. retry_failed: images whose last try failed are tried again, in units of
    their own, and what a repair planned so and was interrupted in. The others: see encode. Records of no unit are
    deleted where no shard lies beside them. An image that is no longer there is quarantined.
    Raises ValueError for an argument, for a ``src`` that is needed and not given, that holds none of the images, or one
    that is not as it was planned; StoreError for what is no store, has a store.json that its shards contradict, a
    folder in the place of a file, or a shard of no unit; StoreLocked while a run is writing it; IdentityMismatch for
    another model; OSError, ENOSPC when the disk is full. Whatever is raised, what was sound stays so, and the same call
    goes on.
    """
    check_amounts(batch, workers, max_failures, max_pixels)
    path = Path(store)
    there = Store.open(path)
    check_kinds(path)
    leases = Leases(path / "leases")
    if leases.folder.is_dir():
        _check_unused(there, leases)
    found = verify(path, deep=True, progress=progress)
    _check_mendable(path, found.damaged)
    orphan_records(there)
    bad = {damage.unit for damage in found.damaged if damage.unit is not None}
    failed = {failure.key for failure, commit in there.latest_failures() if retry_failed and commit.unit not in bad}
    begun = _begun(there, bad) if retry_failed else {}
    result = RepairReport(os.fspath(store), found.damaged, sorted(bad), pending=found.pending - len(begun))
    if not (bad or failed or begun):
        with locked(path):
            _delete_unplanned(there, leases)
            if any(damage.file in DERIVED_NAMES for damage in found.damaged):
                there.write_derived()
        return result
    again = failed.union(*begun.values())
    if src is None:
        what = [f"{len(bad)} units"] * bool(bad) + [f"{len(again)} images that failed"] * bool(again)
        raise ValueError(
            f"src must be named, since {' and '.join(what)} of {path} are encoded again from their images: "
            f"fastvae repair {path} SRC"
        )
    source = open_source(src, image_column=image_column, key_column=key_column, schemes=schemes)
    model = named_model(there, vae, subfolder, revision)
    job = _job(there, source, model, failed, resolve_device(device), max_pixels)
    _check_source(_served(there, bad), again, job)
    check_memory(job.model, job.settings, batch)
    report = result.report = job.report()
    result.missing = len(failed.difference(job.reader.listed or {}))
    result.retried = len(again) - result.missing
    options = RunOptions(batch, workers, "quarantine", max_failures, deterministic, progress)

    run_job(job, options, report, lambda leases: _plan(job, leases, {*bad, *begun}, report), again=bad)
    return result


def _check_mendable(path: Path, damaged: Sequence[Damage]) -> None:
    """Raises StoreError for damage that no encoding mends, before anything is written.

    store.json is written once: were it written anew by what shards state, it would be nobody's word any more.
    """
    if edited := [damage.what for damage in damaged if damage.file == STORE]:
        raise StoreError(f"{path / STORE} {'; '.join(edited)}: set it back to that, nothing was repaired")


def _job(
    store: Store,
    source: Source,
    named: tuple[Any, str | None, str | None],
    failed: Collection[str],
    device: torch.device,
    max_pixels: int,
) -> EncodeJob:
    listing = source.listing(exclude=store.path)
    model, made_with = load_model(*named)
    settings = stored_settings(store, model, device)
    identity = identity_of(model, settings)
    Store.check(store.path, identity)
    check_layout(store, layout_of(model, made_with, settings))
    listed = {file.key: file.place for file in listing.files}
    reader = ImageReader(
        source,
        settings.buckets,
        settings.variants,
        settings.alpha,
        settings.factor,
        max_pixels,
        listed,
        settings.animated,
    )
    files = [file for file in listing.files if file.key in failed]
    return EncodeJob(store.path, model, made_with, settings, reader, listing, files, identity)


def _begun(store: Store, bad: Collection[int]) -> dict[int, set[str]]:
    """Units without a record that hold nothing but images whose last try failed, by number, with their keys.

    A repair that was interrupted had planned them.
    """
    commits = {number: commit for number, commit in store.commits().items() if number not in bad}
    failed: set[str] = set()
    for unit in store.units():
        if unit.number in commits:
            failed -= {row.file.key for row in unit.rows}
            failed |= {failure.key for failure in commits[unit.number].failed}
    keys = {unit.number: {row.file.key for row in unit.rows} for unit in store.units()}
    return {number: own for number, own in keys.items() if number not in {*commits, *bad} and own <= failed}


def _served(store: Store, bad: Collection[int]) -> dict[str, SourceFile]:
    """The images of the units ``bad`` that no later unit has again, as they were planned, by key."""
    units = store.units()
    latest = latest_units(units)
    rows = [(unit.number, row) for unit in units if unit.number in bad for row in unit.rows]
    return {row.file.key: row.file for number, row in rows if latest[row.file.key, row.variant] == number}


def _check_source(planned: Mapping[str, SourceFile], failed: Collection[str], job: EncodeJob) -> None:
    """Raises ValueError where no image of ``planned`` is in the source: theirs would all be quarantined.

    Where one is another than was planned: its latents would stand for the planned one's. And where there are none, and
    none of those that ``failed`` is: nothing would be done.
    """
    places = [(key, file.place) for key, file in planned.items()]
    there = job.reader.listed or {}
    if failed and not places and there.keys().isdisjoint(failed):
        raise ValueError(
            f"src must hold the images that {job.out} was made from: none of the {len(failed)} that failed is in "
            f"{job.reader.source.name}"
        )
    if places and not any(there.get(key) == place for key, place in places):
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


def _plan(job: EncodeJob, leases: Leases, again: Collection[int], report: EncodeReport) -> tuple[Store, list[Unit]]:
    """The store and the units to be done, by the holder of its lock."""
    store = Store.create_or_open(job.out, job.identity, {}, leases)
    _delete_unplanned(store, leases)
    todo = [unit for unit in store.units() if unit.number in again]
    check_buckets(todo, job.settings, job.out)
    fresh = plan_rows(job.files, job.reader)
    buckets = [unit.bucket for unit in todo for _ in unit.rows] + [bucket for bucket, _ in fresh]
    check_room(job.out, sum(map(job.settings.row_size, buckets)))
    report.resumed = sum(commit.rows for number, commit in store.commits().items() if number not in again)
    return store, todo + store.extend_plan(fresh, rows_per_unit(job.settings, SHARD_MB))


def _check_unused(store: Store, leases: Leases) -> None:
    """Raises StoreLocked while another process writes the store: what it has not finished looks damaged."""
    if live := leases.live():
        raise StoreLocked(f"{store.path} is being written, lease {live[0]}: let that run end first")


def _delete_unplanned(store: Store, leases: Leases) -> None:
    """Delete the records of no unit that have no shard; by the lock's holder."""
    if leases.folder.is_dir():
        _check_unused(store, leases)
    records = orphan_records(store)
    for path in records:
        path.unlink(missing_ok=True)
    if records:
        synchronise_folder(records[0].parent)
