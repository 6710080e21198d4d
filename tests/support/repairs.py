"""What the tests of repair share: a store that was made once, what changed of one, and the call itself."""

import shutil
from pathlib import Path

from support.small_store import SIDE, small_vae, write_pictures

from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.repair import repair
from fastvae.system.atomic_files import sha256_of

OPTIONS = {"progress": False, "device": "cpu"}
# Of no reading's: a run may touch them.
PASSING = (".lock", "leases")
_first: list[Path] = []


def first_store(temporary) -> Path:
    """A store of twelve pictures, four to a shard, and a file that was no picture; its source and model beside it.

    Made once by each process, but inside a test: what conftest.py sets for each decides which layers run.
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
    """A copy of that store, and of its source beside it."""
    shutil.copytree(first / "in", place / "in")
    return shutil.copytree(first / "out", place / "out")


def state(out: Path) -> dict[str, tuple[str, int]]:
    """The hash and the time of change of every file that a repair has no business with."""
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
