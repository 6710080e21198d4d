"""Commit records: one JSON file a unit, written after its shard."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from fastvae.data.store.layout import not_a_file
from fastvae.data.store.plan import Unit
from fastvae.data.store.store_json import is_count


@dataclass(frozen=True)
class Failure:
    """A row that could not be encoded; ``reason`` is one of fastvae.data.images.errors.REASONS."""

    key: str
    reason: str
    detail: str
    variant: int = 0


@dataclass
class Commit:
    """A commit record. ``shard`` is None if no row of the unit could be encoded.

    ``max_pixels``: the limit of that run; a later run with a higher limit tries the files that were too large again.
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
        """Return True if every row of ``unit`` is committed or failed, by the counts and names of the record."""
        if unit is None or self.rows + len(self.failed) != len(unit.rows) or (self.rows > 0) != bool(self.shard):
            return False
        if self.shard not in (None, f"{unit.stem}.safetensors"):
            return False
        return {(failure.key, failure.variant) for failure in self.failed} <= {row.name for row in unit.rows}


def read_commit(path: Path) -> Commit | None:
    """Read the record at ``path``; return None for a damaged one, whose unit is then encoded again.

    Records are written atomically, so anything else is damage, a file that the system cannot read too, such as a link
    to itself. Raises FileNotFoundError if there is no file.
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
    # A shard has the name of its record: a record can name no other file.
    own = commit.shard is None or commit.shard == f"{path.stem}.safetensors"
    texts = all(isinstance(text, str) for failure in failed for text in (failure.key, failure.reason, failure.detail))
    return commit if own and texts and path.stem.startswith(f"{commit.unit:06d}-") else None
