"""Captions beside images: a.txt and a.caption of a.jpg, and the rows of metadata.jsonl, .csv and .parquet.

These are the layouts of sd-scripts and ai-toolkit, and of the imagefolder of Hugging Face's datasets.
"""

from __future__ import annotations

import csv
import io
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, BinaryIO

from fastvae.data.rows import SourceFile
from fastvae.data.sources.parquet import json_rows
from fastvae.data.sources.source import Listing, caption_text
from fastvae.system.strict_json import json_bytes, json_value
from fastvae.system.threads import ordered_map

CAPTIONS = ("beside", "none")
SUFFIXES = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
NAME_COLUMN = "file_name"
MAX_CAPTION_BYTES = 2**20
READ_THREADS = 16  # a caption is one small read, on a network one request


def add_captions(
    listing: Listing,
    names_in: Callable[[str], Iterable[str]],
    open_file: Callable[[str], AbstractContextManager[BinaryIO]],
) -> None:
    """Add the captions beside the images of ``listing`` to their columns; their files still count as ignored.

    ``names_in``: names in a folder, by its path under the source; ``open_file``: opens a file by its path; both may
    raise OSError. A caption is a column named after its suffix, ``txt`` or ``caption``, without spaces at its ends. A
    file that cannot be used is named in the notes.
    """
    names = {folder: _names(names_in, folder) for folder in _folders(listing.files)}
    problems, rows = Counter[str](), dict[str, dict[str, Any]]()
    for folder, found in names.items():
        for name in sorted(found & {*METADATA}):
            entries = _entries(posixpath.join(folder, name), open_file, problems)
            rows = {**rows, **{key: {**rows.get(key, {}), **columns} for key, columns in entries.items()}}
    beside = [path for file in listing.files for path in _beside(file.key, names)]
    texts = dict(zip(beside, ordered_map(lambda path: _caption(path, open_file), beside, READ_THREADS), strict=True))
    for number, file in enumerate(listing.files):
        columns = {}
        for path in _beside(file.key, names):
            text, problem = texts[path]
            if problem:
                problems[problem] += 1
            else:
                columns[posixpath.splitext(path)[1][1:]] = text
        columns |= rows.get(file.key, {})
        if columns:
            listing.files[number] = replace(file, columns=columns)
    missing = len(rows.keys() - {file.key for file in listing.files})
    if missing:
        problems["are of files that are not among the images"] += missing
    listing.notes += [f"{count} captions {problem}" for problem, count in sorted(problems.items())]


def _folders(files: Iterable[SourceFile]) -> list[str]:
    """Return the folders of the files and all above them, from the top, which is ""."""
    folders = {""}
    for file in files:
        folder = posixpath.dirname(file.key)
        while folder not in folders:
            folders.add(folder)
            folder = posixpath.dirname(folder)
    return sorted(folders)


def _names(names_in: Callable[[str], Iterable[str]], folder: str) -> set[str]:
    try:
        return {name for name in names_in(folder) if name in METADATA or name.endswith(SUFFIXES)}
    except OSError:
        return set()


def _beside(key: str, names: dict[str, set[str]]) -> Iterator[str]:
    """Yield the paths of the captions beside an image."""
    folder, name = posixpath.split(key)
    stem = posixpath.splitext(name)[0]
    yield from (posixpath.join(folder, stem + suffix) for suffix in SUFFIXES if stem + suffix in names[folder])


def _caption(path: str, open_file: Callable[[str], AbstractContextManager[BinaryIO]]) -> tuple[str, str]:
    """Return (text, "") of a caption's file, or ("", why it is left out)."""
    try:
        with open_file(path) as file:
            data = file.read(MAX_CAPTION_BYTES + 1)
    except OSError:
        return "", "cannot be read"
    if len(data) > MAX_CAPTION_BYTES:
        return "", f"are larger than {MAX_CAPTION_BYTES} bytes and left out"
    return caption_text(data).strip(), ""


def _entries(
    path: str, open_file: Callable[[str], AbstractContextManager[BinaryIO]], problems: Counter[str]
) -> dict[str, dict[str, Any]]:
    """Return the columns of each key that a metadata file names."""
    entries: dict[str, dict[str, Any]] = {}
    try:
        with open_file(path) as file:
            for entry in _rows(path, file):
                name = entry.get(NAME_COLUMN) if isinstance(entry, dict) else None
                if isinstance(entry, dict) and isinstance(name, str) and name:
                    key = posixpath.normpath(posixpath.join(posixpath.dirname(path), name.replace("\\", "/")))
                    entries[key] = {column: value for column, value in entry.items() if column != NAME_COLUMN}
                elif entry != {}:
                    problems[f"of {path} have no {NAME_COLUMN} or are no JSON, and are left out"] += 1
    except (OSError, csv.Error):
        problems[f"of {path} cannot be read"] += 1
    except ValueError as error:  # of Parquet: no pyarrow, or a damaged file
        problems[f"of {path} cannot be read: {error}"] += 1
    return entries


def _rows(path: str, file: BinaryIO) -> Iterable[Any]:
    """Return the rows of a metadata file, as dicts if they are any."""
    if path.endswith(".csv"):
        return _csv_lines(file)
    return json_rows(file, path) if path.endswith(".parquet") else map(_json_line, file)


def _json_line(line: bytes) -> Any:
    """Return the value of a line, {} for an empty one, None for what is no JSON."""
    try:
        value = json_value(line.removeprefix(b"\xef\xbb\xbf")) if line.strip() else {}
        json_bytes(value)  # raises for a number such as 1e999
        return value
    except (ValueError, RecursionError):
        return None


def _csv_lines(file: BinaryIO) -> Iterator[dict[str, Any]]:
    text = io.StringIO(caption_text(file.read()), newline="")
    for row in csv.DictReader(text):
        yield {name: value for name, value in row.items() if isinstance(name, str)}
