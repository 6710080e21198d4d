"""Images in a folder of the local disk, or matching a glob pattern."""

from __future__ import annotations

import glob
import os
import re
import stat
from pathlib import Path
from typing import Any

from fastvae.data.images.read import DEFAULT_MAX_PIXELS
from fastvae.data.rows import Origin, SourceFile
from fastvae.data.sources.captions import add_captions
from fastvae.data.sources.patterns import expand_braces, fixed_folder, translate
from fastvae.data.sources.source import (
    Listing,
    is_image_name,
    origin_at,
    passed_over_folder,
    starts_like_an_image,
    system_folder,
)
from fastvae.data.sources.storage import LocalStorage


class FolderSource:
    """Images of a local folder, as list_folder finds them."""

    def __init__(self, root: str, captions: bool = True):
        self.name, self._captions = root, captions

    def listing(self, exclude: str | os.PathLike[str] | None = None) -> Listing:
        """See Source."""
        listing = list_folder(self.name, exclude)
        if self._captions:
            _add_captions(listing, self.name)
        return listing

    def read(self, file: SourceFile, max_pixels: int = DEFAULT_MAX_PIXELS) -> Path:
        """See Source."""
        return Path(self.name) / (file.place or file.key)


def list_folder(root: str | os.PathLike[str], exclude: str | os.PathLike[str] | None = None) -> Listing:
    """Return every image under ``root``, sorted by key; ``exclude`` is a folder (the output) that is not entered.

    A file is an image by its suffix or, if the suffix is unknown, by its first bytes. Hidden folders and folders that
    systems make for thumbnails and deleted files are passed over, and their images counted. Hidden files are ignored,
    and so is what this process has no permission to read. A linked folder is entered once, after all real folders, so
    loops of links end.
    Raises ValueError if ``root`` is not a folder or holds no image.
    """
    top, origin = Path(root), origin_at(os.path.realpath(root))
    if not top.is_dir():
        raise ValueError(f"src must be a folder of images, got {os.fspath(root)!r}")
    listing = Listing()
    seen: set[tuple[int, int]] = set()
    if exclude is not None and os.path.isdir(exclude):
        seen.add(_inode(os.fspath(exclude)))
    waiting = [os.fspath(top)]
    while waiting:
        links: list[str] = []
        for folder in waiting:
            links += _walk(folder, os.fspath(top), origin, seen, listing)
        waiting = sorted(links)
    if not listing.files:
        raise ValueError(listing.without_images(os.fspath(root)))
    listing.files.sort(key=lambda file: os.fsencode(file.key))
    return listing


def _walk(folder: str, top: str, origin: Origin, seen: set[tuple[int, int]], listing: Listing) -> list[str]:
    """Add the images under ``folder`` to ``listing``; return the links to folders, which are not followed."""
    links = []
    stack = [folder]
    while stack:
        current = stack.pop()
        try:
            identity = _inode(current)
            if identity in seen:
                continue
            with os.scandir(current) as found:
                entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
        except OSError:
            listing.skip(current, top)
            continue
        seen.add(identity)
        for entry in entries:
            try:
                if passed_over_folder([entry.name]) and entry.is_dir(follow_symlinks=False):
                    listing.pass_over(entry.name, _count_images(entry.path))
                elif entry.name.startswith("."):
                    listing.ignored += entry.is_file()
                elif entry.is_dir(follow_symlinks=False):
                    stack.append(entry.path)
                elif entry.is_dir():
                    links.append(entry.path)
                else:
                    add_file(entry.path, top, origin, listing)
            except OSError:
                listing.skip(entry.path, top)
    return links


def _count_images(folder: str) -> int:
    """Return the number of files under ``folder`` with the suffix of an image; links are not followed."""
    return sum(is_image_name(name) for _, _, names in os.walk(folder) for name in names)


def add_file(path: str, top: str, origin: Origin, listing: Listing) -> None:
    """Add the file at ``path`` under the folder ``top``, or count it as ignored."""
    try:
        status = os.stat(path)
    except OSError:  # a dangling link with an image's suffix is listed, and fails as unreadable when it is opened
        status = None
    if status is not None and not stat.S_ISREG(status.st_mode):
        listing.ignored += 1  # opening a pipe or a device could block forever
    elif is_image_name(path) or (status is not None and _holds_an_image(path)):
        key = os.path.relpath(path, top).replace(os.sep, "/")
        size, mtime = (status.st_size, status.st_mtime_ns) if status is not None else (0, 0)
        listing.files.append(SourceFile(key, size, mtime, origin=origin))
    else:
        listing.ignore(path)


def _holds_an_image(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return starts_like_an_image(file)
    except OSError:
        return False


def _inode(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _add_captions(listing: Listing, root: str) -> None:
    storage = LocalStorage(root)
    add_captions(listing, lambda folder: os.listdir(storage.path(folder)), storage.open)


class PatternSource:
    """Images that a pattern matches; a key is relative to the folder before the first ``*`` of the pattern."""

    def __init__(self, pattern: str, captions: bool = True):
        self.name, self._captions = pattern, captions
        self.root = fixed_folder(pattern)

    def listing(self, exclude: str | os.PathLike[str] | None = None) -> Listing:
        """See Source."""
        listing, seen = Listing(), set()
        for pattern in expand_braces(self.name):
            for file in self._matches(pattern, exclude, listing):
                if file.key not in seen:
                    seen.add(file.key)
                    listing.files.append(file)
        if not listing.files:
            raise ValueError(f"src must match an image, {self.name!r} matches none")
        listing.deduplicate_keys()
        if self._captions:
            _add_captions(listing, self.root or ".")
        return listing

    def read(self, file: SourceFile, max_pixels: int = DEFAULT_MAX_PIXELS) -> Path:
        """See Source."""
        return Path(self.root) / (file.place or file.key)

    def _matches(self, pattern: str, exclude: Any, listing: Listing) -> list[SourceFile]:
        if "**" not in pattern:
            found = Listing()
            excluded = os.path.join(os.path.realpath(exclude), "") if exclude is not None else None
            origin = origin_at(os.path.realpath(self.root))
            for path in sorted(glob.iglob(pattern)):
                inside = excluded is not None and os.path.realpath(path).startswith(excluded)
                made = system_folder(os.path.relpath(path, self.root or ".").split(os.sep)[:-1])
                if made and is_image_name(path):
                    listing.pass_over(made, 1)
                elif not inside and not os.path.isdir(path):
                    add_file(path, self.root or ".", origin, found)
            listing.ignored += found.ignored
            return found.files
        # glob.glob follows loops of links; the walk enters each folder once.
        found = list_folder(self.root or ".", exclude)
        try:
            matching = translate(pattern[len(self.root) :].lstrip("/"))
        except re.error as error:
            raise ValueError(f"src must be a pattern, got {pattern!r}: {error}") from error
        listing.unreadable += found.unreadable
        for name, count in found.passed_over.items():
            listing.pass_over(name, count)
        return [file for file in found.files if matching.fullmatch(file.key)]
