"""Verification of a store: every committed shard against its record, by hash and row by row."""

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
from fastvae.data.store.store import Store
from fastvae.data.store.store_json import keeps_alpha
from fastvae.system.atomic_files import sha256_of
from fastvae.system.terminal import format_bytes, print_stderr


@dataclass(frozen=True)
class Damage:
    """A damaged file: its path in the store, and ``what`` is wrong with it."""

    file: str
    what: str
    unit: int | None = None


@dataclass
class RecordCheck:
    """A record and, if the record is sound, its ``shard``; ``what`` is wrong with either, None for nothing.

    ``differences``: fields in which the shard differs from store.json; either may have been changed.
    """

    record: Path
    unit: Unit | None
    commit: Commit | None = None
    shard: Path | None = None
    what: str | None = None
    differences: Differences = field(default_factory=dict)


@dataclass
class VerifyReport:
    """Result of verify: units planned and committed, rows of the committed ones, and every damaged file.

    ``failed``: rows that failed in the latest unit they were planned in. ``superseded``: those of ``rows`` that are
    served no more, of images that were edited or pruned. ``stale``: derived files that differ from the
    records, as after a kill, or are missing although something is committed; the next encode rewrites them.
    """

    planned: int = 0
    committed: int = 0
    rows: int = 0
    failed: int = 0
    superseded: int = 0
    bytes: int = 0
    damaged: list[Damage] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)

    @property
    def pending(self) -> int:
        """Units that are planned and neither committed nor damaged: the same encode continues with them."""
        return self.planned - self.committed - len({damage.unit for damage in self.damaged} - {None})

    def add(self, store: Path, check: RecordCheck, what: str | None, latest: Mapping[tuple[str, int], int]) -> None:
        """Count a record, or the damage ``what``; a failure counts unless a later unit has its row again."""
        if what is not None or check.unit is None or check.commit is None:
            file = (check.shard or check.record).relative_to(store).as_posix()
            self.damaged.append(Damage(file, str(what), check.unit.number if check.unit else None))
            return
        self.committed += 1
        self.rows += check.commit.rows
        failed = sum(latest.get((each.key, each.variant)) == check.unit.number for each in check.commit.failed)
        served = sum(latest.get(row.name) == check.unit.number for row in check.unit.rows) - failed
        self.failed += failed
        self.superseded += check.commit.rows - served
        self.bytes += check.commit.bytes


def verify(path: str | os.PathLike[str], *, deep: bool = False, progress: bool = True) -> VerifyReport:
    """Check every committed shard of the store at ``path``: size, sha256, and metadata against store.json; if all are
    sound, check index.jsonl and failures.jsonl against the records.

    deep: also check every row's checksum, that its values are finite, and its key, variant and sample_id against the
    plan. progress: a plan line on stderr.
    Writes nothing. Raises StoreError for a folder that is not a store, or has a damaged plan.
    """
    store = Store.open(Path(path))
    records = store.records()  # listed before the plan: a run in progress adds to the plan first
    units = {unit.stem: unit for unit in store.units()}
    report = VerifyReport(len(units))
    if progress:
        commits = store.commits().values()
        rows, size = sum(commit.rows for commit in commits), sum(commit.bytes for commit in commits)
        how = "hashes, rows and values" if deep else "hashes"
        print_stderr(
            f"verify  {store.path}  {len(commits)} of {len(units)} units, {rows} rows, {format_bytes(size)}: {how}\n"
        )
    checks = [_check_record(store, record, units.get(record.stem)) for record in records]
    if exchanged := _other_identity(store, checks):
        report.damaged.append(exchanged)
        return report
    differences = [check.differences for check in checks if check.shard is not None and check.what is None]
    edits = edited_fields(differences)
    shards = "its only shard has" if len(differences) == 1 else f"each of its {len(differences)} shards has"
    report.damaged += [
        Damage(STORE, f"says {name} {ours}, and {shards} {theirs}") for name, (ours, theirs) in edits.items()
    ]
    facts = {**store.facts, **{name: int(edits[name][1]) for name in SHAPE if name in edits}}
    latest = store.latest()
    for check in checks:
        what = check.what or _own_difference(check.differences, edits)
        if deep and what is None and check.unit is not None and check.commit is not None:
            what = _rows_damage(facts, check.shard, check.commit, check.unit)
        report.add(store.path, check, what, latest)
    for name in DERIVED_NAMES:
        if (store.path / name).exists() and (what := not_a_file(store.path / name)):
            report.damaged.append(Damage(name, what))
    if not report.damaged:
        report.stale = [name for name, lines in store.derived().items() if _is_stale(store.path / name, lines, report)]
    return report


