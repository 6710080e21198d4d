"""What a store's files hold: the units of its plan, its commit records, and why a folder is no store."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvae.data.sources import SourceFile

# Of these names a store makes files; what has another is the user's.
SHARD = r"\d{6,}-\d+x\d+\.safetensors"
RECORD = r"\d{6,}-\d+x\d+\.json"
PLAN = r"units-\d{5,}\.jsonl"
FORMAT = 1
DERIVED = r"(?:index|failures)\.jsonl"
TOP = rf"store\.json|{DERIVED}"


class StoreError(ValueError):
    """A folder that cannot be used as a store, and why."""


class StoreLocked(StoreError):
    """A store that another process is writing."""


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
        """Whether every file of ``unit`` has a row or a failure here, as far as the record alone can say."""
        if unit is None or self.rows + len(self.failed) != len(unit.files) or (self.rows > 0) != bool(self.shard):
            return False
        return {failure.key for failure in self.failed} <= {file.key for file in unit.files}


def read_facts(path: Path) -> Any:
    """The JSON of ``path``, which has no NaN in it; raises StoreError for anything else."""
    try:
        return json.loads(path.read_text("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is not readable as JSON: {error}") from error


def check_facts(facts: Any, path: Path) -> None:
    """Raises StoreError unless ``facts``, read from ``path``, has what every reader of a store needs."""
    if not isinstance(facts, dict) or facts.get("fvl") != FORMAT:
        raise StoreError(f'{path} must have "fvl": {FORMAT}')
    kinds = {"identity": dict, "identity_digest": str, "bucket": str, "latent_shape": list, "downsample_factor": int}
    kinds |= {"scaling": dict, "metadata": dict, "source": dict, "created_by": str}
    wrong = [name for name, kind in kinds.items() if not isinstance(facts.get(name), kind)]
    if not wrong:
        identity, shape = facts["identity"], facts["latent_shape"]
        parts = {"model": identity.get("model"), "preprocess": identity.get("preprocess")}
        wrong += [f"identity.{name}" for name, part in parts.items() if not isinstance(part, dict)]
        if not wrong:
            wrong += [] if "encoder_weights_sha256" in identity["model"] else ["identity.model.encoder_weights_sha256"]
        numerics = identity.get("numerics")
        given = numerics if isinstance(numerics, dict) else {}
        wrong += [f"identity.numerics.{name}" for name in ("dtype", "posterior", "mean") if name not in given]
        wrong += [] if len(shape) == 3 and all(map(_is_count, shape)) else ["latent_shape"]
        names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "batch_norm")
        wrong += [f"scaling.{name}" for name in names if name not in facts["scaling"]]
        wrong += [] if "vae" in facts["source"] else ["source.vae"]
    if wrong:
        raise StoreError(f"{path} is damaged: it lacks {', '.join(wrong)}")


def plan_number(path: Path) -> int:
    """The number in a plan file's name."""
    return int(path.stem.removeprefix("units-"))


def read_plan(path: Path) -> list[tuple[int, SourceFile]]:
    """(unit, file) of each line of a plan file; raises StoreError for one that cannot be read."""
    entries = []
    try:
        for line in path.read_text("utf-8").splitlines():
            entry = json.loads(line)
            unit, file = entry["unit"], SourceFile(entry["key"], entry["size"], entry["mtime_ns"])
            if not isinstance(file.key, str) or not all(_is_count(n) for n in (unit, file.size)):
                raise ValueError(f"unexpected values in {line[:200]}")
            entries.append((unit, file))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(f"{path} is damaged: {error!r}") from error
    return entries


def read_commit(path: Path) -> Commit | None:
    """The record, or None if it is not one: records appear whole, so it was damaged and its unit is redone."""
    try:
        fields = json.loads(path.read_text("utf-8"))
        failed = [Failure(**failure) for failure in fields.pop("failed")]
        commit = Commit(**fields, failed=failed)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not all(_is_count(number) for number in (commit.unit, commit.bytes, commit.rows)):
        return None
    # A shard has its record's own name: a record leads to no other file.
    own = commit.shard is None or commit.shard == f"{path.stem}.safetensors"
    texts = all(isinstance(text, str) for failure in failed for text in (failure.key, failure.reason, failure.detail))
    return commit if own and texts and path.stem.startswith(f"{commit.unit:06d}-") else None


def is_own(name: str, names: str) -> bool:
    """Whether ``name`` matches the regular expression ``names`` whole."""
    return re.fullmatch(names, name) is not None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
