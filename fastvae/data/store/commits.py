"""What a store's files hold: the units of its plan, its commit records, and why a folder is no store."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from fastvae.data.store.layout import not_a_file
from fastvae.data.store.plan import Unit
from fastvae.data.store.store_json import is_count


@dataclass(frozen=True)
class Failure:
    """A row that could not be encoded: ``reason`` is one of fastvae.data.images.errors.REASONS."""

    key: str
    reason: str
    detail: str
    variant: int = 0


@dataclass
class Commit:
    """A commit record. ``shard`` is None when no row of the unit could be encoded.

    ``max_pixels`` is the limit under which files were found too large: a later run with a higher one tries them again.
    """

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
    max_pixels: int | None = None

    def belongs_to(self, unit: Unit | None) -> bool:
        """Whether every row of ``unit`` is here or has failed, as far as the record alone can say."""
        if unit is None or self.rows + len(self.failed) != len(unit.rows) or (self.rows > 0) != bool(self.shard):
            return False
        if self.shard not in (None, f"{unit.stem}.safetensors"):
            return False
        return {(failure.key, failure.variant) for failure in self.failed} <= {row.name for row in unit.rows}


def read_commit(path: Path) -> Commit | None:
    """The record, or None if it is not one: records appear whole, so it was damaged and its unit is redone.

    One that the system cannot read, such as a link to itself, is none either; FileNotFoundError where there is nothing.
    """
    try:
        if not_a_file(path):
            return None
        fields = json.loads(path.read_text("utf-8"))
        failed = [Failure(**failure) for failure in fields.pop("failed")]
        commit = Commit(**fields, failed=failed)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not all(is_count(number) for number in (commit.unit, commit.bytes, commit.rows)):
        return None
    # A shard has its record's own name: a record leads to no other file.
    own = commit.shard is None or commit.shard == f"{path.stem}.safetensors"
    texts = all(isinstance(text, str) for failure in failed for text in (failure.key, failure.reason, failure.detail))
    return commit if own and texts and path.stem.startswith(f"{commit.unit:06d}-") else None
