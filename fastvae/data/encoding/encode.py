"""encode: a source of images to a latent store."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastvae.data.encoding.batch_size import check_memory
from fastvae.data.encoding.model import load_model
from fastvae.data.encoding.options import LatentOptions, RunOptions
from fastvae.data.encoding.planning import (
    count_by_bucket,
    files_to_encode,
    needed_bytes,
    orphan_records,
    pillow_note,
    plan_rows,
    with_sha256,
)
from fastvae.data.encoding.report import DEFAULT_LIMIT, EncodeReport
from fastvae.data.encoding.run import EncodeJob, check_buckets, prepare, rows_per_unit, run_job
from fastvae.data.encoding.settings import check_layout, denoiser_note, tar_rule_of, with_dtype, with_earlier_buckets
from fastvae.data.images.read import DEFAULT_MAX_PIXELS
from fastvae.data.images.size_rules import is_enlarged
from fastvae.data.rows import SourceFile, size_name
from fastvae.data.sources.changes import find_changes, keep_planned_keys
from fastvae.data.sources.companions import companion_patterns
from fastvae.data.sources.open import open_source
from fastvae.data.sources.source import MAX_LISTED, Listing, Source
from fastvae.data.sources.tar import FIRST_DOT
from fastvae.data.store.layout import STORE
from fastvae.data.store.leases import Leases
from fastvae.data.store.plan import Unit
from fastvae.data.store.store import Store
from fastvae.latents.scaling import denoiser_multiple
from fastvae.system.atomic_files import check_room
from fastvae.system.devices import resolve_device
from fastvae.system.terminal import first_few

SourceName = str | os.PathLike[str]


def encode(
    src: SourceName | Sequence[SourceName],
    out: str | os.PathLike[str],
    *,
    vae: str | os.PathLike[str] | torch.nn.Module,
    subfolder: str | None = None,
    revision: str | None = None,
    preset: str | None = None,
    buckets: int | str | os.PathLike[str] = 256,
    crop: str = "centre",
    variants: int = 1,
    flip: bool = False,
    seed: int = 0,
    dtype: str | None = None,
    posterior: str = "dist",
    store_dtype: str = "fp16",
    logvar: str = "fp16",
    batch: int | str = "auto",
    workers: int | str = "auto",
    shard_mb: float = 256,
    commit_seconds: float = 60,
    max_failures: str | float | int = DEFAULT_LIMIT,
    on_error: str = "quarantine",
    alpha: str = "white",
    animated: str = "first",
    min_size: int = 0,
    no_upscale: bool = False,
    exclude: Collection[str] = (),
    max_pixels: int = DEFAULT_MAX_PIXELS,
    image_column: str | None = None,
    key_column: str | None = None,
    schemes: Collection[str] = (),
    captions: str = "beside",
    device: str | torch.device | None = None,
    deterministic: bool = False,
    hash: str = "none",
    retry_failed: bool = False,
    prune: bool = False,
    progress: bool = True,
    limit: int | None = None,
    dry_run: bool = False,
) -> EncodeReport:
    """Encode every image of ``src`` into the latent store ``out``, or resume a run that stopped.

    src, image_column, key_column, schemes, captions: see open_source. vae: a directory, a Hub id (with ``subfolder``,
    ``revision``), a single file (with ``preset`` if its tensors do not decide the scaling), "tiny", or a model, which
    is copied.
    Options that decide the latents, recorded in the store's identity. buckets: the sizes that images are scaled to
    cover and cropped to, by aspect ratio: a side in pixels for one square, "sdxl", "flux", a JSON file, or one of these
    scaled down as in "sdxl@256". crop: "centre", or "random", drawn by ``seed`` from [0, 2^64) and stored; variants:
    the number of such crops per image; flip: each mirrored as well. dtype: "fp32", "bf16" or "fp16"; by default the
    store's, else fp16 on a GPU, bf16 on a CPU that computes in it, fp32 on others. posterior: "dist" stores mean and
    log-variance, "mean" the mean, "sample" one draw by ``seed``; store_dtype: the mean as "fp16" or "fp32"; logvar:
    "fp16" or "u8". alpha: see read_image; "mask" also stores how opaque the image is in each latent, uint8 [h, w].
    animated: see read_image. min_size: images with a side under so many pixels are left out; no_upscale: so are images
    that are smaller than their bucket in a side. Both are counted, and neither counts as a failure.
    Options of the run. exclude: patterns of images that are left out, by their key, or without a slash by its name in
    any folder. batch: images a step; on a CPU "auto" is 1. workers: threads. shard_mb: size of a shard; a kill
    can lose the work of two. commit_seconds: a shard that takes longer is committed as it is, and its other rows become
    a shard of their own; 0 or deterministic: never. max_failures: rows that may fail, a share or a count, before the
    report is ``exceeded``; by default 5 images or 0.1 % of the rows, the greater.
    on_error: "quarantine", or "fail" to stop at the first. max_pixels: see read_image. deterministic: image by image,
    and on a CPU each in one thread, so that neither batch nor workers change a bit. hash: "full" reads every file once
    more, which finds an edit that keeps size and time, and encodes nothing again for a new time alone. retry_failed:
    try every image again that failed, whatever the reason. prune: serve no row any more whose image ``src`` no longer
    has; refused if ``src`` cannot be listed whole. progress: a plan line and a bar on stderr. limit: the first
    N images only. dry_run: plan and report, and write nothing.
    Any number of processes may run this call on one ``out``: each row is made once. Images that fail are listed in
    OUT/failures.jsonl with a reason; the others are unaffected. Raises ValueError for an argument or an empty source,
    StoreError when ``out`` is damaged or holds other things, StoreLocked when another run plans it for too long,
    IdentityMismatch when it was made otherwise, ImageError with on_error="fail", OSError, ENOSPC when the disk is full,
    and Interrupted, a KeyboardInterrupt with a report, for Ctrl-C while rows are planned or encoded: finished rows are
    committed.
    After any error, committed shards stay valid, and the same call resumes.
    """
    sizes = {"min_size": min_size, "no_upscale": no_upscale}
    latents = LatentOptions(
        buckets, crop, variants, flip, seed, dtype, posterior, store_dtype, logvar, alpha, animated, **sizes
    )
    options = RunOptions(
        device=device,
        batch=batch,
        workers=workers,
        max_failures=max_failures,
        max_pixels=max_pixels,
        deterministic=deterministic,
        retry_failed=retry_failed,
        progress=progress,
        on_error=on_error,
        hash=hash,
        shard_mb=shard_mb,
        commit_seconds=commit_seconds,
    )
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit!r}")
    tar_rule = tar_rule_of(Path(out))
    columns = {"image_column": image_column, "key_column": key_column}
    source = open_source(src, **columns, schemes=schemes, tar_rule=tar_rule, captions=captions)
    if any(os.path.exists(path) and os.path.exists(out) and os.path.samefile(path, out) for path in _paths(src)):
        raise ValueError(f"out must be another folder than src, both are {os.fspath(out)!r}")
    target = resolve_device(options.device)
    listing = _listing(source, Path(out), exclude, prune)
    loaded = load_model(vae, subfolder, revision, preset)
    settings = with_dtype(Path(out), latents.settings(loaded[0], target))
    settings = with_earlier_buckets(Path(out), settings, latents.earlier_buckets(loaded[0]))
    check_memory(loaded[0], settings, options.batch)
    job = _with_files(prepare(Path(out), source, listing, loaded, settings, options), limit)
    job = replace(job, prune=prune)
    if tar_rule == FIRST_DOT:  # left out of a store that an earlier version began
        job = replace(job, layout={**job.layout, "tar_keys": tar_rule})
    # Everything that can be refused is refused before OUT is touched, and once more while OUT is locked.
    existing = _existing_store(job)
    report = job.report()
    if existing is not None:
        report.identity = existing.facts["identity_digest"]  # the job's may have other hints
    if note := denoiser_note(settings, denoiser_multiple(loaded[0])):
        report.notes.append(note)
    report.masks = companion_patterns(listing.files)
    if options.retry_failed and not _failed_before(job, existing):
        report.notes.append("no image of the source has failed before: there is nothing that --retry-failed could try")
    if dry_run:
        return _dry_run(job, existing, report)
    run_job(job, report, lambda leases: _plan(job, leases, report))
    return report


def _paths(src: SourceName | Sequence[SourceName]) -> list[SourceName]:
    return [src] if isinstance(src, str | os.PathLike) else list(src)


def _listing(source: Source, out: Path, exclude: Collection[str], prune: bool) -> Listing:
    """Return the images of ``source``, with the keys that a store at ``out`` gave them."""
    listing = source.listing(exclude=out)
    listing.leave_out(exclude)
    if prune and listing.unreadable:
        raise ValueError(
            f"prune needs a source that can be listed whole, of {source.name} cannot be read: "
            f"{first_few(listing.unreadable)}"
        )
    if (out / STORE).exists():
        keep_planned_keys(listing, Store.open(out).planned_files())
    return listing


def _with_files(job: EncodeJob, limit: int | None) -> EncodeJob:
    """Return ``job`` with its first ``limit`` files, with their sha256 where hash="full" asks for it."""
    files = job.files[:limit]
    if job.options.hash != "full":
        return replace(job, files=files)
    files = with_sha256(files, job.reader)
    listed = {**(job.reader.listed or {}), **{file.key: file for file in files}}
    return replace(job, files=files, reader=replace(job.reader, listed=listed))


def _existing_store(job: EncodeJob) -> Store | None:
    """Return the store at ``out``, None if there is none; refuse a store or a disk that cannot take the job's rows."""
    existing = Store.check(job.out, job.identity)
    if existing is not None:
        check_layout(existing, job.layout)
        orphan_records(existing)
    files, done = job.files, 0
    if existing is not None:
        commits = existing.commits()
        done = sum(len(unit.rows) for unit in existing.units() if unit.number not in commits)
        files = files_to_encode(existing, job.listing.files, job.files, job.reader, job.options.retry_failed)
    count = done + len(files) * job.reader.variants.count
    # A lower bound: the buckets of the images are not known yet.
    check_room(job.out, count * min(map(job.settings.row_size, job.settings.buckets.sizes)))
    return existing


