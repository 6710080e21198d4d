"""Files to rows: which images need work, in which bucket, and how many rows make a unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fastvae.data.encoding.image_reader import ImageReader
from fastvae.data.rows import Size, SourceFile
from fastvae.data.store.commits import Commit, Failure
from fastvae.data.store.errors import StoreError
from fastvae.data.store.plan import PlannedRow, Unit
from fastvae.data.store.store import Store
from fastvae.system.threads import ordered_map

# Headers are waited for, not computed: more threads than cores.
HEADER_THREADS = 16


def files_to_encode(
    store: Store, listed: list[SourceFile], files: list[SourceFile], reader: ImageReader, retry: bool = False
) -> list[SourceFile]:
    """Those of ``files`` that need a unit, among them failures whose cause may be gone.

    A failure is in the file's bytes, but for two: what could not be read and can be now, and what was too large for a
    lower limit than today's. With ``retry`` every one is tried again.
    Raises ValueError if nothing ``listed`` shares a key with the plan: its rows would mix with another folder's.
    """
    known = {row.file.key for unit in store.units() for row in unit.rows}
    if known and known.isdisjoint(file.key for file in listed):
        raise ValueError(f"{store.path} was made from another folder: none of its {len(known)} keys is in the source")
    by_key = {file.key: file for file in files}

    def again(failure: Failure, commit: Commit) -> bool:
        if failure.key not in by_key:
            return False
        if retry:
            return True
        if failure.reason == "unreadable":
            return reader.opens(by_key[failure.key])
        return failure.reason == "too_large" and (commit.max_pixels is None or commit.max_pixels < reader.max_pixels)

    return store.files_to_encode(files, again)


def orphan_records(store: Store) -> list[Path]:
    """The records of no unit; raises StoreError for those with a shard beside them, whose plan was lost.

    No file tells any more of which images they are: what has their keys now may have been edited.
    """
    records = store.records()  # before the plan is read: another run adds to the plan first, and then commits
    stems = {unit.stem for unit in store.units()}
    records = [path for path in records if path.stem not in stems]
    if whole := [path for path in records if path.with_suffix(".safetensors").exists()]:
        raise StoreError(
            f"{whole[0]}: {len(whole)} records with a shard beside them are of no unit in {store.path / 'plan'}: put "
            "the missing plan back, or take both away by hand"
        )
    return records


def with_sha256(files: Sequence[SourceFile], reader: ImageReader) -> list[SourceFile]:
    """``files`` with the sha256 of their bytes, all of which are read for it."""
    digests = ordered_map(reader.sha256, files, HEADER_THREADS)
    return [replace(file, sha256=digest) for file, digest in zip(files, digests, strict=True)]


def plan_rows(files: Sequence[SourceFile], reader: ImageReader) -> list[tuple[Size, PlannedRow]]:
    """Every variant of ``files`` with its bucket, the buckets in the table's order, by what the headers say.

    An image whose header cannot be used is planned all the same, so that its unit quarantines it.
    """
    order = {size: number for number, size in enumerate(reader.buckets.sizes)}
    rows = []
    for file, size in zip(files, ordered_map(reader.size, files, HEADER_THREADS), strict=True):
        bucket = reader.bucket_of(size)
        rows += [(bucket, PlannedRow(file, variant, size)) for variant in range(reader.variants.count)]
    return sorted(rows, key=lambda row: order[row[0]])  # stable: within a bucket the files keep their order


def count_by_bucket(units: Sequence[Unit]) -> dict[Size, int]:
    """How many rows the units have in each bucket."""
    counts: dict[Size, int] = {}
    for unit in units:
        counts[unit.bucket] = counts.get(unit.bucket, 0) + len(unit.rows)
    return counts


def needed_bytes(counts: dict[Size, int], row_size: Callable[[Size], int]) -> int:
    """About how many bytes so many rows take."""
    return sum(count * row_size(bucket) for bucket, count in counts.items())


def rotated_for_rank(units: list[Unit], rank: int, ranks: int) -> list[Unit]:
    """``units`` from the place where process ``rank`` of ``ranks`` starts, and then around."""
    start = len(units) * rank // ranks
    return units[start:] + units[:start]
