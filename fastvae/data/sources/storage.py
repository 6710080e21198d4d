"""Where the files of a source lie: this machine's folders, or a file system that fsspec knows."""

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
        """The file at ``place``, to be read and sought in; raises OSError."""
        ...

    def status(self, place: str) -> tuple[int, int]:
        """(bytes, mtime in ns) of the file at ``place``; raises OSError."""
        ...


class LocalStorage:
    """Regular files under ``root``; anything else, such as a pipe, could be read for ever and is refused."""

    def __init__(self, root: str):
        self.root = root

    def path(self, place: str) -> str:
        """Where ``place`` is on this machine."""
        return os.path.join(self.root, place)

    def open(self, place: str) -> BinaryIO:
        self.status(place)
        return open(self.path(place), "rb")

    def status(self, place: str) -> tuple[int, int]:
        found = os.stat(self.path(place))
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", place)
        return found.st_size, found.st_mtime_ns


class RemoteStorage:
    """Files under ``root``, a URL such as ``s3://bucket/folder``.

    A file's status is asked for once. Where a system knows no time of change, a digest of its ETag takes that place:
    another number means another content.
    """

    def __init__(self, root: str, files: Any):
        self.root = root
        self.files = files
        self._known: dict[str, tuple[int, int]] = {}

    def path(self, place: str) -> str:
        """``place`` as the file system writes it; raises OSError for an absolute path, which would be another's."""
        if place.startswith("/"):
            raise OSError(errno.EINVAL, f"Not a path under {self.root}", place)
        return posixpath.join(self.files._strip_protocol(self.root), place)

    def open(self, place: str) -> AbstractContextManager[BinaryIO]:
        return self.files.open(self.path(place), "rb")

    def status(self, place: str) -> tuple[int, int]:
        if place not in self._known:
            self.note(place, self.files.info(self.path(place)))
        return self._known[place]

    def note(self, place: str, facts: dict[str, Any]) -> tuple[int, int]:
        """Remember what a listing said of ``place``: its (bytes, mtime in ns)."""
        if facts.get("type") == "directory":
            raise OSError(errno.EISDIR, "Is a folder", place)
        self._known[place] = int(facts.get("size") or 0), _changed(facts)
        return self._known[place]


def scheme_of(text: str) -> str | None:
    """The scheme of a URL in small letters, None for a path."""
    found = SCHEME.match(text)
    return found[1].lower() if found else None


def open_remote(url: str) -> RemoteStorage:
    """The storage whose root is ``url``; raises ValueError where fsspec or the scheme's file system is missing."""
    scheme = scheme_of(url)
    if scheme is None or scheme in LOCAL_SCHEMES:
        raise ValueError(f"{url} must be written as a path, without a scheme")
    try:
        fsspec = import_module("fsspec")
    except ImportError as error:
        raise ValueError(f"{scheme}:// needs fsspec: pip install 'fastvae[data]'") from error
    try:
        files = fsspec.filesystem(scheme)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{scheme}:// cannot be read here: {error}") from error
    return RemoteStorage(url, files)


def check_scheme(text: str, allowed: Collection[str], where: str) -> str | None:
    """The scheme of ``text``, None for a path; raises ValueError, naming it, unless it is among the ``allowed``."""
    scheme = scheme_of(text)
    if scheme in LOCAL_SCHEMES:
        raise ValueError(f"{where}: {scheme}:// is not taken, write the path alone")
    if scheme is not None and scheme not in allowed:
        raise ValueError(f"{where}: {scheme}:// is off; it is taken where schemes names {scheme!r}")
    return scheme


def read_all(storage: Storage, place: str) -> bytes:
    """All bytes of the file at ``place``; raises OSError."""
    with storage.open(place) as file:
        return file.read()


class Bounded(io.RawIOBase):
    """``file``, in which a length that a damaged header states is never more than what is there.

    Python allocates what a read asks for before it looks: a header of one byte more could ask for 8 EiB.
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
        return self._file.seek(min(offset, self._size))  # the system refuses 2**63, behind the end or not

    def tell(self) -> int:
        return self._file.tell()


def common_folder(folders: Iterable[str]) -> str:
    """The deepest folder that holds all ``folders``, as they are written; "" is where the process runs."""
    found = set(folders)
    if len(found) == 1:
        return found.pop()
    if len({os.path.isabs(folder) for folder in found}) > 1:
        found = {os.path.abspath(folder) for folder in found}
    return os.path.commonpath([folder or "." for folder in found]) if "" not in found else ""


def _changed(facts: dict[str, Any]) -> int:
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
