"""Images named by JSONL manifests: one line each, with a path or a URL, and any other columns, such as a key."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from fastvae.data.images.errors import ImageError, check_bytes, unreadable
from fastvae.data.images.read import DEFAULT_MAX_PIXELS
from fastvae.data.rows import Origin, SourceFile
from fastvae.data.sources.source import DEFAULT_KEY, Listing, key_of, origin_at
from fastvae.data.sources.storage import (
    LocalStorage,
    RemoteStorage,
    Storage,
    check_scheme,
    open_remote,
    read_all,
    scheme_of,
)
from fastvae.system.strict_json import json_value

PATHS = ("path", "uri", "file_name")


class ManifestSource:
    """Images named by manifests. A relative path starts at the manifest's folder.

    A line's path is its ``image_column`` or one of PATHS, the first of these that it has. ``key_column`` None: "key",
    and in a line without it the key is the path. A URL is accepted if ``schemes`` contains its scheme.
    """

    def __init__(
        self,
        storage: Storage,
        files: Sequence[str],
        name: str,
        image_column: str,
        key_column: str | None,
        schemes: Collection[str] = (),
    ):
        self.name = name
        self._storage, self._files = storage, list(files)
        self._paths, self._key, self._schemes = (image_column, *PATHS), key_column, schemes
        self._remote: dict[str, RemoteStorage] = {}

    def listing(self, exclude: Any = None) -> Listing:
        """See Source. Raises ValueError, naming the line, for a line that cannot be used."""
        listing = Listing()
        for manifest in self._files:
            try:
                origin = origin_at(self._storage.absolute(manifest))
                with self._storage.open(manifest) as lines:
                    for number, line in enumerate(lines, 1):
                        if line.strip():
                            listing.files.append(self._entry(line, manifest, f"{manifest} line {number}", origin))
            except OSError as error:
                raise ValueError(f"src names {manifest}, which cannot be read: {error.strerror or error}") from error
        if not listing.files:
            raise ValueError(f"src must hold rows, {self.name} has none")
        listing.deduplicate_keys()
        return listing

    def read(self, file: SourceFile, max_pixels: int = DEFAULT_MAX_PIXELS) -> Path | bytes:
        """See Source."""
        try:
            storage, place = self._where(file.place, file.key)
        except ValueError as error:
            raise ImageError("unreadable", str(error)) from error
        with unreadable(file.key):
            size, _ = storage.status(place)
            check_bytes(size, max_pixels, file.key)
            return Path(storage.path(place)) if isinstance(storage, LocalStorage) else read_all(storage, place)

    def _entry(self, line: bytes, manifest: str, where: str, origin: Origin) -> SourceFile:
        try:
            entry = json_value(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is no JSON: {error}") from error
        if not isinstance(entry, dict):
            raise ValueError(f'{where} must be an object such as {{"key": ..., "path": ...}}, got {line[:80]!r}')
        column = next((column for column in self._paths if isinstance(entry.get(column), str)), None)
        if column is None or not entry[column] or "\0" in entry[column]:
            raise ValueError(f"{where}: {' or '.join(self._paths)} must name an image's file")
        named = self._key or (DEFAULT_KEY if entry.get(DEFAULT_KEY) is not None else column)
        key = key_of(entry.get(named), where, named)
        path = _beside(manifest, entry[column])
        storage, place = self._where(path, where)
        try:
            status = storage.status(place)
        except OSError:  # listed, and fails as unreadable when it is read
            status = (0, 0)
        columns = {name: value for name, value in entry.items() if name not in (named, column)}
        return SourceFile(key, *status, path, columns, origin=origin)

    def _where(self, path: str, where: str) -> tuple[Storage, str]:
        """Return the storage of ``path`` and its place there; raise ValueError for a scheme that is not allowed."""
        if check_scheme(path, self._schemes, where) is None:
            return self._storage, path
        scheme, _, rest = path.partition("://")
        server, _, place = rest.partition("/")
        root = f"{scheme.lower()}://{server}"
        if root not in self._remote:
            self._remote[root] = open_remote(root)
        return self._remote[root], place


def _beside(manifest: str, path: str) -> str:
    """Return ``path``, if it is relative to the manifest's folder, relative to the storage's root."""
    folder, slash, _ = manifest.rpartition("/")
    return path if path.startswith("/") or scheme_of(path) else f"{folder}{slash}{path}"
