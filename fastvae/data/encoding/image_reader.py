"""ImageReader: pixels, size and hash of one file of a source, by the policies of a run; and the decoding of chunks.

A chunk is a few rows of one unit. This module imports no torch: a child that decodes starts in a tenth of a second.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastvae.data.images.buckets import Buckets
from fastvae.data.images.crop import Variants, cropped, placement, pool_opacity
from fastvae.data.images.errors import ImageError
from fastvae.data.images.on_device.picture_buffer import RawCrop, RawPicture
from fastvae.data.images.read import (
    DECODE_SECONDS,
    DEFAULT_MAX_PIXELS,
    Picture,
    image_size,
    quiet_pillow,
    read_image,
)
from fastvae.data.images.size_rules import ANY_SIZE, SizeRules, is_enlarged
from fastvae.data.rows import Size, SourceFile
from fastvae.data.sources.source import Listing, Source
from fastvae.data.store.commits import Failure
from fastvae.data.store.plan import PlannedRow, Unit
from fastvae.data.store.shard import ShardRow
from fastvae.system.atomic_files import sha256_of
from fastvae.system.child_processes import ChildEnded, ChildProcess, ChildTimedOut

if TYPE_CHECKING:
    from PIL import Image

# Copies a decoded image to where a device takes it from; None if there is no room.
Keep = Callable[["Image.Image"], RawPicture | None]
# An image is given up after this many child processes ended while they decoded it: one end may have another cause.
MAX_ENDS = 2


@dataclass(frozen=True)
class ImageReader:
    """Source, buckets, crops and policies of read_image.

    ``factor``: pixels per latent. ``listed``: the file of each key that the source lists. A plan may have been edited,
    so a file at any other place is not opened. ``size_rules``: images that are left out for their size.
    ``excluded``: keys that are left out although they were planned.
    """

    source: Source
    buckets: Buckets
    variants: Variants
    alpha: str
    factor: int
    max_pixels: int
    listed: Mapping[str, SourceFile] | None = None
    animated: str = "first"
    size_rules: SizeRules = ANY_SIZE
    excluded: Collection[str] = frozenset()

    def size(self, file: SourceFile) -> Size:
        """Return the upright (height, width) in a file's header; (0, 0) for one that cannot be used."""
        try:
            return image_size(self._content(file), max_pixels=self.max_pixels, name=file.key)
        except ImageError:  # it fails again when its row is encoded, and is quarantined then
            return 0, 0

    def bucket_of(self, original_hw: Size) -> Size:
        """Return the bucket of an image; the first of the table if its size is unknown."""
        return self.buckets.nearest(original_hw) if all(original_hw) else self.buckets.sizes[0]

    def picture(self, file: SourceFile, bucket: Size) -> Picture:
        """Return the image of ``file`` for ``bucket``; raises ImageError if it cannot be used.

        Also if it belongs to another bucket than its unit's: the file was changed after the run was planned, or could
        not be read then. The reason is "unreadable", so the next run tries it again.
        """
        content = self._content(file)
        if self.size_rules != ANY_SIZE:
            original_hw = image_size(content, max_pixels=self.max_pixels, name=file.key)
            self.size_rules.check(original_hw, bucket, file.key)
        policies = {"alpha": self.alpha, "animated": self.animated, "max_pixels": self.max_pixels}
        picture = read_image(content, **policies, at_least=bucket, name=file.key)  # type: ignore[arg-type]
        if self.bucket_of(picture.original_hw) != bucket:
            found = "x".join(map(str, picture.original_hw))
            raise ImageError("unreadable", f"{file.key} is {found} now, which was not so when the run was planned")
        if is_enlarged(picture.original_hw, bucket):
            return replace(picture, flags=(*picture.flags, "upscaled"))
        return picture

    def mask(self, picture: Picture, bucket: Size, variant: int, key: str) -> np.ndarray | None:
        """Return the opacity of each latent of a row, uint8 [h, w], with alpha="mask"; else None."""
        if self.alpha != "mask":
            return None
        return pool_opacity(picture, bucket, self.factor, self.variants, variant, key)

    def opens(self, file: SourceFile) -> bool:
        """Return True if the bytes of ``file`` can be read now."""
        try:
            content = self._content(file)
            if isinstance(content, Path):
                with content.open("rb") as opened:
                    opened.read(1)
        except (OSError, ImageError):
            return False
        return True

    def sha256(self, file: SourceFile) -> str:
        """Return the sha256 of a file's bytes; "" if they cannot be read."""
        try:
            content = self._content(file)
            return sha256_of(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
        except (OSError, ImageError):
            return ""

    def of_one_file(self, file: SourceFile) -> ImageReader:
        """Return a reader of ``file`` alone, which can be pickled: it holds the file's path or its bytes.

        Raises ImageError if the source does not give them.
        """
        return replace(self, source=_OneFile(self._content(file)), listed=None, excluded=frozenset())

    def _content(self, file: SourceFile) -> Path | bytes:
        if file.key in self.excluded:
            raise ImageError("excluded", f"{file.key} was planned before, and --exclude names it now")
        if self.listed is not None:
            now = self.listed.get(file.key)
            if now is not None and now.is_same_as(file):
                file = now  # the source's files may have been moved since the plan
            elif now is None or now.place != file.place:
                raise ImageError("unreadable", f"{file.key} is not in the source where it was when the run was planned")
        return self.source.read(file, self.max_pixels)


@dataclass(frozen=True)
class _OneFile:
    """Source of one file whose content has been read; without listing."""

    content: Path | bytes
    name: str = ""

    def listing(self, exclude: str | os.PathLike[str] | None = None) -> Listing:
        raise NotImplementedError

    def read(self, file: SourceFile, max_pixels: int = DEFAULT_MAX_PIXELS) -> Path | bytes:
        return self.content


@dataclass
class Decoded:
    """Pixels of one row, uint8 [H, W, 3] or a crop that a device makes, and its place in the scaled image.

    ``mask``: with alpha="mask" its opacity, uint8 [h, w].
    """

    row: PlannedRow
    pixels: np.ndarray | RawCrop
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


def decode_chunk(chunk: Chunk, reader: ImageReader, keep: Keep | None = None) -> Chunk:
    """Read the chunk's images, each once for neighbouring rows, and crop them. Errors become failures.

    ``keep``: takes the images that a device crops; Pillow crops the others.
    """
    started = time.perf_counter()
    bucket = chunk.unit.bucket
    for file, rows in by_file(chunk.planned):
        try:
            picture = reader.picture(file, bucket)
        except ImageError as error:
            _failed(chunk, rows, error.reason, error.detail)
            continue
        chunk.flags.update(picture.flags)
        raw = None if keep is None else keep(picture.image)
        for row in rows:
            place = placement(picture.original_hw, bucket, reader.variants, row.variant, file.key)
            pixels = np.array(cropped(picture.image, place)) if raw is None else RawCrop(raw, place)
            mask = reader.mask(picture, bucket, row.variant, file.key)
            chunk.decoded.append(Decoded(row, pixels, picture.original_hw, place.crop_tlhw, mask))
    chunk.decode_seconds = time.perf_counter() - started
    return chunk


def by_file(planned: Iterable[PlannedRow]) -> Iterator[tuple[SourceFile, tuple[PlannedRow, ...]]]:
    """Yield each file and the neighbouring rows that are variants of it."""
    for _, rows in groupby(planned, key=lambda row: row.file.key):
        together = tuple(rows)
        yield together[0].file, together


def add_part(chunk: Chunk, part: Chunk) -> None:
    """Add what was decoded of a chunk's next rows to the chunk."""
    chunk.decoded += part.decoded
    chunk.failures += part.failures
    chunk.flags.update(part.flags)
    chunk.decode_seconds += part.decode_seconds


def decode_chunk_apart(chunk: Chunk, reader: ImageReader, child: ChildProcess) -> Chunk:
    """Do what decode_chunk does, each image in ``child``; one that ends the child fails as worker_died, it alone."""
    started = time.perf_counter()
    for _, rows in by_file(chunk.planned):
        add_part(chunk, _decoded_apart(Unit(chunk.unit.number, chunk.unit.bucket, rows), reader, child))
    chunk.decode_seconds = time.perf_counter() - started
    return chunk


def _decoded_apart(unit: Unit, reader: ImageReader, child: ChildProcess) -> Chunk:
    """Return a chunk of ``unit``, the rows of one file, decoded in ``child``."""
    chunk, file = Chunk(unit, unit.rows, True), unit.rows[0].file
    try:
        # The parent reads the source: its connections and open archives stay there, and so do all checks of places.
        alone = reader.of_one_file(file)
    except ImageError as error:
        return _failed(chunk, unit.rows, error.reason, error.detail)
    for _ in range(MAX_ENDS):
        try:
            # The child has a limit of its own for each decode, which a decoder that keeps Python's lock does not obey.
            return child.call(decode_quietly, chunk, alone, seconds=DECODE_SECONDS * (1 + len(unit.rows)))
        except ChildTimedOut as error:
            return _failed(chunk, unit.rows, "timed_out", f"{file.key} was not decoded: {error}")
        except ChildEnded as error:
            how = error.how
    detail = f"{MAX_ENDS} child processes ended while they decoded {file.key}: {how}"
    return _failed(chunk, unit.rows, "worker_died", detail)


def decode_quietly(chunk: Chunk, reader: ImageReader) -> Chunk:
    """Call decode_chunk without Pillow's warnings, in a child process."""
    with quiet_pillow():
        return decode_chunk(chunk, reader)


def _failed(chunk: Chunk, rows: Iterable[PlannedRow], reason: str, detail: str) -> Chunk:
    chunk.failures += [Failure(row.file.key, reason, detail, row.variant) for row in rows]
    return chunk
