"""A folder of latents that is always consistent: identity, frozen work list, shards, and commit records written last.

    store.json                      identity and layout, written once
    plan/units-00000.jsonl          the work list; later files only ever append units
    shards/000017-256x256.safetensors
    shards/000017-256x256.json      the commit record; a shard without one does not exist
    failures.jsonl, index.jsonl     derived from the commit records

A key in a later unit replaces the same key of an earlier one: that is how an edited image is encoded again.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastvae.checkpoints.atomic import is_leftover, sweep, write_atomically
from fastvae.checkpoints.report import first_few
from fastvae.data import identity as identities
from fastvae.data.lock import LOCK_NAME
from fastvae.data.records import (
    DERIVED,
    PLAN,
    RECORD,
    SHARD,
    TOP,
    Commit,
    Failure,
    IdentityMismatch,
    StoreError,
    Unit,
    check_facts,
    is_own,
    plan_number,
    read_commit,
    read_facts,
    read_plan,
)
from fastvae.data.shards import Row, pack, read_keys
from fastvae.data.sources import SourceFile

__all__ = ["Commit", "Failure", "IdentityMismatch", "Store", "StoreError", "Unit"]


class Store:
    """A latent store at ``path``; ``facts`` is its store.json."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path = path
        self.facts = facts

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """The store at ``path``; raises StoreError if there is none, or it is damaged or of another format."""
        path = Path(path)
        try:
            facts = read_facts(path / "store.json")
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(f"{path} is not a latent store: it has no store.json") from None
        check_facts(facts, path / "store.json")
        if identities.digest(facts["identity"]) != facts["identity_digest"]:
            raise StoreError(f"{path / 'store.json'} was edited: its identity does not have the digest it states")
        return cls(path, facts)

    @classmethod
    def check(cls, path: str | Path, identity: dict[str, Any]) -> Store | None:
        """The store at ``path`` if latents of ``identity`` can be added to it, None if one can be made; writes nothing.

        One of another identity without a commit is as good as none. Raises IdentityMismatch for one with commits,
        StoreError for a folder with other things in it.
        """
        path = Path(path)
        if (path / "store.json").exists():
            store = cls.open(path)
            lines = identities.differences(store.facts["identity"], json.loads(identities.canonical_json(identity)))
            if lines and store._has_records():
                raise IdentityMismatch(path, lines)
            return None if lines else store
        if path.exists() and not path.is_dir():
            raise StoreError(f"the output must be a folder, {path} is a file")
        if path.is_dir() and (others := sorted(entry.name for entry in path.iterdir() if not _is_ours(entry))):
            raise StoreError(f"{path} is neither empty nor a latent store: it holds {first_few(others)}")
        return None

    @classmethod
    def create_or_open(cls, path: str | Path, identity: dict[str, Any], layout: dict[str, Any]) -> Store:
        """The store at ``path``, made if it is not there; ``layout`` is what readers need beside the identity.

        Raises as check does. To be called by the holder of the folder's lock.
        """
        path = Path(path)
        store = cls.check(path, identity)
        if store is None:
            path.mkdir(parents=True, exist_ok=True)
            facts = {"fvl": 1, "identity": identity, "identity_digest": identities.digest(identity), **layout}
            content = _json_bytes(facts, indent=1)
            store = cls(path, json.loads(content))
            store._sweep()
            store._forget()
            write_atomically(path / "store.json", [content])
        store._sweep()
        (path / "plan").mkdir(exist_ok=True)
        (path / "shards").mkdir(exist_ok=True)
        return store

    @property
    def bucket(self) -> str:
        """Height and width of the pixels behind every row, as in a shard's name: 256x256."""
        return self.facts["bucket"]

    def units(self) -> list[Unit]:
        """The work list of every plan file, in order; raises StoreError for one that cannot be read."""
        files: dict[int, list[SourceFile]] = {}
        for path in self._plan_files():
            for number, file in read_plan(path):
                files.setdefault(number, []).append(file)
        return [Unit(number, tuple(files[number])) for number in sorted(files)]

    def fresh(
        self, files: Iterable[SourceFile], again: Callable[[Failure, Commit], bool] = lambda failure, commit: False
    ) -> list[SourceFile]:
        """Those of ``files`` that need a unit: new, of another size or time than planned, or to be tried again.

        ``again`` is asked for each failure that the latest unit of a file committed.
        """
        units, commits = self.units(), self.commits()
        planned = {file.key: file for unit in units for file in unit.files}
        latest = {file.key: unit.number for unit in units for file in unit.files}
        retried = {
            failure.key
            for commit in commits.values()
            for failure in commit.failed
            if latest[failure.key] == commit.unit and again(failure, commit)
        }
        return [file for file in files if planned.get(file.key) != file or file.key in retried]

    def extend_plan(self, fresh: list[SourceFile], rows_per_unit: int) -> list[Unit]:
        """Append units for the ``fresh`` files; returns them. No plan file is ever replaced."""
        if not fresh:
            return []
        units, plan = self.units(), self._plan_files()
        first = units[-1].number + 1 if units else 0
        added = [
            Unit(first + index, tuple(fresh[start : start + rows_per_unit]))
            for index, start in enumerate(range(0, len(fresh), rows_per_unit))
        ]
        lines = [
            _json_bytes({"unit": unit.number, "row": row, "bucket": self.bucket, **asdict(file)}) + b"\n"
            for unit in added
            for row, file in enumerate(unit.files)
        ]
        number = plan_number(plan[-1]) + 1 if plan else 0
        write_atomically(self.path / "plan" / f"units-{number:05d}.jsonl", lines, exclusive=True)
        return added

    def commits(self, whole: bool = False) -> dict[int, Commit]:
        """The commit records that can be trusted, by unit.

        They are readable, of this identity, speak of as many files as their unit has, and their shard has the stated
        size; with ``whole`` its keys are read as well, and a shard that is damaged there counts as not committed.
        """
        trusted = {}
        units = {unit.number: unit for unit in self.units()}
        for path in self._files("shards", RECORD):
            commit = read_commit(path)
            if commit is None or commit.identity != self.facts["identity_digest"]:
                continue
            unit = units.get(commit.unit)
            if unit is None or not commit.belongs_to(unit):
                continue
            if commit.shard is not None:
                shard = self.path / "shards" / commit.shard
                if not shard.is_file() or shard.stat().st_size != commit.bytes:
                    continue
                if whole and not self._is_whole(commit, unit):
                    continue
            trusted[commit.unit] = commit
        return dict(sorted(trusted.items()))

    def commit(self, unit: Unit, rows: list[Row], **facts: Any) -> Commit:
        """Write the shard of ``unit`` and then its commit record; ``facts`` are the record's other fields."""
        stem = f"{unit.number:06d}-{self.bucket}"
        shard, size, digest = None, 0, None
        if rows:
            shard = f"{stem}.safetensors"
            metadata = {**self.facts["metadata"], "identity": self.facts["identity_digest"]}
            size, digest = write_atomically(self.path / "shards" / shard, pack(rows, metadata))
        commit = Commit(
            unit.number, shard, size, digest, len(rows), self.facts["identity_digest"], host=platform.node(), **facts
        )
        write_atomically(self.path / "shards" / f"{stem}.json", [_json_bytes(asdict(commit), indent=1)])
        return commit

    def write_derived(self) -> None:
        """Rewrite index.jsonl (key, shard, row of every row served) and failures.jsonl from the commit records."""
        index, failures = self.resolve()
        rows = [_json_bytes({"key": key, "shard": shard, "row": row}) + b"\n" for key, (shard, row) in index.items()]
        write_atomically(self.path / "index.jsonl", rows)
        lines = [_json_bytes(asdict(failure)) + b"\n" for failure in failures.values()]
        write_atomically(self.path / "failures.jsonl", lines)

    def resolve(self) -> tuple[dict[str, tuple[str, int]], dict[str, Failure]]:
        """Where each key's row is, as (shard, row), and which keys failed; the latest unit of a key decides.

        Raises StoreError for a committed shard that cannot be read.
        """
        index: dict[str, tuple[str, int]] = {}
        failures: dict[str, Failure] = {}
        for commit in self.commits().values():
            for failure in commit.failed:
                index.pop(failure.key, None)
                failures[failure.key] = failure
            if commit.shard is not None:
                for row, key in enumerate(self._keys(commit)):
                    failures.pop(key, None)
                    index[key] = (commit.shard, row)
        return index, failures

    def _keys(self, commit: Commit) -> list[str]:
        shard = self.path / "shards" / str(commit.shard)
        try:
            keys = list(read_keys(shard))
        # ValueError: offsets that are no numbers of bytes. TypeError: a tensor of another type.
        except (SafetensorError, ValueError, TypeError) as error:
            raise StoreError(f"{shard} is damaged: {error}; run the same fastvae encode again") from error
        if len(keys) != commit.rows:
            raise StoreError(f"{shard} is damaged: {len(keys)} keys for {commit.rows} rows; run fastvae encode again")
        return keys

    def _is_whole(self, commit: Commit, unit: Unit) -> bool:
        try:
            keys = self._keys(commit)
        except StoreError:
            return False
        return sorted([*keys, *(failure.key for failure in commit.failed)]) == sorted(file.key for file in unit.files)

    def _files(self, folder: str, names: str) -> list[Path]:
        inside = self.path / folder
        return sorted(path for path in inside.iterdir() if is_own(path.name, names)) if inside.is_dir() else []

    def _plan_files(self) -> list[Path]:
        return sorted(self._files("plan", PLAN), key=plan_number)

    def _has_records(self) -> bool:
        return bool(self._files("shards", RECORD))

    def _sweep(self) -> None:
        for inside, names in ((".", TOP), ("plan", PLAN), ("shards", f"{SHARD}|{RECORD}")):
            if (self.path / inside).is_dir():
                sweep(self.path / inside, names)

    def _forget(self) -> None:
        """Delete the plan, and shards without a record, of a store that never had a commit."""
        for path in (*self._files(".", DERIVED), *self._files("shards", SHARD), *self._plan_files()):
            path.unlink()


def _is_ours(path: Path) -> bool:
    return path.name == LOCK_NAME or is_leftover(path, TOP)


def _json_bytes(value: Any, indent: int | None = None) -> bytes:
    # ASCII with \u escapes carries the lone surrogates that stand for file names that are not UTF-8.
    return json.dumps(value, indent=indent, ensure_ascii=True, allow_nan=False).encode("ascii")
