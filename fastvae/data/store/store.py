"""A folder of latents that is consistent at any time: identity, plan, shards, and commit records, written last.

    store.json                      identity and layout, written once
    plan/units-00000.jsonl          the plan; later files only append units
    shards/000017-256x256.safetensors
    shards/000017-256x256.json      the commit record; a shard without one does not exist
    leases/000017.lease             a unit that a running process encodes
    failures.jsonl, index.jsonl     derived from the commit records

A key in a later unit replaces the same key of an earlier one as soon as it is planned: so an edited image is encoded
again, and its old latents are no longer served.
"""

from __future__ import annotations

import json
import os
import platform
import stat
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastvae.data.rows import Size, SourceFile
from fastvae.data.store import identity as identities
from fastvae.data.store.commits import Commit, Failure, read_commit
from fastvae.data.store.errors import IdentityMismatch, StoreError
from fastvae.data.store.layout import (
    DERIVED,
    LOCK_NAME,
    PLAN,
    RECORD,
    SHARD,
    STORE,
    TOP_LEVEL_NAMES,
    check_kinds,
    matches,
)
from fastvae.data.store.leases import Leases
from fastvae.data.store.plan import PlannedRow, Unit, WorkList
from fastvae.data.store.shard import ShardRow, pack, read_names
from fastvae.data.store.shard_metadata import metadata_of
from fastvae.data.store.store_json import check_store_json, read_store_json
from fastvae.system.atomic_files import is_leftover, sweep, synchronise_folder, write_atomically
from fastvae.system.strict_json import json_bytes
from fastvae.system.terminal import first_few

__all__ = ["Commit", "Failure", "IdentityMismatch", "Store", "StoreError", "Unit"]


