"""Helpers of the tests of repair: a store that is made once, the files that changed in a copy, and the call."""

import shutil
from pathlib import Path

from support.small_store import SIDE, small_vae, write_pictures

from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.repair import repair
from fastvae.system.atomic_files import sha256_of

OPTIONS = {"progress": False, "device": "cpu"}
# Files that no reader uses: a run may change them.
PASSING = (".lock", "leases")
_first: list[Path] = []


def first_store(temporary) -> Path:
    """Return a folder: a store of twelve pictures, four to a shard, and one bad file, its source and its model.

    Made once by each process, but inside a test: the fixtures of conftest.py decide which layers run.
    """
    if not _first:
        folder = temporary.mktemp("first")
        small_vae().save_pretrained(folder / "vae")
        write_pictures(folder / "in", 12)
        (folder / "in" / "bad.png").write_bytes(b"")
        fixed = {"buckets": SIDE, "dtype": "fp32", "shard_mb": 0.002, "max_failures": 1}
        encode(folder / "in", folder / "out", vae=folder / "vae", **fixed, **OPTIONS)
        _first.append(folder)
    return _first[0]


def copy_of(first: Path, place: Path) -> Path:
    """Copy that store and its source."""
    shutil.copytree(first / "in", place / "in")
    return shutil.copytree(first / "out", place / "out")


def state(out: Path) -> dict[str, tuple[str, int]]:
    """Return hash and modification time of every file that a reader uses."""
    files = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    return {
        name: (sha256_of(path), path.stat().st_mtime_ns)
        for name, path in files.items()
        if name.split("/")[0] not in PASSING
    }


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-40] ^= 4
    path.write_bytes(data)


def mend(out, src=None, **more):
    return repair(out, src, **{"max_failures": 1, **OPTIONS, **more})
