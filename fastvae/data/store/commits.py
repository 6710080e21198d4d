"""What a store's files hold: the units of its plan, its commit records, and why a folder is no store."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvae.data.images.buckets import Size, parse_size, size_name
from fastvae.data.sources.source import SourceFile
from fastvae.system.strict_json import json_value

# Of these names a store makes files; what has another is the user's.
SHARD = r"\d{6,}-\d+x\d+\.safetensors"
RECORD = r"\d{6,}-\d+x\d+\.json"
PLAN = r"units-\d{5,}\.jsonl"
FORMAT = 1
MOST = 2**20  # far above any model's channels or downsampling
STORE = "store.json"
DERIVED_NAMES = ("index.jsonl", "failures.jsonl")
DERIVED = "|".join(map(re.escape, DERIVED_NAMES))
TOP = rf"{re.escape(STORE)}|{DERIVED}"
# Metadata of a shard alone: store.json has none of these names.
OWN = ("identity", "bucket", "latent_shape")


class StoreError(ValueError):
    """A folder that cannot be used as a store, and why."""


class StoreLocked(StoreError):
    """A folder whose lock another process has held for too long."""


class IdentityMismatch(StoreError):
    """A store made by another model, numerics or preprocessing; ``differences`` has a line for each field."""

    def __init__(self, path: Path, lines: list[str]):
        self.differences = lines
        listed = "\n".join(f"  {line}" for line in lines)
        advice = "nothing was changed; encode into a new folder, or with the store's settings"
        super().__init__(f"{path} holds latents of another identity ({advice}):\n{listed}")


@dataclass(frozen=True)
class Failure:
    """A row that could not be encoded: ``reason`` is one of fastvae.data.images.errors.REASONS."""

    key: str
    reason: str
    detail: str
    variant: int = 0


@dataclass(frozen=True)
class PlannedRow:
    """One row to make: an image's file, its variant, and its upright (height, width) by the header, 0 if unreadable."""

    file: SourceFile
    variant: int = 0
    original_hw: Size = (0, 0)

    @property
    def name(self) -> tuple[str, int]:
        """What tells a row from all others: the key and the variant."""
        return self.file.key, self.variant


@dataclass(frozen=True)
class Unit:
    """The work of one shard: its number, its bucket (height, width) in pixels, and its rows, in order."""

    number: int
    bucket: Size
    rows: tuple[PlannedRow, ...]

    @property
    def stem(self) -> str:
        """The name of its shard and commit record, without their suffixes."""
        return f"{self.number:06d}-{size_name(self.bucket)}"

    @property
    def lease(self) -> str:
        """The name of its lease."""
        return f"{self.number:06d}"


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


def read_facts(path: Path) -> Any:
    """The JSON of ``path``, which has no NaN in it; raises StoreError for anything else."""
    if what := strange(path):
        raise StoreError(f"{path} is damaged: it {what}")
    try:
        return json_value(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is not readable as JSON: {error}") from error


def check_facts(facts: Any, path: Path) -> None:
    """Raises StoreError unless ``facts``, read from ``path``, has what every reader of a store needs."""
    if not isinstance(facts, dict) or facts.get("fvl") != FORMAT:
        raise StoreError(f'{path} must have "fvl": {FORMAT}')
    kinds = {"identity": dict, "identity_digest": str, "buckets": list, "latent_channels": int}
    kinds |= {"downsample_factor": int}
    kinds |= {"scaling": dict, "metadata": dict, "source": dict, "created_by": str}
    wrong = [name for name in kinds if name not in facts]
    if not wrong and (others := [name for name, kind in kinds.items() if not isinstance(facts[name], kind)]):
        raise StoreError(f"{path} is damaged: {', '.join(others)} cannot be what it says")
    if not wrong:
        identity = facts["identity"]
        parts = {"model": identity.get("model"), "preprocess": identity.get("preprocess")}
        wrong += [f"identity.{name}" for name, part in parts.items() if not isinstance(part, dict)]
        if not wrong:
            wrong += [] if "encoder_weights_sha256" in identity["model"] else ["identity.model.encoder_weights_sha256"]
        numerics = identity.get("numerics")
        given = numerics if isinstance(numerics, dict) else {}
        wrong += [f"identity.numerics.{name}" for name in ("dtype", "posterior", "mean") if name not in given]
        names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "batch_norm")
        wrong += [f"scaling.{name}" for name in names if name not in facts["scaling"]]
        wrong += [] if "vae" in facts["source"] else ["source.vae"]
    if wrong:
        raise StoreError(f"{path} is damaged: it lacks {', '.join(wrong)}")
    if wrong := _wrong_values(facts):
        raise StoreError(f"{path} is damaged: {', '.join(wrong)} cannot be what it says")


