"""encode over a folder: the rows stored, their keys, and arguments that are refused."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from support.latent_checks import assert_half_equal, expected, latents
from support.small_store import SIDE, picture, small_vae, write_pictures

from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.encoding.encode import encode
from fastvae.data.store.errors import IdentityMismatch, StoreError

OPTIONS = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu"}


def test_every_row_is_its_own_files(tmp_path):
    vae = small_vae()
    names = write_pictures(tmp_path / "in", 7)
    report = encode(tmp_path / "in", tmp_path / "out", vae=vae, workers=2, **OPTIONS)
    assert (report.ok, report.failed, report.resumed, report.exceeded) == (7, 0, 0, False)
    stored = latents(tmp_path / "out")
    assert sorted(stored) == names
    for name in names:
        assert_half_equal(stored[name], expected(vae, tmp_path / "in" / name))


@pytest.fixture
def two_threads():
    """Let torch compute with two threads, so that a single worker would use both within an image."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_row_34_rows_depend_on_neither_workers_nor_neighbours(tmp_path, two_threads):
    vae, options = small_vae(), {**OPTIONS, "buckets": 64, "deterministic": True}
    write_pictures(tmp_path / "in", 6)
    (tmp_path / "in" / "002.png").write_bytes(b"spoilt")
    encode(tmp_path / "in", tmp_path / "one", vae=vae, workers=1, **options)
    encode(tmp_path / "in", tmp_path / "many", vae=vae, workers=3, shard_mb=0.002, batch=2, **options)
    one, many = latents(tmp_path / "one"), latents(tmp_path / "many")
    assert sorted(one) == sorted(many) == ["000.png", "001.png", "003.png", "004.png", "005.png"]
    for key in one:
        assert np.array_equal(one[key], many[key])


def test_row_34_equal_runs_give_equal_bytes(tmp_path):
    write_pictures(tmp_path / "in", 4)
    for name in ("a", "b"):
        encode(tmp_path / "in", tmp_path / name, vae=small_vae(), **OPTIONS)
    shards = [sorted((tmp_path / name / "shards").glob("*.safetensors")) for name in ("a", "b")]
    assert [path.name for path in shards[0]] == ["000000-32x32.safetensors"]
    assert shards[0][0].read_bytes() == shards[1][0].read_bytes()


def test_bad_files_are_quarantined_and_the_rest_is_encoded(tmp_path):
    folder = tmp_path / "in"
    good = write_pictures(folder, 3)
    whole = (folder / "000.png").read_bytes()
    bad = {
        "cut.png": (whole[: len(whole) // 2], "truncated"),
        "empty.jpg": (b"", "empty"),
        "noise.jpg": (b"\xff\xd8\xff" + b"\x13garbage" * 40, "decode_error"),
        "print.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "unsupported"),
        "text.png": (b"hello", "unsupported"),
    }
    for name, (data, _) in bad.items():
        (folder / name).write_bytes(data)
    Image.new("RGB", (100, 2)).save(folder / "thin.png")
    os.symlink(folder / "gone", folder / "link.png")
    report = encode(folder, tmp_path / "out", vae=small_vae(), **OPTIONS)
    assert (report.ok, report.failed, report.exceeded) == (3, 7, True)
    assert sorted(latents(tmp_path / "out")) == good
    lines = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    wanted = {name: reason for name, (_, reason) in bad.items()} | {"thin.png": "too_small", "link.png": "unreadable"}
    assert {line["key"]: line["reason"] for line in lines} == wanted
    assert all(line["key"] in line["detail"] for line in lines)
    assert sum(report.reasons.values()) == 7
    # Failures are remembered: a second run does not try them again, and still counts them.
    again = encode(folder, tmp_path / "out", vae=small_vae(), **OPTIONS)
    assert (again.ok, again.failed, again.resumed, again.failed_before, again.exceeded) == (0, 0, 3, 7, True)
    assert not encode(folder, tmp_path / "out", vae=small_vae(), max_failures=7, **OPTIONS).exceeded


def test_row_06_every_orientation_gives_the_same_latents(tmp_path):
    (tmp_path / "in").mkdir()
    upright = picture(5, 56, 40)
    turned = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
        1: [],
    }
    for orientation, steps in turned.items():
        image = upright
        for step in steps:
            image = image.transpose(step)
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / "in" / f"{orientation}.png", exif=exif)
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **OPTIONS)
    items = list(LatentDataset(tmp_path / "out"))
    assert len(items) == 8
    for item in items:
        assert torch.equal(item["mean"], items[0]["mean"])
        assert torch.equal(item["logvar"], items[0]["logvar"])
        assert item["original_hw"].tolist() == [40, 56]
        assert item["crop_tlhw"].tolist() == [0, 6, 32, 32]  # 56 * 32 / 40 = 44.8 -> 45 wide, (45 - 32) // 2


