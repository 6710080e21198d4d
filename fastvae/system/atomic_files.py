"""Files that appear whole or not at all, and stay after a power cut. Knows neither torch nor a format."""

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
# What file systems without hard links answer.
UNLINKABLE = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)


def write_atomically(path: Path, parts: Iterable[Buffer | Any], exclusive: bool = False) -> tuple[int, str]:
    """Write ``parts`` one after another to ``path``; returns the size in bytes and the sha256.

    The bytes go to an exclusive temporary file in the same folder, are synchronised, read back and compared by hash,
    and only then take the name, which is synchronised as well. Raises OSError (a full disk, a failed comparison) and
    then leaves neither the temporary file nor a changed ``path``. ``exclusive``: FileExistsError if ``path`` is there.
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
    """Let ``write`` make a file at the path it is given, beside ``path``, and give it the name ``path``.

    For whatever writes files itself, such as ``lambda temporary: torch.save(state, temporary)``. Raises what ``write``
    raises, or OSError; then ``path`` is as it was and nothing is left beside it.
    """
    replace_together(path.parent, {path.name: write})


def replace_together(folder: Path, writers: Mapping[str, Callable[[Path], None]]) -> None:
    """As replace_atomically for several files of ``folder``, by name: none is replaced before all are written."""
    unfinished = {name: _beside(folder / name) for name in writers}
    try:
        for name, write in writers.items():
            unfinished[name].touch(exist_ok=False)
            permissions = unfinished[name].stat().st_mode
            write(unfinished[name])
            # safetensors makes a file of its own that nobody else may read.
            unfinished[name].chmod(permissions)
            with unfinished[name].open("rb+") as file:  # "rb" would do, but Windows synchronises no file it only reads
                os.fsync(file.fileno())
        for name, temporary in unfinished.items():
            os.replace(temporary, folder / name)
    finally:
        for temporary in unfinished.values():
            temporary.unlink(missing_ok=True)
    synchronise_folder(folder)


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


def is_leftover(path: Path, names: str) -> bool:
    """Whether ``path`` has the name of a temporary file of this module for a name that matches ``names``, a regex."""
    return re.fullmatch(rf"(?:{names})\.tmp\.\d+\.[0-9a-f]{{8}}", path.name) is not None


def sweep(folder: Path, names: str) -> int:
    """Delete the temporary files for ``names``, a regex, that a killed run left in ``folder``; returns how many.

    Nothing else in it is touched, and no folder inside it is entered.
    """
    leftovers = [path for path in folder.iterdir() if is_leftover(path, names) and path.is_file()]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def _take_free_name(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike a rename, it fails where the name is taken
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
    """The free bytes of the disk where ``out`` is or will be."""
    place = Path(out).absolute()
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    return shutil.disk_usage(there).free


def check_room(out: Path, needed: int) -> None:
    """Raises OSError, ENOSPC, if ``needed`` bytes do not fit where ``out`` is or will be."""
    free = free_bytes(out)
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed} bytes are needed and {free} are free", os.fspath(out))
