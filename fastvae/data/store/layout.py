"""Names of a store's files and folders, and checks of what is found under them."""

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


# Of these names a store makes files; what has another is the user's.
SHARD = r"\d{6,}-\d+x\d+\.safetensors"
RECORD = r"\d{6,}-\d+x\d+\.json"
PLAN = r"units-\d{5,}\.jsonl"
STORE = "store.json"
DERIVED_NAMES = ("index.jsonl", "failures.jsonl")
DERIVED = "|".join(map(re.escape, DERIVED_NAMES))
TOP_LEVEL_NAMES = rf"{re.escape(STORE)}|{DERIVED}"


def not_a_file(path: Path) -> str | None:
    """What lies at ``path`` in the place of a file, in words; None for a file. It is not opened: a pipe may never end.

    Raises OSError, FileNotFoundError where there is nothing.
    """
    kind = file_kind(path.stat().st_mode)
    return None if kind == "a file" else f"is {kind} and no file"


def file_kind(mode: int) -> str:
    """What has the ``mode`` that the system gives, in words."""
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link"}
    kinds |= {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def bucket_of(shard: str) -> Size:
    """Height and width in pixels, by a shard's name."""
    return parse_size(shard.removesuffix(".safetensors").rsplit("-", 1)[-1])


def matches(name: str, names: str) -> bool:
    """Whether ``name`` matches the regular expression ``names`` whole."""
    return re.fullmatch(names, name) is not None


def check_kinds(store: Path) -> None:
    """Raises StoreError where another thing, a link too, lies in the place of a folder or a lock that a run writes to,
    or a folder in the place of a file that it replaces; a link to a file is replaced as a file is. Opens nothing.
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


def check_kind(path: Path, wanted: str) -> None:
    """Raises StoreError where something else than ``wanted``, "a file" or "a folder", lies at ``path``."""
    try:
        kind = file_kind(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return
    if kind != wanted:
        raise _wrong_kind(path, kind, wanted)


def open_regular_file(path: Path) -> int:
    """A descriptor, for reading and writing, of the file ``path``, which is made where there is none.

    Raises StoreError for what is no file, a link to one among them: it would be written somewhere else.
    """
    check_kind(path, "a file")  # a device may do something when it is opened
    flags = (getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"))  # Windows has none of them
    descriptor = os.open(path, sum(flags, os.O_RDWR | os.O_CREAT), 0o644)
    kind = file_kind(os.fstat(descriptor).st_mode)
    if kind != "a file":
        os.close(descriptor)
        raise _wrong_kind(path, kind, "a file")
    return descriptor


def _wrong_kind(path: Path, kind: str, wanted: str) -> StoreError:
    return StoreError(f"{path} is {kind} in the place of {wanted}: move it away")
