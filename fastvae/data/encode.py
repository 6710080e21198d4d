"""A folder of images to a latent store: the run behind ``fastvae encode``."""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fastvae import __version__
from fastvae.data.console import Stderr, say
from fastvae.data.devices import settled_device
from fastvae.data.images import DEFAULT_MAX_PIXELS
from fastvae.data.lock import locked
from fastvae.data.moment_encoder import MomentEncoder
from fastvae.data.pipeline import BackgroundWriter, Chunk, Reading, chunks_of, decode_chunk, encoded_chunks
from fastvae.data.preprocess import bucket_side
from fastvae.data.reasons import ImageError
from fastvae.data.report import EncodeReport, parse_limit
from fastvae.data.settings import (
    MAX_BATCH,
    MAX_WORKERS,
    Settings,
    check_choices,
    check_memory,
    decided,
    identity_of,
    layout_of,
    load_model,
    positive,
    settle_workers,
)
from fastvae.data.sources import SourceFile, list_folder
from fastvae.data.store import Commit, Failure, Store, Unit
from fastvae.latents import downsample_factor, pixel_multiple

# How many files may be unreadable before the dtype's error is measured on fewer images than a batch, or on none.
TRIED_IN_VAIN = 16


@dataclass
class _Run:
    """One run's resolved settings and parts."""

    store: Store
    settings: Settings
    encoder: MomentEncoder
    reading: Reading
    report: EncodeReport
    on_error: str
    progress: bool


