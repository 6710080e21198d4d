"""A source of images to a latent store: the run behind ``fastvae encode``."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastvae.data.encoding.batch_size import check_memory
from fastvae.data.encoding.image_reader import ImageReader
from fastvae.data.encoding.model import load_model
from fastvae.data.encoding.planning import (
    count_by_bucket,
    files_to_encode,
    needed_bytes,
    orphan_records,
    plan_rows,
    with_sha256,
)
from fastvae.data.encoding.report import EncodeReport
from fastvae.data.encoding.row_format import LOGVARS, RowFormat
from fastvae.data.encoding.run import EncodeJob, RunOptions, check_amounts, check_buckets, rows_per_unit, run_job
from fastvae.data.encoding.settings import Settings, check_layout, identity_of, layout_of, with_dtype
from fastvae.data.images.buckets import Buckets
from fastvae.data.images.crop import CROPS, checked_variants
from fastvae.data.images.read import ALPHAS, ANIMATED, DEFAULT_MAX_PIXELS
from fastvae.data.rows import size_name
from fastvae.data.sources.open import open_source
from fastvae.data.store.leases import Leases
from fastvae.data.store.plan import Unit
from fastvae.data.store.shard import POSTERIORS
from fastvae.data.store.store import Store
from fastvae.latents.scaling import downsample_factor, pixel_multiple
from fastvae.system.arguments import check_choices
from fastvae.system.atomic_files import check_room
from fastvae.system.devices import resolve_device

SourceName = str | os.PathLike[str]


@dataclass(frozen=True)
class _Encode(EncodeJob):
    """``files``: the first of the listing up to the limit; ``retry``: those that failed are tried again."""

    layout: dict[str, Any]
    retry: bool


def encode(
    src: SourceName | Sequence[SourceName],
    out: str | os.PathLike[str],
    *,
    vae: str | os.PathLike[str] | torch.nn.Module = "tiny",
    subfolder: str | None = None,
    revision: str | None = None,
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
    max_failures: str | float | int = "0.1%",
    on_error: str = "quarantine",
    alpha: str = "white",
    animated: str = "first",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    image_column: str = "image",
    key_column: str = "key",
    schemes: Collection[str] = (),
    device: str | torch.device | None = None,
    deterministic: bool = False,
    hash: str = "none",
    retry_failed: bool = False,
    progress: bool = True,
    limit: int | None = None,
    dry_run: bool = False,
) -> EncodeReport:
    """Encode every image of ``src`` into the latent store ``out``, or go on where a run stopped.

    src, image_column, key_column, schemes: see open_source. vae: a directory, a Hub id (with ``subfolder``,
    ``revision``), "tiny", or a model, which is copied. buckets: the sizes that images are scaled to cover and cropped
    to, by aspect ratio: a side in pixels for one square, "sdxl", "flux", a JSON file, or one of these scaled down as in
    "sdxl@256". crop: "centre", or "random", drawn by ``seed`` from [0, 2^64) and stored; variants: how many such crops
    an image; flip: each mirrored as well. dtype: "fp32", "bf16" or "fp16"; by default the store's own, else fp16 on a
    GPU, bf16 on a CPU that computes in it, fp32 on others. posterior: "dist" stores mean and log-variance, "mean" the
    mean, "sample" one draw by ``seed`` in its place; store_dtype: the mean as "fp16" or "fp32"; logvar: "fp16" or "u8".
    batch: images a step; on a CPU "auto" is 1. workers: threads. shard_mb: size of a shard; a kill can lose two's work.
    max_failures: rows that may fail, a share or a count, before the report is ``exceeded``. on_error: "quarantine", or
    "fail" to stop at the first. alpha: see read_image; "mask" also stores how opaque the image is in each latent, uint8
    [h, w]. animated, max_pixels: see read_image. deterministic: image by image, and on a CPU each in one thread, so
    that neither batch nor workers change a bit. hash: "full" reads every file once more, so that an edit is seen that
    keeps size and time, and a new time alone encodes nothing again. retry_failed: images that failed are tried again,
    whatever the reason was. progress: a plan line and a bar on stderr. limit: the first N images only. dry_run: plan,
    report and write nothing.
    Any number of processes may run this call on one ``out``: each row is made once. Images that fail are listed in
    OUT/failures.jsonl with a reason; the others are unaffected. Raises ValueError for an argument or an empty source,
    StoreError when ``out`` is damaged or holds other things, StoreLocked when another run plans it for too long,
    IdentityMismatch when it was made otherwise, ImageError with on_error="fail", and OSError, ENOSPC when the disk is
    full. Whatever is raised, committed shards stay valid, and the same call resumes.
    """
    check_choices(
        posterior=(posterior, POSTERIORS),
        store_dtype=(store_dtype, ("fp16", "fp32")),
        logvar=(logvar, LOGVARS),
        crop=(crop, CROPS),
        on_error=(on_error, ("quarantine", "fail")),
        alpha=(alpha, ALPHAS),
        animated=(animated, ANIMATED),
        hash=(hash, ("none", "full")),
        dtype=(dtype, (None, "fp32", "bf16", "fp16")),
    )
    check_amounts(batch, workers, max_failures, max_pixels)
    if not (shard_mb > 0 and math.isfinite(shard_mb)):
        raise ValueError(f"shard_mb must be above 0 and finite, got {shard_mb!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit!r}")
    source = open_source(src, image_column=image_column, key_column=key_column, schemes=schemes)
    if os.path.exists(out) and os.path.exists(source.name) and os.path.samefile(source.name, out):
        raise ValueError(f"out must be another folder than src, both are {os.fspath(out)!r}")
    place = resolve_device(device)
    kinds = checked_variants(crop, variants, flip, seed)
    listing = source.listing(exclude=out)
    model, made_with = load_model(vae, subfolder, revision)
    table = Buckets.named(buckets, pixel_multiple(model))
    row_format = RowFormat(posterior, store_dtype, logvar, seed)
    factor, channels = downsample_factor(model), int(model.config.latent_channels)
    wanted = Settings(dtype, row_format, table, kinds, alpha, factor, channels, place, animated)
    settings = with_dtype(Path(out), wanted)
    check_memory(model, settings, batch)
    listed = {file.key: file.place for file in listing.files}
    reader = ImageReader(source, table, kinds, alpha, factor, max_pixels, listed, animated)
    identity, layout = identity_of(model, settings), layout_of(model, made_with, settings)
    files = with_sha256(listing.files[:limit], reader) if hash == "full" else listing.files[:limit]
    job = _Encode(
        Path(out), model, made_with, settings, reader, listing, files, identity, layout=layout, retry=retry_failed
    )
    # Everything that can be refused is refused before OUT is touched, and once more by whoever holds its lock.
    existing = _foreseen(job)
    report = job.report()
    if retry_failed and not _failed_before(job, existing):
        report.notes.append("no image of the source has failed before: there is nothing that --retry-failed could try")
    if dry_run:
        return _planned(job, existing, report)
    options = RunOptions(batch, workers, on_error, max_failures, deterministic, progress)
    run_job(job, options, report, lambda leases: _plan(job, leases, shard_mb, report))
    return report


def _foreseen(job: _Encode) -> Store | None:
    """The store that is there; raises what can be told of it, and of the disk, without writing anything."""
    existing = Store.check(job.out, job.identity)
    if existing is not None:
        check_layout(existing, job.layout)
        orphan_records(existing)
    files, done = job.files, 0
    if existing is not None:
        commits = existing.commits()
        done = sum(len(unit.rows) for unit in existing.units() if unit.number not in commits)
        files = files_to_encode(existing, job.listing.files, job.files, job.reader, job.retry)
    count = done + len(files) * job.reader.variants.count
    # The images' buckets are not known yet: at least this much.
    check_room(job.out, count * min(map(job.settings.row_size, job.settings.buckets.sizes)))
    return existing


def _failed_before(job: _Encode, existing: Store | None) -> set[str]:
    """The keys of the source's images whose last try failed."""
    keys = {failure.key for failure, _ in existing.latest_failures()} if existing is not None else set()
    return keys & {file.key for file in job.files}


