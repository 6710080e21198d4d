"""Plan of a store: files, each written once, that assign every row to a unit.

A line is a row, {"unit", "row", "bucket", "key", "size", "mtime_ns", "place", "columns", "variant", "height", "width"},
or, with "unit" null, new columns of a file. A row's "origin" is the folder or archive of its image; plans of version
0.1.0 have none. A line with "pruned" true ends its file's rows in all units before it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fastvae.data.rows import Origin, Size, SourceFile, parse_size, size_name
from fastvae.data.store.errors import StoreError
from fastvae.data.store.layout import PLAN, matches, not_a_file
from fastvae.data.store.store_json import is_count
from fastvae.system.atomic_files import write_atomically
from fastvae.system.strict_json import json_bytes


class WorkList:
    """Plan files in ``folder``."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._read: dict[str, PlanFile] = {}  # cached by name, because a plan file is never replaced

    def files(self) -> list[Path]:
        """Return the plan files, in order."""
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in paths if matches(path.name, PLAN)), key=_plan_number)

    def units(self) -> list[Unit]:
        """Return every unit, in order; raises StoreError for a plan file that cannot be read."""
        units = {}
        for plan in self._plans():
            units |= {number: Unit(number, plan.buckets[number], tuple(rows)) for number, rows in plan.rows.items()}
        return [units[number] for number in sorted(units)]

    def columns(self) -> dict[str, dict[str, Any]]:
        """Return the latest columns of each key."""
        columns: dict[str, dict[str, Any]] = {}
        for plan in self._plans():
            columns = {key: values for key, values in columns.items() if key not in plan.pruned} | plan.columns
        return columns

    def latest(self) -> dict[tuple[str, int], int]:
        """Return the number of the latest unit of each row, by its name, without the rows that were pruned."""
        latest: dict[tuple[str, int], int] = {}
        for plan in self._plans():
            if plan.pruned:
                latest = {name: unit for name, unit in latest.items() if name[0] not in plan.pruned}
            latest |= {row.name: number for number in sorted(plan.rows) for row in plan.rows[number]}
        return latest

    def extend(
        self,
        fresh: Sequence[tuple[Size, PlannedRow]],
        rows_per_unit: Callable[[Size], int],
        files: Iterable[SourceFile] = (),
        least: int = 0,
        pruned: Iterable[SourceFile] = (),
    ) -> list[Unit]:
        """Append units for the ``fresh`` rows, which come with their buckets, one bucket a unit; return the units.

        Their numbers follow the planned ones, and are at least ``least``. ``files``: files of the source; changed
        columns of planned ones are recorded as well. ``pruned``: files whose rows are served no more. No plan file is
        ever replaced.
        """
        units = self.units()
        first = max(least, units[-1].number + 1 if units else 0)
        added: list[Unit] = []
        for bucket in dict.fromkeys(bucket for bucket, _ in fresh):
            rows, most = [row for size, row in fresh if size == bucket], rows_per_unit(bucket)
            for start in range(0, len(rows), most):
                added.append(Unit(first + len(added), bucket, tuple(rows[start : start + most])))
        known = {**self.columns(), **{row.file.key: _as_json(row.file.columns) for _, row in fresh}}
        entries = [_plan_line(unit, number, row) for unit in added for number, row in enumerate(unit.rows)]
        entries += [_columns_line(f) for f in files if f.key in known and known[f.key] != _as_json(f.columns)]
        entries += [{**_columns_line(file), "columns": {}, "pruned": True} for file in pruned]
        if entries:
            self._append(entries)
        return added

    def split(self, unit: Unit, done: Collection[tuple[str, int]], least: int = 0) -> tuple[Unit, Unit] | None:
        """Replace ``unit`` by one of its rows with names in ``done``, under its number, and a new one of the rest.

        Both leave out rows that were planned again since or pruned; nothing changes if one is then empty: None. One
        plan file replaces the old unit and adds the new one, so that no reader finds a row twice or not at all.
        """
        latest, columns = self.latest(), self.columns()
        own = [row for row in unit.rows if latest.get(row.name) == unit.number]
        own = [replace(row, file=replace(row.file, columns=columns[row.file.key])) for row in own]
        part = replace(unit, rows=tuple(row for row in own if row.name in done))
        rest = Unit(
            max(least, self.units()[-1].number + 1), unit.bucket, tuple(row for row in own if row.name not in done)
        )
        if not (part.rows and rest.rows):
            return None
        self._append([_plan_line(half, number, row) for half in (part, rest) for number, row in enumerate(half.rows)])
        return part, rest

    def _append(self, entries: list[dict[str, Any]]) -> None:
        """Write ``entries`` to the next plan file."""
        plan = self.files()
        number = _plan_number(plan[-1]) + 1 if plan else 0
        lines = [json_bytes(entry) + b"\n" for entry in entries]
        write_atomically(self.folder / f"units-{number:05d}.jsonl", lines, exclusive=True)

    def _plans(self) -> list[PlanFile]:
        paths = self.files()
        for path in paths:
            if path.name not in self._read:
                self._read[path.name] = read_plan(path)
        return [self._read[path.name] for path in paths]


