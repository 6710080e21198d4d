"""Whether a store is what its records say: every committed shard, by its hash, and row by row."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fastvae.data.rows import key_text
from fastvae.data.store.commits import Commit, read_commit
from fastvae.data.store.errors import StoreError
from fastvae.data.store.layout import DERIVED_NAMES, STORE, not_a_file
from fastvae.data.store.lock import locked
from fastvae.data.store.mapped_shard import map_shard
from fastvae.data.store.plan import Unit
from fastvae.data.store.shard import SUMMED, read_metadata, read_names, row_damage
from fastvae.data.store.shard_metadata import SHAPE, Differences, edited_fields, metadata_differences
from fastvae.data.store.store import Store, latest_units
from fastvae.data.store.store_json import keeps_alpha
from fastvae.system.atomic_files import sha256_of
from fastvae.system.terminal import format_bytes, print_stderr


@dataclass(frozen=True)
class Damage:
    """A file of a store that is not what it should be: its path in the store, and ``what`` is wrong, in words."""

    file: str
    what: str
    unit: int | None = None


@dataclass
class RecordCheck:
    """A record and, where it can be believed, its ``shard``; ``what`` is wrong with the one or the other, in words.

    ``differences``: what the shard states otherwise than store.json, of which either may have been changed.
    """

    record: Path
    unit: Unit | None
    commit: Commit | None = None
    shard: Path | None = None
    what: str | None = None
    differences: Differences = field(default_factory=dict)


@dataclass
class VerifyReport:
    """What was found: units that were planned and are committed, their rows, and every damage.

    ``failed``: rows that the latest unit they were planned in could not make. ``stale``: which derived files say
    something else than the records, as after a kill, or are missing where something is committed; the next encode
    rewrites them.
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

    def add(self, store: Path, one: RecordCheck, what: str | None, latest: Mapping[tuple[str, int], int]) -> None:
        """Count a record, or the damage ``what``; a failure counts where no later unit has its row again."""
        if what is not None or one.unit is None or one.commit is None:
            file = (one.shard or one.record).relative_to(store).as_posix()
            self.damaged.append(Damage(file, str(what), one.unit.number if one.unit else None))
            return
        self.committed += 1
        self.rows += one.commit.rows
        self.failed += sum(latest[each.key, each.variant] == one.unit.number for each in one.commit.failed)
        self.bytes += one.commit.bytes


def verify(path: str | os.PathLike[str], *, deep: bool = False, progress: bool = True) -> VerifyReport:
    """Look at every committed shard of the store at ``path``: its size, its sha256, and whether it states what
    store.json says; and where all are sound, whether index.jsonl and failures.jsonl say what the records do.

    deep: also every row's checksum, that its values are finite, and that its key, variant and number are those that
    were planned. progress: a plan line on stderr.
    Nothing is written. Raises StoreError for what is no store, or has a plan that cannot be read.
    """
    store = Store.open(Path(path))
    records = store.records()  # before the plan: a run that is on adds to the plan first
    units = {unit.stem: unit for unit in store.units()}
    found = VerifyReport(len(units))
    if progress:
        commits = store.commits().values()
        rows, size = sum(commit.rows for commit in commits), sum(commit.bytes for commit in commits)
        how = "hashes, rows and values" if deep else "hashes"
        print_stderr(
            f"verify  {store.path}  {len(commits)} of {len(units)} units, {rows} rows, {format_bytes(size)}: {how}\n"
        )
    looked = [_check_record(store, record, units.get(record.stem)) for record in records]
    if exchanged := _other_identity(store, looked):
        found.damaged.append(exchanged)
        return found
    whole = [one.differences for one in looked if one.shard is not None and one.what is None]
    wrong = edited_fields(whole)
    shards = "its only shard states" if len(whole) == 1 else f"each of its {len(whole)} shards states"
    found.damaged += [
        Damage(STORE, f"says {name} {said}, and {shards} {stated}") for name, (said, stated) in wrong.items()
    ]
    facts = {**store.facts, **{name: int(wrong[name][1]) for name in SHAPE if name in wrong}}
    latest = latest_units([*units.values()])
    for one in looked:
        what = one.what or _otherwise(one.differences, wrong)
        if deep and what is None and one.unit is not None and one.commit is not None:
            what = _rows_damage(facts, one.shard, one.commit, one.unit)
        found.add(store.path, one, what, latest)
    for name in DERIVED_NAMES:
        if (store.path / name).exists() and (what := not_a_file(store.path / name)):
            found.damaged.append(Damage(name, what))
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


