"""A folder of images to a latent store: the run behind ``fastvae encode``."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from fastvae import __version__
from fastvae.data.encoder import MomentEncoder, default_device
from fastvae.data.images import DEFAULT_MAX_PIXELS
from fastvae.data.pipeline import BackgroundWriter, Chunk, Reading, chunks_of, decode_chunk, encoded_chunks
from fastvae.data.preprocess import bucket_side
from fastvae.data.reasons import ImageError
from fastvae.data.report import EncodeReport, parse_limit
from fastvae.data.settings import Settings, check_choices, load_model, open_store, settle_workers
from fastvae.data.shards import row_bytes
from fastvae.data.sources import SourceFile, list_folder
from fastvae.data.store import Store, Unit

MEASURED_SIDE = 128  # a multiple of every model's downsample factor


@dataclass
class _Run:
    """One run's resolved settings and parts."""

    store: Store
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
    a CPU). workers: threads. shard_mb: size of a shard, and the most a kill can lose. max_failures: rows that may
    fail, a share or a count, before the report is ``exceeded``. on_error: "quarantine", or "fail" to stop at the first.
    alpha, max_pixels: see read_image. progress: a plan line and a bar on stderr. limit: the first N images only.
    Images that fail are listed in OUT/failures.jsonl with a reason; the others are unaffected. Raises ValueError for an
    argument or an empty source, IdentityMismatch when ``out`` was made otherwise, ImageError with on_error="fail", and
    OSError, ENOSPC when the disk is full: committed shards stay valid, and the same call resumes.
    """
    check_choices(posterior=(posterior, ("dist", "mean")), store_dtype=(store_dtype, ("fp16", "fp32")),
                  on_error=(on_error, ("quarantine", "fail")), alpha=(alpha, ("white", "drop")),
                  dtype=(dtype, (None, "fp32", "bf16", "fp16")))  # fmt: skip
    _check_amounts(shard_mb, limit, max_failures, max_pixels)
    if os.path.exists(out) and os.path.exists(src) and os.path.samefile(src, out):
        raise ValueError(f"out must be another folder than src, both are {os.fspath(src)!r}")
    place = default_device() if device is None else torch.device(device)
    listing = list_folder(src, exclude=out)
    model, source = load_model(vae, subfolder, revision)
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    settings = Settings(dtype, posterior, store_dtype, bucket_side(buckets, factor), factor, alpha, place)
    store, settings = open_store(Path(out), model, source, settings)
    row_size = row_bytes(model.config.latent_channels, settings.latent_side, store_dtype, posterior == "dist")
    _check_same_source(store, listing.files)
    store.extend_plan(listing.files[:limit], max(1, int(shard_mb * 1e6) // row_size))
    encoder = MomentEncoder(model, str(settings.dtype), place, posterior, store_dtype)
    report = EncodeReport(os.fspath(out), store.facts["identity_digest"], str(settings.dtype), None)
    report.ignored_files = listing.ignored
    todo = _pending(store, report)
    settle_workers(report, encoder, settings.side, sum(len(unit.files) for unit in todo), batch, workers)
    run = _Run(store, encoder, Reading(Path(src), settings.side, alpha, max_pixels), report, on_error, progress)
    _announce(run, todo, source["vae"], row_size, posterior)
    started = time.perf_counter()
    if todo:
        _execute(run, todo)
    report.seconds = time.perf_counter() - started
    store.write_derived()
    _finish(report, store, max_failures, place)
    return report


def _check_amounts(shard_mb: float, limit: int | None, max_failures: str | float | int, max_pixels: int) -> None:
    if not shard_mb > 0:
        raise ValueError(f"shard_mb must be above 0, got {shard_mb!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit!r}")
    if max_pixels < 1:
        raise ValueError(f"max_pixels must be at least 1, got {max_pixels!r}")
    parse_limit(max_failures, 1)


def _check_same_source(store: Store, files: list[SourceFile]) -> None:
    """Refuse a folder that shares no key with the plan: its rows would mix with another folder's."""
    planned = {file.key for unit in store.units() for file in unit.files}
    if planned and planned.isdisjoint(file.key for file in files):
        raise ValueError(f"{store.path} was made from another folder: none of its {len(planned)} keys is in the source")


