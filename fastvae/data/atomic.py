"""Files that appear whole or not at all, and stay after a power cut."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Buffer = bytes | bytearray | memoryview


def write_atomically(path: Path, parts: Iterable[Buffer | Any]) -> tuple[int, str]:
    """Write ``parts`` one after another to ``path``; returns the size in bytes and the sha256.

    The bytes go to an exclusive temporary file in the same folder, are synchronised, read back and compared by hash,
    and only then take the name, which is synchronised as well. Raises OSError (a full disk, a failed comparison) and
    then leaves neither the temporary file nor a changed ``path``.
    """
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        digest = hashlib.sha256()
        size = 0
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                view = memoryview(part).cast("B") if memoryview(part).nbytes else memoryview(b"")
                file.write(view)
                digest.update(view)
                size += view.nbytes
            file.flush()
            os.fsync(file.fileno())
        if sha256_of(temporary) != digest.hexdigest():
            raise OSError(f"{path} was read back with other bytes than were written")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    synchronise_folder(path.parent)
    return size, digest.hexdigest()


def synchronise_folder(folder: Path) -> None:
    """Make the names in ``folder`` survive a power cut, where the system can (Windows cannot)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep(folder: Path) -> int:
    """Delete temporary files that a killed run left under ``folder``; returns how many."""
    leftovers = [path for path in folder.rglob("*.tmp.*") if path.is_file()]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)