def _is_stale(path: Path, lines: list[bytes], found: VerifyReport) -> bool:
    if not path.is_file():
        return found.committed > 0
    return path.read_bytes() != b"".join(lines)


def _check_record(store: Store, record: Path, unit: Unit | None) -> RecordCheck:
    one = RecordCheck(record, unit)
    try:
        one.commit = read_commit(record)
        one.what = not_a_file(record) or _record_damage(store, one.commit, unit)
        if one.what is None and unit is not None and one.commit is not None and one.commit.shard is not None:
            one.shard = record.with_suffix(".safetensors")
            one.what = not_a_file(one.shard) or _file_damage(one.shard, one.commit)
            if one.what is None:
                one.differences = metadata_differences(store.facts, unit.bucket, read_metadata(one.shard))
    except OSError as error:
        one.what = f"cannot be read: {error.strerror or error}"
    except (SafetensorError, ValueError) as error:
        one.what = f"is damaged: {error}"
    return one


def _record_damage(store: Store, commit: Commit | None, unit: Unit | None) -> str | None:
    if unit is None:
        return "belongs to no unit of the plan"
    if commit is None:
        return "is no commit record"
    if commit.identity != store.facts["identity_digest"]:
        return "is of another identity"
    return None if commit.belongs_to(unit) else "speaks of other rows than its unit has"


def _other_identity(store: Store, looked: list[RecordCheck]) -> Damage | None:
    """store.json's own damage, where all records are of one identity, and that is another: it is another store's."""
    own = store.facts["identity_digest"]
    stated = [str(one.commit.identity) for one in looked if one.unit is not None and one.commit is not None]
    if own in stated or len({*stated}) != 1:
        return None
    records = "its only record states" if len(stated) == 1 else f"each of its {len(stated)} records states"
    return Damage(STORE, f"says identity_digest {own}, and {records} {' '.join(stated[0].split())[:64]}")


def _file_damage(shard: Path, commit: Commit) -> str | None:
    size = shard.stat().st_size
    if size != commit.bytes:
        return f"has {size} bytes, and its record says {commit.bytes}"
    return None if sha256_of(shard) == commit.sha256 else "has another sha256 than its record says"


def _otherwise(of_shard: Differences, wrong: Differences) -> str | None:
    """What a shard states otherwise than store.json, where not all do."""
    said = [
        f"states {name} {values[1]}, and store.json says {values[0]}"
        for name, values in of_shard.items()
        if name not in wrong
    ]
    return said[0] if said else None


def _rows_damage(facts: dict[str, Any], path: Path | None, commit: Commit, unit: Unit) -> str | None:
    failed = [(failure.key, failure.variant) for failure in commit.failed]
    if path is None:
        return None if sorted(failed) == sorted(row.name for row in unit.rows) else "misses rows of its unit"
    sides = tuple(side // facts["downsample_factor"] for side in unit.bucket)
    try:
        names = read_names(path)
        with_logvar = facts["identity"]["numerics"]["posterior"] == "dist"
        map_shard(path, (facts["latent_channels"], *sides), with_logvar, keeps_alpha(facts))
        if sorted([*names, *failed]) != sorted(row.name for row in unit.rows):
            return "has other rows than its unit"
        return _values_damage(path, names)
    except (StoreError, SafetensorError, ValueError, TypeError, OSError) as error:
        return f"is damaged: {error}"


def _values_damage(path: Path, names: list[tuple[str, int]]) -> str | None:
    with safe_open(os.fspath(path), framework="np") as shard:
        there = set(shard.keys())
        parts = [shard.get_tensor(name) if name in there else None for name in SUMMED]
        checksums, ids = shard.get_tensor("row_crc32"), shard.get_tensor("sample_id")
    if not len(checksums) == len(ids) == len(names):
        return "has columns of different lengths"
    for row, (key, _) in enumerate(names):
        values = [None if part is None else part[row] for part in parts]
        if what := row_damage(key, values, int(checksums[row]), int(ids[row])):
            return f"row {row} ({key_text(key.encode('utf-8', 'backslashreplace'))}) {what}"
    return None
