"""Storage of a source's files: the local disk, or a file system that fsspec knows."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import posixpath
import re
import stat
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from importlib import import_module
from typing import Any, BinaryIO, Protocol

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://", re.ASCII)
LOCAL_SCHEMES = ("file", "local")
TIMES = ("LastModified", "last_modified", "mtime", "updated", "created")
TAGS = ("ETag", "etag", "checksum", "blob_id", "md5Hash")


class Storage(Protocol):
    """Files by their place: a path relative to the storage's root, or an absolute one."""

    root: str

    def open(self, place: str) -> AbstractContextManager[BinaryIO]:
        """Open the file at ``place`` for reading and seeking; raises OSError."""
        ...

    def status(self, place: str) -> tuple[int, int]:
        """Return (bytes, mtime in ns) of the file at ``place``; raises OSError."""
        ...

    def absolute(self, place: str) -> str:
        """Return the path of ``place`` that does not depend on the current folder, or its URL."""
        ...


class LocalStorage:
    """Regular files under ``root``. Others are refused: reading a pipe or a device may never end."""

    def __init__(self, root: str):
        self.root = root

    def path(self, place: str) -> str:
        """Return the local path of ``place``."""
        return os.path.join(self.root, place)

    def absolute(self, place: str) -> str:
        return os.path.realpath(self.path(place))

    def open(self, place: str) -> BinaryIO:
        self.status(place)
        return open(self.path(place), "rb")

    def status(self, place: str) -> tuple[int, int]:
        status = os.stat(self.path(place))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", place)
        return status.st_size, status.st_mtime_ns


class RemoteStorage:
    """Files under ``root``, a URL such as ``s3://bucket/folder``.

    The status of a file is requested once. If the file system has no mtime, the mtime is a digest of the ETag: another
    number means other content.
    """

    def __init__(self, root: str, files: Any):
        self.root = root
        self.files = files
        self._known: dict[str, tuple[int, int]] = {}

    def path(self, place: str) -> str:
        """Return the path of ``place`` in the file system; raises OSError for an absolute path, outside of ``root``."""
        if place.startswith("/"):
            raise OSError(errno.EINVAL, f"Not a path under {self.root}", place)
        return posixpath.join(self.files._strip_protocol(self.root), place)

    def absolute(self, place: str) -> str:
        return posixpath.join(self.root, place)

    def open(self, place: str) -> AbstractContextManager[BinaryIO]:
        return self.files.open(self.path(place), "rb")

    def status(self, place: str) -> tuple[int, int]:
        if place not in self._known:
            self.note(place, self.files.info(self.path(place)))
        return self._known[place]

    def note(self, place: str, facts: dict[str, Any]) -> tuple[int, int]:
        """Store and return (bytes, mtime in ns) of ``place``, from ``facts`` of fsspec; raises OSError for a folder."""
        if facts.get("type") == "directory":
            raise OSError(errno.EISDIR, "Is a folder", place)
        self._known[place] = int(facts.get("size") or 0), _mtime_ns(facts)
        return self._known[place]


def scheme_of(text: str) -> str | None:
    """Return the scheme of a URL in lower case, None for a path."""
    found = SCHEME.match(text)
    return found[1].lower() if found else None


def open_remote(url: str) -> RemoteStorage:
    """Return the storage with root ``url``; raises ValueError if fsspec or the scheme's file system is missing."""
    scheme = scheme_of(url)
    if scheme is None or scheme in LOCAL_SCHEMES:
        raise ValueError(f"{url} must be written as a path, without a scheme")
    try:
        fsspec = import_module("fsspec")
    except ImportError as error:
        raise ValueError(f"{scheme}:// needs fsspec: pip install fsspec") from error
    try:
        files = fsspec.filesystem(scheme)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{scheme}:// cannot be read here: {error}") from error
    return RemoteStorage(url, files)


def check_scheme(text: str, allowed: Collection[str], where: str) -> str | None:
    """Return the scheme of ``text``, None for a path; raises ValueError if the scheme is not in ``allowed``."""
    scheme = scheme_of(text)
    if scheme in LOCAL_SCHEMES:
        raise ValueError(f"{where}: {scheme}:// is not allowed, write the path alone")
    if scheme is not None and scheme not in allowed:
        raise ValueError(f"{where}: {scheme}:// is not allowed unless schemes contains {scheme!r}")
    return scheme


def read_all(storage: Storage, place: str) -> bytes:
    """Return all bytes of the file at ``place``; raises OSError."""
    with storage.open(place) as file:
        return file.read()


class Bounded(io.RawIOBase):
    """Reader of ``file`` that never asks for more than the ``size`` bytes that the file has.

    Python allocates the length of a read before it reads, and a damaged tar header can ask for 8 EiB.
    """

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._file.tell())
        return self._file.read(left if size is None or size < 0 else min(size, left))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET:
            return self._file.seek(offset, whence)
        if offset < 0:
            raise ValueError(f"offset must be at least 0, got {offset}")
        return self._file.seek(min(offset, self._size))  # the system refuses to seek to 2**63

    def tell(self) -> int:
        return self._file.tell()


def common_folder(folders: Iterable[str]) -> str:
    """Return the deepest folder that contains all ``folders``; "" is the current folder."""
    found = set(folders)
    if len(found) == 1:
        return found.pop()
    if len({os.path.isabs(folder) for folder in found}) > 1:
        found = {os.path.abspath(folder) for folder in found}
    return os.path.commonpath([folder or "." for folder in found]) if "" not in found else ""


def _mtime_ns(facts: dict[str, Any]) -> int:
    for name in TIMES:
        value = facts.get(name)
        if isinstance(value, str):
            try:
                value = datetime.fromisoformat(value)
            except ValueError:
                continue
        if isinstance(value, datetime):
            since = (value if value.tzinfo else value.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
            return (since.days * 86_400 + since.seconds) * 10**9 + since.microseconds * 1000
        if isinstance(value, int | float) and not isinstance(value, bool):
            return int(value) * 10**9 + int(value % 1 * 10**9)
    for name in TAGS:
        if facts.get(name):
            return int.from_bytes(hashlib.sha256(str(facts[name]).encode()).digest()[:7], "big")
    return 0
