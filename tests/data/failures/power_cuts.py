"""Model of a disk after a power cut during a run.

POSIX promises of a file what was synchronised with fsync, and of a name what was synchronised with its folder. All else
may have reached the disk or not, in any order. ``Disk`` watches a run's system calls and says, at any moment, what may
be there then: nothing that was not synchronised, every name but no bytes that were not, or any mixture.
"""

import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

Listing = dict[str, int]  # names and inodes


class Disk:
    """Files under ``root`` that are certain to survive, and those there now; calls ``at_each`` around system calls."""

    def __init__(self, root: Path, at_each: Callable[[str], None]):
        self.root, self.at_each = root, at_each
        self.bytes: dict[int, bytes] = {}  # by inode, as of its last fsync
        self.names: dict[int, Listing] = {}  # by a folder's inode, as of its last fsync
        self.moment = 0

    def watch(self, monkeypatch) -> None:
        """Watch every fsync, rename, link and new folder under the root from now on."""
        for name in ("fsync", "replace", "link", "mkdir", "open"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name, real):
        def called(*arguments, **named):
            counts = name == "fsync" or self._inside(arguments[0])
            if counts and name != "open":
                self._tell(f"before {name}")
            result = real(*arguments, **named)
            if name == "fsync":
                self._keep(arguments[0])
            elif name == "open" and counts and arguments[1] & os.O_CREAT and arguments[1] & os.O_EXCL:
                self.bytes.pop(os.fstat(result).st_ino, None)  # the inode of a deleted file, used again
            if counts and name != "open":
                self._tell(f"after {name}")
            return result

        return called

    def _inside(self, path) -> bool:
        text = os.fspath(path)
        return isinstance(text, str) and Path(text).is_relative_to(self.root) and "leases" not in Path(text).parts

    def _tell(self, what: str) -> None:
        self.moment += 1
        self.at_each(f"{self.moment} {what}")

    def _keep(self, descriptor: int) -> None:
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            self.names[found.st_ino] = _listing(descriptor)
        else:
            self.bytes[found.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def after_a_cut(self, into: Path, choose: Callable[[], bool]) -> None:
        """Write to ``into`` a state that a cut at this moment may leave; ``choose`` decides which open changes survive.

        A new folder survives if its name in the parent does. A name whose file was never synchronised has none, half or
        all of its bytes.
        """
        self._folder(self.root, into, choose)

    def _folder(self, folder: Path, into: Path, choose: Callable[[], bool]) -> None:
        into.mkdir()
        now, kept = _listing(folder), self.names.get(folder.stat().st_ino, {})
        inodes = {path.stat().st_ino: path for path in folder.iterdir()}
        for name in sorted(now.keys() | kept.keys()):
            if name == "leases":
                continue
            inode = now.get(name) if now.get(name) == kept.get(name) or choose() else kept.get(name)
            if inode is None:
                continue
            path = inodes.get(inode)
            if path is not None and path.is_dir():
                self._folder(path, into / name, choose)
            elif inode in self.bytes:
                (into / name).write_bytes(self.bytes[inode])
            elif path is not None:
                data = path.read_bytes()
                (into / name).write_bytes(data if choose() else data[: len(data) // 2] if choose() else b"")


def _listing(folder: int | Path) -> Listing:
    with os.scandir(folder) as entries:
        return {entry.name: entry.inode() for entry in entries}


def nothing() -> bool:
    """Choose no change that was not synchronised."""
    return False


def all_names_and_no_bytes() -> Callable[[], bool]:
    """Choose every second change: names without their bytes, and bytes without their names."""
    state = [False]

    def choose() -> bool:
        state[0] = not state[0]
        return state[0]

    return choose


def at_random(generator: random.Random) -> Callable[[], bool]:
    """Choose each change at random."""
    return lambda: generator.random() < 0.5
