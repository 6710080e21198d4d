"""Images in tar files of WebDataset's layout: headers are read once, members are read by seek.

Nothing is unpacked to disk, and a member's name is used only as a key. As in WebDataset, members of one archive with
equal names up to the first dot of the last part are a sample, and the rest is the extension: ``image.jpg`` of
``0001.image.jpg``. The sample's image is a row, and its ``txt``, ``json`` and ``cls`` members are the columns. Stores
of earlier versions keep the rule that they were made with: a name ends at its last dot, and each image is a row.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from fastvae.data.images.errors import ImageError, check_bytes, unreadable
from fastvae.data.images.read import DEFAULT_MAX_PIXELS
from fastvae.data.rows import Origin, SourceFile
from fastvae.data.sources.source import (
    MAX_LISTED,
    Listing,
    caption_text,
    content_digest,
    is_image_name,
    origin_at,
    starts_like_an_image,
    system_folder,
)
from fastvae.data.sources.storage import Bounded, Storage
from fastvae.system.strict_json import json_value
from fastvae.system.terminal import first_few

COLUMNS = ("txt", "json", "cls")
FIRST_DOT, LAST_DOT = "webdataset", "last dot"
KEY_RULES = (FIRST_DOT, LAST_DOT)  # the key is the name up to its first dot, or up to its last
MAX_COLUMN_BYTES = 2**20
BLOCK = 512
MEMBER_PLACE = re.compile(r"(.*)@(\d+)\+(\d+)", re.DOTALL | re.ASCII)
# What tarfile raises on hostile headers; nothing broader is caught.
HEADER_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError, IndexError)
COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


@dataclass
class _Sample:
    """Members with one key: their extensions, images as (extension, place, size), and columns."""

    extensions: set[str] = field(default_factory=set)
    images: list[tuple[str, str, int]] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)


class TarSource:
    """Images in ``archives``, places in ``storage``; a key is a member's name without its extension.

    ``rule``: where the extension begins, one of KEY_RULES. ``image``: extension of the image, or its first part
    (``image`` of ``image.jpg``); needed if a sample has several images.
    """

    def __init__(
        self, storage: Storage, archives: Sequence[str], name: str, rule: str = FIRST_DOT, image: str | None = None
    ):
        self.name = name
        self._storage, self._archives = storage, list(archives)
        self._rule, self._image = rule, image

    def listing(self, exclude: Any = None) -> Listing:
        """See Source. An archive that ends early is named in ``unreadable``.

        Raises ValueError for an archive that cannot be opened, for a sample of several images where ``image`` is None,
        and if no sample has an image of that extension.
        """
        listing, left_out = Listing(), Counter[str]()
        for archive in self._archives:
            try:
                size, mtime_ns = self._storage.status(archive)
                with self._storage.open(archive) as file:
                    samples, content = self._samples(file, archive, size, listing, left_out)
            except OSError as error:
                raise ValueError(f"src names {archive}, which cannot be read: {error.strerror or error}") from error
            origin = origin_at(self._storage.absolute(archive), content)
            for key, groups in samples.items():
                self._add_rows(listing, left_out, f"{archive}: {key}", key, groups, mtime_ns, origin)
        listing.notes += [f"{count} members {why}" for why, count in sorted(left_out.items())]
        if not listing.files:
            why = f" ({listing.ignored} other members passed over)"
            why += f"; cannot be read: {first_few(listing.unreadable)}" if listing.unreadable else ""
            why += "".join(f"; {note}" for note in listing.notes)
            raise ValueError(f"src must hold images, there is none in {self.name}{why}")
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

    def _samples(
        self, file: BinaryIO, archive: str, size: int, listing: Listing, left_out: Counter[str]
    ) -> tuple[dict[str, list[_Sample]], str]:
        """Return the samples of an archive by key, several if an extension comes twice, and its content digest."""
        if file.read(5).startswith(COMPRESSED_MAGIC):
            raise ValueError(
                f"src names {archive}, which is compressed as a whole: its members cannot be found by seek"
            )
        samples: dict[str, list[_Sample]] = {}
        images, names = 0, hashlib.sha256()
        members = _Members(file, size)
        for member in members:
            facts = f"{member.name}\0{member.offset_data}\0{member.size}\0{member.mtime}\n"
            names.update(facts.encode("utf-8", "surrogateescape"))
            base = posixpath.basename(member.name)
            key, extension = split_name(member.name, self._rule)
            kind = extension.rpartition(".")[2]
            if member.isdir():
                continue
            if not member.isreg() or base.startswith(".") or member.size < 0:
                listing.ignored += 1  # a link, a device or a pipe has no bytes
            elif member.sparse is not None:
                # The stored bytes lack the holes, so they are not the image. No writer of training tars makes such
                # members.
                listing.ignored += 1
                left_out["stored without their holes (tar --sparse) are not read"] += 1
            elif made := system_folder(member.name.split("/")[:-1]):
                listing.pass_over(made, is_image_name(base))
            elif kind in COLUMNS:
                _add_column(samples, key, extension, _column(file, member, kind, size), left_out)
            elif is_image_name(base) or starts_like_an_image(file, member.offset_data, member.size):
                place = f"{archive}@{member.offset_data}+{member.size}"
                _sample_for(samples, key, extension).images.append((extension, place, member.size))
                images += 1
            else:
                listing.ignored += 1
        if members.damage:
            listing.unreadable += [f"{archive}: {members.damage} after {images} images"][
                : MAX_LISTED - len(listing.unreadable)
            ]
        return samples, content_digest(file, archive, size, names.hexdigest())

    def _add_rows(
        self,
        listing: Listing,
        left_out: Counter[str],
        where: str,
        key: str,
        groups: list[_Sample],
        mtime_ns: int,
        origin: Origin,
    ) -> None:
        # Of samples with other extensions, such as two images and then two captions, it is unknown which caption is
        # whose.
        clear = len({frozenset(group.extensions) for group in groups}) == 1
        for group in groups:
            if not group.images:
                listing.ignored += len(group.extensions)
                continue
            if not clear and group.columns:
                left_out["of a repeated key in no clear order: their columns are left out"] += len(group.columns)
            for _, place, size in self._chosen(listing, left_out, where, group):
                columns = group.columns if clear else {}
                listing.files.append(SourceFile(key, size, mtime_ns, place, columns, origin=origin))

    def _chosen(
        self, listing: Listing, left_out: Counter[str], where: str, sample: _Sample
    ) -> list[tuple[str, str, int]]:
        """Return the images of a sample that are rows: one, or under the rule of earlier versions all."""
        if self._rule == LAST_DOT:
            return sample.images
        chosen = sample.images
        if self._image is not None:
            named = self._image.lower()
            chosen = [image for image in chosen if image[0] == named] or [
                image for image in chosen if image[0].partition(".")[0] == named
            ]
        if len(chosen) > 1:
            choices = ", ".join(extension for extension, *_ in chosen)
            raise ValueError(f"{where} has {len(chosen)} images: image_column must be one of {choices}")
        if not chosen:
            left_out[f"of samples without an image {self._image!r} are left out"] += len(sample.extensions)
        listing.ignored += len(sample.images) - len(chosen) if chosen else len(sample.extensions)
        return chosen


def split_name(name: str, rule: str) -> tuple[str, str]:
    """Return the key and the extension, in lower case and without its dot, of a member's name."""
    if rule == LAST_DOT:
        key, suffix = posixpath.splitext(name)
        return key, suffix[1:].lower()
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return f"{folder}{slash}{key}", extension.lower()


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


