"""Images of a folder or a pattern under a URL, and where the archives that a user names lie."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from typing import Any

from fastvae.data.images.errors import check_bytes, unreadable
from fastvae.data.images.read import DEFAULT_MAX_PIXELS
from fastvae.data.sources.patterns import expand_braces, fixed_folder, is_pattern
from fastvae.data.sources.source import Listing, SourceFile, is_image_name
from fastvae.data.sources.storage import LocalStorage, RemoteStorage, Storage, common_folder, remote, scheme_of, whole


class RemoteSource:
    """The images under a URL's folder, or those that a pattern in it matches: told by their names alone."""

    def __init__(self, url: str):
        self.name = url
        pattern = is_pattern(url)
        self._storage = remote(fixed_folder(url) if pattern else url.rstrip("/"))
        self._patterns = expand_braces(url) if pattern else []

    def listing(self, exclude: Any = None) -> Listing:
        """See Source; ``exclude``, a folder of this machine, cannot be inside."""
        files, top = self._storage.files, self._storage.path("").rstrip("/")
        found: dict[str, dict[str, Any]] = {}
        try:
            for pattern in self._patterns:
                found |= files.glob(pattern, detail=True)
            if not self._patterns:
                found = files.find(top, detail=True)
        except OSError as error:
            raise ValueError(f"src {self.name} cannot be listed: {error}") from error
        listing = Listing()
        for path, facts in found.items():
            key = posixpath.relpath(path.strip("/"), top.strip("/"))
            if facts.get("type") == "directory":
                continue
            if is_image_name(key) and not any(part.startswith(".") for part in key.split("/")):
                listing.files.append(SourceFile(key, *self._storage.note(key, facts)))
            else:
                listing.ignored += 1
        if not listing.files:
            raise ValueError(f"no images under {self.name} ({listing.ignored} other files passed over)")
        listing.keep_apart()
        return listing

    def read(self, file: SourceFile, max_pixels: int = DEFAULT_MAX_PIXELS) -> bytes:
        """See Source."""
        check_bytes(file.size, max_pixels, file.key)
        with unreadable(file.key):
            return whole(self._storage, file.key)


def located(texts: Sequence[str]) -> tuple[Storage, list[str]]:
    """The storage in which the files that ``texts`` name lie, and each one's place in it, sorted within a pattern.

    Raises ValueError for a pattern that matches nothing and for files of different systems.
    """
    schemes = {scheme_of(text) for text in texts}
    if len(schemes) > 1:
        raise ValueError(f"src must name files of one file system, got {list(texts)}")
    if schemes != {None}:
        return _located_remotely(texts)
    from glob import glob

    paths, folders = [], []
    for text in texts:
        if os.path.exists(text) or not is_pattern(text):
            paths.append(text)
            folders.append(os.path.dirname(text))
            continue
        found = [path for name in expand_braces(text) for path in (sorted(glob(name)) if is_pattern(name) else [name])]
        if not found:
            raise ValueError(f"no file matches {text!r}")
        paths += found
        folders.append(fixed_folder(text))
    root = common_folder(folders)
    return LocalStorage(root), [
        os.path.relpath(path, root or ".").replace(os.sep, "/") for path in dict.fromkeys(paths)
    ]


def _located_remotely(texts: Sequence[str]) -> tuple[RemoteStorage, list[str]]:
    scheme = scheme_of(texts[0])
    bare = [text.split("://", 1)[1] for text in texts]
    folders = [fixed_folder(text) if is_pattern(text) else posixpath.dirname(text) for text in bare]
    root = common_folder(folders)
    storage = remote(f"{scheme}://{root}")
    top = storage.path("").strip("/")
    places: list[str] = []
    for name in (name for text in bare for name in expand_braces(text)):
        if not is_pattern(name):
            places.append(posixpath.relpath(name, root or "."))
            continue
        # What a file system finds it names in its own way: some keep the scheme, some start with a slash.
        found = sorted(path.strip("/") for path in storage.files.glob(f"{scheme}://{name}"))
        if not found:
            raise ValueError(f"no file matches {scheme}://{name}")
        places += [posixpath.relpath(path, top) if top else path for path in found]
    return storage, list(dict.fromkeys(places))
