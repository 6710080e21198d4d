"""Lock of a folder, for one process at a time; the system releases it when its process ends, however it ends."""

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
except ImportError:  # Windows has no such lock: the user must run one process at a time
    fcntl = None

# Errors of file systems without locks (some network mounts): there too the user must run one process at a time.
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
# In seconds. A plan over millions of images takes minutes; a process that holds the lock for longer is stuck.
LOCK_TIMEOUT, POLL_INTERVAL = 1800.0, 0.05


@contextlib.contextmanager
def locked(folder: Path, timeout: float | None = None) -> Iterator[None]:
    """Wait for the lock of the existing ``folder``, and hold it.

    Raises StoreLocked, which names the holder's pid, when another process has held it for ``timeout`` seconds, by
    default LOCK_TIMEOUT, and StoreError when the lock is not a regular file (a link to one is refused too).
    """
    descriptor = open_regular_file(folder / LOCK_NAME)
    try:
        _acquire(descriptor, folder, LOCK_TIMEOUT if timeout is None else timeout)
        if os.fstat(descriptor).st_nlink == 1:  # a hard link may be a user's file
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode("ascii"))
        yield
    finally:
        os.close(descriptor)  # releases the lock; the file stays, because removing it would let two processes in


def _acquire(descriptor: int, folder: Path, timeout: float) -> None:
    if fcntl is None:
        return None
    until = time.monotonic() + timeout
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
                whose = f"process {holder}" if holder.isdigit() else "another process"
                raise StoreLocked(f"{folder} is locked: {whose} has been planning it for {timeout:.0f} s") from None
            time.sleep(POLL_INTERVAL)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            return None
