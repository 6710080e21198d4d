"""Stores of format 1, made by version 0.1.0: every version opens, resumes, verifies, repairs and exports them.

make_stores.py describes them. A change that fails here breaks the stores that users have: a new rule applies to new
stores and is recorded in them.
"""

import copy
import hashlib
import io
import json
import os
import shutil
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image, ImageOps
from support.accuracy import assert_as_accurate

import fastvae

STORES = Path(__file__).parent / "stores"
# The digest of each store's identity. None of them ever changes.
DIGESTS = {
    "folder": "bf8487b9991eed440291bc023eaf558474a54f497a69fb36211b9dd2fa827fb6",
    "tar": "bd9c64416beac02ecdf29d688ed6e71309f2c5c701855548158cb8c1dad3dfa7",
    "manifest": "b052adf9d0a6e942767536508be41d1a386732654c79ea91dee7d14db3fe5784",
    "mask": "f79e36f1705c098f77edaaa2eb8c8c198eb4151205542f1c12e95e93178f9a8b",
    "repaired": "fe57763c48b620d8db24e34e8c3eb35a4b173bdc0cc25689bc034b5fee3fbdf5",
}
FAILED = {"folder": {("nested/cut.png", 0), ("nested/cut.png", 1)}}
LATENTS = ("mean", "logvar", "latents")
QUIET = {"progress": False, "deterministic": True}


@dataclass
class Golden:
    """A copy of a store and of its source; ``expected`` is what its expected.json has."""

    name: str
    store: Path
    source: Path
    expected: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def rows(self, **how: Any) -> dict[tuple[str, int], dict[str, Any]]:
        """Return the rows of LatentDataset by key and variant."""
        return {(row["key"], int(row["variant"])): row for row in fastvae.LatentDataset(self.store, **how)}

    def shards(self) -> list[Path]:
        """Return the shards, in order."""
        return sorted((self.store / "shards").glob("*.safetensors"))

    def files(self, folder: str = "") -> dict[str, tuple[bytes, int]]:
        """Return the bytes and the time of change of each file in ``folder``, without the locks of a run."""
        found = {path.relative_to(self.store): path for path in (self.store / folder).rglob("*") if path.is_file()}
        return {
            name.as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
            for name, path in found.items()
            if name.parts[0] not in (".lock", "leases")
        }

    def image(self, key: str) -> Image.Image:
        """Return the upright image of ``key``, opened by Pillow alone."""
        if self.name == "tar":
            with tarfile.open(self.source) as tar:
                content = io.BytesIO(tar.extractfile(f"{key}.png").read())
        elif self.name == "manifest":
            (path,) = [line["path"] for line in lines_of(self.source) if str(line["key"]) == key]
            content = self.source.parent / path
        else:
            content = self.source / key
        with Image.open(content) as image:
            return ImageOps.exif_transpose(image)


