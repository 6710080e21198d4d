"""Files that appear complete or not at all and survive a power cut, and the free space of a disk."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

Buffer = bytes | bytearray | memoryview
# Error numbers of file systems without hard links.
UNLINKABLE = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)


def write_atomically(path: Path, parts: Iterable[Buffer | Any], exclusive: bool = False) -> tuple[int, str]:
    """Write ``parts`` one after another to ``path``; return the size in bytes and the sha256.

    The bytes are written to a new temporary file in the same folder, synchronised, read back and compared by sha256.
    Then the file is renamed and the folder is synchronised. Raises OSError (a full disk, a failed comparison) and
    FileExistsError if ``exclusive`` and ``path`` exists; then the temporary file is deleted and ``path`` is unchanged.
    """
    temporary = _beside(path)
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
        if exclusive:
            _take_free_name(temporary, path)
        else:
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    synchronise_folder(path.parent)
    return size, digest.hexdigest()


def replace_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a temporary path in the same folder, then rename that file to ``path``.

    For functions that write files, such as ``lambda temporary: torch.save(state, temporary)``. Raises the errors of
    ``write``, or OSError; then ``path`` is unchanged and the temporary file is deleted.
    """
    replace_together(path.parent, {path.name: write})


def replace_together(folder: Path, writers: Mapping[str, Callable[[Path], None]]) -> None:
    """Replace several files of ``folder``, by name, as replace_atomically does; all are written before any rename."""
    unfinished = {name: _beside(folder / name) for name in writers}
    try:
        for name, write in writers.items():
            unfinished[name].touch(exist_ok=False)
            permissions = unfinished[name].stat().st_mode
            write(unfinished[name])
            # safetensors creates the file anew, with mode 600.
            unfinished[name].chmod(permissions)
            with unfinished[name].open("rb+") as file:  # Windows cannot synchronise a file opened for reading only
                os.fsync(file.fileno())
        for name, temporary in unfinished.items():
            os.replace(temporary, folder / name)
    finally:
        for temporary in unfinished.values():
            temporary.unlink(missing_ok=True)
    synchronise_folder(folder)


def synchronise_folder(folder: Path) -> None:
    """Synchronise ``folder``, so that its names survive a power cut; do nothing on Windows, which cannot."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_leftover(path: Path, names: str) -> bool:
    """Return True if ``path`` is named as a temporary file of this module for a name that matches the regex."""
    return re.fullmatch(rf"(?:{names})\.tmp\.\d+\.[0-9a-f]{{8}}", path.name) is not None


def sweep(folder: Path, names: str) -> int:
    """Delete the temporary files for ``names``, a regex, of killed runs in ``folder``; return their number.

    Other files and sub-folders are not touched.
    """
    leftovers = [path for path in folder.iterdir() if is_leftover(path, names) and path.is_file()]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def _take_free_name(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike a rename, it fails if the name exists
    except OSError as error:
        if error.errno not in UNLINKABLE:
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, "the file exists already", os.fspath(path)) from None
        os.replace(temporary, path)
    else:
        temporary.unlink()


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp.{os.getpid()}.{secrets.token_hex(4)}")


def free_bytes(out: str | os.PathLike[str]) -> int:
    """Return the free bytes of the disk where ``out`` is or will be."""
    path = Path(out).absolute()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(existing).free


def check_room(out: Path, needed: int) -> None:
    """Raise OSError (ENOSPC) if ``needed`` bytes do not fit on the disk where ``out`` is or will be."""
    free = free_bytes(out)
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed} bytes are needed and {free} are free", os.fspath(out))
