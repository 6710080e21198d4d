"""The Source protocol, and its listing: images by key, in an order that does not depend on the file system."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from fastvae.data.images.formats import identify
from fastvae.data.images.read import DEFAULT_MAX_PIXELS
from fastvae.data.rows import Origin, SourceFile
from fastvae.data.sources.patterns import expand_braces, translate
from fastvae.system.terminal import first_few

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".avif", ".gif"}
# Listed although they cannot be read, so that each is reported as unsupported.
RAW_SUFFIXES = {
    *(".dng", ".gpr", ".nef", ".nrw", ".cr2", ".cr3", ".crw", ".arw", ".sr2", ".srf", ".raf", ".orf", ".rw2", ".rwl"),
    *(".pef", ".srw", ".3fr", ".fff", ".iiq", ".mos", ".mef", ".mrw", ".x3f", ".erf", ".dcr", ".kdc"),
}
REFUSED_SUFFIXES = {".heic", ".heif", ".jxl", ".jp2", ".eps", ".psd", *RAW_SUFFIXES}
# Files that hold images or name them, by suffix: a folder of them is given as a pattern.
KINDS = {".tar": "tar", ".parquet": "parquet", ".pq": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
MAX_LISTED = 100
DEFAULT_KEY = "key"  # column of keys in a table or manifest
# Thumbnails, snapshots and deleted files of Synology, QNAP, NetApp, freedesktop.org, macOS, Windows and Lightroom.
SYSTEM_FOLDERS = re.compile(
    r"@eaDir|#recycle|#snapshot|@tmp|@Syno\w+|\.@__thumb|@Recycle|@Recently-Snapshot|@sharebin|~snapshot|\.snapshots?"
    r"|\.thumbnails|\.Trash(es|-\d+)?|lost\+found|__MACOSX|\.AppleD\w+|Network Trash Folder|Temporary Items"
    r"|\.TemporaryItems|\$RECYCLE\.BIN|RECYCLER|System Volume Information|FOUND\.\d{3}|.*\.lrdata",
    re.IGNORECASE,
)
EDGE = 2**16  # bytes at the start and at the end of an archive that its content digest covers


@dataclass
class Listing:
    """Images of a source: ``files`` sorted by key, and the number of other files (``ignored``).

    ``unreadable`` names up to MAX_LISTED folders without permission, links to themselves, archives that end early and
    the like. ``duplicates`` is the number of images whose key an earlier one has; ``base_keys`` has the key of each
    such image before ``~2`` was appended. ``notes`` are sentences about members
    and columns that were left out. ``excluded`` are the keys that leave_out took away; ``passed_over`` is the number of
    images in hidden folders and those of SYSTEM_FOLDERS, by the folder's name. ``suffixes`` are those of KINDS that
    ignored files have.
    """

    files: list[SourceFile] = field(default_factory=list)
    ignored: int = 0
    unreadable: list[str] = field(default_factory=list)
    duplicates: int = 0
    notes: list[str] = field(default_factory=list)
    excluded: set[str] = field(default_factory=set)
    passed_over: dict[str, int] = field(default_factory=dict)
    base_keys: dict[str, str] = field(default_factory=dict)
    suffixes: set[str] = field(default_factory=set)

    def leave_out(self, patterns: Collection[str]) -> None:
        """Take away the files that a pattern matches: their key, or without a slash in it their name in any folder.

        A pattern that ends with a slash matches all below that folder. Raises ValueError for no pattern, and if no file
        is left.
        """
        if isinstance(patterns, str):
            raise ValueError(f"exclude must be a list of patterns, got {patterns!r}")
        matched = [_matcher(pattern) for given in patterns for pattern in expand_braces(given)]
        self.excluded = {file.key for file in self.files if any(match(file.key) for match in matched)}
        self.files = [file for file in self.files if file.key not in self.excluded]
        if not self.files and self.excluded:
            raise ValueError(f"exclude must leave an image: {list(patterns)} matches all {len(self.excluded)}")

    def ignore(self, path: str) -> None:
        """Count the file at ``path``, which is no image."""
        self.ignored += 1
        suffix = os.path.splitext(path)[1]
        if suffix.lower() in KINDS:
            self.suffixes.add(suffix)

    def without_images(self, top: str) -> str:
        """Return the sentence that no file under ``top`` is an image, and the pattern for those of KINDS."""
        ignored = f" ({self.ignored} other files passed over)" if self.ignored else ""
        if self.unreadable:
            ignored += f"; cannot be read: {first_few(self.unreadable)}"
        patterns = [repr(f"{top.rstrip('/')}/**/*{suffix}") for suffix in sorted(self.suffixes)]
        give = f"; give a pattern for its {' or '.join(sorted(self.suffixes))} files: {' or '.join(patterns)}"
        return f"src must hold images, there is none under {top!r}{ignored}" + give * bool(patterns)

    @property
    def captions_not_utf8(self) -> int:
        """Number of images with a caption or another column that UTF-8 cannot write: of other bytes, or half a pair."""
        return sum(not _is_utf8(file.columns) for file in self.files)

    def pass_over(self, folder: str, images: int) -> None:
        """Count ``images`` in a folder that a system makes, or in a hidden one."""
        if images:
            self.passed_over[folder] = self.passed_over.get(folder, 0) + images

    def deduplicate_keys(self) -> None:
        """Sort the files by key; of files with equal keys all but the first get ``~2``, ``~3`` and so on appended."""
        used = {file.key for file in self.files}
        seen: dict[str, int] = {}
        for index, file in enumerate(self.files):
            number = seen[file.key] = seen.get(file.key, 0) + 1
            if number == 1:
                continue
            self.duplicates += 1
            while (key := f"{file.key}~{number}") in used:
                number += 1
            seen[file.key] = number
            used.add(key)
            self.base_keys[key] = file.key
            self.files[index] = renamed(file, key)
        self.sort()

    def sort(self) -> None:
        """Sort the files by the bytes of their keys."""
        self.files.sort(key=lambda file: os.fsencode(file.key))

    def skip(self, place: str, top: str) -> None:
        """Count ``place``, which this process has no permission to read, as ignored, and note its name."""
        self.ignored += 1
        if len(self.unreadable) < MAX_LISTED:
            self.unreadable.append(os.path.relpath(place, top).replace(os.sep, "/"))


def _is_utf8(value: Any) -> bool:
    if isinstance(value, str):
        return value.isascii() or value == value.encode("utf-8", "ignore").decode("utf-8")
    if isinstance(value, Mapping):
        value = (*value, *value.values())
    return not isinstance(value, list | tuple) or all(map(_is_utf8, value))


def renamed(file: SourceFile, key: str) -> SourceFile:
    """Return ``file`` under another key, with the place that its key was."""
    return replace(file, key=key, place=file.place or file.key)


class Source(Protocol):
    """A source of images; ``name`` is the user's argument."""

    name: str

    def listing(self, exclude: str | os.PathLike[str] | None = None) -> Listing:
        """Return all images; ``exclude`` is a folder (the output) that is not entered. Raises ValueError for none."""
        ...

    def read(self, file: SourceFile, max_pixels: int = DEFAULT_MAX_PIXELS) -> Path | bytes:
        """Return a path or the bytes for read_image; raises ImageError, or OSError if the machine is the cause."""
        ...