@dataclass
class PlanFile:
    """Contents of a plan file: rows and bucket of each unit by its number, and the latest columns of each key.

    ``pruned``: keys whose rows in earlier plan files are served no more.
    """

    rows: dict[int, list[PlannedRow]] = field(default_factory=dict)
    buckets: dict[int, Size] = field(default_factory=dict)
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    pruned: set[str] = field(default_factory=set)


def _plan_line(unit: Unit, number: int, row: PlannedRow) -> dict[str, Any]:
    """Return the line of a plan file for the ``number``-th row of ``unit``."""
    place = {"unit": unit.number, "row": number, "bucket": size_name(unit.bucket), **_source_line(row.file)}
    return {**place, "variant": row.variant, "height": row.original_hw[0], "width": row.original_hw[1]}


def _columns_line(file: SourceFile) -> dict[str, Any]:
    """Return the line of a plan file for a file of which only the columns changed, so that it needs no unit."""
    return {"unit": None, **_source_line(file)}


def _source_line(file: SourceFile) -> dict[str, Any]:
    fields: dict[str, Any] = {"key": file.key, "size": file.size, "mtime_ns": file.mtime_ns}
    if file.sha256:
        fields["sha256"] = file.sha256
    if file.origin is not None:
        fields["origin"] = {name: value for name, value in asdict(file.origin).items() if value}
    return {**fields, "place": file.place, "columns": dict(file.columns)}


def read_plan(path: Path) -> PlanFile:
    """Read a plan file; raises StoreError for a damaged one."""
    plan, origins = PlanFile(), dict[tuple[Any, ...], Origin]()
    if what := not_a_file(path):
        raise StoreError(f"{path} is damaged: it {what}")
    try:
        for line in path.read_text("utf-8").splitlines():
            entry = json.loads(line)
            columns = entry.get("columns", {})
            digest = entry.get("sha256", "")
            place, origin = entry.get("place", ""), _origin_of(entry.get("origin"), origins)
            file = SourceFile(entry["key"], entry["size"], entry["mtime_ns"], place, columns, digest, origin)
            unit = entry["unit"]
            texts = (file.key, file.place, digest)
            if (
                not all(isinstance(text, str) for text in texts)
                or not isinstance(columns, dict)
                or not is_count(file.size)
            ):
                raise ValueError(f"unexpected values in {line[:200]}")
            if unit is None and entry.get("pruned") is True:
                plan.pruned.add(file.key)
                continue
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


def _origin_of(entry: Any, known: dict[tuple[Any, ...], Origin]) -> Origin | None:
    """Return the origin of a row, one object for each that a plan file names; raises ValueError for a wrong one."""
    if entry is None:
        return None
    fields = entry["name"], entry["path"], entry.get("content", "")
    if fields not in known:
        if not all(isinstance(text, str) for text in fields):
            raise ValueError(f"unexpected origin {entry!r:.200}")
        known[fields] = Origin(*fields)
    return known[fields]


def _as_json(columns: Any) -> dict[str, Any]:
    return json.loads(json_bytes(dict(columns)))


def _plan_number(path: Path) -> int:
    return int(path.stem.removeprefix("units-"))


@dataclass(frozen=True)
class PlannedRow:
    """A row to encode: file of the image, variant, and upright (height, width) by its header, 0 if unreadable."""

    file: SourceFile
    variant: int = 0
    original_hw: Size = (0, 0)

    @property
    def name(self) -> tuple[str, int]:
        """Key and variant, which identify the row."""
        return self.file.key, self.variant


@dataclass(frozen=True)
class Unit:
    """Rows of one shard: number of the unit, bucket (height, width) in pixels, and rows, in order."""

    number: int
    bucket: Size
    rows: tuple[PlannedRow, ...]

    @property
    def stem(self) -> str:
        """Name of its shard and commit record, without their suffixes."""
        return f"{self.number:06d}-{size_name(self.bucket)}"

    @property
    def lease(self) -> str:
        """Name of its lease."""
        return f"{self.number:06d}"
