"""The images of a source, by key, in an order that does not depend on the file system; and which source is which."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from fastvae.checkpoints.report import first_few
from fastvae.data.images.formats import identify
from fastvae.data.images.read import DEFAULT_MAX_PIXELS
from fastvae.data.sources.storage import scheme_of

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".avif", ".gif"}
# Pictures that are not taken: listed all the same, so that each is reported as unsupported and none vanishes unseen.
REFUSED_SUFFIXES = {".heic", ".heif", ".jxl", ".jp2", ".eps", ".psd"}
NAMED = 100
# What an archive or a table is told by. What is compressed as a whole cannot be read by seek.
ARCHIVES = {".tar": "tar", ".parquet": "parquet", ".pq": "parquet", ".jsonl": "manifest", ".ndjson": "manifest"}
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True, order=True)
class SourceFile:
    """One image of a source.

    ``key``: a folder's relative path with forward slashes and its extension; a tar member's name without its last
    extension; a table's key column. ``size`` in bytes and ``mtime_ns`` change when the image does: an archive's member
    has its archive's time, a row of a Parquet file that file's size and time; 0 where the source knows none.
    ``place``: where the bytes are inside the source, "" where the key says it. ``columns``: captions and whatever else
    came along, as JSON values. ``sha256``: of the bytes, "" where nobody asked.
    """

    key: str
    size: int
    mtime_ns: int
    place: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)
    sha256: str = field(default="", compare=False)

    def is_same_as(self, planned: SourceFile | None) -> bool:
        """Whether the image is the one ``planned``: by its bytes where both are hashed, else by size and time."""
        if planned is None or not (self.sha256 and planned.sha256):
            return self == planned
        return (self.key, self.place, self.sha256) == (planned.key, planned.place, planned.sha256)


@dataclass
class Listing:
    """What a source holds: ``files`` sorted by key, and how many other files were passed over.

    ``unreadable`` names, at most NAMED of them, folders without permission, links to themselves, archives that end
    early and the like. ``duplicates`` counts the images whose key another one had already. ``notes`` say in words what
    was left out of the columns.
    """

    files: list[SourceFile] = field(default_factory=list)
    ignored: int = 0
    unreadable: list[str] = field(default_factory=list)
    duplicates: int = 0
    notes: list[str] = field(default_factory=list)

    def keep_apart(self) -> None:
        """Sort the files by key; where several have one key, all but the first get ``~2``, ``~3`` and so on added."""
        taken = {file.key for file in self.files}
        seen: dict[str, int] = {}
        for index, file in enumerate(self.files):
            number = seen[file.key] = seen.get(file.key, 0) + 1
            if number == 1:
                continue
            self.duplicates += 1
            while (key := f"{file.key}~{number}") in taken:
                number += 1
            seen[file.key] = number
            taken.add(key)
            self.files[index] = replace(file, key=key)
        self.files.sort(key=lambda file: os.fsencode(file.key))

    def pass_over(self, place: str, top: str) -> None:
        """Count ``place``, which the system does not let us look into, as ignored, and note its name."""
        self.ignored += 1
        if len(self.unreadable) < NAMED:
            self.unreadable.append(os.path.relpath(place, top).replace(os.sep, "/"))


class Source(Protocol):
    """Where images come from; ``name`` is what the user gave."""

    name: str

    def listing(self, exclude: str | os.PathLike[str] | None = None) -> Listing:
        """Its images; ``exclude`` is a folder (the output) that is not entered. Raises ValueError if there is none."""
        ...

    def read(self, file: SourceFile, max_pixels: int = DEFAULT_MAX_PIXELS) -> Path | bytes:
        """What read_image takes of ``file``; raises ImageError, and OSError where the machine is at fault."""
        ...


def open_source(
    src: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    image_column: str = "image",
    key_column: str = "key",
    schemes: Collection[str] = (),
) -> Source:
    """The source that ``src`` names.

    A folder; a pattern of image files such as ``photos/**/*.{jpg,png}``; tar files in WebDataset's layout, Parquet
    files or JSONL manifests, one, a list of them, or a pattern such as ``shards/{000..127}.tar``; any of these under a
    URL whose file system fsspec knows. ``image_column`` and ``key_column`` name a table's columns; ``schemes`` are
    those of URLs that a manifest may name, by default none.
    Raises ValueError for what is none of these, and where a package that it needs is not installed.
    """
    given = [src] if isinstance(src, str | os.PathLike) else list(src)
    texts = [os.fspath(text) for text in given]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"src must be a path, a pattern or a list of them, got {src!r}")
    kinds = {_kind(text) for text in texts}
    if len(kinds) > 1 or (kinds == {"images"} and len(texts) > 1):
        raise ValueError(
            f"src must be one folder or pattern, or .tar, .parquet or .jsonl files of one kind, got {given}"
        )
    (kind,) = kinds
    if kind == "images":
        if scheme_of(texts[0]):
            from fastvae.data.sources.remote import RemoteSource

            return RemoteSource(texts[0])
        from fastvae.data.sources.patterns import PatternSource, is_pattern

        is_folder = not is_pattern(texts[0]) or os.path.isdir(texts[0])
        return FolderSource(texts[0]) if is_folder else PatternSource(texts[0])
    from fastvae.data.sources.remote import located

    storage, places = located(texts)
    name = ", ".join(texts)
    if kind == "tar":
        from fastvae.data.sources.tar import TarSource

        return TarSource(storage, places, name)
    if kind == "parquet":
        from fastvae.data.sources.parquet import ParquetSource

        return ParquetSource(storage, places, name, image_column, key_column)
    from fastvae.data.sources.jsonl import ManifestSource

    return ManifestSource(storage, places, name, image_column, key_column, schemes)


def _kind(text: str) -> str:
    if text.lower().endswith(COMPRESSED):
        raise ValueError(f"{text} is compressed as a whole, and its images cannot be found by seek: unpack it first")
    kind = ARCHIVES.get(os.path.splitext(text)[1].lower(), "images")
    return "images" if kind == "images" or os.path.isdir(text) else kind


class FolderSource:
    """A folder's images, as list_folder finds them."""

    def __init__(self, root: str):
        self.name = root

    def listing(self, exclude: str | os.PathLike[str] | None = None) -> Listing:
        """See Source."""
        return list_folder(self.name, exclude)

    def read(self, file: SourceFile, max_pixels: int = DEFAULT_MAX_PIXELS) -> Path:
        """See Source."""
        return Path(self.name) / file.key


