"""Whether what is to be written fits where it is to go."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path


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