def lines_of(path):
    """Return the values of a JSONL file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(params=sorted(DIGESTS))
def golden(request, tmp_path):
    """A copy of each store, its images with the times that its plan has: git keeps none."""
    made = STORES / request.param
    expected = json.loads((made / "expected.json").read_text("utf-8"))
    shutil.copytree(made / "source", tmp_path / "source")
    store = shutil.copytree(made / "store", tmp_path / "store")
    source = tmp_path / expected["source"]
    for line in [line for path in sorted((store / "plan").iterdir()) for line in lines_of(path)]:
        place = line["place"].rpartition("@")[0] or line["place"] or line["key"]
        os.utime((source if source.is_dir() else source.parent) / place, ns=(line["mtime_ns"], line["mtime_ns"]))
    return Golden(request.param, store, source, expected, {**expected["options"], **QUIET})


@pytest.fixture(scope="session")
def model():
    """The model of every store."""
    return fastvae.AutoencoderKL.from_pretrained("tiny").eval()


def described(value):
    """Return a value of a row as expected.json has it; see make_stores.described."""
    if not isinstance(value, torch.Tensor):
        return value
    array = value.numpy()
    if array.ndim < 2:
        return array.tolist()
    shape = "x".join(map(str, array.shape))
    return f"{array.dtype} {shape} {hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()}"


def bits(array):
    array = np.ascontiguousarray(array)
    return array.dtype.str, array.shape, array.tobytes()


def assert_sound(golden):
    """Hold a store to what verify found when it was made."""
    found = fastvae.verify(golden.store, deep=True, progress=False)
    assert (found.damaged, found.stale, found.pending) == ([], [], 0)
    assert {name: getattr(found, name) for name in golden.expected["verify"]} == golden.expected["verify"]


def test_every_row_is_read_with_the_bits_of_the_build_that_made_it(golden):
    rows = fastvae.LatentDataset(golden.store, columns=golden.expected["columns"], seed=3)
    assert [{name: described(value) for name, value in row.items()} for row in rows] == golden.expected["rows"]
    parts = {*LATENTS, "alpha"} & {*rows[0]}
    assert parts == {
        "manifest": {"latents"},
        "mask": {"mean", "alpha"},
    }.get(golden.name, {"mean", "logvar"})


def test_scaled_means_are_the_stored_ones_by_the_recorded_factor(golden):
    stored = golden.rows()
    for name, row in golden.rows(scaled=True).items():
        part = "latents" if golden.name == "manifest" else "mean"
        wanted = stored[name][part].numpy().astype(np.float32) * np.float32(0.2759)
        assert bits(row[part].numpy()) == bits(wanted)


def test_the_digest_of_an_identity_is_the_one_that_was_stored(golden, tmp_path):
    facts = json.loads((golden.store / "store.json").read_text("utf-8"))
    canonical = json.dumps(facts["identity"], sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(canonical.encode("ascii")).hexdigest() == DIGESTS[golden.name]
    assert (facts["fvl"], facts["identity_digest"]) == (1, DIGESTS[golden.name])
    fresh = fastvae.encode(golden.source, tmp_path / "new", dry_run=True, **golden.options)
    assert fresh.identity == DIGESTS[golden.name]


def test_encoding_goes_on_with_nothing_to_do(golden):
    before = golden.files()
    report = fastvae.encode(golden.source, golden.store, **golden.options)
    assert (report.ok, report.failed, report.resumed) == (0, 0, golden.expected["verify"]["rows"])
    assert golden.files() == before


@pytest.mark.parametrize("golden", sorted({*DIGESTS} - {"tar"}), indirect=True)  # any change makes a tar new
def test_an_added_image_is_the_only_one_encoded(golden):
    before = golden.files("shards")
    if golden.source.is_dir():
        Image.new("RGB", (32, 32), "teal").save(golden.source / "added.png")
    else:
        line = {"key": "added", "path": "images/square.png"}
        golden.source.write_text(golden.source.read_text("utf-8") + json.dumps(line) + "\n", "utf-8")
    report = fastvae.encode(golden.source, golden.store, **golden.options)
    assert (report.ok, report.failed) == (2 if golden.name == "folder" else 1, 0)
    assert before.items() <= golden.files("shards").items()
    assert not fastvae.verify(golden.store, deep=True, progress=False).damaged


def test_verify_finds_a_sound_store_and_the_failures_that_it_had(golden):
    before = golden.files()
    assert_sound(golden)
    failures = lines_of(golden.store / "failures.jsonl")
    assert {(line["key"], line["variant"]) for line in failures} == FAILED.get(golden.name, set())
    assert {line["reason"] for line in failures} <= {"truncated"}
    assert golden.files() == before


def pixels_of(golden, row):
    """Return the pixels [1, 3, H, W] of a row, from -1 to 1, by the rules of docs/latents.md, with Pillow alone."""
    image = golden.image(row["key"])
    if golden.options.get("alpha") == "mask":
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, "white")
        image.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
    (width, height), (rows, columns) = image.size, row["bucket"].tolist()
    assert row["original_hw"].tolist() == [height, width]
    if rows * width >= columns * height:
        size = (2 * width * rows + height) // (2 * height), rows
    else:
        size = columns, (2 * height * columns + width) // (2 * width)
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    if golden.options.get("flip") and int(row["variant"]) % 2:
        image = ImageOps.mirror(image)
    top, left, tall, wide = row["crop_tlhw"].tolist()
    cut = np.array(image.crop((left, top, left + wide, top + tall)).convert("RGB"))
    return torch.from_numpy(cut).permute(2, 0, 1)[None].float() / 127.5 - 1


def moments_of(golden, row, model):
    """Return the moments and the draw that a model gives for a row's image, by the names of the row's parts."""
    with torch.no_grad():
        posterior = model.encode(pixels_of(golden, row).to(model.dtype)).latent_dist
    mean, logvar = posterior.mean[0], posterior.logvar[0].clamp(-30, 20)
    key = fastvae.noise_key(golden.options.get("seed", 0), 0, row["key"], int(row["variant"]))
    nothing = torch.zeros(1, *mean.shape)
    noise = fastvae.sample_posterior(nothing, nothing, [key])[0].to(mean.dtype)
    return {"mean": mean, "logvar": logvar, "latents": mean + torch.exp(logvar / 2) * noise}


def test_repair_makes_damaged_shards_again(golden, model):
    before, stored = golden.files(), golden.rows()
    latest = {line["shard"] for line in lines_of(golden.store / "index.jsonl")}
    damaged = [path for path in golden.shards() if path.name in latest]
    for path in damaged:
        data = bytearray(path.read_bytes())
        data[-40] ^= 4
        path.write_bytes(data)
    done = fastvae.repair(golden.store, golden.source, device="cpu", **QUIET)
    assert len(done.units) == len(damaged) == len(done.damaged)
    assert (done.report.failed, done.report.kept) == (0, 0)
    assert_sound(golden)
    changed = {name for name, content in golden.files().items() if content != before[name]}
    assert changed <= {f"shards/{path.stem}{ending}" for path in damaged for ending in (".json", ".safetensors")}
    fast, exact = fastvae.accelerate(copy.deepcopy(model), freeze=True), copy.deepcopy(model).double()
    again = golden.rows()
    assert list(again) == list(stored)
    for name, row in again.items():
        ours, truth = (moments_of(golden, row, model) for model in (fast, exact))
        for part, value in row.items():
            if part in LATENTS:
                # In fp16 and in 8 bits the error is that of storing, the same on every CPU. In fp32 it is the model's,
                # which depends on the CPU: without AVX it is up to twice that of AVX-512.
                eager = ours[part] if value.dtype == torch.float32 else stored[name][part]
                assert_as_accurate(value, eager, truth[part])
            else:
                assert described(value) == described(stored[name][part])


def exported(golden, to, out, **options):
    return fastvae.export(golden.store, out, to=to, progress=False, **options)


def assert_exported(stored, found):
    """Hold a row that was read back to the stored one: every array by its bits, and where it is in its image."""
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


@pytest.mark.parametrize("golden", ["folder"], indirect=True)
def test_a_newer_format_is_refused_in_one_sentence(golden):
    path = golden.store / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"fvl": 2}))
    calls = [
        lambda: fastvae.LatentDataset(golden.store),
        lambda: fastvae.encode(golden.source, golden.store, **golden.options),
        lambda: fastvae.verify(golden.store, progress=False),
        lambda: fastvae.repair(golden.store, golden.source, progress=False),
        lambda: fastvae.export(golden.store, golden.store / "out", to="wds", progress=False),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r'store\.json must have "fvl": 1$'):
            call()
