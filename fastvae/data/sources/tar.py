"""Images in tar files of WebDataset's layout: headers are read once, members are read by seek.

Nothing is unpacked to disk, and a member's name is used only as a key. Members of one archive with the same stem are a
sample: its images are rows, and its ``.txt``, ``.json`` and ``.cls`` members are their columns.
"""

from __future__ import annotations

import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from fastvae.data.images.errors import ImageError, check_bytes, unreadable
from fastvae.data.images.read import DEFAULT_MAX_PIXELS
from fastvae.data.rows import SourceFile
from fastvae.data.sources.source import MAX_LISTED, Listing, is_image_name, starts_like_an_image
from fastvae.data.sources.storage import Bounded, Storage
from fastvae.system.strict_json import json_value
from fastvae.system.terminal import first_few

COLUMNS = (".txt", ".json", ".cls")
MAX_COLUMN_BYTES = 2**20
BLOCK = 512
MEMBER_PLACE = re.compile(r"(.*)@(\d+)\+(\d+)", re.DOTALL | re.ASCII)
# What tarfile raises on hostile headers; nothing broader is caught.
HEADER_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError, IndexError)
COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


@dataclass
class _Sample:
    """Members with one stem: their suffixes, images as (place, size), and columns."""

    suffixes: set[str] = field(default_factory=set)
    images: list[tuple[str, int]] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)


class TarSource:
    """Images in ``archives``, places in ``storage``; a key is a member's name without its last extension."""

    def __init__(self, storage: Storage, archives: Sequence[str], name: str):
        self.name = name
        self._storage, self._archives = storage, list(archives)

    def listing(self, exclude: Any = None) -> Listing:
        """See Source. Raises ValueError for an archive that cannot be opened; a cut one is named in ``unreadable``."""
        listing, left_out = Listing(), Counter[str]()
        for archive in self._archives:
            try:
                size, mtime_ns = self._storage.status(archive)
                with self._storage.open(archive) as file:
                    _list_archive(file, archive, size, mtime_ns, listing, left_out)
            except OSError as error:
                raise ValueError(f"src names {archive}, which cannot be read: {error.strerror or error}") from error
        listing.notes += [f"{count} members {why}" for why, count in sorted(left_out.items())]
        if not listing.files:
            why = f"; cannot be read: {first_few(listing.unreadable)}" if listing.unreadable else ""
            why += "".join(f"; {note}" for note in listing.notes)
            raise ValueError(f"no images in {self.name} ({listing.ignored} other members passed over){why}")
        listing.deduplicate_keys()
        return listing

    def read(self, file: SourceFile, max_pixels: int = DEFAULT_MAX_PIXELS) -> bytes:
        """See Source."""
        found = MEMBER_PLACE.fullmatch(file.place)
        if found is None:
            raise ImageError("unreadable", f"{file.key} has no place in an archive: {file.place!r}")
        archive, offset, length = found[1], int(found[2]), int(found[3])
        check_bytes(file.size, max_pixels, file.key)
        with unreadable(file.key):
            size, mtime_ns = self._storage.status(archive)
            if mtime_ns != file.mtime_ns:  # another image may be at this offset now
                raise ImageError("unreadable", f"{file.key}: {archive} was changed since it was listed")
            with self._storage.open(archive) as opened:
                opened.seek(offset)
                data = Bounded(opened, size).read(length)
        if len(data) != file.size:
            raise ImageError("truncated", f"{file.key} ends beyond the end of {archive}")
        return data


def _list_archive(
    file: BinaryIO, archive: str, size: int, mtime_ns: int, listing: Listing, left_out: Counter[str]
) -> None:
    if file.read(5).startswith(COMPRESSED_MAGIC):
        raise ValueError(f"src names {archive}, which is compressed as a whole: its members cannot be found by seek")
    samples: dict[str, list[_Sample]] = {}
    images = 0
    members = _Members(file, size)
    for member in members:
        name = member.name
        base = posixpath.basename(name)
        stem, suffix = posixpath.splitext(name)
        if member.isdir():
            continue
        if not member.isreg() or base.startswith(".") or member.size < 0:
            listing.ignored += 1  # a link, a device or a pipe has no bytes
        elif member.sparse is not None:
            # The stored bytes lack the holes, so they are not the image. No writer of training tars makes such members.
            listing.ignored += 1
            left_out["stored without their holes (tar --sparse) are not read"] += 1
        elif suffix.lower() in COLUMNS:
            _add_column(samples, stem, suffix.lower(), _column(file, member, suffix.lower(), size), left_out)
        elif is_image_name(base) or starts_like_an_image(file, member.offset_data, member.size):
            place = f"{archive}@{member.offset_data}+{member.size}"
            _sample_for(samples, stem, suffix.lower()).images.append((place, member.size))
            images += 1
        else:
            listing.ignored += 1
    if members.damage:
        listing.unreadable += [f"{archive}: {members.damage} after {images} images"][
            : MAX_LISTED - len(listing.unreadable)
        ]
    for stem, groups in samples.items():
        _add_rows(listing, left_out, stem, groups, mtime_ns)


