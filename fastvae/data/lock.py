"""One writer for a store: a lock that the system takes back when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from fastvae.data.records import StoreLocked

try:
    import fcntl
except ImportError:  # Windows: no such lock, and the user sees to one process at a time
    fcntl = None

LOCK_NAME = ".lock"
# What file systems without locks answer (some network mounts): there too the user sees to it.
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``, which exists; raises StoreLocked, naming the holder's pid, while another does."""
    path = folder / LOCK_NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
    try:
        _take(descriptor, folder)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode("ascii"))
        yield
    finally:
        os.close(descriptor)  # which gives the lock back; the file stays, as removing it would let two processes in


def _take(descriptor: int, folder: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode("ascii", "replace").strip()
        whose = f"process {holder}" if holder.isdigit() else "another process"
        raise StoreLocked(f"{folder} is locked: {whose} is writing it; wait for it, or end it") from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
