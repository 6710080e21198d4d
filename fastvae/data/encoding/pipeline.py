"""Files to encoded rows: decodes, encodes and collects at the same time, in the order of the plan.

On a GPU, the threads of a pool decode the images of the next batches, while one thread feeds the model, one batch ahead
of the results that it collects. Images wait in pinned memory, and the GPU resizes them to Pillow's bytes.
On a CPU each thread of the pool decodes and encodes its own images with its share of the cores: two streams of one
thread each encode 256x256 with the embedded model in 18 ms an image, one stream of two threads in 53 ms (SD's own: 256
against 302; Xeon with AMX, torch 2.13).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastvae.data.encoding.batch_size import BatchSizes
from fastvae.data.encoding.encoder import Finished, MomentEncoder, Pending
from fastvae.data.encoding.image_reader import (
    Chunk,
    ImageReader,
    add_part,
    by_file,
    decode_chunk,
    decode_chunk_apart,
)
from fastvae.data.encoding.row_format import RowFormat
from fastvae.data.images.on_device.picture_buffer import RawCrop
from fastvae.data.images.on_device.resize import DeviceResize
from fastvae.data.images.read import quiet_pillow
from fastvae.data.store.commits import Failure
from fastvae.data.store.plan import Unit
from fastvae.data.store.shard import ShardRow
from fastvae.system.child_processes import ChildProcess
from fastvae.system.threads import ordered_map

# Images that are decoded before their batch is asked for, besides two for each thread: enough for two batches.
AHEAD = 32
MESSAGES = {
    "non_finite": "is not finite, in fp32 either",
    "overflow": "exceeds 65504: store it as fp32",
}


@dataclass(frozen=True)
class Encoding:
    """Model, format of stored rows, batch sizes, and what resizes: None is Pillow, in the threads that decode."""

    encoder: MomentEncoder
    row_format: RowFormat
    batches: BatchSizes
    resize: DeviceResize | None = None

    def batch(self, pixels: Sequence[np.ndarray | RawCrop]) -> np.ndarray | Tensor:
        """Return uint8 [B, H, W, 3] of pixels and crops, on the device if that resizes."""
        return np.stack(pixels) if self.resize is None else self.resize.batch(pixels)  # type: ignore[arg-type]


def chunks_of(units: Iterable[Unit], batches: BatchSizes) -> Iterator[Chunk]:
    """Yield every unit's rows in chunks of at most its bucket's batch; a chunk never crosses a unit."""
    for unit in units:
        start = 0
        while start < len(unit.rows):
            stop = start + batches.size_for(unit.bucket)
            yield Chunk(unit, unit.rows[start:stop], stop >= len(unit.rows))
            start = stop


def start_chunk(chunk: Chunk, encoding: Encoding) -> Pending | Finished | None:
    """Begin to encode the chunk's pixels; None if it has none."""
    if not chunk.decoded:
        return None
    started = time.perf_counter()
    pending = start_in_parts([item.pixels for item in chunk.decoded], chunk.unit.bucket, encoding)
    chunk.encode_seconds += time.perf_counter() - started
    return pending


def start_in_parts(
    pixels: Sequence[np.ndarray | RawCrop], bucket: tuple[int, int], encoding: Encoding
) -> Pending | Finished:
    """Begin to encode ``pixels``; out of memory, encode in halves and halve the bucket's batch.

    Raises torch.OutOfMemoryError if a single image does not fit.
    """
    try:
        return encoding.encoder.start(encoding.batch(pixels))
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

    before = torch.get_num_threads()
    try:
        # torch has a number of threads for each thread and a default for new ones: both are restored.
        with quiet_pillow():
            if encoding.encoder.device.type == "cpu":
                yield from ordered_map(encode, chunks, workers, lambda: torch.set_num_threads(threads))
            else:
                yield from _fed_chunks(chunks, reader, encoding, workers)
    finally:
        torch.set_num_threads(before)


def _fed_chunks(chunks: Iterator[Chunk], reader: ImageReader, encoding: Encoding, workers: int) -> Iterator[Chunk]:
    """Yield the chunks, decoded by ``workers`` threads and encoded on a GPU, which this thread feeds."""
    # With more threads an operator on the CPU waits for cores that decode: tables for pictures of 192 sizes took 6.8 ms
    # of CPU an image, in one thread 0.8.
    torch.set_num_threads(1)
    ahead: tuple[Chunk, Pending | Finished | None] | None = None
    for chunk in decoded_chunks(chunks, reader, encoding.resize, workers):
        pending = start_chunk(chunk, encoding)
        if ahead is not None:
            yield _collected(*ahead, encoding)
        ahead = chunk, pending
    if ahead is not None:
        yield _collected(*ahead, encoding)


def decoded_chunks(
    chunks: Iterator[Chunk], reader: ImageReader, resize: DeviceResize | None, workers: int
) -> Iterator[Chunk]:
    """Yield the chunks, decoded by ``workers`` threads, in order; each thread decodes one image, not a whole chunk."""
    buffer = None if resize is None else resize.buffer
    if buffer is not None:
        buffer.open()

    def decode(task: tuple[int, Chunk, Chunk]) -> tuple[int, Chunk, Chunk]:
        turn, _, part = task
        decode_chunk(part, reader, None if buffer is None else functools.partial(buffer.put, turn=turn))
        return task

    tasks = ((turn, chunk, part) for turn, chunk in enumerate(chunks) for part in _parts(chunk))
    at_end = buffer.close if buffer is not None else lambda: None
    for turn, chunk, part in ordered_map(decode, tasks, workers, ahead=AHEAD, at_end=at_end):
        add_part(chunk, part)
        if part.last:
            yield chunk
            if buffer is not None:
                buffer.await_turn(turn + 1)


def _parts(chunk: Chunk) -> list[Chunk]:
    """Return the chunk's rows as chunks of one file each; the final one is the ``last``."""
    files = [rows for _, rows in by_file(chunk.planned)]
    return [Chunk(chunk.unit, rows, number == len(files)) for number, rows in enumerate(files, 1)]


def _collected(chunk: Chunk, pending: Pending | Finished | None, encoding: Encoding) -> Chunk:
    """Do what finish_chunk does, and give up the chunk's images in the buffer: the device has read them."""
    raw = {item.pixels.picture for item in chunk.decoded if isinstance(item.pixels, RawCrop)}
    finish_chunk(chunk, pending, encoding.row_format)
    if encoding.resize is not None:
        encoding.resize.buffer.free(raw)
    return chunk


def chunks_apart(
    chunks: Iterator[Chunk], reader: ImageReader, encoding: Encoding, threads: int
) -> Generator[Chunk, None, None]:
    """Yield the chunks, encoded, in order, without threads of their own; each image is decoded in a child process."""
    on_cpu, before = encoding.encoder.device.type == "cpu", torch.get_num_threads()
    try:
        if on_cpu:  # the number decides the last bits of a latent: the same as in encoded_chunks
            torch.set_num_threads(threads)
        with ChildProcess() as child:
            for chunk in chunks:
                decode_chunk_apart(chunk, reader, child)
                yield finish_chunk(chunk, start_chunk(chunk, encoding), encoding.row_format)
    finally:
        if on_cpu:
            torch.set_num_threads(before)