def list_folder(root: str | os.PathLike[str], exclude: str | os.PathLike[str] | None = None) -> Listing:
    """Every image under ``root``, sorted by key; ``exclude`` is a folder (the output) that is not entered.

    A file counts as an image when its suffix or, for unknown suffixes, its first bytes say so. Hidden files and folders
    are passed over, and so is what the system does not let us look into. Linked folders are entered once each, after
    the real ones, so loops end.
    Raises ValueError if ``root`` is not a folder or holds no image.
    """
    top = Path(root)
    if not top.is_dir():
        raise ValueError(f"the source must be a folder of images, got {os.fspath(root)!r}")
    listing = Listing()
    seen: set[tuple[int, int]] = set()
    if exclude is not None and os.path.isdir(exclude):
        seen.add(_inode(os.fspath(exclude)))
    waiting = [os.fspath(top)]
    while waiting:
        links: list[str] = []
        for folder in waiting:
            links += _walk(folder, os.fspath(top), seen, listing)
        waiting = sorted(links)
    if not listing.files:
        passed = f" ({listing.ignored} other files passed over)" if listing.ignored else ""
        if listing.unreadable:
            passed += f"; not to be looked into: {first_few(listing.unreadable)}"
        raise ValueError(f"no images under {os.fspath(root)!r}{passed}")
    listing.files.sort(key=lambda file: os.fsencode(file.key))
    return listing


def _walk(folder: str, top: str, seen: set[tuple[int, int]], listing: Listing) -> list[str]:
    """Adds the images under ``folder`` without following links to folders, which are returned."""
    links = []
    stack = [folder]
    while stack:
        here = stack.pop()
        try:
            identity = _inode(here)
            if identity in seen:
                continue
            with os.scandir(here) as found:
                entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
        except OSError:
            listing.pass_over(here, top)
            continue
        seen.add(identity)
        for entry in entries:
            try:
                if entry.name.startswith("."):
                    listing.ignored += entry.is_file()
                elif entry.is_dir(follow_symlinks=False):
                    stack.append(entry.path)
                elif entry.is_dir():
                    links.append(entry.path)
                else:
                    add_file(entry.path, top, listing)
            except OSError:
                listing.pass_over(entry.path, top)
    return links


def add_file(path: str, top: str, listing: Listing) -> None:
    """Add the file at ``path`` under the folder ``top``, or count it as ignored."""
    try:
        status = os.stat(path)
    except OSError:  # a dangling link: an image by name is listed, and quarantined as unreadable when it is opened
        status = None
    if status is not None and not stat.S_ISREG(status.st_mode):
        listing.ignored += 1  # a pipe or a device: opening it could wait for ever
    elif is_image_name(path) or (status is not None and _starts_like_an_image(path)):
        key = os.path.relpath(path, top).replace(os.sep, "/")
        size, mtime = (status.st_size, status.st_mtime_ns) if status is not None else (0, 0)
        listing.files.append(SourceFile(key, size, mtime))
    else:
        listing.ignored += 1


def is_image_name(name: str) -> bool:
    """Whether the suffix says that ``name`` is a picture, taken or not."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES | REFUSED_SUFFIXES


def _starts_like_an_image(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return identify(file.read(64)) is not None
    except OSError:
        return False


def _inode(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def key_of(value: Any, where: str, column: str) -> str:
    """A table's key as text; raises ValueError for what is neither text nor an integer, and for text that is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: {column} must be text or an integer, got {value!r:.80}")
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {column} holds half a surrogate pair: {value!r:.80}") from None
    return value