def keeps_alpha(facts: Mapping[str, Any]) -> bool:
    """Whether the rows of a store with these ``facts`` hold how opaque their images are, beside the latents."""
    return facts["identity"]["preprocess"].get("alpha") == "mask"


def _wrong_values(facts: dict[str, Any]) -> list[str]:
    """The names of the facts that no store has: what readers compute with, so that none of them fails on it."""
    scaling, numerics = facts["scaling"], facts["identity"]["numerics"]
    channels = facts["latent_channels"]
    right = {
        name: is_count(facts[name]) and 0 < facts[name] <= MOST for name in ("latent_channels", "downsample_factor")
    }
    right |= {f"identity.numerics.{name}": isinstance(numerics[name], str) for name in ("dtype", "posterior", "mean")}
    factor = scaling["scaling_factor"]  # a model that normalises patches has none
    right["scaling.scaling_factor"] = _is_number(factor) or (factor is None and scaling["batch_norm"] is True)
    right["scaling.shift_factor"] = scaling["shift_factor"] is None or _is_number(scaling["shift_factor"])
    for name in ("latents_mean", "latents_std"):
        given = scaling[name]
        right[f"scaling.{name}"] = given is None or (
            isinstance(given, list) and len(given) == channels and all(map(_is_number, given))
        )
    deviations = scaling["latents_std"] if isinstance(scaling["latents_std"], list) else []
    right["scaling.latents_std"] &= 0 not in deviations
    right["scaling.batch_norm"] = isinstance(scaling["batch_norm"], bool)
    right["buckets"] = all(isinstance(bucket, str) for bucket in facts["buckets"])
    right["metadata"] = facts["metadata"].keys().isdisjoint(OWN) and all(
        isinstance(text, str) for text in facts["metadata"].values()
    )
    right["source.vae"] = isinstance(facts["source"]["vae"], str)
    return [name for name, is_right in right.items() if not is_right]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def read_commit(path: Path) -> Commit | None:
    """The record, or None if it is not one: records appear whole, so it was damaged and its unit is redone.

    One that the system cannot read, such as a link to itself, is none either; FileNotFoundError where there is nothing.
    """
    try:
        if strange(path):
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


def strange(path: Path) -> str | None:
    """What lies at ``path`` in the place of a file, in words; None for a file. It is not opened: a pipe may never end.

    Raises OSError, FileNotFoundError where there is nothing.
    """
    kind = kind_of(path.stat().st_mode)
    return None if kind == "a file" else f"is {kind} and no file"


def kind_of(mode: int) -> str:
    """What has the ``mode`` that the system gives, in words."""
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link"}
    kinds |= {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def bucket_of(shard: str) -> Size:
    """Height and width in pixels, by a shard's name."""
    return parse_size(shard.removesuffix(".safetensors").rsplit("-", 1)[-1])


def is_own(name: str, names: str) -> bool:
    """Whether ``name`` matches the regular expression ``names`` whole."""
    return re.fullmatch(names, name) is not None


def is_count(value: Any) -> bool:
    """Whether ``value`` is a whole number that is not negative."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