def test_row_26_new_and_edited_files_are_added_without_renumbering(tmp_path):
    vae, folder, out = small_vae(), tmp_path / "in", tmp_path / "out"
    write_pictures(folder, 3)
    encode(folder, out, vae=vae, **OPTIONS)
    before = (out / "shards" / "000000-32x32.safetensors").read_bytes()
    picture(50).save(folder / "000-first.png")
    picture(51, 60, 44).save(folder / "001.png")
    report = encode(folder, out, vae=vae, **OPTIONS)
    assert (report.ok, report.resumed) == (2, 2)
    assert (out / "plan" / "units-00001.jsonl").exists()
    assert (out / "shards" / "000000-32x32.safetensors").read_bytes() == before
    stored = latents(out)
    assert sorted(stored) == ["000-first.png", "000.png", "001.png", "002.png"]
    for key in stored:
        assert_half_equal(stored[key], expected(vae, folder / key))
    # Edited into something unreadable: the old latent must not be served under its key.
    (folder / "001.png").write_bytes(b"spoilt")
    encode(folder, out, vae=vae, **OPTIONS)
    assert sorted(latents(out)) == ["000-first.png", "000.png", "002.png"]


def test_limit_takes_the_first_and_a_later_run_the_rest(tmp_path):
    names = write_pictures(tmp_path / "in", 5)
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), limit=2, **OPTIONS)
    assert sorted(latents(tmp_path / "out")) == names[:2]
    report = encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **OPTIONS)
    assert (report.ok, report.resumed) == (3, 2)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"vae": small_vae(1)}, "model.encoder_weights_sha256"),
        ({"vae": small_vae(0, scaling_factor=0.5)}, "model.config.scaling_factor"),
        ({"dtype": "bf16"}, "numerics.dtype"),
        ({"posterior": "mean"}, "numerics.posterior"),
        ({"store_dtype": "fp32"}, "numerics.mean"),
        ({"buckets": 64}, "preprocess.buckets"),
        ({"alpha": "drop"}, "preprocess.alpha"),
        ({"alpha": "mask"}, "preprocess.alpha"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_row_25_another_identity_is_refused_field_by_field(tmp_path, change, field):
    write_pictures(tmp_path / "in", 1)
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **OPTIONS)
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(IdentityMismatch, match=field):
        encode(tmp_path / "in", tmp_path / "out", **({"vae": small_vae()} | OPTIONS | change))
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == files


def test_a_run_without_a_dtype_continues_the_stores(tmp_path):
    write_pictures(tmp_path / "in", 2)
    options = {**OPTIONS, "dtype": None}
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), limit=1, **OPTIONS)
    assert encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **options).dtype == "fp32"


def test_another_folders_rows_are_not_mixed_in(tmp_path):
    write_pictures(tmp_path / "in", 1)
    (tmp_path / "other").mkdir()
    picture(9).save(tmp_path / "other" / "another.png")
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **OPTIONS)
    with pytest.raises(ValueError, match="was made from another folder"):
        encode(tmp_path / "other", tmp_path / "out", vae=small_vae(), **OPTIONS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"posterior": "draw"}, "posterior must be one of 'dist', 'mean', 'sample', got 'draw'"),
        ({"crop": "left"}, "crop must be one of 'centre', 'random', got 'left'"),
        ({"logvar": "fp32"}, "logvar must be one of 'fp16', 'u8', got 'fp32'"),
        ({"variants": 0}, "variants must be from 1 to 32768, got 0"),
        ({"variants": 2}, "variants must be 1 with crop='centre'"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"buckets": 30}, "buckets must be a multiple"),
        ({"batch": 0}, "batch must be 'auto' or at least 1, got 0"),
        ({"workers": "many"}, "workers must be"),
        ({"shard_mb": 0}, "shard_mb must be above 0"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"max_pixels": 0}, "max_pixels must be at least 1"),
        ({"max_failures": "-1%"}, "max_failures must be"),
        ({"max_failures": "nan%"}, "max_failures must be"),
        ({"vae": torch.nn.Linear(1, 1)}, "vae must be a loaded model with the methods of AutoencoderKL, got Linear"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_wrong_arguments_are_refused(tmp_path, change, words):
    write_pictures(tmp_path / "in", 1)
    with pytest.raises(ValueError, match=words):
        encode(tmp_path / "in", tmp_path / "out", **({"vae": small_vae()} | OPTIONS | change))


def test_the_output_is_not_the_source_nor_a_folder_of_other_things(tmp_path):
    write_pictures(tmp_path / "in", 1)
    with pytest.raises(ValueError, match="out must be another folder than src"):
        encode(tmp_path / "in", tmp_path / "in", vae=small_vae(), **OPTIONS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("mine")
    with pytest.raises(StoreError, match="neither empty nor a latent store"):
        encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **OPTIONS)
