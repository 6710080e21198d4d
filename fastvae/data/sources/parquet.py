"""Images in a column of Parquet files, as bytes or as Hugging Face's {"bytes", "path"}.

The listing reads the other columns. The image column is read one row group at a time, and the last two
groups are cached; a group above LARGE_GROUP is read in batches, because one array of Arrow holds at most 2 GiB.
"""

from __future__ import annotations

import bisect
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from fastvae.data.images.errors import MACHINE, ImageError, check_bytes, unreadable
from fastvae.data.images.read import DEFAULT_MAX_PIXELS
from fastvae.data.rows import Origin, SourceFile
from fastvae.data.sources.source import DEFAULT_KEY, Listing, content_digest, key_of, origin_at
from fastvae.data.sources.storage import LocalStorage, Storage, check_scheme, read_all

ROW_PLACE = re.compile(r"(.*)#(\d+)", re.DOTALL | re.ASCII)
CACHED_GROUPS = 2
CACHED_BATCHES = 4
LARGE_GROUP = 2**28  # bytes of the image column, unpacked
BATCH_BYTES = 2**26
MAX_BATCH_ROWS = 1024


class ParquetSource:
    """Images in rows of ``files``, places in ``storage``; a row's key is its ``key_column``, text or an integer.

    ``key_column`` None: "key"; in a file without that column the key is the image's path, else FILE#ROW.
    """

    def __init__(self, storage: Storage, files: Sequence[str], name: str, image_column: str, key_column: str | None):
        _check_pyarrow()
        self.name = name
        self._storage, self._files = storage, list(files)
        self._image, self._key = image_column, key_column
        self._groups = _Groups(storage, image_column)

    def listing(self, exclude: Any = None) -> Listing:
        """See Source. Columns of types that JSON does not have are left out and named in ``notes``."""
        listing, left_out = Listing(), set[str]()
        for place in self._files:
            with _reading(self._storage, place) as (table, (size, mtime_ns)):
                origin = self._origin(place, size)
                key_column, taken = self._columns(table.schema_arrow, place, left_out)
                read = [*dict.fromkeys([*filter(None, [key_column]), *taken])]
                for row, values in enumerate(_rows_of(table, read)):
                    key = self._key_of(values, key_column, place, row)
                    columns = {column: _without_non_finite(values[column]) for column in taken}
                    listing.files.append(SourceFile(key, size, mtime_ns, f"{place}#{row}", columns, origin=origin))
        if not listing.files:
            raise ValueError(f"src must hold rows, {self.name} has none")
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

    def _origin(self, place: str, size: int) -> Origin:
        with self._storage.open(place) as file:
            return origin_at(self._storage.absolute(place), content_digest(file, place, size))

    def _columns(self, schema: Any, place: str, left_out: set[str]) -> tuple[str | None, list[str]]:
        """Return the key column and the names of the other columns that JSON can hold; check the image column.

        The first is the path in the image column for a file without keys, None if there is none either.
        Raises ValueError if a column is missing or occurs twice, or if the image column holds no images.
        """
        given = self._key or (DEFAULT_KEY if DEFAULT_KEY in schema.names else None)
        for argument, column in (("image_column", self._image), ("key_column", given)):
            if column is not None and schema.names.count(column) != 1:
                raise ValueError(f"{argument} must be a column of {place}, got {column!r}, it has {schema.names}")
        kind = schema.field(self._image).type
        parts = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)} if _is(kind, "struct") else {}
        if not _is_bytes(parts.get("bytes", kind)):
            raise ValueError(
                f'image_column must hold bytes or {{"bytes", "path"}}, {self._image!r} of {place} is {kind}'
            )
        rest = [field for field in schema if field.name not in (self._image, given)]
        left_out |= {field.name for field in rest if not _is_json(field.type)}
        path = f"{self._image}.path" if _is_text(parts.get("path")) else None
        return given or path, [field.name for field in rest if _is_json(field.type)]

    def _key_of(self, values: dict[str, Any], column: str | None, place: str, row: int) -> str:
        if column in values:
            return key_of(values[column], f"{place} row {row}", str(column))
        path = (values.get(self._image) or {}).get("path")
        # The file's name alone: what is above it changes with the other files of the source.
        return key_of(path or f"{PurePosixPath(place).name}#{row}", f"{place} row {row}", f"{self._image}.path")


