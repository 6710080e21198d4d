"""Files to encoded rows: decoding, encoding and collecting at the same time, in the order of the plan.

On a GPU, a pool of threads decodes while one thread feeds the model. On a CPU each thread of the pool decodes and
encodes its own images with its share of the cores: two streams of one thread each encode 256x256 with the embedded
model in 18 ms an image, one stream of two threads in 53 ms (SD's own: 256 against 302; Xeon with AMX, torch 2.13).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import torch

from fastvae.data.images import quiet_pillow, read_image
from fastvae.data.moment_encoder import MomentEncoder
from fastvae.data.preprocess import to_bucket
from fastvae.data.reasons import ImageError
from fastvae.data.shards import Row
from fastvae.data.sources import SourceFile
from fastvae.data.store import Failure, Unit

Argument = TypeVar("Argument")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Reading:
    """How files become pixels: the folder, the bucket's side, and the policies of read_image."""

    root: Path
    side: int
    alpha: str
    max_pixels: int


@dataclass
class Decoded:
    """One file's pixels uint8 [S, S, 3] and where they come from."""

    key: str
    pixels: np.ndarray
    original_hw: tuple[int, int]
    crop_tlhw: tuple[int, int, int, int]


@dataclass
class Chunk:
    """A few files of one unit on their way; ``last`` marks the unit's final chunk."""

    unit: Unit
    files: tuple[SourceFile, ...]
    last: bool
    decoded: list[Decoded] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    flags: dict[str, int] = field(default_factory=dict)
    redone: int = 0
    decode_seconds: float = 0.0
    encode_seconds: float = 0.0


def chunks_of(units: Iterable[Unit], batch: int) -> Iterator[Chunk]:
    """Every unit's files in groups of at most ``batch``, which never cross a unit."""
    for unit in units:
        for start in range(0, len(unit.files), batch):
            stop = start + batch
            yield Chunk(unit, unit.files[start:stop], stop >= len(unit.files))


def decode_chunk(chunk: Chunk, reading: Reading) -> Chunk:
    """Read and crop the chunk's files; those that cannot be used become failures."""
    started = time.perf_counter()
    for file in chunk.files:
        try:
            picture = read_image(
                reading.root / file.key,
                alpha=reading.alpha,
                max_pixels=reading.max_pixels,
                at_least=reading.side,
                name=file.key,
            )
        except ImageError as error:
            chunk.failures.append(Failure(file.key, error.reason, error.detail))
            continue
        for flag in picture.flags:
            chunk.flags[flag] = chunk.flags.get(flag, 0) + 1
        pixels, crop = to_bucket(picture, reading.side)
        chunk.decoded.append(Decoded(file.key, pixels, picture.original_hw, crop))
    chunk.decode_seconds = time.perf_counter() - started
    return chunk


def encode_chunk(chunk: Chunk, encoder: MomentEncoder) -> Chunk:
    """Encode the chunk's pixels; rows that are not finite even in fp32, or overflow the store, become failures."""
    started = time.perf_counter()
    if chunk.decoded:
        moments, chunk.redone = encoder.moments(np.stack([item.pixels for item in chunk.decoded]))
        for item, row in zip(chunk.decoded, moments, strict=True):
            mean, logvar, reason = encoder.split(row)
            if reason is None:
                chunk.rows.append(Row(item.key, mean, logvar, item.original_hw, item.crop_tlhw))
            else:
                said = "is not finite, in fp32 either" if reason == "non_finite" else "exceeds 65504: store it as fp32"
                chunk.failures.append(Failure(item.key, reason, f"the latent of {item.key} {said}"))
    chunk.decoded = []
    chunk.encode_seconds = time.perf_counter() - started
    return chunk


def encoded_chunks(
    chunks: Iterator[Chunk], reading: Reading, encoder: MomentEncoder, workers: int, threads: int
) -> Generator[Chunk, None, None]:
    """The chunks, encoded, in their own order. Any error in a thread is raised here, after the others have stopped."""
    if encoder.device.type == "cpu":
        before = torch.get_num_threads()
        try:
            # torch keeps the number of threads for each thread and a default for new ones: both are put back.
            with quiet_pillow():
                yield from ordered_map(
                    lambda chunk: encode_chunk(decode_chunk(chunk, reading), encoder),
                    chunks,
                    workers,
                    lambda: torch.set_num_threads(threads),
                )
        finally:
            torch.set_num_threads(before)
        return
    with quiet_pillow():
        for chunk in ordered_map(lambda chunk: decode_chunk(chunk, reading), chunks, workers):
            yield encode_chunk(chunk, encoder)


def ordered_map(
    function: Callable[[Argument], Result],
    arguments: Iterable[Argument],
    workers: int,
    initializer: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """function(argument) for each argument, in order, by ``workers`` threads working at most 2 * workers ahead."""
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="fastvae", initializer=initializer)
    try:
        for argument in arguments:
            waiting.append(pool.submit(function, argument))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class BackgroundWriter:
    """Runs one write at a time in a thread, beside the work for the next; to be used in a ``with``.

    Whatever was submitted is written, also when the ``with`` is left by an error or an interruption.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fastvae-write")
        self._writes: deque[Future[None]] = deque()
        self.seconds = 0.0

    def submit(self, write: Callable[[], None]) -> None:
        """Queue ``write``, and wait until the one before it is done; raises that one's error."""
        # Queued before the wait: an interruption while waiting loses nothing that was finished.
        self._writes.append(self._pool.submit(self._timed, write))
        if len(self._writes) > 1:
            self._writes.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True)
        # After another error that one is told: it came first, and what was not written is encoded again.
        while self._writes and kind is None:
            self._writes.popleft().result()

    def _timed(self, write: Callable[[], None]) -> None:
        started = time.perf_counter()
        try:
            write()
        finally:
            self.seconds += time.perf_counter() - started