class _Members:
    """Iterator over the members of an archive; afterwards ``damage`` is "", or says what is wrong with its end."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size
        self.damage = ""

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        self._file.seek(0)
        last = -1
        try:
            archive = tarfile.TarFile(fileobj=Bounded(self._file, self._size), mode="r", encoding="utf-8")
            while (member := archive.next()) is not None:
                if member.offset_data <= last:  # a negative size: an endless loop
                    raise tarfile.ReadError("an offset before the last one")
                last = member.offset_data
                archive.members = []  # type: ignore[attr-defined] (tarfile would keep every header in memory)
                yield member
        except HEADER_ERRORS:
            self.damage = "it is cut or damaged"
            return
        self._file.seek(archive.offset)
        self.damage = self._end_damage()

    def _end_damage(self) -> str:
        """Return what is wrong with the end, or "": a block of zeros must be there, and only zeros may follow.

        tarfile accepts any end, so images would be missing silently: of a cut archive, and of all but the first of
        several that were joined by ``cat``.
        """
        block = self._file.read(BLOCK)
        if len(block) < BLOCK or any(block):
            return "it has no end mark and may be cut"
        while more := self._file.read(2**20):
            if any(more):
                return "it goes on behind its end mark"
        return ""


def _sample_for(samples: dict[str, list[_Sample]], stem: str, suffix: str) -> _Sample:
    """Return the last sample of ``stem``, or a new one if that has a member of this suffix already."""
    groups = samples.setdefault(stem, [_Sample()])
    if suffix in groups[-1].suffixes:
        groups.append(_Sample())
    groups[-1].suffixes.add(suffix)
    return groups[-1]


def _add_column(
    samples: dict[str, list[_Sample]], stem: str, suffix: str, column: tuple[Any, str], left_out: Counter[str]
) -> None:
    sample = _sample_for(samples, stem, suffix)
    value, problem = column
    if problem:
        left_out[problem] += 1
    else:
        sample.columns[suffix[1:]] = value


def _add_rows(listing: Listing, left_out: Counter[str], stem: str, groups: list[_Sample], mtime_ns: int) -> None:
    # Of samples with other suffixes, such as two images and then two captions, it is unknown which caption is whose.
    clear = len({frozenset(group.suffixes) for group in groups}) == 1
    for group in groups:
        if not group.images:
            listing.ignored += len(group.suffixes)
            continue
        if not clear and group.columns:
            left_out["of a repeated stem in no clear order: their columns are left out"] += len(group.columns)
        for place, size in group.images:
            listing.files.append(SourceFile(stem, size, mtime_ns, place, group.columns if clear else {}))


def _column(file: BinaryIO, member: tarfile.TarInfo, suffix: str, size: int) -> tuple[Any, str]:
    """Return (value, "") of a column's member, or (None, why it is left out)."""
    if member.size > MAX_COLUMN_BYTES:
        return None, f"larger than {MAX_COLUMN_BYTES} bytes are left out of the columns"
    if member.offset_data + member.size > size:
        return None, "cut by the end of their archive are left out of the columns"
    file.seek(member.offset_data)
    text = file.read(member.size).decode("utf-8", "surrogateescape")
    if suffix == ".json":
        try:
            return json_value(text), ""
        except (ValueError, RecursionError):
            return None, "that are no JSON are left out of the columns"
    if suffix == ".cls" and re.fullmatch(r"\s*-?\d{1,18}\s*", text, re.ASCII):
        return int(text), ""
    return text, ""
