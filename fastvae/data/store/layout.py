"""Names of a store's files and folders, and checks of the files with those names."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from fastvae.data.rows import Size, parse_size
from fastvae.data.store.errors import StoreError

FOLDERS = ("plan", "shards", "leases")
LOCK_NAME, CLOCK_NAME = ".lock", ".clock"
LOCKS = (LOCK_NAME, f"leases/{LOCK_NAME}", f"leases/{CLOCK_NAME}")

# Names of the files that a store writes; files with other names are the user's.
SHARD = r"\d{6,}-\d+x\d+\.safetensors"
RECORD = r"\d{6,}-\d+x\d+\.json"
PLAN = r"units-\d{5,}\.jsonl"
STORE = "store.json"
DERIVED_NAMES = ("index.jsonl", "failures.jsonl")
DERIVED = "|".join(map(re.escape, DERIVED_NAMES))
TOP_LEVEL_NAMES = rf"{re.escape(STORE)}|{DERIVED}"


def not_a_file(path: Path) -> str | None:
    """Return "is a folder, not a file" or the like for what is at ``path``, None for a file.

    Nothing is opened: opening a pipe may block for ever. Raises OSError, FileNotFoundError if nothing is there.
    """
    kind = file_kind(path.stat().st_mode)
    return None if kind == "a file" else f"is {kind}, not a file"


def file_kind(mode: int) -> str:
    """Return "a file", "a folder", "a link" and so on for the ``mode`` of a stat result."""
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link"}
    kinds |= {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def bucket_of(shard: str) -> Size:
    """Return height and width in pixels from the name of a shard."""
    return parse_size(shard.removesuffix(".safetensors").rsplit("-", 1)[-1])


def matches(name: str, names: str) -> bool:
    """Return True if the regular expression ``names`` matches all of ``name``."""
    return re.fullmatch(names, name) is not None


def check_kinds(store: Path) -> None:
    """Raise StoreError if plan, shards or leases is not a real folder, a lock is not a regular file (links are refused
    for both), or a folder has the name of a file that a run replaces. Opens nothing; a link to a replaced file is
    replaced like a file.
    """
    for name in FOLDERS:
        check_kind(store / name, "a folder")
    for name in LOCKS:
        check_kind(store / name, "a file")
    shards = store / "shards"
    inside = sorted(os.listdir(shards)) if shards.is_dir() else []
    files = [store / name for name in DERIVED_NAMES]
    files += [shards / name for name in inside if matches(name, rf"{SHARD}|{RECORD}")]
    for path in files:
        if path.is_dir():
            raise _wrong_kind(path, "a folder", "a file")


def check_kind(path: Path, expected: str) -> None:
    """Raise StoreError if something other than ``expected``, "a file" or "a folder", is at ``path``."""
    try:
        kind = file_kind(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return
    if kind != expected:
        raise _wrong_kind(path, kind, expected)


def open_regular_file(path: Path) -> int:
    """Open the file ``path`` for reading and writing, and create it if needed; return its descriptor.

    Raises StoreError for anything but a regular file. A link to a file is refused too: writing would change its target.
    """
    check_kind(path, "a file")  # a device may do something when it is opened
    flags = (getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"))  # Windows has none of them
    descriptor = os.open(path, sum(flags, os.O_RDWR | os.O_CREAT), 0o644)
    kind = file_kind(os.fstat(descriptor).st_mode)
    if kind != "a file":
        os.close(descriptor)
        raise _wrong_kind(path, kind, "a file")
    return descriptor


def _wrong_kind(path: Path, kind: str, expected: str) -> StoreError:
    return StoreError(f"{path} is {kind}, not {expected}: move it away")
