"""Images in a folder, or matching a pattern, under a URL."""

from __future__ import annotations

import posixpath
from typing import Any

from fastvae.data.images.errors import check_bytes, unreadable
from fastvae.data.images.read import DEFAULT_MAX_PIXELS
from fastvae.data.rows import SourceFile
from fastvae.data.sources.captions import add_captions
from fastvae.data.sources.patterns import expand_braces, fixed_folder, is_pattern
from fastvae.data.sources.source import Listing, is_image_name, origin_at, passed_over_folder
from fastvae.data.sources.storage import open_remote, read_all


class RemoteSource:
    """Images in a URL's folder, or matching a pattern in the URL, by their suffix alone."""

    def __init__(self, url: str, captions: bool = True):
        self.name, self._captions = url, captions
        pattern = is_pattern(url)
        self._storage = open_remote(fixed_folder(url) if pattern else url.rstrip("/"))
        self._patterns = expand_braces(url) if pattern else []

    def listing(self, exclude: Any = None) -> Listing:
        """See Source; ``exclude`` is ignored, because a local folder is never under a URL."""
        files, top = self._storage.files, self._storage.path("").rstrip("/")
        found: dict[str, dict[str, Any]] = {}
        try:
            for pattern in self._patterns:
                found |= files.glob(pattern, detail=True)
            if not self._patterns:
                found = files.find(top, detail=True)
        except OSError as error:
            raise ValueError(f"src {self.name} cannot be listed: {error}") from error
        listing, origin = Listing(), origin_at(self._storage.root)
        for path, facts in found.items():
            key = posixpath.relpath(path.strip("/"), top.strip("/"))
            if facts.get("type") == "directory":
                continue
            *folders, name = key.split("/")
            if (folder := passed_over_folder(folders)) and is_image_name(key):
                listing.pass_over(folder, 1)
            elif is_image_name(key) and not name.startswith("."):
                listing.files.append(SourceFile(key, *self._storage.note(key, facts), origin=origin))
            else:
                listing.ignore(key)
        if not listing.files:
            raise ValueError(listing.without_images(self.name))
        listing.deduplicate_keys()
        if self._captions:
            add_captions(listing, self._names_in, self._storage.open)
        return listing

    def _names_in(self, folder: str) -> list[str]:
        return [
            posixpath.basename(path.rstrip("/")) for path in self._storage.files.ls(self._storage.path(folder), False)
        ]

    def read(self, file: SourceFile, max_pixels: int = DEFAULT_MAX_PIXELS) -> bytes:
        """See Source."""
        check_bytes(file.size, max_pixels, file.key)
        with unreadable(file.key):
            return read_all(self._storage, file.place or file.key)