def _plan(job: _Encode, leases: Leases, shard_mb: float, report: EncodeReport) -> tuple[Store, list[Unit]]:
    """The store with a plan for every file, and the units without a commit; by the holder of the lock."""
    store = Store.create_or_open(job.out, job.identity, job.layout, leases)
    orphan_records(store)
    fresh = plan_rows(files_to_encode(store, job.listing.files, job.files, job.reader, job.retry), job.reader)
    check_room(job.out, sum(job.settings.row_size(bucket) for bucket, _ in fresh))
    store.extend_plan(fresh, rows_per_unit(job.settings, shard_mb), job.files)
    commits = store.commits(with_keys=True)
    report.resumed = sum(commit.rows for commit in commits.values())
    todo = [unit for unit in store.units() if unit.number not in commits]
    check_buckets(todo, job.settings, job.out)
    return store, todo


def _planned(job: _Encode, existing: Store | None, report: EncodeReport) -> EncodeReport:
    """The report of a dry run."""
    commits = existing.commits() if existing is not None else {}
    report.resumed = sum(commit.rows for commit in commits.values())
    counts = count_by_bucket([unit for unit in existing.units() if unit.number not in commits] if existing else [])
    files = files_to_encode(existing, job.listing.files, job.files, job.reader, job.retry) if existing else job.files
    for bucket, row in plan_rows(files, job.reader):
        counts[bucket] = counts.get(bucket, 0) + 1
        report.unreadable_headers += not all(row.original_hw)
    report.planned = {size_name(bucket): count for bucket, count in counts.items()}
    report.planned_bytes = needed_bytes(counts, job.settings.row_size)
    return report
