"""The work list of a store: plan files, each written once, that say which row is made where.

A line is a row, {"unit", "row", "bucket", "key", "size", "mtime_ns", "place", "columns", "variant", "height", "width"},
or, with "unit" null, the columns that a file has now.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvae.data.rows import Size, SourceFile, parse_size, size_name
from fastvae.data.store.errors import StoreError
from fastvae.data.store.layout import PLAN, matches, not_a_file
from fastvae.data.store.store_json import is_count
from fastvae.system.atomic_files import write_atomically
from fastvae.system.strict_json import json_bytes


class WorkList:
    """The plan files in ``folder``."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._read: dict[str, PlanFile] = {}  # by name: a plan file is never replaced

    def files(self) -> list[Path]:
        """The plan files, in order."""
        there = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in there if matches(path.name, PLAN)), key=_plan_number)

    def units(self) -> list[Unit]:
        """Every unit, in order; raises StoreError for a plan file that cannot be read."""
        units = {}
        for plan in self._plans():
            units |= {number: Unit(number, plan.buckets[number], tuple(rows)) for number, rows in plan.rows.items()}
        return [units[number] for number in sorted(units)]

    def columns(self) -> dict[str, dict[str, Any]]:
        """The columns of each key, the latest that were given."""
        columns: dict[str, dict[str, Any]] = {}
        for plan in self._plans():
            columns |= plan.columns
        return columns

    def extend(
        self,
        fresh: Sequence[tuple[Size, PlannedRow]],
        rows_per_unit: Callable[[Size], int],
        files: Iterable[SourceFile] = (),
        least: int = 0,
    ) -> list[Unit]:
        """Append units for the ``fresh`` rows, each with its bucket, one bucket a unit; returns them.

        Their numbers follow those that are planned, and are at least ``least``.
        ``files``: the source's; the columns of those that are planned and have others now are noted as well. No plan
        file is ever replaced.
        """
        units, plan = self.units(), self.files()
        first = max(least, units[-1].number + 1 if units else 0)
        added: list[Unit] = []
        for bucket in dict.fromkeys(bucket for bucket, _ in fresh):
            rows, most = [row for size, row in fresh if size == bucket], rows_per_unit(bucket)
            for start in range(0, len(rows), most):
                added.append(Unit(first + len(added), bucket, tuple(rows[start : start + most])))
        known = {**self.columns(), **{row.file.key: _as_json(row.file.columns) for _, row in fresh}}
        entries = [_plan_line(unit, number, row) for unit in added for number, row in enumerate(unit.rows)]
        entries += [_columns_line(f) for f in files if f.key in known and known[f.key] != _as_json(f.columns)]
        if entries:
            number = _plan_number(plan[-1]) + 1 if plan else 0
            lines = [json_bytes(entry) + b"\n" for entry in entries]
            write_atomically(self.folder / f"units-{number:05d}.jsonl", lines, exclusive=True)
        return added

    def _plans(self) -> list[PlanFile]:
        paths = self.files()
        for path in paths:
            if path.name not in self._read:
                self._read[path.name] = read_plan(path)
        return [self._read[path.name] for path in paths]


@dataclass
class PlanFile:
    """What a plan file holds: the rows of units by number, their buckets, and columns that were given later."""

    rows: dict[int, list[PlannedRow]] = field(default_factory=dict)
    buckets: dict[int, Size] = field(default_factory=dict)
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)


def _plan_line(unit: Unit, number: int, row: PlannedRow) -> dict[str, Any]:
    """The line of a plan file for the ``number``-th row of ``unit``."""
    place = {"unit": unit.number, "row": number, "bucket": size_name(unit.bucket), **_source_line(row.file)}
    return {**place, "variant": row.variant, "height": row.original_hw[0], "width": row.original_hw[1]}


def _columns_line(file: SourceFile) -> dict[str, Any]:
    """The line of a plan file for a file whose columns changed while its image did not: it needs no unit."""
    return {"unit": None, **_source_line(file)}


def _source_line(file: SourceFile) -> dict[str, Any]:
    fields: dict[str, Any] = {"key": file.key, "size": file.size, "mtime_ns": file.mtime_ns}
    if file.sha256:
        fields["sha256"] = file.sha256
    return {**fields, "place": file.place, "columns": dict(file.columns)}


def read_plan(path: Path) -> PlanFile:
    """The contents of a plan file; raises StoreError for one that cannot be read."""
    plan = PlanFile()
    if what := not_a_file(path):
        raise StoreError(f"{path} is damaged: it {what}")
    try:
        for line in path.read_text("utf-8").splitlines():
            entry = json.loads(line)
            columns = entry.get("columns", {})
            digest = entry.get("sha256", "")
            file = SourceFile(entry["key"], entry["size"], entry["mtime_ns"], entry.get("place", ""), columns, digest)
            unit = entry["unit"]
            if (
                not isinstance(file.key, str)
                or not isinstance(digest, str)
                or not isinstance(columns, dict)
                or not is_count(file.size)
            ):
                raise ValueError(f"unexpected values in {line[:200]}")
            if unit is None:
                plan.columns[file.key] = columns
                continue
            row = PlannedRow(file, entry["variant"], (entry["height"], entry["width"]))
            bucket = parse_size(entry["bucket"])
            numbers = (unit, row.variant, *row.original_hw)
            if not all(map(is_count, numbers)) or plan.buckets.setdefault(unit, bucket) != bucket:
                raise ValueError(f"unexpected values in {line[:200]}")
            plan.rows.setdefault(unit, []).append(row)
            plan.columns[file.key] = columns
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path} is damaged: {error!r}") from error
    return plan


def _as_json(columns: Any) -> dict[str, Any]:
    return json.loads(json_bytes(dict(columns)))


def _plan_number(path: Path) -> int:
    return int(path.stem.removeprefix("units-"))


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
