"""A source against the plan of a store: keys of other origins, edited and deleted images."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count

from fastvae.data.rows import Origin, SourceFile
from fastvae.data.sources.source import Listing, renamed

SUFFIXED = re.compile(r"(.*)~\d+", re.DOTALL | re.ASCII)


@dataclass(frozen=True)
class SourceChanges:
    """Served rows that a run changes: keys of edited images (``replaced``), and planned files that the source lacks.

    ``replaced_rows`` and ``gone_rows`` count the rows, variants included.
    """

    replaced: list[str] = field(default_factory=list)
    replaced_rows: int = 0
    gone: list[SourceFile] = field(default_factory=list)
    gone_rows: int = 0


def find_changes(
    planned: Mapping[str, SourceFile],
    rows: Mapping[str, int],
    listed: Collection[str],
    changed: Iterable[SourceFile],
) -> SourceChanges:
    """Return what ``changed``, the files that get new units, replace, and which ``planned`` files are gone.

    ``rows``: number of served rows of each key. ``listed``: keys of the source's images.
    """
    replaced = [file.key for file in changed if file.key in rows and not file.is_same_as(planned[file.key])]
    gone = [file for key, file in planned.items() if key not in listed]
    gone_rows = sum(rows.get(file.key, 0) for file in gone)
    return SourceChanges(replaced, sum(rows[key] for key in replaced), gone, gone_rows)


def check_origins(
    planned: Mapping[str, SourceFile], store: str, listed: Iterable[SourceFile], files: Iterable[SourceFile]
) -> None:
    """Raise ValueError if one of ``files`` has the key of another origin's image, whose row it would replace.

    An origin was moved if an image of it in ``listed`` is one that was planned: then its other images were edited.
    """
    moved = set()
    for file in listed:
        before = planned.get(file.key)
        if before is not None and file.origin != before.origin and file.is_same_as(before):
            moved.add((_path(file.origin), _path(before.origin)))
    others = []
    for file in files:
        before = planned.get(file.key)
        if before is None or before.origin is None or file.origin is None or file.origin.is_same_as(before.origin):
            continue
        if (file.origin.path, before.origin.path) not in moved and not file.is_same_as(before):
            others.append((file, file.origin, before.origin))
    if others:
        file, ours, theirs = others[0]
        elsewhere = " elsewhere" if ours.name == theirs.name else ""
        raise ValueError(
            f"{file.key!r} is in {store} from {theirs.name}, and {ours.name}{elsewhere} has another "
            f"image of that key ({len(others)} such keys): encode both in one call, which keeps their keys apart as "
            "KEY~2, or name another OUT"
        )


def keep_planned_keys(listing: Listing, planned: Mapping[str, SourceFile]) -> None:
    """Give the images of ``listing`` the keys that they have in a plan, whatever the order of sources in the call.

    Of images with one key, from archives or folders that come in one call, those that were planned keep their keys, and
    new ones get ``~2`` and so on.
    """
    groups: dict[str, list[SourceFile]] = {}
    for file in listing.files:
        base = listing.base_keys.get(file.key, file.key)
        groups.setdefault(base, []).append(file)
    groups = {base: files for base, files in groups.items() if _may_be_renamed(base, files, planned)}
    if not groups:
        return
    kept: dict[str, list[str]] = {}
    for key in planned:
        found = SUFFIXED.fullmatch(key)
        for base in {key, found[1] if found else key} & groups.keys():
            kept.setdefault(base, []).append(key)
    used = {file.key for file in listing.files} - {file.key for files in groups.values() for file in files}
    origins = {file.origin for file in listing.files}
    given: dict[str, SourceFile] = {}
    listing.base_keys = {key: base for key, base in listing.base_keys.items() if base not in groups}
    for base, files in groups.items():
        free = [key for key in kept.get(base, []) if key not in used]
        for old, new in zip(files, _keys(base, files, free, planned, origins, used), strict=True):
            used.add(new)
            given[old.key] = renamed(old, new) if new != old.key else old
            if new != base:
                listing.base_keys[new] = base
    listing.files = [given.get(file.key, file) for file in listing.files]
    listing.duplicates = len(listing.base_keys)
    listing.sort()


def _keys(
    base: str,
    files: list[SourceFile],
    free: list[str],
    planned: Mapping[str, SourceFile],
    origins: Collection[Origin | None],
    used: Collection[str],
) -> list[str]:
    """Return the key of each of ``files``: that of the same planned image, of its origin's, or a new one."""
    keys: dict[int, str] = {}

    def same(file: SourceFile, before: SourceFile) -> bool:
        return renamed(file, before.key).is_same_as(before)

    def edited(file: SourceFile, before: SourceFile) -> bool:
        return bool(file.origin and before.origin and file.origin.is_same_as(before.origin))

    # An image of the same origin first: files of two folders may have one size and time, and other pixels.
    for matches in (lambda file, before: same(file, before) and edited(file, before), same, edited):
        for number, file in enumerate(files):
            left = (key for key in free if key not in keys.values() and number not in keys)
            if (key := next((key for key in left if matches(file, planned[key])), None)) is not None:
                keys[number] = key
    for number in range(len(files)):
        if number in keys:
            continue
        before = planned.get(base)
        here = before is None or not any(
            origin and before.origin and origin.is_same_as(before.origin) for origin in origins
        )
        if base not in keys.values() and here:
            keys[number] = base  # if it is planned, of an origin that is not in this call: refused by check_origins
            continue
        taken = (used, planned, keys.values())
        new = (f"{base}~{n}" for n in count(2))
        keys[number] = next(key for key in new if not any(key in names for names in taken))
    return [keys[number] for number in range(len(files))]


def _may_be_renamed(base: str, files: list[SourceFile], planned: Mapping[str, SourceFile]) -> bool:
    before = planned.get(base)
    if not all(file.origin for file in files) or (before is not None and before.origin is None):
        return False
    return len(files) > 1 or (before is not None and not files[0].is_same_as(before))


def _path(origin: Origin | None) -> str | None:
    return origin.path if origin is not None else None