class Store:
    """A latent store at ``path``; ``facts`` is the content of its store.json."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path = path
        self.facts = facts
        self._work = WorkList(path / "plan")

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open the store at ``path``; raises StoreError if there is none, or it is damaged or of another format."""
        path = Path(path)
        try:
            facts = read_store_json(path / STORE)
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(f"{path} is not a latent store: it has no store.json") from None
        check_store_json(facts, path / STORE)
        if identities.digest(facts["identity"]) != facts["identity_digest"]:
            raise StoreError(f"{path / STORE} was edited: its identity does not have its identity_digest")
        return cls(path, facts)

    @classmethod
    def check(cls, path: str | Path, identity: dict[str, Any]) -> Store | None:
        """Return the store at ``path`` if it takes latents of ``identity``, None if one can be made; writes nothing.

        A store of another identity that has no commits can be replaced. Raises IdentityMismatch for one with commits,
        StoreError for a folder with other files in it, or with the wrong kind of file under a name of a store.
        """
        path = Path(path)
        if (path / STORE).exists():
            check_kinds(path)
            store = cls.open(path)
            lines = identities.identity_differences(store.facts["identity"], identity)
            if lines and store.records():
                raise IdentityMismatch(path, lines)
            return None if lines else store
        if path.is_symlink() and not path.exists():
            raise StoreError(
                f"the output must be a folder, {path} is a link to {os.readlink(path)}, which is not there"
            )
        if path.exists() and not path.is_dir():
            raise StoreError(f"the output must be a folder, {path} is a file")
        if path.is_dir() and (others := sorted(entry.name for entry in path.iterdir() if not _is_own_name(entry))):
            if (path / STORE).exists():  # another process has made the store since the first check
                return cls.check(path, identity)
            raise StoreError(f"{path} is neither empty nor a latent store: it holds {first_few(others)}")
        check_kinds(path)
        return None

    @classmethod
    def create_or_open(
        cls, path: str | Path, identity: dict[str, Any], layout: dict[str, Any], leases: Leases
    ) -> Store:
        """Open the store at ``path``, or create it; ``layout``: fields of store.json beside the identity.

        Raises as check does, and IdentityMismatch if another process is making a store of another identity there. The
        caller holds the folder's lock, and is inside its ``leases``.
        """
        path = Path(path)
        store = cls.check(path, identity)
        if store is None:
            if leases.live() and (path / STORE).exists():
                other = cls.open(path).facts["identity"]
                raise IdentityMismatch(path, identities.identity_differences(other, identity))
            path.mkdir(parents=True, exist_ok=True)
            facts = {"fvl": 1, "identity": identity, "identity_digest": identities.digest(identity), **layout}
            content = json_bytes(facts, indent=1)
            store = cls(path, json.loads(content))
            store._sweep(leases)
            store._delete_uncommitted()
            write_atomically(path / STORE, [content])
        store._sweep(leases)
        (path / "plan").mkdir(exist_ok=True)
        (path / "shards").mkdir(exist_ok=True)
        # Otherwise a power cut could remove a folder and every record in it, although the records were synchronised.
        synchronise_folder(path)
        synchronise_folder(path.parent)
        return store

    def units(self) -> list[Unit]:
        """Return the units of every plan file, in order; raises StoreError for a damaged one."""
        return self._work.units()

    def columns(self) -> dict[str, dict[str, Any]]:
        """Return the columns of each key, such as its caption, as of the latest change of the plan."""
        return self._work.columns()

    def extend_plan(
        self,
        fresh: Sequence[tuple[Size, PlannedRow]],
        rows_per_unit: Callable[[Size], int],
        files: Iterable[SourceFile] = (),
        pruned: Iterable[SourceFile] = (),
    ) -> list[Unit]:
        """Extend the plan, see WorkList.extend; skip the numbers of records whose plan was lost, which would match."""
        return self._work.extend(fresh, rows_per_unit, files, self._least_number(), pruned)

    def latest(self) -> dict[tuple[str, int], int]:
        """Return the number of the latest unit of each row, by its name, without the rows that were pruned."""
        return self._work.latest()

    def planned_files(self) -> dict[str, SourceFile]:
        """Return each file of the plan by its key, as it was planned last, without the pruned ones."""
        latest = self.latest()
        rows = ((unit.number, row) for unit in self.units() for row in unit.rows)
        return {row.file.key: row.file for number, row in rows if latest.get(row.name) == number}

    def served_rows(self) -> dict[str, int]:
        """Return the number of committed rows of each key, in the latest unit that they were planned in."""
        commits, rows = self.commits(), dict[str, int]()
        failed = {(failure.key, failure.variant) for failure, _ in self.latest_failures()}
        for name, unit in self.latest().items():
            if unit in commits and name not in failed:
                rows[name[0]] = rows.get(name[0], 0) + 1
        return rows

    def count_served(self, commits: Mapping[int, Commit]) -> int:
        """Return the number of rows that ``commits`` serve: encoded, in the latest unit that they were planned in."""
        latest = self.latest()
        failures = (
            (failure.key, failure.variant, commit.unit) for commit in commits.values() for failure in commit.failed
        )
        failed = sum(latest.get((key, variant)) == unit for key, variant, unit in failures)
        return sum(unit in commits for unit in latest.values()) - failed

    def split(self, unit: Unit, done: Collection[tuple[str, int]]) -> tuple[Unit, Unit] | None:
        """Split ``unit`` in the plan into its ``done`` rows and the others, see WorkList.split."""
        return self._work.split(unit, done, self._least_number())

    def plan_files(self) -> int:
        """Return the number of plan files, which grows with every change of the plan."""
        return len(self._work.files())

    def _least_number(self) -> int:
        return max((int(path.name.split("-")[0]) for path in self.records()), default=-1) + 1

    def records(self) -> list[Path]:
        """Return the paths of all commit records, trusted or not."""
        return self._files("shards", RECORD)

    def files_to_encode(
        self, files: Iterable[SourceFile], again: Callable[[Failure, Commit], bool] = lambda failure, commit: False
    ) -> list[SourceFile]:
        """Return those of ``files`` that need a unit: new, changed since the plan (see is_same_as), or to be retried.

        ``again``: returns True for a failure, of the latest unit of its file, that is to be retried.
        """
        planned = self.planned_files()
        retried = {failure.key for failure, commit in self.latest_failures() if again(failure, commit)}
        return [file for file in files if not file.is_same_as(planned.get(file.key)) or file.key in retried]

    def latest_failures(self) -> list[tuple[Failure, Commit]]:
        """Return every failure in the latest unit of its row, with that unit's record."""
        latest = self.latest()
        failures = ((failure, commit) for commit in self.commits().values() for failure in commit.failed)
        return [pair for pair in failures if latest.get((pair[0].key, pair[0].variant)) == pair[1].unit]

    def pending(self) -> int:
        """Return the number of rows planned and not committed: not encoded yet, or their record is not trusted."""
        commits = self.commits()
        return sum(unit not in commits for unit in self.latest().values())

    def commits(self, with_keys: bool = False) -> dict[int, Commit]:
        """Return the trusted commit records, by unit.

        A trusted record is readable, has this identity and the number of rows of its unit, and its shard has the size
        in the record; ``with_keys`` reads the shard's keys as well, and does not trust a record with wrong ones.
        """
        trusted = {}
        for unit in self.units():
            commit = self.commit_of(unit, with_keys)
            if commit is not None:
                trusted[unit.number] = commit
        return trusted

    def commit_of(self, unit: Unit, with_keys: bool = False) -> Commit | None:
        """Return the commit record of ``unit`` if there is one and it is trusted, see commits."""
        try:
            commit = read_commit(self.path / "shards" / f"{unit.stem}.json")
        except FileNotFoundError:
            return None
        if commit is None or commit.identity != self.facts["identity_digest"] or not commit.belongs_to(unit):
            return None
        if commit.shard is not None:
            try:
                found = (self.path / "shards" / commit.shard).stat()
            except OSError:  # another process may delete it now
                return None
            if not stat.S_ISREG(found.st_mode) or found.st_size != commit.bytes:
                return None
            if with_keys and not self._has_rows_of(commit, unit):
                return None
        return commit

    def commit(self, unit: Unit, rows: list[ShardRow], **facts: Any) -> Commit:
        """Write the shard of ``unit`` and then its commit record; ``facts``: other fields of the record."""
        shard, size, digest = None, 0, None
        if rows:
            shard = f"{unit.stem}.safetensors"
            metadata = metadata_of(self.facts, unit.bucket, rows[0].mean.shape)
            size, digest = write_atomically(self.path / "shards" / shard, pack(rows, metadata))
        commit = Commit(
            unit.number, shard, size, digest, len(rows), self.facts["identity_digest"], host=platform.node(), **facts
        )
        write_atomically(self.path / "shards" / f"{unit.stem}.json", [json_bytes(asdict(commit), indent=1)])
        if shard is None:  # an earlier try may have left one, which no record names now
            (self.path / "shards" / f"{unit.stem}.safetensors").unlink(missing_ok=True)
        return commit

    def write_derived(self) -> None:
        """Write index.jsonl (key, variant, shard, row of each served row) and failures.jsonl if they have changed."""
        for name, lines in self.derived().items():
            path = self.path / name
            if not path.is_file() or path.read_bytes() != b"".join(lines):
                write_atomically(path, lines)

    def derived(self) -> dict[str, list[bytes]]:
        """Return the lines of each file that write_derived writes."""
        index, failures = self._index_and_failures()
        rows = [
            json_bytes({"key": key, "variant": variant, "shard": shard, "row": row}) + b"\n"
            for (key, variant), (shard, row) in index.items()
        ]
        lines = [json_bytes(asdict(failure)) + b"\n" for failure in failures.values()]
        return {"index.jsonl": rows, "failures.jsonl": lines}

    def resolve(self) -> dict[tuple[str, int], tuple[str, int]]:
        """Return (shard, row) of each (key, variant), in the latest unit that the row was planned in.

        Raises StoreError for a committed shard that cannot be read.
        """
        return self._index_and_failures()[0]

    def failures(self) -> dict[tuple[str, int], Failure]:
        """Return the failures in the latest unit of each row, by (key, variant)."""
        return self._index_and_failures()[1]

    def _index_and_failures(self) -> tuple[dict[tuple[str, int], tuple[str, int]], dict[tuple[str, int], Failure]]:
        index: dict[tuple[str, int], tuple[str, int]] = {}
        latest = self.latest()
        for commit in self.commits().values():
            if commit.shard is not None:
                for row, name in enumerate(self._names(commit)):
                    if latest.get(name) == commit.unit:
                        index[name] = (commit.shard, row)
        return index, {(failure.key, failure.variant): failure for failure, _ in self.latest_failures()}

    def _names(self, commit: Commit) -> list[tuple[str, int]]:
        shard = self.path / "shards" / str(commit.shard)
        try:
            names = read_names(shard)
        # ValueError: offsets that are not numbers of bytes. TypeError: a tensor of another type.
        except (SafetensorError, ValueError, TypeError) as error:
            raise StoreError(f"{shard} is damaged: {error}; fastvae repair makes it again") from error
        if len(names) != commit.rows:
            raise StoreError(
                f"{shard} is damaged: {len(names)} keys for {commit.rows} rows; fastvae repair makes it again"
            )
        return names

    def _has_rows_of(self, commit: Commit, unit: Unit) -> bool:
        try:
            names = self._names(commit)
        except StoreError:
            return False
        failed = [(failure.key, failure.variant) for failure in commit.failed]
        return sorted([*names, *failed]) == sorted(row.name for row in unit.rows)

    def _files(self, folder: str, names: str) -> list[Path]:
        inside = self.path / folder
        return sorted(path for path in inside.iterdir() if matches(path.name, names)) if inside.is_dir() else []

    def _sweep(self, leases: Leases) -> None:
        """Delete temporary files of killed runs, but not those that the holder of a live lease is writing."""
        for folder, names in ((".", TOP_LEVEL_NAMES), ("plan", PLAN)):  # only the lock's holder writes them
            if (self.path / folder).is_dir():
                sweep(self.path / folder, names)
        shards = self.path / "shards"
        for path in shards.iterdir() if shards.is_dir() else ():
            # Checked here and not earlier: a process takes the lease before it writes.
            if is_leftover(path, f"{SHARD}|{RECORD}") and not leases.is_live(path.name.split("-")[0]):
                path.unlink(missing_ok=True)

    def _delete_uncommitted(self) -> None:
        """Delete the plan and the shards of a store that never had a commit."""
        for path in (*self._files(".", DERIVED), *self._files("shards", SHARD), *self._work.files()):
            path.unlink()


def _is_own_name(path: Path) -> bool:
    return path.name in (LOCK_NAME, "leases") or is_leftover(path, TOP_LEVEL_NAMES)