def _matcher(pattern: str) -> Callable[[str], Any]:
    if pattern.endswith("/"):
        pattern += "**"
    try:
        whole = translate(pattern).fullmatch
    except re.error as error:
        raise ValueError(f"exclude must be a pattern, got {pattern!r}: {error}") from error
    return whole if "/" in pattern else lambda key: whole(key.rpartition("/")[2])


def system_folder(parts: Iterable[str]) -> str | None:
    """Return the first of the folder names ``parts`` that a system makes for thumbnails or deleted files, else None."""
    return next((part for part in parts if SYSTEM_FOLDERS.fullmatch(part)), None)


def passed_over_folder(parts: Iterable[str]) -> str | None:
    """Return the first of the folder names ``parts`` that a system makes, else the first hidden one, else None."""
    parts = list(parts)
    return system_folder(parts) or next((part for part in parts if part.startswith(".")), None)


def origin_at(path: str, content: str = "") -> Origin:
    """Return the origin with an absolute path or URL and a content digest."""
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()
    return Origin(os.path.basename(path.rstrip("/")) or path, digest[:16], content)


def content_digest(file: BinaryIO, name: str, size: int, members: str = "") -> str:
    """Return the content digest of an archive: of its name, size, both ends, and the digest of its member list."""
    digest = hashlib.sha256(json.dumps([os.path.basename(name), size, members]).encode("ascii"))
    for start in (0, max(0, size - EDGE)):
        file.seek(start)
        digest.update(file.read(EDGE))
    return digest.hexdigest()[:16]


def is_image_name(name: str) -> bool:
    """Return True if ``name`` has the suffix of an image, of a supported format or not."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES | REFUSED_SUFFIXES


def starts_like_an_image(file: BinaryIO, position: int = 0, size: int = 64) -> bool:
    """Return True if the ``size`` bytes of ``file`` at ``position`` start like a format that is read."""
    file.seek(position)
    return identify(file.read(min(64, size))) is not None


def key_of(value: Any, where: str, column: str) -> str:
    """Return a key column's value as text; raises ValueError unless it is an integer or valid, non-empty text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: {column} must be text or an integer, got {value!r:.80}")
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {column} holds half a surrogate pair: {value!r:.80}") from None
    return value


def caption_text(data: bytes) -> str:
    """Return UTF-8 as text, and UTF-16 with a byte order mark, as Notepad and PowerShell of Windows write it."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace")
    return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
