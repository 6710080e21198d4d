"""Stores of format 1, made by version 0.1.0: every version opens, resumes, verifies and repairs them.

make_stores.py describes them. A change that fails here breaks the stores of users: a new rule applies to new stores
and is recorded in them.
"""

import copy
import hashlib
import json

import numpy as np
import pytest
import torch
from golden.golden_store import DIGESTS, LATENTS, QUIET, bits, described, lines_of
from PIL import Image, ImageOps
from support.accuracy import assert_as_accurate
from support.short_run import short_run

import fastvae

FAILED = {"folder": {("nested/cut.png", 0), ("nested/cut.png", 1)}}


def assert_sound(golden):
    """Check that verify finds what it found when the store was made."""
    found = fastvae.verify(golden.store, deep=True, progress=False)
    assert (found.damaged, found.stale, found.pending) == ([], [], 0)
    assert {name: getattr(found, name) for name in golden.expected["verify"]} == golden.expected["verify"]


def test_every_row_is_read_with_the_bits_that_the_first_build_read(golden):
    rows = fastvae.LatentDataset(golden.store, columns=golden.expected["columns"], seed=3)
    assert [{name: described(value) for name, value in row.items()} for row in rows] == golden.expected["rows"]
    parts = {*LATENTS, "alpha"} & {*rows[0]}
    assert parts == {
        "manifest": {"latents"},
        "mask": {"mean", "alpha"},
    }.get(golden.name, {"mean", "logvar"})


def test_scaled_means_are_the_stored_ones_times_the_recorded_factor(golden):
    stored = golden.rows()
    for name, row in golden.rows(scaled=True).items():
        part = "latents" if golden.name == "manifest" else "mean"
        expected = stored[name][part].numpy().astype(np.float32) * np.float32(0.2759)
        assert bits(row[part].numpy()) == bits(expected)


def test_the_digest_of_an_identity_is_the_one_that_was_stored(golden, tmp_path):
    facts = json.loads((golden.store / "store.json").read_text("utf-8"))
    canonical = json.dumps(facts["identity"], sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(canonical.encode("ascii")).hexdigest() == DIGESTS[golden.name]
    assert (facts["fvl"], facts["identity_digest"]) == (1, DIGESTS[golden.name])
    fresh = fastvae.encode(golden.source, tmp_path / "new", dry_run=True, **golden.options)
    assert fresh.identity == DIGESTS[golden.name]


def test_encode_finds_nothing_to_do(golden):
    before = golden.files()
    report = fastvae.encode(golden.source, golden.store, **golden.options)
    assert (report.ok, report.failed, report.resumed) == (0, 0, len(golden.expected["rows"]))
    assert golden.files() == before


# Not of the tar: every image of a changed one is encoded again.
@pytest.mark.parametrize("golden", short_run(sorted({*DIGESTS} - {"tar"}), ["folder", "manifest"]), indirect=True)
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


def test_verify_finds_no_damage_and_the_recorded_failures(golden):
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


# In the short run: the files of a folder, the members of a tar with log-variances in 8 bits, and masks.
@pytest.mark.parametrize("golden", short_run(sorted(DIGESTS), ["folder", "mask", "tar"]), indirect=True)
def test_repair_encodes_damaged_shards_again(golden, model):
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
                # In fp16 and in 8 bits the error is that of rounding, the same on every CPU. In fp32 it is the model's,
                # which depends on the CPU: without AVX it is up to twice that of AVX-512.
                eager = ours[part] if value.dtype == torch.float32 else stored[name][part]
                assert_as_accurate(value, eager, truth[part])
            else:
                assert described(value) == described(stored[name][part])


@pytest.mark.parametrize("golden", ["folder"], indirect=True)
def test_a_newer_format_is_refused(golden):
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
