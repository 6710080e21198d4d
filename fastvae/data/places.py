"""What lies where a store has its files and folders: it may be a stranger's, and no link of it is written through."""

from __future__ import annotations

import os
from pathlib import Path

from fastvae.data.store.commits import DERIVED_NAMES, RECORD, SHARD, StoreError, is_own, kind_of

FOLDERS = ("plan", "shards", "leases")
LOCK_NAME, CLOCK_NAME = ".lock", ".clock"
LOCKS = (LOCK_NAME, f"leases/{LOCK_NAME}", f"leases/{CLOCK_NAME}")


def check_places(store: Path) -> None:
    """Raises StoreError where another thing, a link too, lies in the place of a folder or a lock that a run writes to,
    or a folder in the place of a file that it replaces; a link to a file is replaced as a file is. Opens nothing.
    """
    for name in FOLDERS:
        check_place(store / name, "a folder")
    for name in LOCKS:
        check_place(store / name, "a file")
    shards = store / "shards"
    inside = sorted(os.listdir(shards)) if shards.is_dir() else []
    files = [store / name for name in DERIVED_NAMES]
    files += [shards / name for name in inside if is_own(name, rf"{SHARD}|{RECORD}")]
    for path in files:
        if path.is_dir():
            raise _misplaced(path, "a folder", "a file")


def check_place(path: Path, wanted: str) -> None:
    """Raises StoreError where something else than ``wanted``, "a file" or "a folder", lies at ``path``."""
    try:
        kind = kind_of(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return
    if kind != wanted:
        raise _misplaced(path, kind, wanted)


def open_own(path: Path) -> int:
    """A descriptor, for reading and writing, of the file ``path``, which is made where there is none.

    Raises StoreError for what is no file, a link to one among them: it would be written somewhere else.
    """
    check_place(path, "a file")  # a device may do something when it is opened
    flags = (getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"))  # Windows has none of them
    descriptor = os.open(path, sum(flags, os.O_RDWR | os.O_CREAT), 0o644)
    kind = kind_of(os.fstat(descriptor).st_mode)
    if kind != "a file":
        os.close(descriptor)
        raise _misplaced(path, kind, "a file")
    return descriptor


def _misplaced(path: Path, kind: str, wanted: str) -> StoreError:
    return StoreError(f"{path} is {kind} in the place of {wanted}: move it away")