class _Groups:
    """Rows of one column, with a cache of row groups; threads that ask for the same group read it once."""

    def __init__(self, storage: Storage, column: str):
        self._storage, self._column = storage, column
        self._lock = threading.Lock()
        self._ends: dict[str, list[int]] = {}
        self._cache: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._large: dict[tuple[str, int], _LargeGroup] = {}

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
            return self._value(place, group, row - (ends[group - 1] if group else 0))

    def _value(self, place: str, group: int, row: int) -> Any:
        name = place, group
        if name in self._large:
            return self._large[name].row(row)
        if name not in self._cache:
            with _reading(self._storage, place) as (table, _):
                rows, size = table.metadata.row_group(group).num_rows, _column_bytes(table, group, self._column)
                if size <= LARGE_GROUP:
                    while len(self._cache) >= CACHED_GROUPS:
                        self._cache.popitem(last=False)
                    # Values that repeat can unpack to more than LARGE_GROUP, and to more than Arrow joins to one array.
                    with suppress(NotImplementedError):
                        self._cache[name] = table.read_row_group(group, columns=[self._column]).column(0)
            if name not in self._cache:
                batch = min(max(1, BATCH_BYTES * rows // max(1, size)), MAX_BATCH_ROWS)
                self._large = {name: _LargeGroup(lambda: _batches(self._storage, place, group, self._column, batch))}
                return self._large[name].row(row)
        self._cache.move_to_end(name)
        return self._cache[name][row].as_py()


class _LargeGroup:
    """Rows of a row group that is too large for one array: read in order, with the last batches cached.

    A row before the cached ones is read from the group's start again.
    """

    def __init__(self, batches: Callable[[], Iterator[Any]]):
        self._open = batches
        self._restart()

    def row(self, row: int) -> Any:
        """Return the value of ``row`` of the group."""
        if row < self._end and not any(start <= row for start in self._cache):
            self._restart()
        while row >= self._end:
            values = next(self._batches).column(0)
            while len(self._cache) >= CACHED_BATCHES:
                del self._cache[min(self._cache)]
            self._cache[self._end] = values
            self._end += len(values)
        start = max(start for start in self._cache if start <= row)
        return self._cache[start][row - start].as_py()

    def _restart(self) -> None:
        self._batches, self._end, self._cache = self._open(), 0, dict[int, Any]()


def json_rows(file: BinaryIO, name: str) -> Iterator[dict[str, Any]]:
    """Yield the columns of every row of a Parquet file that JSON can hold; raises ValueError for what is no Parquet."""
    _check_pyarrow()
    with _parquet_errors(name):
        table = import_module("pyarrow.parquet").ParquetFile(file)
        for values in _rows_of(table, [field.name for field in table.schema_arrow if _is_json(field.type)]):
            yield {column: _without_non_finite(value) for column, value in values.items()}


def _check_pyarrow() -> None:
    try:
        import_module("pyarrow.parquet")
    except ImportError as error:
        raise ValueError("Parquet needs pyarrow: pip install pyarrow") from error


def _rows_of(table: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield ``columns`` of every row of a file."""
    for group in range(table.num_row_groups):
        if not columns:
            yield from ({} for _ in range(table.metadata.row_group(group).num_rows))
            continue
        try:
            batches = [table.read_row_group(group, columns=columns)]
        except NotImplementedError:  # lists or structs of more than 2 GiB
            batches = table.iter_batches(MAX_BATCH_ROWS, row_groups=[group], columns=columns)
        for batch in batches:
            yield from batch.to_pylist()


def _batches(storage: Storage, place: str, group: int, column: str, rows: int) -> Iterator[Any]:
    """Yield the batches of one column of a row group; the file is closed with the generator."""
    with _reading(storage, place) as (table, _):
        yield from table.iter_batches(rows, row_groups=[group], columns=[column])


def _column_bytes(table: Any, group: int, column: str) -> int:
    """Return the unpacked size of a column in a row group by the file's metadata; repeated values are counted once."""
    found = table.metadata.row_group(group)
    parts = [found.column(number) for number in range(found.num_columns)]
    return sum(part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] == column)


@contextmanager
def _reading(storage: Storage, place: str) -> Iterator[tuple[Any, tuple[int, int]]]:
    """Yield (the open Parquet file, its status); raises ValueError, naming the file, if it is no valid Parquet."""
    with _parquet_errors(place):
        status = storage.status(place)
        with storage.open(place) as file:
            yield import_module("pyarrow.parquet").ParquetFile(file), status


@contextmanager
def _parquet_errors(place: str) -> Iterator[None]:
    """Turn the errors of Arrow and of the file system into ValueError, unless the machine is the cause."""
    try:
        yield
    except (import_module("pyarrow").ArrowException, OSError, UnicodeDecodeError) as error:
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
    return any(getattr(types, f"is_{name}", _never)(kind) for name in names)  # pyarrow 16 has not all of them


def _values(kind: Any) -> Any:
    """Return the type of the values of a dictionary-encoded column."""
    return kind.value_type if _is(kind, "dictionary") else kind


def _never(kind: Any) -> bool:
    return False


def _is_bytes(kind: Any) -> bool:
    return _is(_values(kind), "binary", "large_binary", "binary_view", "null")  # null: each row has a path


def _is_text(kind: Any) -> bool:
    return kind is not None and _is(_values(kind), "string", "large_string", "string_view")


def _is_json(kind: Any) -> bool:
    if _is(kind, "list", "large_list", "list_view", "large_list_view", "fixed_size_list", "dictionary"):
        return _is_json(kind.value_type)
    if _is(kind, "struct"):
        return all(_is_json(kind.field(index).type) for index in range(kind.num_fields))
    return _is(kind, "boolean", "integer", "floating", "string", "large_string", "string_view", "null")


def _without_non_finite(value: Any) -> Any:
    """Return ``value`` with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_without_non_finite(item) for item in value]
    return {name: _without_non_finite(item) for name, item in value.items()} if isinstance(value, dict) else value
