"""Images in a column of Parquet files, as bytes or as Hugging Face's {"bytes", "path"}.

The listing reads the other columns. The image column is read one row group at a time; the last two groups are cached.
"""

from __future__ import annotations

import bisect
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any

from fastvae.data.images.errors import MACHINE, ImageError, check_bytes, unreadable
from fastvae.data.images.read import DEFAULT_MAX_PIXELS
from fastvae.data.rows import SourceFile
from fastvae.data.sources.source import Listing, key_of
from fastvae.data.sources.storage import LocalStorage, Storage, check_scheme, read_all

ROW_PLACE = re.compile(r"(.*)#(\d+)", re.DOTALL | re.ASCII)
CACHED_GROUPS = 2


class ParquetSource:
    """Images in rows of ``files``, places in ``storage``; a row's key is its ``key_column``, text or an integer."""

    def __init__(self, storage: Storage, files: Sequence[str], name: str, image_column: str, key_column: str):
        try:
            import_module("pyarrow.parquet")
        except ImportError as error:
            raise ValueError("Parquet needs pyarrow: pip install 'fastvae[data]'") from error
        self.name = name
        self._storage, self._files = storage, list(files)
        self._image, self._key = image_column, key_column
        self._groups = _Groups(storage, image_column)

    def listing(self, exclude: Any = None) -> Listing:
        """See Source. Columns of types that JSON does not have are left out and named in ``notes``."""
        listing, left_out = Listing(), set[str]()
        for place in self._files:
            with _reading(self._storage, place) as (table, (size, mtime_ns)):
                taken = self._columns(table.schema_arrow, place, left_out)
                row = 0
                for group in range(table.num_row_groups):
                    for values in table.read_row_group(group, columns=[self._key, *taken]).to_pylist():
                        key = key_of(values[self._key], f"{place} row {row}", self._key)
                        columns = {column: _without_non_finite(values[column]) for column in taken}
                        listing.files.append(SourceFile(key, size, mtime_ns, f"{place}#{row}", columns))
                        row += 1
        if not listing.files:
            raise ValueError(f"no rows in {self.name}")
        if left_out:
            listing.notes.append(f"columns that are no JSON values are left out: {', '.join(sorted(left_out))}")
        listing.deduplicate_keys()
        return listing

    def read(self, file: SourceFile, max_pixels: int = DEFAULT_MAX_PIXELS) -> Path | bytes:
        """See Source."""
        found = ROW_PLACE.fullmatch(file.place)
        if found is None:
            raise ImageError("unreadable", f"{file.key} has no place in a table: {file.place!r}")
        place, row = found[1], int(found[2])
        with unreadable(file.key):
            if self._storage.status(place) != (file.size, file.mtime_ns):  # the row may now be another image's
                raise ImageError("unreadable", f"{file.key}: {place} was changed since it was listed")
            try:
                value = self._groups.row(place, row)
            except ValueError as error:
                raise ImageError("decode_error", f"{file.key}: {error}") from error
        if isinstance(value, dict):
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if value is None:
            raise ImageError("empty", f"{file.key} has neither bytes nor a path in {place} row {row}")
        if isinstance(value, str):
            return _read_named_file(self._storage, value, file.key, max_pixels)
        check_bytes(len(value), max_pixels, file.key)
        return value

    def _columns(self, schema: Any, place: str, left_out: set[str]) -> list[str]:
        """Return the names of the other columns that JSON can hold; check the image and the key column.

        Raises ValueError if either is missing or occurs twice, or if the image column holds no images.
        """
        for argument, column in (("image_column", self._image), ("key_column", self._key)):
            if schema.names.count(column) != 1:
                raise ValueError(f"{argument} must be a column of {place}, got {column!r}, it has {schema.names}")
        kind = schema.field(self._image).type
        parts = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)} if _is(kind, "struct") else {}
        if not _is_bytes(parts.get("bytes", kind)):
            raise ValueError(
                f'image_column must hold bytes or {{"bytes", "path"}}, {self._image!r} of {place} is {kind}'
            )
        rest = [field for field in schema if field.name not in (self._image, self._key)]
        left_out |= {field.name for field in rest if not _is_json(field.type)}
        return [field.name for field in rest if _is_json(field.type)]


class _Groups:
    """Rows of one column, with a cache of row groups; threads that ask for the same group read it once."""

    def __init__(self, storage: Storage, column: str):
        self._storage, self._column = storage, column
        self._lock = threading.Lock()
        self._ends: dict[str, list[int]] = {}
        self._cache: OrderedDict[tuple[str, int], Any] = OrderedDict()

    def row(self, place: str, row: int) -> Any:
        """Return the value of ``row``; raises OSError, and ValueError for a missing row or a damaged file."""
        with self._lock:
            if place not in self._ends:
                with _reading(self._storage, place) as (table, _):
                    rows = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
                self._ends[place] = list(accumulate(rows))
            ends = self._ends[place]
            group = bisect.bisect_right(ends, row)
            if group == len(ends):
                raise ValueError(f"{place} has {ends[-1] if ends else 0} rows, none is {row}")
            values = self._group(place, group)
            return values[row - (ends[group - 1] if group else 0)].as_py()

    def _group(self, place: str, group: int) -> Any:
        if (place, group) not in self._cache:
            while len(self._cache) >= CACHED_GROUPS:
                self._cache.popitem(last=False)
            with _reading(self._storage, place) as (table, _):
                self._cache[place, group] = table.read_row_group(group, columns=[self._column]).column(0)
        self._cache.move_to_end((place, group))
        return self._cache[place, group]


@contextmanager
def _reading(storage: Storage, place: str) -> Iterator[tuple[Any, tuple[int, int]]]:
    """Yield (the open Parquet file, its status); raises ValueError, naming the file, if it is no valid Parquet."""
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    try:
        status = storage.status(place)
        with storage.open(place) as file:
            yield parquet.ParquetFile(file), status
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno in MACHINE:
            raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{place} is not readable as Parquet: {reason}") from error


def _read_named_file(storage: Storage, path: str, key: str, max_pixels: int) -> Path | bytes:
    """Return the file that a row names by a path, which may not be a URL."""
    if "\0" in path:
        raise ImageError("unreadable", f"{key} names a path with a NUL")
    try:
        check_scheme(path, (), key)
    except ValueError as error:
        raise ImageError("unreadable", str(error)) from error
    if isinstance(storage, LocalStorage):
        with unreadable(key):
            storage.status(path)
        return Path(storage.path(path))
    with unreadable(key):
        check_bytes(storage.status(path)[0], max_pixels, key)
        return read_all(storage, path)


def _is(kind: Any, *names: str) -> bool:
    types = import_module("pyarrow").types
    return any(getattr(types, f"is_{name}")(kind) for name in names)


def _is_bytes(kind: Any) -> bool:
    return _is(kind, "binary", "large_binary", "null")  # null: no row has bytes, each has a path


def _is_json(kind: Any) -> bool:
    if _is(kind, "list", "large_list", "fixed_size_list", "dictionary"):
        return _is_json(kind.value_type)
    if _is(kind, "struct"):
        return all(_is_json(kind.field(index).type) for index in range(kind.num_fields))
    return _is(kind, "boolean", "integer", "floating", "string", "large_string", "null")


def _without_non_finite(value: Any) -> Any:
    """Return ``value`` with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_without_non_finite(item) for item in value]
    return {name: _without_non_finite(item) for name, item in value.items()} if isinstance(value, dict) else value
