"""Leases on units: any number of processes share one store, and each row is encoded once.

A lease is a file OUT/leases/NAME.lease that only one process can create. It has owner, process and host; its
modification time is the owner's last heartbeat. A lease is dead if its process has ended (seen on its own host) or its
heartbeat is STALE seconds old by the file system's clock; then another process may take it over.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import secrets
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

from fastvae.data.store.layout import CLOCK_NAME, check_kind, not_a_file, open_regular_file
from fastvae.data.store.lock import locked
from fastvae.system.atomic_files import is_leftover, write_atomically

# In seconds: between heartbeats, until a lease is dead, and until one without content is.
HEARTBEAT, STALE, EMPTY = 15.0, 60.0, 2.0
LEASE = r"(?:\d{6,}|run-[0-9a-f]{16})\.lease"


class Leases:
    """Leases of this process in ``folder``: a context manager with a heartbeat thread, which releases all on exit."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.owner = secrets.token_hex(8)
        self._held: set[str] = set()
        self._guard = threading.Lock()
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="fastvae-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        check_kind(self.folder, "a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.acquire(f"run-{self.owner}")  # shows that this run is alive between its units as well
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._heart.join()
        for name in sorted(self._held):
            self.release(name)

    def acquire(self, name: str) -> bool:
        """Acquire the lease ``name`` if it is free or its holder is dead; return True if this process now has it."""
        if self._create(name):
            return True
        if self.is_live(name):
            return False
        with locked(self.folder):  # check again and replace, one process at a time; the file is never missing
            if self._create(name):
                return True
            if self.is_live(name):
                return False
            write_atomically(self._path(name), [self._content(self.deaths(name) + 1)])
        self._hold(name)
        return True

    def is_taken(self, name: str) -> bool:
        """Return True if any process, alive or dead, has the lease."""
        return self._path(name).exists()

    def deaths(self, name: str) -> int:
        """Return the number of holders that died and had the lease taken over."""
        deaths = _read(self._path(name)).get("deaths", 0)
        return deaths if isinstance(deaths, int) else 0

    def holds(self, name: str) -> bool:
        """Return True if this process still has the lease: it is lost if another process found this one dead."""
        return name in self._held and _read(self._path(name)).get("owner") == self.owner

    def release(self, name: str) -> None:
        """Release a lease, unless another process has taken it over."""
        with self._guard:
            self._held.discard(name)
        with locked(self.folder):
            if _read(self._path(name)).get("owner") == self.owner:
                self._path(name).unlink(missing_ok=True)

    def live(self) -> list[str]:
        """Return the names of the leases that other, living processes hold."""
        names = [path.stem for path in sorted(self.folder.iterdir()) if re.fullmatch(LEASE, path.name)]
        return [name for name in names if name not in self._held and self.is_live(name)]

    def sweep(self, keep: Collection[str] = ()) -> None:
        """Delete the leases of dead processes, except those in ``keep``, which record deaths for the next holder."""
        with locked(self.folder):
            for path in self.folder.iterdir():
                # Checked here and not earlier: a free lease may be acquired at any time, a dead one only with the lock.
                kept = path.stem in self._held or path.stem in keep
                dead = re.fullmatch(LEASE, path.name) and not kept and not self.is_live(path.stem)
                if dead or is_leftover(path, LEASE):
                    path.unlink(missing_ok=True)

    def _create(self, name: str) -> bool:
        try:
            descriptor = os.open(self._path(name), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, self._content())
        finally:
            os.close(descriptor)
        self._hold(name)
        return True

    def _hold(self, name: str) -> None:
        with self._guard:
            self._held.add(name)

    def is_live(self, name: str) -> bool:
        """Return True if a living process, this one included, holds the lease ``name``."""
        try:
            age = self._now() - self._path(name).stat().st_mtime
        except FileNotFoundError:
            return False
        if age > STALE:
            return False
        holder = _read(self._path(name))
        if not holder:  # written right after its creation, unless the process was killed in between
            return age < EMPTY
        return holder.get("host") != _host() or _is_running(holder.get("pid"))

    def _now(self) -> float:
        """Return the time by the file system's clock, which all hosts' heartbeats share."""
        clock = self.folder / CLOCK_NAME
        descriptor = open_regular_file(clock)
        try:
            os.utime(descriptor if os.utime in os.supports_fd else clock)
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            with self._guard:
                for name in self._held:
                    if self.holds(name):
                        with contextlib.suppress(FileNotFoundError):  # taken over and released since
                            os.utime(self._path(name))

    def _content(self, deaths: int = 0) -> bytes:
        holder = {"owner": self.owner, "pid": os.getpid(), "host": _host(), "deaths": deaths}
        return json.dumps(holder).encode("ascii")

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.lease"


def _read(path: Path) -> dict[str, Any]:
    try:
        if not_a_file(path):
            return {}
        content = json.loads(path.read_text("ascii"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _host() -> str:
    """Return the host and, on Linux, its namespace of process numbers (a container), within which a pid is unique."""
    try:
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def _is_running(pid: Any) -> bool:
    if not isinstance(pid, int) or os.name != "posix":  # elsewhere os.kill ends the process: rely on the heartbeat
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