def _pending(store: Store, report: EncodeReport) -> list[Unit]:
    """The units without a commit; what the others hold is counted as resumed."""
    commits = store.commits()
    for commit in commits.values():
        report.resumed += commit.rows
    return [unit for unit in store.units() if unit.number not in commits]


def _announce(run: _Run, todo: list[Unit], source: str, row_size: int, posterior: str) -> None:
    """Measure the dtype's error, check the room on the disk, and say what will be done."""
    report, store = run.report, run.store
    report.dtype_error = _measured_error(run, todo)
    count = sum(len(unit.files) for unit in todo)
    needed, free = count * row_size, shutil.disk_usage(store.path).free
    if run.progress:
        error = "" if report.dtype_error is None else f" (error vs fp32 {100 * report.dtype_error:.2g} %)"
        sys.stderr.write(
            f"encode  {source}  {report.dtype}{error}  {posterior}  bucket {store.bucket}  {count} images  "
            f"~{needed / 1e6:.1f} MB (free {free / 1e6:.0f} MB)  {report.workers} workers of batch {report.batch}\n"
        )
        if report.resumed:
            sys.stderr.write(f"resume  {report.resumed} rows committed before (identity {report.identity[:8]})\n")
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed} bytes are needed and {free} are free", os.fspath(store.path))


def _measured_error(run: _Run, todo: list[Unit]) -> float | None:
    """The dtype's error on the middle of the first image that can be read among the first few.

    The middle, because fp32 on a CPU takes four times as long as the run's own dtype: about 15 s at 1024x1024.
    """
    if run.report.dtype == "fp32":
        return None
    inside = min(run.reading.side, MEASURED_SIDE)
    for file in [file for unit in todo for file in unit.files][:16]:
        chunk = decode_chunk(Chunk(todo[0], (file,), True), run.reading)
        if chunk.decoded:
            edge = max(0, run.reading.side - MEASURED_SIDE) // 2
            return run.encoder.error_against_fp32(chunk.decoded[0].pixels[None, edge:, edge:][:, :inside, :inside])
    return None


def _execute(run: _Run, todo: list[Unit]) -> None:
    report = run.report
    total = sum(len(unit.files) for unit in todo)
    writer = BackgroundWriter()
    complete = False
    chunks = encoded_chunks(
        chunks_of(todo, report.batch), run.reading, run.encoder, report.workers, report.threads_per_worker
    )
    try:
        with tqdm(total=total, unit="image", disable=not run.progress, file=sys.stderr) as bar:
            gathered: list[Chunk] = []
            for chunk in chunks:
                if chunk.failures and run.on_error == "fail":
                    raise ImageError(chunk.failures[0].reason, chunk.failures[0].detail)
                gathered.append(chunk)
                bar.update(len(chunk.files))
                if chunk.last:
                    writer.submit(_write(run, gathered))
                    gathered = []
        complete = True
    finally:
        chunks.close()
        writer.close(wait_for_writes=complete)
        report.write_seconds = writer.seconds


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
            gathered[0].unit, rows, failed=failed, redone=sum(chunk.redone for chunk in gathered), flags=flags,
            seconds=round(seconds, 3), versions={"fastvae": __version__, "torch": str(torch.__version__)},
        )  # fmt: skip
        report.ok += len(rows)
        report.failed += len(failed)
        report.bytes_written += commit.bytes
        for flag, count in flags.items():
            report.flags[flag] = report.flags.get(flag, 0) + count

    return write


def _finish(report: EncodeReport, store: Store, max_failures: str | float | int, place: torch.device) -> None:
    index, failures = store.resolve()
    for failure in failures.values():
        report.reasons[failure.reason] = report.reasons.get(failure.reason, 0) + 1
    report.failed_before = len(failures) - report.failed
    report.exceeded = len(failures) > parse_limit(max_failures, len(index) + len(failures))
    report.judge(on_cpu=place.type == "cpu")