def _failed_before(job: EncodeJob, existing: Store | None) -> set[str]:
    """Return the keys of the job's images whose last try failed."""
    keys = {failure.key for failure, _ in existing.latest_failures()} if existing is not None else set()
    return keys & {file.key for file in job.files}


def _plan(job: EncodeJob, leases: Leases, report: EncodeReport) -> tuple[Store, list[Unit]]:
    """Plan every file while the store is locked; return the store and the units without a commit."""
    store = Store.create_or_open(job.out, job.identity, job.layout, leases)
    report.identity = store.facts["identity_digest"]
    orphan_records(store)
    fresh = plan_rows(
        files_to_encode(store, job.listing.files, job.files, job.reader, job.options.retry_failed), job.reader
    )
    check_room(job.out, sum(job.settings.row_size(bucket) for bucket, _ in fresh))
    gone = _note_changes(job, store, [row.file for _, row in fresh], report)
    pruned = gone if job.prune else []
    store.extend_plan(fresh, rows_per_unit(job.settings, job.options.shard_mb), job.files, pruned)
    commits = store.commits(with_keys=True)
    report.resumed = store.count_served(commits)
    todo = [unit for unit in store.units() if unit.number not in commits]
    check_buckets(todo, job.settings, job.out)
    if todo and (note := pillow_note(commits.values())):
        report.notes.append(note)
    return store, todo


