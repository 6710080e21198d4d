"""Decoding of rows to PNG files, and contact sheets."""

import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from support.small_store import SIDE, small_vae, write_pictures

from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.decoding.contact_sheet import write_sheet
from fastvae.data.decoding.decode import decode, parse_rows, safe_name
from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.report import EncodeReport, parse_limit

OPTIONS = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("decode")
    write_pictures(root / "in", 3)
    with pytest.MonkeyPatch.context() as patch:  # conftest.py patches after fixtures of the module
        patch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", ())
        encode(root / "in", root / "out", vae=small_vae(), buckets=SIDE, dtype="fp32", progress=False, device="cpu")
    return root / "out"


def test_rows_are_decoded_under_their_own_keys(made, tmp_path):
    vae = small_vae()
    written = decode(made, tmp_path / "png", rows=slice(1, 3), vae=vae)
    assert [(key, path.name) for key, path in written] == [
        ("001.png", "000001-001.png.png"),
        ("002.png", "000002-002.png.png"),
    ]
    with torch.no_grad():
        sample = vae.decode(LatentDataset(made)[1]["mean"][None].float()).sample[0]
    expected = ((sample / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    with Image.open(written[0][1]) as image:
        shown = np.asarray(image)
    assert shown.shape == (SIDE, SIDE, 3)
    # Rounding to the nearest level, and a hundredth for scaling there and back in fp32.
    assert np.abs(shown - expected).max() <= 0.51


@pytest.mark.skipif(os.name != "posix", reason="this system limits no file's size")
@pytest.mark.parametrize("full", ["a picture", "a sheet"])
def test_row_15_an_incomplete_picture_is_never_left(tmp_path, full):
    """A limit on file size refuses bytes in the middle of the file, as a full disk does."""
    resource = pytest.importorskip("resource")
    vae, out, side = small_vae(), tmp_path / "png", 128  # more than Pillow writes in one call
    options = {"buckets": side, "dtype": "fp32", "progress": False, "device": "cpu"}
    write_pictures(tmp_path / "in", 1)
    encode(tmp_path / "in", tmp_path / "out", vae=vae, **options)
    decode(tmp_path / "out", out, vae=vae, progress=False)
    (written,) = out.iterdir()
    before, size = written.read_bytes(), written.stat().st_size
    black = np.zeros((side, side, 3), np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    writers = {
        "a picture": lambda: decode(tmp_path / "out", out, vae=vae, progress=False),
        "a sheet": lambda: write_sheet([("a", black, noise)], written),
    }
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            writers[full]()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in out.iterdir()] == [written.name]
    assert written.read_bytes() == before


def test_a_store_of_draws_is_decoded_from_its_draws(tmp_path):
    write_pictures(tmp_path / "in", 2)
    vae, out = small_vae(), tmp_path / "out"
    options = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu"}
    encode(tmp_path / "in", out, vae=vae, posterior="sample", **options)
    written = decode(out, tmp_path / "png", vae=vae, progress=False)
    with torch.no_grad():
        sample = vae.decode(LatentDataset(out)[1]["latents"][None].float()).sample[0]
    expected = ((sample / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    with Image.open(written[1][1]) as image:
        assert np.abs(np.asarray(image) - expected).max() <= 0.51


def test_arguments_are_refused(made, tmp_path):
    with pytest.raises(ValueError, match="rows must be among the store's 0:3, got 7:9"):
        decode(made, tmp_path, rows=slice(7, 9), vae=small_vae())
    with pytest.raises(ValueError, match=r"got 7:$"):
        decode(made, tmp_path, rows=slice(7, None), vae=small_vae())
    with pytest.raises(ValueError, match=r"sheet must be a file in a folder that is there, got '.*gone/sheet\.png'"):
        decode(made, tmp_path / "png", vae=small_vae(), sheet=tmp_path / "gone" / "sheet.png")
    assert not (tmp_path / "png").exists()
    with pytest.raises(ValueError, match="the model decodes 8 latent channels, the store has 4"):
        decode(made, tmp_path, vae=small_vae(latent_channels=8))
    with pytest.raises(ValueError, match="vae must be given"):
        decode(made, tmp_path)


@pytest.mark.parametrize(
    ("text", "rows"), [("0:16", slice(0, 16)), ("4", slice(4, 5)), (":3", slice(0, 3)), ("2:", slice(2, None))]
)
def test_rows_are_parsed(text, rows):
    assert parse_rows(text) == rows


@pytest.mark.parametrize("text", ["", "a", "-1:2", "1:2:3", "1-2", "٣"])
def test_other_rows_are_refused(text):
    with pytest.raises(ValueError, match="rows must look like 0:16"):
        parse_rows(text)


@pytest.mark.parametrize("key", ["../../etc/passwd", "a/b\n\x1b[31m.png", "..", "", "x" * 300, "con\0.png"])
def test_row_13_no_key_leaves_the_folder(key):
    name = safe_name(key)
    assert 0 < len(name) <= 80
    assert name[0] != "."
    assert not set(name) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def test_the_sheet_shows_each_pair_side_by_side(tmp_path):
    red, blue = np.full((32, 32, 3), (255, 0, 0), np.uint8), np.full((32, 32, 3), (0, 0, 255), np.uint8)
    write_sheet([("a", red, blue), ("b", blue, red), ("c", red, red)], tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        sheet = np.asarray(image)
    assert sheet.shape == (2 * 56, 2 * 72, 3)
    assert sheet[30, 10].tolist() == [255, 0, 0]
    assert sheet[30, 40].tolist() == [0, 0, 255]
    assert sheet[30, 72 + 10].tolist() == [0, 0, 255]
    with pytest.raises(ValueError, match="at least one picture"):
        write_sheet([], tmp_path / "none.png")


@pytest.mark.parametrize(
    ("limit", "total", "allowed"),
    [
        ("5 or 0.1%", 57, 5),
        ("5 or 0.1%", 9000, 9),
        ("0.1%", 1000, 1),
        ("0.1%", 999, 0),
        ("100%", 5, 5),
        (0.25, 8, 2),
        (3, 10, 3),
        ("3", 10, 3),
        (0, 10, 0),
    ],
)
def test_failure_limits(limit, total, allowed):
    assert parse_limit(limit, total) == allowed


def test_the_report_names_the_bottleneck():
    report = EncodeReport("out", "id", "fp32", None, ok=10, seconds=2.0, decode_seconds=9, encode_seconds=4, workers=2)
    report.judge(on_cpu=True)
    assert report.bottleneck == "decode"
    assert report.images_per_second == 5
    report.judge(on_cpu=False)  # on a GPU one thread encodes and two decode: 4.5 s each against 4
    assert report.bottleneck == "decode"
    report.encode_seconds = 10
    report.judge(on_cpu=True)
    assert report.bottleneck == "encode"


@pytest.fixture
def source(tmp_path):
    """A folder of two pictures."""
    write_pictures(tmp_path / "in", 2)
    return tmp_path / "in"


def test_decode_opens_the_stores_model_and_refuses_other_weights(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    small_vae().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    encode(source, out, vae="model", **OPTIONS)
    monkeypatch.chdir(source)
    assert LatentDataset(out).made_with["vae"] == str(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert len(decode(out, tmp_path / "png", device="cpu")) == 2
        # The same weights in other files are the same model.
        (tmp_path / "again").mkdir()
        vae = small_vae()
        vae.save_pretrained(tmp_path / "again", max_shard_size="8KB")
        assert len(decode(out, tmp_path / "png", vae=tmp_path / "again", device="cpu")) == 2
        assert len(decode(out, tmp_path / "png", vae=vae)) == 2
    small_vae(1).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds other weights than those the store was made with"):
        decode(out, tmp_path / "other", device="cpu")
    assert not (tmp_path / "other").exists()
    with pytest.warns(UserWarning, match="is another model than the one"):
        decode(out, tmp_path / "other", vae=tmp_path / "model", device="cpu")


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA"), (2, None)])
def test_images_of_other_channels(source, tmp_path, channels, mode):
    vae = small_vae(out_channels=channels)
    encode(source, tmp_path / "out", vae=vae, **OPTIONS)
    if mode is None:
        with pytest.raises(ValueError, match="decodes to 2 channels; a picture has 1, 3 or 4"):
            decode(tmp_path / "out", tmp_path / "png", vae=vae)
        assert not (tmp_path / "png").exists()
        return
    ((_, path), *_) = decode(tmp_path / "out", tmp_path / "png", vae=vae)
    with Image.open(path) as image:
        assert image.mode == mode
