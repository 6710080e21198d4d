"""Exports of stores of format 1 have the stored bits."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from golden.golden_store import DIGESTS, LATENTS, bits

import fastvae


def exported(golden, to, out, **options):
    return fastvae.export(golden.store, out, to=to, progress=False, **options)


def assert_exported(stored, found):
    """Check that a row read back has the bits of the stored arrays, and the same crop, bucket and original size."""
    for part in (*LATENTS, "alpha"):
        assert (part in found) == (part in stored)
        if part in stored:
            assert bits(found[part]) == bits(stored[part].numpy())
    for part in ("original_hw", "crop_tlhw", "bucket"):
        assert list(found[part]) == stored[part].tolist()


def columns_of(golden):
    """Return the columns of each key that expected.json has, without those that a row lacks."""
    names = golden.expected["columns"]
    return {row["key"]: {n: row[n] for n in names if row[n] is not None} for row in golden.expected["rows"]}


def test_webdataset_tars_hold_the_stored_bits(golden, tmp_path):
    done = exported(golden, "wds", tmp_path / "out")
    stored, columns = golden.rows(), columns_of(golden)
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                number, part = member.name.split(".", 1)
                content = tar.extractfile(member).read()
                row = rows.setdefault(number, {})
                if part == "json":
                    row.update(json.loads(content))
                else:
                    row[part.removesuffix(".npy")] = np.load(io.BytesIO(content))
    assert [(row["key"], row["variant"]) for row in rows.values()] == list(stored)
    assert (done.rows, done.pending, done.about["identity"]) == (len(stored), 0, DIGESTS[golden.name])
    for row in rows.values():
        assert_exported(stored[row["key"], row["variant"]], row)
        assert row["columns"] == columns[row["key"]]


def test_parquet_files_hold_the_stored_bits(golden, tmp_path):
    exported(golden, "parquet", tmp_path / "out")
    stored, columns = golden.rows(), columns_of(golden)
    rows = [row for path in sorted((tmp_path / "out").glob("*.parquet")) for row in _parquet_rows(path)]
    assert [(row["key"], row["variant"]) for row in rows] == list(stored)
    for row in rows:
        assert_exported(stored[row["key"], row["variant"]], row)
        assert json.loads(row["columns"]) == columns[row["key"]]


def _parquet_rows(path):
    table = pyarrow.parquet.read_table(path)
    for number, row in enumerate(table.to_pylist()):
        for part in {*LATENTS, "alpha"} & {*row}:
            values = table.column(part)[number].values.to_numpy(zero_copy_only=False)
            row[part] = values.reshape(row["alpha_shape" if part == "alpha" else "latent_shape"])
        yield row


def test_caches_of_sd_scripts_hold_the_stored_values(golden, tmp_path):
    options = {} if golden.name == "manifest" else {"posterior": "mean"}
    if golden.name == "tar":
        with pytest.raises(ValueError, match="which holds one crop"):
            exported(golden, "npz-kohya", tmp_path / "out", **options)
        return
    exported(golden, "npz-kohya", tmp_path / "out", **options)
    stored = golden.rows()
    for (key, variant), row in stored.items():
        height, width = row["original_hw"].tolist()
        name = Path(key).with_name(f"{Path(key).stem}_{width:04d}x{height:04d}_sdxl.npz")
        with np.load(tmp_path / "out" / name, allow_pickle=False) as cache:
            found = cache["latents_flipped" if variant else "latents"]
            assert ("alpha_mask" in cache.files) == ("alpha" in row)
            assert cache["original_size"].tolist() == [width, height]
        assert bits(found) == bits(row["latents" if "latents" in row else "mean"].numpy().astype(np.float32))
    assert len([*(tmp_path / "out").rglob("*.npz")]) == len({key for key, _ in stored})
