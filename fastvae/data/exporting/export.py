"""Export of a store's rows: kohya's npz, WebDataset, Parquet, Hugging Face datasets."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvae.data.datasets.dataset import ARRAYS, LatentDataset
from fastvae.data.exporting.kohya import FAMILIES, Kohya, family_of
from fastvae.data.exporting.parquet import Parquet
from fastvae.data.exporting.webdataset import Tar
from fastvae.data.store.leases import STALE, Leases
from fastvae.data.store.shard import POSTERIORS
from fastvae.data.store.store import Store
from fastvae.system.atomic_files import check_room, free_bytes, is_leftover, synchronise_folder, write_atomically
from fastvae.system.strict_json import json_bytes
from fastvae.system.terminal import format_bytes, print_stderr

FORMATS = ("npz-kohya", "wds", "parquet", "hf")
# Rows read together; they are of one shard, so of one size.
ROWS_AT_ONCE = 64
EXPORT_RECORD = "export.json"
# In the temporary folder: the future DST, and the lease of its writer.
CONTENT, LEASES = "content", "leases"


@dataclass
class ExportReport:
    """Result of an export: the folder, rows, files and bytes, and ``about``, the content of export.json.

    ``pending``: rows planned in the store and not exported, because they are not committed. ``clashes``: the keys of
    images that would share a file of kohya's caches, which is not written; their rows are not among ``rows``.
    """

    path: str
    rows: int = 0
    pending: int = 0
    files: int = 0
    bytes: int = 0
    about: dict[str, Any] = field(default_factory=dict)
    clashes: list[list[str]] = field(default_factory=list)


def export(
    store: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    to: str,
    posterior: str | None = None,
    scaled: bool = False,
    seed: int = 0,
    family: str | None = None,
    shard_mb: float = 256,
    beside_images: bool = False,
    progress: bool = True,
) -> ExportReport:
    """Write every committed row of the latent store into the new folder ``dst``, which appears complete or not at all.

    Rows planned and not committed are left out, and counted as ``pending`` in the result, in export.json and on stderr.
    to: "npz-kohya", one file an image, as sd-scripts caches them; "wds", tar shards for WebDataset; "parquet"; or "hf",
    a folder for datasets.load_dataset. posterior: "dist", mean and logvar [L, h, w], the default; "mean"; or "sample",
    one draw [L, h, w] in fp32, its noise keyed by (``seed`` from [0, 2^64), epoch 0, key, variant). kohya's caches have
    one latent an image: "sample", their default, or "mean". scaled: as scale_latents returns them, in fp32, else raw as
    stored. family: for kohya's caches alone ("sd", "sdxl", "sd3", "flux"), whose latents are raw except for flux; by
    default the family with the store's channels and scaling. shard_mb: size of a tar or Parquet file. progress: a plan
    line on stderr. beside_images: for kohya's caches, ``dst`` is the existing folder of the images, and each file is
    renamed to its place beside its image, where sd-scripts reads it; an older cache of that name is replaced. A folder
    that has none of the images is refused.
    Images that would share a file of kohya's caches, such as x.jpg and x.png of one size, get none; they are named in
    the result and in export.json, and the other rows are written.
    Raises FileExistsError if ``dst`` exists, ValueError for another argument, for a family that the store's
    latents are not of, for keys that the format cannot have or for several crops of an image in kohya's layout,
    StoreError for a folder that is not a store or cannot be scaled, OSError, ENOSPC if the disk is too small,
    ImportError if pyarrow is needed and missing.
    """
    _check(to, posterior, scaled, family, shard_mb)
    out = Path(dst)
    if beside_images and not (to == "npz-kohya" and out.is_dir()):
        raise ValueError(f"beside_images must be used with npz-kohya and the folder of the images, got {to} and {out}")
    if not beside_images and (out.exists() or out.is_symlink()):
        raise FileExistsError(f"dst must be a new folder, {out} is there already")
    is_kohya = to == "npz-kohya"
    posterior = posterior or ("sample" if is_kohya else "dist")
    opened, note = Store.open(Path(store)), None
    if is_kohya:
        family, note = family_of(opened.facts["latent_channels"], opened.facts["scaling"], family)
        scaled = FAMILIES[family].scaled
    stored = opened.facts["identity"]["numerics"]["posterior"]
    if stored == "sample" or (stored == "mean" and posterior == "dist"):
        posterior = stored  # the store has one draw, or one mean, and nothing else
    rows = LatentDataset(store, scaled=scaled, posterior=posterior, seed=seed)  # type: ignore[arg-type]
    if beside_images and not any((out / key).exists() for key in rows.keys()):  # noqa: SIM118 (a method)
        raise ValueError(f"dst must be the folder of the images with beside_images, {out} has none of the {len(rows)}")
    about = _about(opened, rows, to, posterior, seed, family)
    if note:
        about["note"] = note
    records = _rows(rows, opened.columns())
    _sweep(out)
    needed = _size(rows)
    if progress:
        missing = f" of {len(rows) + about['pending']}, the others are not committed" if about["pending"] else ""
        what = f"{opened.path}  {len(rows)} rows{missing}  {to}  {posterior}  {about['space']}"
        print_stderr(f"export  {what}  ~{format_bytes(needed)} (free {format_bytes(free_bytes(out))})\n")
        if note:
            print_stderr(f"fastvae: {note}\n")
    check_room(out, needed)
    clashes: dict[Path, list[str]] = {}
    writer = lambda content: _writer(to, content, about, opened, int(shard_mb * 1e6), clashes)  # noqa: E731
    written = _write_folder(out, writer, records, lambda: _without(clashes, about, rows), beside_images)
    shared = about.get("clashes", [])
    return ExportReport(os.fspath(out), about["rows"], about["pending"], len(written), sum(written), about, shared)


def _without(clashes: dict[Path, list[str]], about: dict[str, Any], rows: LatentDataset) -> dict[str, Any]:
    """Take the rows of images that would share a file out of the count of ``about``, name them there, and return it."""
    if clashes:
        about["clashes"] = [*clashes.values()]
        lost = {key for keys in clashes.values() for key in keys}
        about["rows"] = sum(key not in lost for key in rows.keys())  # noqa: SIM118 (the dataset's method, a key a row)
    return about


def _write_folder(
    out: Path,
    make_writer: Callable[[Path], Kohya | Tar | Parquet],
    rows: Iterator[dict[str, Any]],
    record: Callable[[], dict[str, Any]],
    beside: bool,
) -> list[int]:
    """Write ``rows`` and export.json to a temporary folder, and rename it to ``out``; return the sizes of the files.

    record: gives the content of export.json once all rows are written. beside: rename each file to its place in ``out``
    instead, without export.json.
    """
    temporary = out.with_name(f"{out.name}.tmp.{os.getpid()}.{secrets.token_hex(4)}")
    content = temporary / CONTENT
    content.mkdir(parents=True)
    try:
        # Shows that this process is alive, so that no other export deletes the folder.
        with Leases(temporary / LEASES):
            with make_writer(content) as writer:
                for row in rows:
                    writer.add(row)
            about = record()
            if not beside:
                write_atomically(content / EXPORT_RECORD, [json_bytes(about, indent=1)])
            sizes = _synchronise_files(content)
            if beside:
                _move_beside(content, out)
            else:
                _take_name(content, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sizes


def _move_beside(content: Path, out: Path) -> None:
    """Rename each finished file to its place in ``out``."""
    for path in sorted(path for path in content.rglob("*") if path.is_file()):
        place = out / path.relative_to(content)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)


def _take_name(content: Path, out: Path) -> None:
    """Rename the finished folder; raises FileExistsError if another process made ``out`` and it is not empty."""
    try:
        os.rename(content, out)
    except OSError as error:
        if out.exists():
            raise FileExistsError(f"dst must be a new folder, {out} came up meanwhile") from error
        raise
    synchronise_folder(out.absolute().parent)


def _sweep(out: Path) -> None:
    """Delete the folders of killed exports to ``out``: those without a living lease."""
    folder = out.absolute().parent
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_symlink() or not path.is_dir() or not is_leftover(path, re.escape(out.name)):
            continue
        with contextlib.suppress(FileNotFoundError):  # its own process may delete it now
            age = time.time() - path.stat().st_mtime
            leases = Leases(path / LEASES)
            begun = leases.folder.is_dir() and any(leases.folder.glob("*.lease"))
            # Without a lease the export has just begun, or was killed at its start.
            dead = not leases.live() if begun else age > STALE
            if dead and {*os.listdir(path)} <= {CONTENT, LEASES}:
                shutil.rmtree(path, ignore_errors=True)


def _check(to: str, posterior: str | None, scaled: bool, family: str | None, shard_mb: float) -> None:
    for name, value, taken in (
        ("to", to, FORMATS),
        ("posterior", posterior, (None, *POSTERIORS)),
        ("family", family, (None, *FAMILIES)),
    ):
        if value not in taken:
            listed = ", ".join(repr(one) for one in taken if one is not None)
            raise ValueError(f"{name} must be one of {listed}, got {value!r}")
    if not 0 < shard_mb < float("inf"):
        raise ValueError(f"shard_mb must be above 0 and finite, got {shard_mb!r}")
    if to != "npz-kohya" and family is not None:
        raise ValueError(f"family must be left out for {to}: it is of npz-kohya's caches, got {family!r}")
    if to == "npz-kohya" and posterior == "dist":
        raise ValueError("posterior must be 'sample' or 'mean' for npz-kohya, which holds one latent an image")
    if to == "npz-kohya" and scaled:
        raise ValueError("scaled must be left out for npz-kohya: the family says which space its trainer reads")


def _about(store: Store, rows: LatentDataset, to: str, posterior: str, seed: int, family: str | None) -> dict[str, Any]:
    drawn = posterior == "sample" and store.facts["identity"]["numerics"]["posterior"] == "dist"
    return {
        "format": to,
        "rows": len(rows),
        "pending": store.pending(),
        "posterior": posterior,
        "noise": f"fastvae noise 1, epoch 0, seed {seed}" if drawn else None,
        "space": rows.scaling["space"],
        "scaling": store.facts["scaling"],
        "latent_channels": rows.latent_channels,
        "downsample_factor": rows.downsample_factor,
        "family": family,
        "identity": store.facts["identity_digest"],
    }


def _rows(rows: LatentDataset, columns: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield every row: arrays and numbers by name, the key, and the source columns."""
    for _, numbers in rows.shards():
        for part in numbers.split(ROWS_AT_ONCE):
            for item in rows.__getitems__(part.tolist()):
                arrays = {name: item[name].numpy() for name in ARRAYS if name in item}
                placed = {name: [int(n) for n in item[name]] for name in ("original_hw", "crop_tlhw", "bucket")}
                key = item["key"]
                yield {
                    "key": key,
                    "variant": int(item["variant"]),
                    **placed,
                    "columns": columns.get(key, {}),
                    **arrays,
                }


def _size(rows: LatentDataset) -> int:
    """Return about the bytes of latents and masks, from the first row of each shard."""
    total = 0
    for _, numbers in rows.shards():
        item = rows[int(numbers[0])]
        total += len(numbers) * sum(item[name].nbytes for name in ARRAYS if name in item)
    return total


def _writer(
    to: str, folder: Path, about: dict[str, Any], store: Store, size: int, clashes: dict[Path, list[str]]
) -> Kohya | Tar | Parquet:
    if to == "npz-kohya":
        flip = bool(store.facts["identity"]["preprocess"].get("flip"))
        return Kohya(folder, about["family"], flip, clashes)
    if to == "wds":
        return Tar(folder, size)
    return Parquet(folder, about, size, card=to == "hf")


def _synchronise_files(folder: Path) -> list[int]:
    """Synchronise every file in ``folder``, and return their sizes."""
    sizes = []
    for parent, _, names in os.walk(folder):
        for name in names:
            with (Path(parent) / name).open("rb+") as file:
                os.fsync(file.fileno())
                sizes.append(os.fstat(file.fileno()).st_size)
        synchronise_folder(Path(parent))
    return sizes