def encode(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    vae: str | os.PathLike[str] | torch.nn.Module = "tiny",
    subfolder: str | None = None,
    revision: str | None = None,
    buckets: int | str = 256,
    dtype: str | None = None,
    posterior: str = "dist",
    store_dtype: str = "fp16",
    batch: int | str = "auto",
    workers: int | str = "auto",
    shard_mb: float = 256,
    max_failures: str | float | int = "0.1%",
    on_error: str = "quarantine",
    alpha: str = "white",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    device: str | torch.device | None = None,
    progress: bool = True,
    limit: int | None = None,
) -> EncodeReport:
    """Encode every image under the folder ``src`` into the latent store ``out``, or go on where a run stopped.

    vae: a directory, a Hub id (with ``subfolder``, ``revision``), "tiny", or a model, which is copied. buckets: the
    side in pixels of the square that images are scaled to cover and centre-cropped to. dtype: "fp32", "bf16" or "fp16";
    by default the store's own, else fp16 on a GPU, bf16 on a CPU that computes in it, fp32 on others. posterior: "dist"
    stores mean and log-variance, "mean" the mean; store_dtype: the mean as "fp16" or "fp32". batch: images a step (1 on
    a CPU). workers: threads. shard_mb: size of a shard; a kill can lose the work of two. max_failures: rows that may
    fail, a share or a count, before the report is ``exceeded``. on_error: "quarantine", or "fail" to stop at the first.
    alpha, max_pixels: see read_image. progress: a plan line and a bar on stderr. limit: the first N images only.
    Images that fail are listed in OUT/failures.jsonl with a reason; the others are unaffected. Raises ValueError for an
    argument or an empty source, StoreError when ``out`` is damaged or holds other things, StoreLocked when another run
    writes it, IdentityMismatch when it was made otherwise, ImageError with on_error="fail", and OSError, ENOSPC when
    the disk is full. Whatever is raised, committed shards stay valid, and the same call resumes.
    """
    check_choices(
        posterior=(posterior, ("dist", "mean")),
        store_dtype=(store_dtype, ("fp16", "fp32")),
        on_error=(on_error, ("quarantine", "fail")),
        alpha=(alpha, ("white", "drop")),
        dtype=(dtype, (None, "fp32", "bf16", "fp16")),
    )
    _check_amounts(shard_mb, limit, max_failures, max_pixels, batch, workers)
    if os.path.exists(out) and os.path.exists(src) and os.path.samefile(src, out):
        raise ValueError(f"out must be another folder than src, both are {os.fspath(src)!r}")
    place = settled_device(device)
    listing = list_folder(src, exclude=out)
    model, source = load_model(vae, subfolder, revision)
    factor = downsample_factor(model)
    side = bucket_side(buckets, factor, pixel_multiple(model) // factor)
    settings = decided(Path(out), Settings(dtype, posterior, store_dtype, side, factor, alpha, place))
    check_memory(model, settings, batch)
    identity, layout = identity_of(model, settings), layout_of(model, source, settings)
    reading = Reading(Path(src), settings.side, alpha, max_pixels)
    # Everything that can be refused is refused before OUT is touched, and once more by whoever holds its lock.
    files = listing.files[:limit]
    existing = Store.check(Path(out), identity)
    count = len(files)
    if existing is not None:
        commits = existing.commits()
        unfinished = _count([unit for unit in existing.units() if unit.number not in commits])
        count = unfinished + len(_fresh(existing, listing.files, files, reading))
    _check_room(Path(out), settings, layout, count)
    Path(out).mkdir(parents=True, exist_ok=True)
    with locked(Path(out)):
        store = Store.create_or_open(Path(out), identity, layout)
        encoder = MomentEncoder(model, str(settings.dtype), place, posterior, store_dtype)
        report = EncodeReport(os.fspath(out), store.facts["identity_digest"], str(settings.dtype), None)
        report.ignored_files, report.unreadable_places = listing.ignored, listing.unreadable
        run = _Run(store, settings, encoder, reading, report, on_error, progress)
        fresh = _fresh(store, listing.files, files, reading)
        store.extend_plan(fresh, max(1, int(shard_mb * 1e6) // settings.row_size(layout["latent_shape"][0])))
        commits = store.commits(whole=True)
        report.resumed = sum(commit.rows for commit in commits.values())
        todo = [unit for unit in store.units() if unit.number not in commits]
        settle_workers(report, encoder, settings.side, _count(todo), batch, workers)
        _announce(run, todo, source["vae"])
        _execute(run, todo)
        _finish(run, max_failures)
    return report


def _check_amounts(
    shard_mb: float,
    limit: int | None,
    max_failures: str | float | int,
    max_pixels: int,
    batch: int | str,
    workers: int | str,
) -> None:
    if not (shard_mb > 0 and math.isfinite(shard_mb)):
        raise ValueError(f"shard_mb must be above 0 and finite, got {shard_mb!r}")
    for name, value, most in (("batch", batch, MAX_BATCH), ("workers", workers, MAX_WORKERS)):
        if value != "auto":
            positive(name, value, most)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit!r}")
    if not (max_pixels >= 1 and math.isfinite(max_pixels)):
        raise ValueError(f"max_pixels must be at least 1 and finite, got {max_pixels!r}")
    parse_limit(max_failures, 1)


def _fresh(store: Store, listed: list[SourceFile], files: list[SourceFile], reading: Reading) -> list[SourceFile]:
    """Those of ``files`` that need a unit, among them failures whose cause may be gone.

    A failure is in the file's bytes, but for two: what could not be read and can be now, and what was too large for a
    lower limit than today's.
    Raises ValueError if nothing ``listed`` shares a key with the plan: its rows would mix with another folder's.
    """
    known = {file.key for unit in store.units() for file in unit.files}
    if known and known.isdisjoint(file.key for file in listed):
        raise ValueError(f"{store.path} was made from another folder: none of its {len(known)} keys is in the source")

    def again(failure: Failure, commit: Commit) -> bool:
        if failure.reason == "unreadable":
            return _opens(reading.root / failure.key)
        return failure.reason == "too_large" and (commit.max_pixels is None or commit.max_pixels < reading.max_pixels)

    return store.fresh(files, again)


def _opens(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError:
        return False
    return True


def _check_room(out: Path, settings: Settings, layout: dict[str, Any], count: int) -> None:
    """Raises OSError, ENOSPC, if ``count`` rows do not fit where ``out`` is or will be."""
    needed = count * settings.row_size(layout["latent_shape"][0])
    free = _free(out)
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed} bytes are needed and {free} are free", os.fspath(out))


def _free(out: Path) -> int:
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def _count(units: list[Unit]) -> int:
    return sum(len(unit.files) for unit in units)


def _announce(run: _Run, todo: list[Unit], source: str) -> None:
    """Measure the dtype's error, and say what will be done."""
    report, store = run.report, run.store
    report.dtype_error = _measured_error(run, todo)
    if not run.progress:
        return
    count = _count(todo)
    needed = count * run.settings.row_size(store.facts["latent_shape"][0])
    error = "" if report.dtype_error is None else f" (error vs fp32 {100 * report.dtype_error:.2g} %)"
    say(
        f"encode  {source}  {report.dtype}{error}  {run.settings.posterior}  bucket {store.bucket}  "
        f"{count} images  ~{needed / 1e6:.1f} MB (free {_free(store.path) / 1e6:.0f} MB)  "
        f"{report.workers} workers of batch {report.batch}\n"
    )
    if report.resumed:
        say(f"resume  {report.resumed} rows committed before (identity {report.identity[:8]})\n")


def _measured_error(run: _Run, todo: list[Unit]) -> float | None:
    """The dtype's error on the run's first batch of images that can be read, at the bucket's size."""
    if run.report.dtype == "fp32":
        return None
    pixels: list[np.ndarray] = []
    files = (file for unit in todo for file in unit.files)
    for file in itertools.islice(files, run.report.batch + TRIED_IN_VAIN):
        chunk = decode_chunk(Chunk(todo[0], (file,), True), run.reading)
        pixels += [item.pixels for item in chunk.decoded]
        if len(pixels) == run.report.batch:
            break
    return run.encoder.error_against_fp32(np.stack(pixels)) if pixels else None


def _execute(run: _Run, todo: list[Unit]) -> None:
    if not todo:
        return
    report = run.report
    started = time.perf_counter()
    encoded = encoded_chunks(
        chunks_of(todo, report.batch), run.reading, run.encoder, report.workers, report.threads_per_worker
    )
    shown = Stderr()
    bar = tqdm(
        total=_count(todo), unit="image", disable=not (run.progress and shown.is_there), file=shown, dynamic_ncols=True
    )
    # Left from right to left: the threads end, then the units that are complete are written, whatever happened.
    with BackgroundWriter() as writer, contextlib.closing(encoded) as chunks, bar:
        gathered: list[Chunk] = []
        for chunk in chunks:
            if chunk.failures and run.on_error == "fail":
                raise ImageError(chunk.failures[0].reason, chunk.failures[0].detail)
            gathered.append(chunk)
            bar.update(len(chunk.files))
            if chunk.last:
                writer.submit(_write(run, gathered))
                gathered = []
    report.write_seconds = writer.seconds
    report.seconds = time.perf_counter() - started


def _write(run: _Run, gathered: list[Chunk]) -> Callable[[], None]:
    """The write of one finished unit, to be called by the writer's thread."""

    def write() -> None:
        report = run.report
        rows = [row for chunk in gathered for row in chunk.rows]
        failed = [failure for chunk in gathered for failure in chunk.failures]
        flags: dict[str, int] = {}
        for chunk in gathered:
            for flag, count in chunk.flags.items():
                flags[flag] = flags.get(flag, 0) + count
            report.decode_seconds += chunk.decode_seconds
            report.encode_seconds += chunk.encode_seconds
            report.redone_fp32 += chunk.redone
        seconds = sum(chunk.decode_seconds + chunk.encode_seconds for chunk in gathered)
        commit = run.store.commit(
            gathered[0].unit,
            rows,
            failed=failed,
            redone=sum(chunk.redone for chunk in gathered),
            flags=flags,
            seconds=round(seconds, 3),
            versions={"fastvae": __version__, "torch": str(torch.__version__)},
            max_pixels=int(run.reading.max_pixels),
        )
        report.ok += len(rows)
        report.failed += len(failed)
        report.bytes_written += commit.bytes
        for flag, count in flags.items():
            report.flags[flag] = report.flags.get(flag, 0) + count

    return write


def _finish(run: _Run, max_failures: str | float | int) -> None:
    report, store = run.report, run.store
    store.write_derived()
    index, failures = store.resolve()
    for failure in failures.values():
        report.reasons[failure.reason] = report.reasons.get(failure.reason, 0) + 1
    report.failed_before = len(failures) - report.failed
    report.exceeded = len(failures) > parse_limit(max_failures, len(index) + len(failures))
    report.judge(on_cpu=run.settings.device.type == "cpu")