def _sample_for(samples: dict[str, list[_Sample]], key: str, extension: str) -> _Sample:
    """Return the last sample of ``key``, or a new one if that has a member of this extension already."""
    groups = samples.setdefault(key, [_Sample()])
    if extension in groups[-1].extensions:
        groups.append(_Sample())
    groups[-1].extensions.add(extension)
    return groups[-1]


def _add_column(
    samples: dict[str, list[_Sample]], key: str, extension: str, column: tuple[Any, str], left_out: Counter[str]
) -> None:
    sample = _sample_for(samples, key, extension)
    value, problem = column
    if problem:
        left_out[problem] += 1
    else:
        sample.columns[extension] = value


def _column(file: BinaryIO, member: tarfile.TarInfo, kind: str, size: int) -> tuple[Any, str]:
    """Return (value, "") of a column's member, or (None, why it is left out)."""
    if member.size > MAX_COLUMN_BYTES:
        return None, f"larger than {MAX_COLUMN_BYTES} bytes are left out of the columns"
    if member.offset_data + member.size > size:
        return None, "cut by the end of their archive are left out of the columns"
    file.seek(member.offset_data)
    text = caption_text(file.read(member.size))
    if kind == "json":
        try:
            return json_value(text), ""
        except (ValueError, RecursionError):
            return None, "that are no JSON are left out of the columns"
    if kind == "cls" and re.fullmatch(r"\s*-?\d{1,18}\s*", text, re.ASCII):
        return int(text), ""
    return text, ""
