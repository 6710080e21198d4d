"""One process at a time in a folder: a lock that the system takes back when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

from fastvae.data.store.errors import StoreLocked
from fastvae.data.store.layout import LOCK_NAME, open_regular_file

try:
    import fcntl
except ImportError:  # Windows: no such lock, and the user sees to one process at a time
    fcntl = None

# What file systems without locks answer (some network mounts): there too the user sees to it.
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
# A plan over millions of images takes minutes; whoever holds the lock for longer is stuck.
PATIENCE, PAUSE = 1800.0, 0.05


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``, which exists, waiting for it.

    Raises StoreLocked, naming the holder's pid, when another process has held it for PATIENCE seconds, and StoreError
    where its lock is no file, but a link to one or another thing.
    """
    descriptor = open_regular_file(folder / LOCK_NAME)
    try:
        _take(descriptor, folder)
        if os.fstat(descriptor).st_nlink == 1:  # by its other name it may be anybody's file
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode("ascii"))
        yield
    finally:
        os.close(descriptor)  # which gives the lock back; the file stays, as removing it would let two processes in


def _take(descriptor: int, folder: Path) -> None:
    if fcntl is None:
        return None
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
                whose = f"process {holder}" if holder.isdigit() else "another process"
                raise StoreLocked(f"{folder} is locked: {whose} has been planning it for {PATIENCE:.0f} s") from None
            time.sleep(PAUSE)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            return None