def _note_changes(
    job: EncodeJob, store: Store, changed: Iterable[SourceFile], report: EncodeReport
) -> list[SourceFile]:
    """Count and name in ``report`` the rows of edited and deleted images; return the planned files that are gone."""
    changed = {file.key: file for file in changed}.values()
    listed = {*job.listing.excluded, *(file.key for file in job.listing.files)}
    changes = find_changes(store.planned_files(), store.served_rows(), listed, changed)
    report.replaced, report.replaced_keys = changes.replaced_rows, changes.replaced[:MAX_LISTED]
    report.gone, report.gone_keys = changes.gone_rows, [file.key for file in changes.gone[:MAX_LISTED]]
    report.pruned = changes.gone_rows if job.prune else 0
    return changes.gone


def _dry_run(job: EncodeJob, existing: Store | None, report: EncodeReport) -> EncodeReport:
    """Complete the report of a dry run."""
    commits = existing.commits() if existing is not None else {}
    report.resumed = existing.count_served(commits) if existing is not None else 0
    counts = count_by_bucket([unit for unit in existing.units() if unit.number not in commits] if existing else [])
    files = (
        files_to_encode(existing, job.listing.files, job.files, job.reader, job.options.retry_failed)
        if existing
        else job.files
    )
    if existing is not None:
        _note_changes(job, existing, files, report)
        report.resumed -= report.replaced + report.pruned
    for bucket, row in plan_rows(files, job.reader):
        counts[bucket] = counts.get(bucket, 0) + 1
        known = all(row.original_hw)
        report.unreadable_headers += not known
        if known and (reason := job.settings.size_rules.reason(row.original_hw, bucket)):
            report.reasons[reason] = report.reasons.get(reason, 0) + 1
        elif known and is_enlarged(row.original_hw, bucket):
            report.flags["upscaled"] = report.flags.get("upscaled", 0) + 1
    report.planned = {size_name(bucket): count for bucket, count in counts.items()}
    report.planned_bytes = needed_bytes(counts, job.settings.row_size)
    return report
