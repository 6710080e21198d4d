"""Files to planned rows: finds the images that need a row, and the bucket of each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import PIL

from fastvae.data.encoding.image_reader import ImageReader
from fastvae.data.rows import Size, SourceFile
from fastvae.data.sources.changes import check_origins
from fastvae.data.store.commits import Commit, Failure
from fastvae.data.store.errors import StoreError
from fastvae.data.store.plan import PlannedRow, Unit
from fastvae.data.store.store import Store
from fastvae.system.threads import ordered_map

# Reading a header is mostly waiting, so there are more threads than cores. Each takes files in blocks: on a local disk
# handing over one file at a time took five times the CPU of reading its header.
HEADER_THREADS, HEADER_BLOCK = 16, 32


def files_to_encode(
    store: Store, listed: list[SourceFile], files: list[SourceFile], reader: ImageReader, retry: bool = False
) -> list[SourceFile]:
    """Return those of ``files`` that need a unit, among them failures whose cause may be gone.

    Two kinds of failures are tried again: a file that could not be read and can be read now, and one that was too large
    for a lower ``max_pixels``. With ``retry`` all are.
    Raises ValueError if no key of ``listed`` is in the plan: rows of two folders would be mixed.
    """
    planned = store.planned_files()
    if planned and planned.keys().isdisjoint(file.key for file in listed):
        raise ValueError(f"{store.path} was made from another folder: none of its {len(planned)} keys is in the source")
    check_origins(planned, str(store.path), listed, files)
    by_key = {file.key: file for file in files}

    def again(failure: Failure, commit: Commit) -> bool:
        if failure.key not in by_key:
            return False
        if retry:
            return True
        if failure.reason == "excluded":
            return True
        if failure.reason == "unreadable":
            return reader.opens(by_key[failure.key])
        return failure.reason == "too_large" and (commit.max_pixels is None or commit.max_pixels < reader.max_pixels)

    return store.files_to_encode(files, again)


def pillow_note(commits: Iterable[Commit]) -> str | None:
    """Return a sentence if rows of a store were made under another major version of Pillow, as far as records say."""
    own = PIL.__version__.split(".", 1)[0]
    made = (str(commit.versions.get("pillow", own)).split(".", 1)[0] for commit in commits)
    if not (others := sorted({*made} - {own})):
        return None
    return (
        f"rows of this store were made under Pillow {' and '.join(others)}, and new ones are under Pillow {own}: its "
        "resize may give other bytes (docs/numerics.md)"
    )


def orphan_records(store: Store) -> list[Path]:
    """Return the commit records of no unit; raises StoreError for one with a shard beside it, whose plan is lost.

    Without the plan nothing says which images they are: files of the same keys may have been edited.
    """
    records = store.records()  # read before the plan: another run adds to the plan first, and then commits
    stems = {unit.stem for unit in store.units()}
    records = [path for path in records if path.stem not in stems]
    if whole := [path for path in records if path.with_suffix(".safetensors").exists()]:
        raise StoreError(
            f"{whole[0]}: {len(whole)} records with a shard beside them are of no unit in {store.path / 'plan'}: put "
            "the missing plan back, or take both away by hand"
        )
    return records


def with_sha256(files: Sequence[SourceFile], reader: ImageReader) -> list[SourceFile]:
    """Return ``files`` with the sha256 of their bytes; reads every file."""
    digests = ordered_map(reader.sha256, files, HEADER_THREADS)
    return [replace(file, sha256=digest) for file, digest in zip(files, digests, strict=True)]


def plan_rows(files: Sequence[SourceFile], reader: ImageReader) -> list[tuple[Size, PlannedRow]]:
    """Return every variant of ``files`` with its bucket, from the images' headers, buckets in the table's order.

    An image whose header cannot be used is planned too, so that its unit quarantines it.
    """
    order = {size: number for number, size in enumerate(reader.buckets.sizes)}
    rows = []
    blocks = (files[at : at + HEADER_BLOCK] for at in range(0, len(files), HEADER_BLOCK))
    sizes = ordered_map(lambda block: [reader.size(file) for file in block], blocks, HEADER_THREADS)
    for file, size in zip(files, itertools.chain.from_iterable(sizes), strict=True):
        bucket = reader.bucket_of(size)
        rows += [(bucket, PlannedRow(file, variant, size)) for variant in range(reader.variants.count)]
    return sorted(rows, key=lambda row: order[row[0]])  # stable: within a bucket the files keep their order


def count_by_bucket(units: Sequence[Unit]) -> dict[Size, int]:
    """Return the number of rows in each bucket."""
    counts: dict[Size, int] = {}
    for unit in units:
        counts[unit.bucket] = counts.get(unit.bucket, 0) + len(unit.rows)
    return counts


def needed_bytes(counts: dict[Size, int], row_size: Callable[[Size], int]) -> int:
    """Estimate the bytes of ``counts`` rows in each bucket."""
    return sum(count * row_size(bucket) for bucket, count in counts.items())
