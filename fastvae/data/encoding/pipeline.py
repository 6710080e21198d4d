"""Files to encoded rows: decodes, encodes and collects at the same time, in the order of the plan.

On a GPU, a pool of threads decodes while one thread feeds the model, one batch ahead of the results that it collects.
On a CPU each thread of the pool decodes and encodes its own images with its share of the cores: two streams of one
thread each encode 256x256 with the embedded model in 18 ms an image, one stream of two threads in 53 ms (SD's own: 256
against 302; Xeon with AMX, torch 2.13).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from fastvae.data.encoding.batch_size import BatchSizes
from fastvae.data.encoding.encoder import Finished, MomentEncoder, Pending
from fastvae.data.encoding.image_reader import ImageReader
from fastvae.data.encoding.row_format import RowFormat
from fastvae.data.images.crop import to_bucket
from fastvae.data.images.errors import ImageError
from fastvae.data.images.read import Picture, quiet_pillow
from fastvae.data.store.commits import Failure
from fastvae.data.store.plan import PlannedRow, Unit
from fastvae.data.store.shard import ShardRow
from fastvae.system.threads import ordered_map

MESSAGES = {
    "non_finite": "is not finite, in fp32 either",
    "overflow": "exceeds 65504: store it as fp32",
}


@dataclass
class Decoded:
    """Pixels of one row, uint8 [H, W, 3], its crop, and its opacity, uint8 [h, w], with alpha="mask"."""

    row: PlannedRow
    pixels: np.ndarray
    original_hw: tuple[int, int]
    crop_tlhw: tuple[int, int, int, int]
    mask: np.ndarray | None


@dataclass
class Chunk:
    """A few rows of one unit; ``last`` marks the unit's final chunk, ``finished`` one whose rows are encoded."""

    unit: Unit
    planned: tuple[PlannedRow, ...]
    last: bool
    decoded: list[Decoded] = field(default_factory=list)
    rows: list[ShardRow] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    flags: Counter[str] = field(default_factory=Counter)
    redone: int = 0
    decode_seconds: float = 0.0
    encode_seconds: float = 0.0
    finished: bool = False


@dataclass(frozen=True)
class Encoding:
    """Model, format of stored rows, and batch sizes."""

    encoder: MomentEncoder
    row_format: RowFormat
    batches: BatchSizes


def chunks_of(units: Iterable[Unit], batches: BatchSizes) -> Iterator[Chunk]:
    """Yield every unit's rows in chunks of at most its bucket's batch; a chunk never crosses a unit."""
    for unit in units:
        start = 0
        while start < len(unit.rows):
            stop = start + batches.size_for(unit.bucket)
            yield Chunk(unit, unit.rows[start:stop], stop >= len(unit.rows))
            start = stop


def decode_chunk(chunk: Chunk, reader: ImageReader) -> Chunk:
    """Read and crop the chunk's rows; a file is read once for neighbouring rows. Errors become failures."""
    started = time.perf_counter()
    key, found = None, None
    for row in chunk.planned:
        if row.file.key != key:
            key, found = row.file.key, _read(chunk, row, reader)
        if isinstance(found, Picture):
            pixels, crop = to_bucket(found, chunk.unit.bucket, reader.variants, row.variant, row.file.key)
            mask = reader.mask(found, chunk.unit.bucket, row.variant, row.file.key)
            chunk.decoded.append(Decoded(row, pixels, found.original_hw, crop, mask))
        elif found is not None:
            chunk.failures.append(Failure(row.file.key, found.reason, found.detail, row.variant))
    chunk.decode_seconds = time.perf_counter() - started
    return chunk


def _read(chunk: Chunk, row: PlannedRow, reader: ImageReader) -> Picture | ImageError:
    try:
        picture = reader.picture(row.file, chunk.unit.bucket)
    except ImageError as error:
        return error
    chunk.flags.update(picture.flags)
    return picture


def start_chunk(chunk: Chunk, encoding: Encoding) -> Pending | Finished | None:
    """Begin to encode the chunk's pixels; None if it has none."""
    if not chunk.decoded:
        return None
    started = time.perf_counter()
    pixels = np.stack([item.pixels for item in chunk.decoded])
    pending = start_in_parts(pixels, chunk.unit.bucket, encoding)
    chunk.encode_seconds += time.perf_counter() - started
    return pending


def start_in_parts(pixels: np.ndarray, bucket: tuple[int, int], encoding: Encoding) -> Pending | Finished:
    """Begin to encode ``pixels``; out of memory, encode in halves and halve the bucket's batch.

    Raises torch.OutOfMemoryError if a single image does not fit.
    """
    try:
        return encoding.encoder.start(pixels)
    except torch.OutOfMemoryError:
        if len(pixels) == 1:
            raise
    # Outside the except: the frames of the error keep their allocations.
    half = encoding.batches.halve(bucket, len(pixels))
    parts = [start_in_parts(pixels[:half], bucket, encoding).result()]
    parts += [start_in_parts(pixels[half:], bucket, encoding).result()]
    return Finished(np.concatenate([moments for moments, _ in parts]), sum(redone for _, redone in parts))


def finish_chunk(chunk: Chunk, pending: Pending | Finished | None, row_format: RowFormat) -> Chunk:
    """Collect the chunk's latents; rows that are not finite in fp32, or overflow the store's dtype, become failures."""
    started = time.perf_counter()
    if pending is not None:
        moments, chunk.redone = pending.result()
        for item, values in zip(chunk.decoded, moments, strict=True):
            key, variant = item.row.name
            stored = row_format.split(values, key, variant)
            if isinstance(stored, str):
                chunk.failures.append(Failure(key, stored, f"the latent of {key} {MESSAGES[stored]}", variant))
                continue
            place = item.original_hw, item.crop_tlhw, variant
            chunk.rows.append(ShardRow(key, stored.mean, stored.logvar, *place, stored.logvar_range, item.mask))
    chunk.decoded, chunk.finished = [], True
    chunk.encode_seconds += time.perf_counter() - started
    return chunk


def encoded_chunks(
    chunks: Iterator[Chunk], reader: ImageReader, encoding: Encoding, workers: int, threads: int
) -> Generator[Chunk, None, None]:
    """Yield the chunks, encoded, in order; raise a thread's error here after the other threads have stopped."""

    def encode(chunk: Chunk) -> Chunk:
        decode_chunk(chunk, reader)
        return finish_chunk(chunk, start_chunk(chunk, encoding), encoding.row_format)

    if encoding.encoder.device.type == "cpu":
        before = torch.get_num_threads()
        try:
            # torch has a number of threads for each thread and a default for new ones: both are restored.
            with quiet_pillow():
                yield from ordered_map(encode, chunks, workers, lambda: torch.set_num_threads(threads))
        finally:
            torch.set_num_threads(before)
        return
    ahead: tuple[Chunk, Pending | Finished | None] | None = None
    with quiet_pillow():
        for chunk in ordered_map(lambda chunk: decode_chunk(chunk, reader), chunks, workers):
            pending = start_chunk(chunk, encoding)
            if ahead is not None:
                yield finish_chunk(*ahead, encoding.row_format)
            ahead = chunk, pending
        if ahead is not None:
            yield finish_chunk(*ahead, encoding.row_format)
