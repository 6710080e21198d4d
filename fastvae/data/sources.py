"""The images of a folder, found recursively, in an order that does not depend on the file system."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from fastvae.checkpoints.report import first_few
from fastvae.data.signatures import identify

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".avif", ".gif"}
# Pictures that are not taken: listed all the same, so that each is reported as unsupported and none vanishes unseen.
REFUSED_SUFFIXES = {".heic", ".heif", ".jxl", ".jp2", ".eps", ".psd"}
NAMED = 100


@dataclass(frozen=True, order=True)
class SourceFile:
    """One file to encode: ``key`` is its path relative to the root, with forward slashes."""

    key: str
    size: int
    mtime_ns: int


@dataclass
class Listing:
    """What a folder holds: ``files`` sorted by key, and how many other files were passed over.

    ``unreadable`` names, at most NAMED of them, folders without permission, links to themselves and the like.
    """

    files: list[SourceFile] = field(default_factory=list)
    ignored: int = 0
    unreadable: list[str] = field(default_factory=list)

    def pass_over(self, place: str, top: str) -> None:
        """Count ``place``, which the system does not let us look into, as ignored, and note its name."""
        self.ignored += 1
        if len(self.unreadable) < NAMED:
            self.unreadable.append(os.path.relpath(place, top).replace(os.sep, "/"))


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
                    _add(entry, top, listing)
            except OSError:
                listing.pass_over(entry.path, top)
    return links


def _add(entry: os.DirEntry[str], top: str, listing: Listing) -> None:
    suffix = os.path.splitext(entry.name)[1].lower()
    claims = suffix in IMAGE_SUFFIXES or suffix in REFUSED_SUFFIXES
    try:
        status = entry.stat()
    except OSError:  # a dangling link: an image by name is listed, and quarantined as unreadable when it is opened
        status = None
    if status is not None and not stat.S_ISREG(status.st_mode):
        listing.ignored += 1  # a pipe or a device: opening it could wait for ever
    elif claims or (status is not None and _starts_like_an_image(entry.path)):
        key = os.path.relpath(entry.path, top).replace(os.sep, "/")
        size, mtime = (status.st_size, status.st_mtime_ns) if status is not None else (0, 0)
        listing.files.append(SourceFile(key, size, mtime))
    else:
        listing.ignored += 1


def _starts_like_an_image(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return identify(file.read(64)) is not None
    except OSError:
        return False


def _inode(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
