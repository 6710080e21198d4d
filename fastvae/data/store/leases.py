"""Who works on what: leases on units, so that any number of processes share one store and each row is made once.

A lease is a file OUT/leases/NAME.lease that only one process can create; it says owner, process and host, and its
modification time is the owner's last heartbeat. A lease is dead when its process is gone (seen on its own host) or its
heartbeat is STALE seconds old by the file system's own clock; then another process may take it over.
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

HEARTBEAT, STALE, EMPTY = 15.0, 60.0, 2.0
LEASE = r"(?:\d{6,}|run-[0-9a-f]{16})\.lease"


class Leases:
    """The leases of this process in ``folder``, to be used in a ``with``: it beats for them, and gives all back."""

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
        self.acquire(f"run-{self.owner}")  # says that this run is there, between its units as well
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._heart.join()
        for name in sorted(self._held):
            self.release(name)

    def acquire(self, name: str) -> bool:
        """Whether the lease ``name`` is now this process's: it was free, or its holder is dead."""
        if self._create(name):
            return True
        if self.is_live(name):
            return False
        with locked(self.folder):  # one at a time looks again and replaces: the file is never missing meanwhile
            if self._create(name):
                return True
            if self.is_live(name):
                return False
            write_atomically(self._path(name), [self._content(self.deaths(name) + 1)])
        self._hold(name)
        return True

    def is_taken(self, name: str) -> bool:
        """Whether somebody has the lease, a process that died among them."""
        return self._path(name).exists()

    def deaths(self, name: str) -> int:
        """How many of the lease's holders died before it was taken over from them."""
        deaths = _read(self._path(name)).get("deaths", 0)
        return deaths if isinstance(deaths, int) else 0

    def holds(self, name: str) -> bool:
        """Whether the lease is still this process's: one that was taken for dead may have lost it."""
        return name in self._held and _read(self._path(name)).get("owner") == self.owner

    def release(self, name: str) -> None:
        """Give a lease back, unless another process has taken it over."""
        with self._guard:
            self._held.discard(name)
        with locked(self.folder):
            if _read(self._path(name)).get("owner") == self.owner:
                self._path(name).unlink(missing_ok=True)

    def live(self) -> list[str]:
        """The names of the leases that other, living processes hold."""
        names = [path.stem for path in sorted(self.folder.iterdir()) if re.fullmatch(LEASE, path.name)]
        return [name for name in names if name not in self._held and self.is_live(name)]

    def sweep(self, keep: Collection[str] = ()) -> None:
        """Delete the leases of the dead, but those in ``keep``: whoever takes these over has to know of it."""
        with locked(self.folder):
            for path in self.folder.iterdir():
                # Asked now and not before: one that is free may be taken at any time, one of the dead only by the lock.
                spared = path.stem in self._held or path.stem in keep
                dead = re.fullmatch(LEASE, path.name) and not spared and not self.is_live(path.stem)
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
        """Whether a living process, this one among them, holds the lease ``name``."""
        try:
            age = self._now() - self._path(name).stat().st_mtime
        except FileNotFoundError:
            return False
        if age > STALE:
            return False
        holder = _read(self._path(name))
        if not holder:  # it is written right after it was made, unless its process was killed in between
            return age < EMPTY
        return holder.get("host") != _host() or _is_running(holder.get("pid"))

    def _now(self) -> float:
        """The time by the file system's clock, by which every host's heartbeats are told."""
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
                        with contextlib.suppress(FileNotFoundError):  # taken over and given back since
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
    """Where a process number means something: a host, and on Linux the namespace of its processes (a container)."""
    try:
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def _is_running(pid: Any) -> bool:
    if not isinstance(pid, int) or os.name != "posix":  # elsewhere os.kill does not ask, it ends: the heartbeat tells
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
