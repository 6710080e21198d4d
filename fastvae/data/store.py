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
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastvae.checkpoints.atomic import sweep, write_atomically
from fastvae.data import identity as identities
from fastvae.data.shards import Row, pack, read_keys
from fastvae.data.sources import SourceFile

FORMAT = 1


class StoreError(ValueError):
    """A folder that cannot be used as a store, and why."""


class IdentityMismatch(StoreError):
    """A store made by another model, numerics or preprocessing; ``differences`` has a line for each field."""

    def __init__(self, path: Path, lines: list[str]):
        self.differences = lines
        listed = "\n".join(f"  {line}" for line in lines)
        advice = "nothing was changed; encode into a new folder, or with the store's settings"
        super().__init__(f"{path} holds latents of another identity ({advice}):\n{listed}")


@dataclass(frozen=True)
class Failure:
    """A row that could not be encoded: ``reason`` is one of fastvae.data.reasons.REASONS."""

    key: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Unit:
    """The work of one shard: its number and its files, in order."""

    number: int
    files: tuple[SourceFile, ...]


@dataclass
class Commit:
    """A commit record. ``shard`` is None when no row of the unit could be encoded."""

    unit: int
    shard: str | None
    bytes: int
    sha256: str | None
    rows: int
    identity: str
    failed: list[Failure] = field(default_factory=list)
    redone: int = 0
    flags: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    host: str = ""
    versions: dict[str, str] = field(default_factory=dict)


class Store:
    """A latent store at ``path``; ``facts`` is its store.json."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path = path
        self.facts = facts

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """The store at ``path``; raises StoreError if there is none or it is of another format."""
        path = Path(path)
        try:
            facts = json.loads((path / "store.json").read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(f"{path} is not a latent store: it has no store.json") from None
        except ValueError as error:
            raise StoreError(f"{path / 'store.json'} is not readable as JSON: {error}") from error
        if not isinstance(facts, dict) or facts.get("fvl") != FORMAT:
            raise StoreError(f'{path / "store.json"} must have "fvl": {FORMAT}')
        if identities.digest(facts.get("identity", {})) != facts.get("identity_digest"):
            raise StoreError(f"{path / 'store.json'} was edited: its identity does not have the digest it states")
        return cls(path, facts)

    @classmethod
    def create_or_open(cls, path: str | Path, identity: dict[str, Any], layout: dict[str, Any]) -> Store:
        """The store at ``path``, made if it is not there; ``layout`` is what readers need beside the identity.

        Raises IdentityMismatch for a store of another identity, StoreError for a folder with other things in it.
        """
        path = Path(path)
        if (path / "store.json").exists():
            store = cls.open(path)
            lines = identities.differences(store.facts["identity"], json.loads(identities.canonical_json(identity)))
            if lines:
                raise IdentityMismatch(path, lines)
            store._prepare()
            return store
        if path.exists() and not path.is_dir():
            raise StoreError(f"the output must be a folder, {path} is a file")
        if path.is_dir() and any(entry for entry in path.iterdir() if ".tmp." not in entry.name):
            raise StoreError(f"{path} is neither empty nor a latent store")
        path.mkdir(parents=True, exist_ok=True)
        sweep(path)
        facts = {"fvl": FORMAT, "identity": identity, "identity_digest": identities.digest(identity), **layout}
        write_atomically(path / "store.json", [_json_bytes(facts, indent=1)])
        store = cls(path, json.loads(_json_bytes(facts)))
        store._prepare()
        return store

    @property
    def bucket(self) -> str:
        """Height and width of the pixels behind every row, as in a shard's name: 256x256."""
        return self.facts["bucket"]

    def units(self) -> list[Unit]:
        """The work list of every plan file, in order; raises StoreError for one that cannot be read."""
        files: dict[int, list[SourceFile]] = {}
        for path in sorted(self.path.glob("plan/units-*.jsonl")):
            try:
                for line in path.read_text("utf-8").splitlines():
                    entry = json.loads(line)
                    files.setdefault(entry["unit"], []).append(
                        SourceFile(entry["key"], entry["size"], entry["mtime_ns"])
                    )
            except (ValueError, KeyError) as error:
                raise StoreError(f"{path} is damaged: {error!r}") from error
        return [Unit(number, tuple(files[number])) for number in sorted(files)]

    def extend_plan(self, files: Iterable[SourceFile], rows_per_unit: int) -> list[Unit]:
        """Append units for the files that are new, or of another size or time than planned; returns those units."""
        units = self.units()
        planned = {file.key: file for unit in units for file in unit.files}
        fresh = [file for file in files if planned.get(file.key) != file]
        if not fresh:
            return []
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
        number = len(list(self.path.glob("plan/units-*.jsonl")))
        write_atomically(self.path / "plan" / f"units-{number:05d}.jsonl", lines)
        return added

    def commits(self) -> dict[int, Commit]:
        """The commit records that can be trusted, by unit: readable, of this identity, their shard of stated size."""
        trusted = {}
        for path in sorted(self.path.glob("shards/*.json")):
            commit = _read_commit(path)
            if commit is None or commit.identity != self.facts["identity_digest"]:
                continue
            if commit.shard is not None:
                shard = self.path / "shards" / commit.shard
                if not shard.is_file() or shard.stat().st_size != commit.bytes:
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
                for row, key in enumerate(_keys(self.path / "shards" / commit.shard)):
                    failures.pop(key, None)
                    index[key] = (commit.shard, row)
        return index, failures

    def _prepare(self) -> None:
        sweep(self.path)
        (self.path / "plan").mkdir(exist_ok=True)
        (self.path / "shards").mkdir(exist_ok=True)


def _json_bytes(value: Any, indent: int | None = None) -> bytes:
    # ASCII with \u escapes carries the lone surrogates that stand for file names that are not UTF-8.
    return json.dumps(value, indent=indent, ensure_ascii=True).encode("ascii")


def _keys(shard: Path) -> list[str]:
    try:
        return list(read_keys(shard))
    except SafetensorError as error:
        raise StoreError(f"{shard} is damaged: {error}; delete it and encode again") from error


def _read_commit(path: Path) -> Commit | None:
    """The record, or None if it is not one: records appear whole, so it was damaged and its unit is redone."""
    try:
        fields = json.loads(path.read_text("utf-8"))
        failed = [Failure(**failure) for failure in fields.pop("failed")]
        return Commit(**fields, failed=failed)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