def rebuild_index(path: str | os.PathLike[str]) -> list[str]:
    """Write index.jsonl and failures.jsonl of the store at ``path`` again, from its commit records; return their names.

    Raises StoreError for a folder that is not a store or has a damaged shard, StoreLocked if another process has the
    lock for too long.
    """
    store = Store.open(Path(path))
    with locked(store.path):
        store.write_derived()
    return list(store.derived())


def _is_stale(path: Path, lines: list[bytes], report: VerifyReport) -> bool:
    if not path.is_file():
        return report.committed > 0
    return path.read_bytes() != b"".join(lines)


def _check_record(store: Store, record: Path, unit: Unit | None) -> RecordCheck:
    check = RecordCheck(record, unit)
    try:
        check.commit = read_commit(record)
        check.what = not_a_file(record) or _record_damage(store, check.commit, unit)
        if check.what is None and unit is not None and check.commit is not None and check.commit.shard is not None:
            check.shard = record.with_suffix(".safetensors")
            check.what = not_a_file(check.shard) or _file_damage(check.shard, check.commit)
            if check.what is None:
                check.differences = metadata_differences(store.facts, unit.bucket, read_metadata(check.shard))
    except OSError as error:
        check.what = f"cannot be read: {error.strerror or error}"
    except (SafetensorError, ValueError) as error:
        check.what = f"is damaged: {error}"
    return check


def _record_damage(store: Store, commit: Commit | None, unit: Unit | None) -> str | None:
    if unit is None:
        return "belongs to no unit of the plan"
    if commit is None:
        return "is no commit record"
    if commit.identity != store.facts["identity_digest"]:
        return "has another identity"
    return None if commit.belongs_to(unit) else "lists other rows than its unit"


def _other_identity(store: Store, checks: list[RecordCheck]) -> Damage | None:
    """Return damage of store.json if all records have one identity and it has another: it is another store's file."""
    own = store.facts["identity_digest"]
    identities = [str(check.commit.identity) for check in checks if check.unit is not None and check.commit is not None]
    if own in identities or len({*identities}) != 1:
        return None
    records = "its only record has" if len(identities) == 1 else f"each of its {len(identities)} records has"
    return Damage(STORE, f"says identity_digest {own}, and {records} {' '.join(identities[0].split())[:64]}")


def _file_damage(shard: Path, commit: Commit) -> str | None:
    size = shard.stat().st_size
    if size != commit.bytes:
        return f"has {size} bytes, and its record says {commit.bytes}"
    return None if sha256_of(shard) == commit.sha256 else "has another sha256 than its record says"


def _own_difference(of_shard: Differences, edits: Differences) -> str | None:
    """Return the first difference between a shard and store.json that not all shards have."""
    for name, (ours, theirs) in of_shard.items():
        if name not in edits:
            return f"has {name} {theirs}, and store.json has {ours}"
    return None


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
        stored = set(shard.keys())
        parts = [shard.get_tensor(name) if name in stored else None for name in SUMMED]
        checksums, ids = shard.get_tensor("row_crc32"), shard.get_tensor("sample_id")
    if not len(checksums) == len(ids) == len(names):
        return "has columns of different lengths"
    for row, (key, _) in enumerate(names):
        values = [None if part is None else part[row] for part in parts]
        if what := row_damage(key, values, int(checksums[row]), int(ids[row])):
            return f"row {row} ({key_text(key.encode('utf-8', 'backslashreplace'))}) {what}"
    return None
