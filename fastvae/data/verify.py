"""Whether a store is what its records say: every committed shard, by its hash, and row by row."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from fastvae.checkpoints.atomic import sha256_of
from fastvae.data.console import amount, say
from fastvae.data.lock import locked
from fastvae.data.mapped_shards import map_shard
from fastvae.data.records import RECORD, Commit, StoreError, Unit, is_own, read_commit
from fastvae.data.shards import key_text, read_names, row_checksum, sample_id
from fastvae.data.store import Store


@dataclass(frozen=True)
class Damage:
    """A file of a store that is not what it should be: its path in the store, and ``what`` is wrong, in words."""

    file: str
    what: str
    unit: int | None = None


@dataclass
class Verified:
    """What was found: units that were planned and are committed, their rows, and every damage.

    ``stale``: which derived files say something else than the records, as after a kill, or are missing where something
    is committed; the next encode rewrites them.
    """

    planned: int = 0
    committed: int = 0
    rows: int = 0
    failed: int = 0
    bytes: int = 0
    damaged: list[Damage] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)

    @property
    def pending(self) -> int:
        """Units that are planned and neither committed nor damaged: the same encode goes on with them."""
        return self.planned - self.committed - len({damage.unit for damage in self.damaged} - {None})


def verify(path: str | os.PathLike[str], *, deep: bool = False, progress: bool = True) -> Verified:
    """Look at every committed shard of the store at ``path``: its size and its sha256; and where all are sound, whether
    index.jsonl and failures.jsonl say what the records do.

    deep: also every row's checksum, that its values are finite, and that its key, variant and number are those that
    were planned. progress: a plan line on stderr.
    Nothing is written. Raises StoreError for what is no store, or has a plan that cannot be read.
    """
    store = Store.open(Path(path))
    units = {unit.stem: unit for unit in store.units()}
    found = Verified(len(units))
    if progress:
        commits = store.commits().values()
        rows, size = sum(commit.rows for commit in commits), sum(commit.bytes for commit in commits)
        how = "hashes, rows and values" if deep else "hashes"
        say(f"verify  {store.path}  {len(commits)} of {len(units)} units, {rows} rows, {amount(size)}: {how}\n")
    folder = store.path / "shards"
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    for name in names:
        if is_own(name, RECORD):
            _look(store, folder / name, units.get(Path(name).stem), deep, found)
    if not found.damaged:
        found.stale = [name for name, lines in store.derived().items() if _is_stale(store.path / name, lines, found)]
    return found


def rebuild_index(path: str | os.PathLike[str]) -> list[str]:
    """Write index.jsonl and failures.jsonl of the store at ``path`` anew from its commit records; returns their names.

    Raises StoreError for what is no store or has a damaged shard, StoreLocked while another process plans for too long.
    """
    store = Store.open(Path(path))
    with locked(store.path):
        store.write_derived()
    return list(store.derived())


def _is_stale(path: Path, lines: list[bytes], found: Verified) -> bool:
    if not path.is_file():
        return found.committed > 0
    return path.read_bytes() != b"".join(lines)


def _look(store: Store, record: Path, unit: Unit | None, deep: bool, found: Verified) -> None:
    def damaged(path: Path, what: str) -> None:
        found.damaged.append(Damage(path.relative_to(store.path).as_posix(), what, unit.number if unit else None))

    commit = read_commit(record)
    if unit is None:
        return damaged(record, "belongs to no unit of the plan")
    if commit is None:
        return damaged(record, "is no commit record")
    if commit.identity != store.facts["identity_digest"]:
        return damaged(record, "is of another identity")
    if not commit.belongs_to(unit):
        return damaged(record, "speaks of other rows than its unit has")
    if commit.shard is not None and (what := _wrong_bytes(store, commit)):
        return damaged(record.with_suffix(".safetensors"), what)
    if deep and (what := _wrong_rows(store, commit, unit)):
        return damaged(record.with_suffix(".safetensors"), what)
    found.committed += 1
    found.rows += commit.rows
    found.failed += len(commit.failed)
    found.bytes += commit.bytes
    return None


def _wrong_bytes(store: Store, commit: Commit) -> str | None:
    path = store.path / "shards" / str(commit.shard)
    try:
        size = path.stat().st_size
        if size != commit.bytes:
            return f"has {size} bytes, and its record says {commit.bytes}"
        return None if sha256_of(path) == commit.sha256 else "has another sha256 than its record says"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _wrong_rows(store: Store, commit: Commit, unit: Unit) -> str | None:
    failed = [(failure.key, failure.variant) for failure in commit.failed]
    if commit.shard is None:
        return None if sorted(failed) == sorted(row.name for row in unit.rows) else "misses rows of its unit"
    path = store.path / "shards" / commit.shard
    sides = tuple(side // store.facts["downsample_factor"] for side in unit.bucket)
    try:
        names = read_names(path)
        with_logvar = store.facts["identity"]["numerics"]["posterior"] == "dist"
        map_shard(path, (store.facts["latent_channels"], *sides), with_logvar)
        if sorted([*names, *failed]) != sorted(row.name for row in unit.rows):
            return "has other rows than its unit"
        return _wrong_values(path, names)
    except (StoreError, SafetensorError, ValueError, TypeError, OSError) as error:
        return f"is damaged: {error}"


def _wrong_values(path: Path, names: list[tuple[str, int]]) -> str | None:
    with safe_open(os.fspath(path), framework="np") as shard:
        there = set(shard.keys())
        parts = [shard.get_tensor(name) if name in there else None for name in ("mean", "logvar", "logvar_range")]
        checksums, ids = shard.get_tensor("row_crc32"), shard.get_tensor("sample_id")
    if not len(checksums) == len(ids) == len(names):
        return "has columns of different lengths"
    for row, (key, _) in enumerate(names):
        values = [None if part is None else part[row] for part in parts]
        said = key_text(key.encode("utf-8", "backslashreplace"))
        if row_checksum(*values) != checksums[row]:  # type: ignore[arg-type]
            return f"row {row} ({said}) has another checksum than it says"
        if not all(np.isfinite(value).all() for value in values if value is not None):
            return f"row {row} ({said}) is not finite"
        if ids[row] != sample_id(key):
            return f"row {row} ({said}) has another number than its key"
    return None
