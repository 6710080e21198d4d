"""Exports are read back bit for bit by the readers of their users."""

import errno
import importlib.util
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from support.small_store import MASK, moments_of, opacity_of, write_store

from fastvae.data.exporting import export as exports
from fastvae.data.exporting.export import export
from fastvae.data.exporting.kohya import crop_ltrb
from fastvae.data.rows import noise_key
from fastvae.data.store.errors import StoreError
from fastvae.latents.cpu_sampling import draw

BUCKETS = {(32, 32): [f"a/{n}.b.png" for n in range(5)], (48, 32): [f"tall{n}.png" for n in range(3)]}
KEYS = {key: bucket for bucket, keys in BUCKETS.items() for key in keys}
CAPTIONS = {"a/0.b.png": {"caption": "a \u2603"}}


CHANNELS = {"sd": 4, "sdxl": 4, "sd3": 16, "flux": 16}


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "store", BUCKETS, columns=CAPTIONS)


def run(store, out, to, **options):
    return export(store, out, to=to, progress=False, **options)


def bits(array):
    """Return dtype, shape and bytes."""
    array = np.ascontiguousarray(array)
    return array.dtype.str, array.shape, array.tobytes()


def check(key, variant, found):
    """Compare mean and logvar that were read back with the stored ones."""
    for name, stored in zip(("mean", "logvar"), moments_of(key, variant, KEYS[key]), strict=True):
        assert bits(found[name]) == bits(stored), (key, name)


# WebDataset leaves the archives open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_tars(store, tmp_path):
    wds = pytest.importorskip("webdataset", reason="WebDataset is not installed")
    done = run(store, tmp_path / "out", "wds", shard_mb=0.003)
    tars = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    assert len(tars) > 2
    assert (done.rows, done.files) == (8, len(tars) + 1)
    rows = list(wds.WebDataset(tars, shardshuffle=False).decode())
    assert [row["json"]["key"] for row in rows] == list(KEYS)
    for row in rows:
        check(row["json"]["key"], 0, {"mean": row["mean.npy"], "logvar": row["logvar.npy"]})
    assert rows[0]["json"]["columns"] == {"caption": "a \u2603"}
    assert rows[5]["json"]["bucket"] == rows[5]["json"]["original_hw"] == [48, 32]
    assert rows[5]["json"]["crop_tlhw"] == [0, 0, 48, 32]


def test_pyarrow_reads_the_parquet_files(store, tmp_path):
    done = run(store, tmp_path / "out", "parquet", shard_mb=0.0005)
    paths = sorted((tmp_path / "out").glob("*.parquet"))
    assert len(paths) == done.files - 1
    assert len(paths) > 1
    rows = [row for path in paths for row in pyarrow.parquet.read_table(path).to_pylist()]
    assert [row["key"] for row in rows] == list(KEYS)
    for row in rows:
        found = {name: np.array(row[name], np.float16).reshape(row["latent_shape"]) for name in ("mean", "logvar")}
        check(row["key"], row["variant"], found)
    about = json.loads(pyarrow.parquet.read_schema(paths[0]).metadata[b"fastvae"])
    assert about == json.loads((tmp_path / "out" / "export.json").read_text())
    assert (about["space"], about["posterior"], about["noise"]) == ("raw", "dist", None)
    assert json.loads(rows[0]["columns"]) == {"caption": "a \u2603"}


def test_datasets_loads_the_folder(store, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    run(store, tmp_path / "out", "hf")
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert list(rows["key"]) == list(KEYS)
    for row in rows.with_format("numpy"):
        shape = row["latent_shape"].tolist()
        found = {name: row[name].astype(np.float16).reshape(shape) for name in ("mean", "logvar")}
        check(row["key"], int(row["variant"]), found)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_numpy_reads_the_caches_of_sd_scripts(tmp_path, family):
    channels = CHANNELS[family]
    store = write_store(tmp_path / "store", BUCKETS, columns=CAPTIONS, channels=channels)
    run(store, tmp_path / "out", "npz-kohya", family=family, seed=3)
    files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.npz"))
    expected = [f"a/{n}.b_0032x0032_{family}.npz" for n in range(5)]
    assert files == expected + [f"tall{n}_0032x0048_{family}.npz" for n in range(3)]
    mean, logvar = (torch.from_numpy(part)[None].float() for part in moments_of("tall1.png", 0, (48, 32), channels))
    drawn = draw(mean, logvar, [noise_key(3, 0, "tall1.png")])[0]
    ending = "_6x4" if family in ("sd3", "flux") else ""
    with np.load(tmp_path / "out" / f"tall1_0032x0048_{family}.npz", allow_pickle=False) as cache:
        assert sorted(cache.files) == sorted(f"{n}{ending}" for n in ("latents", "original_size", "crop_ltrb"))
        found = cache[f"latents{ending}"]
        assert cache[f"original_size{ending}"].tolist() == [32, 48]
        assert cache[f"crop_ltrb{ending}"].tolist() == [0, 0, 32, 48]
    if family == "flux":  # scaled by 0.5, a power of two, so rounding is the same
        drawn = draw(mean * 0.5, logvar + 2 * torch.tensor(0.5).log(), [noise_key(3, 0, "tall1.png")])[0]
    assert bits(found) == bits(drawn.numpy())


def test_mirrored_rows_are_latents_flipped(tmp_path):
    names = [("a.png", 0), ("a.png", 1)]
    store = write_store(tmp_path / "store", {(32, 32): names})
    with pytest.raises(ValueError, match=r"holds one crop: a\.png has several"):
        run(store, tmp_path / "crops", "npz-kohya", posterior="mean")
    store = write_store(tmp_path / "mirrored", {(32, 32): names}, preprocess={"flip": True})
    run(store, tmp_path / "out", "npz-kohya", posterior="mean")
    with np.load(tmp_path / "out" / "a_0032x0032_sdxl.npz") as cache:
        for name, variant in (("latents", 0), ("latents_flipped", 1)):
            assert bits(cache[name]) == bits(moments_of("a.png", variant, (32, 32))[0].astype(np.float32))


def test_the_crop_is_that_of_the_example_for_sd_scripts(monkeypatch):
    spec = importlib.util.spec_from_file_location("example", Path(__file__).parents[3] / "examples/cache_latents.py")
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "example", example)
    spec.loader.exec_module(example)
    generator = np.random.default_rng(0)
    for width, height, across, down in generator.integers(1, 3000, (200, 4)).tolist():
        assert crop_ltrb((width, height), (across, down)) == example.crop_ltrb((width, height), (across, down))


def test_a_scaled_export_of_means_alone(store, tmp_path):
    done = run(store, tmp_path / "out", "wds", posterior="mean", scaled=True)
    assert (done.about["space"], done.about["posterior"]) == ("scaled", "mean")
    with tarfile.open(next((tmp_path / "out").glob("*.tar"))) as tar:
        assert [name for name in tar.getnames() if name.startswith("000000000.")] == [
            "000000000.mean.npy",
            "000000000.json",
        ]
        values = np.load(io.BytesIO(tar.extractfile("000000000.mean.npy").read()))
    assert bits(values) == bits(moments_of("a/0.b.png", 0, (32, 32))[0].astype(np.float32) * np.float32(0.5))


def test_a_store_of_draws_is_exported_as_draws(tmp_path):
    store = write_store(tmp_path / "store", {(32, 32): ["x.png"]}, posterior="sample")
    run(store, tmp_path / "out", "npz-kohya")
    with np.load(tmp_path / "out" / "x_0032x0032_sdxl.npz") as cache:
        assert bits(cache["latents"]) == bits(moments_of("x.png", 0, (32, 32))[0].astype(np.float32))


def test_rows_not_committed_are_left_out_and_counted(store, tmp_path, capsys):
    """One unit was never encoded, and one has a damaged record."""
    last, first = (store / "shards" / name for name in ("000002-48x32.json", "000000-32x32.json"))
    for out, (damage, pending) in {"unmade": (last.unlink, 3), "noise": (lambda: first.write_text("[]"), 7)}.items():
        damage()
        done = export(store, tmp_path / out, to="wds")
        assert (done.rows, done.pending, done.about["pending"]) == (8 - pending, pending, pending)
        assert json.loads((tmp_path / out / "export.json").read_text())["pending"] == pending
        assert f"{8 - pending} rows of 8, the others are not committed  wds" in capsys.readouterr().err


def test_a_complete_store_is_exported_completely(store, tmp_path, capsys):
    done = export(store, tmp_path / "out", to="wds")
    assert (done.rows, done.pending, done.about["pending"]) == (8, 0, 0)
    assert "8 rows  wds" in capsys.readouterr().err


# Masks


@pytest.fixture
def masked(tmp_path):
    return write_store(tmp_path / "masked", BUCKETS, preprocess=MASK)


# WebDataset leaves the archives open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_masks(masked, tmp_path):
    wds = pytest.importorskip("webdataset", reason="WebDataset is not installed")
    run(masked, tmp_path / "out", "wds", posterior="sample")
    (tar,) = (tmp_path / "out").glob("*.tar")
    rows = list(wds.WebDataset([str(tar)], shardshuffle=False).decode())
    assert [row["json"]["key"] for row in rows] == list(KEYS)
    for row in rows:
        assert bits(row["alpha.npy"]) == bits(opacity_of(row["json"]["key"], 0, KEYS[row["json"]["key"]]))


def test_pyarrow_and_datasets_read_the_masks(masked, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    for to in ("parquet", "hf"):
        run(masked, tmp_path / to, to)
    rows = pyarrow.parquet.read_table(tmp_path / "parquet" / "rows-00000.parquet").to_pylist()
    loaded = datasets.load_dataset(str(tmp_path / "hf"), split="train", cache_dir=str(tmp_path / "cache"))
    for found in (rows, loaded.with_format("numpy")):
        assert [row["key"] for row in found] == list(KEYS)
        for row in found:
            shape = [int(side) for side in row["alpha_shape"]]
            alpha = np.array(row["alpha"], np.uint8).reshape(shape)
            assert bits(alpha) == bits(opacity_of(row["key"], 0, KEYS[row["key"]]))
    assert str(loaded.features["alpha"].feature.dtype) == "uint8"


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_sd_scripts_weights_its_loss_by_the_masks(tmp_path, family):
    """The trainer stacks masks at the bucket's size and takes their mean over each latent; it mirrors them itself."""
    names = [("a.png", 0), ("a.png", 1), ("b.png", 0)]
    store = write_store(
        tmp_path / "store", {(48, 32): names}, preprocess={**MASK, "flip": True}, channels=CHANNELS[family]
    )
    run(store, tmp_path / "out", "npz-kohya", family=family)
    ending = "_6x4" if family == "flux" else ""
    for key in ("a.png", "b.png"):
        with np.load(tmp_path / "out" / f"{key[0]}_0032x0048_{family}.npz", allow_pickle=False) as cache:
            assert (f"latents_flipped{ending}" in cache.files) == (key == "a.png")
            found = cache[f"alpha_mask{ending}"]
        assert (found.dtype, found.shape) == (np.float32, (48, 32))
        weights = torch.nn.functional.interpolate(torch.from_numpy(found)[None, None], size=(6, 4), mode="area")
        levels = opacity_of(key, 0, (48, 32))
        assert np.array_equal(torch.round(weights[0, 0] * 255).byte(), levels)
        # Each of the 63 additions of a sum is rounded by half a step.
        assert np.abs(weights[0, 0].numpy() - levels / 255).max() <= 32 * np.finfo(np.float32).eps
    assert (tmp_path / "out" / f"a_0032x0048_{family}.npz").stat().st_size < 48 * 32 * 4


@pytest.mark.parametrize("to", exports.FORMATS)
def test_an_existing_folder_is_not_replaced(store, tmp_path, to):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match=r"dst must be a new folder, .*out is there already"):
        run(store, tmp_path / "out", to)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("key", ["../x.png", "/x.png", "a\n.png", "c:\\x.png"])
def test_a_hostile_key_writes_nothing(tmp_path, key):
    store = write_store(tmp_path / "store", {(32, 32): ["good.png", key]})
    with pytest.raises(ValueError, match="is no relative path"):
        run(store, tmp_path / "exports" / "out", "npz-kohya")
    assert not list((tmp_path / "exports").iterdir())
    run(store, tmp_path / "exports" / "out", "wds")
    assert {path.parent for path in tmp_path.rglob("*.tar")} == {tmp_path / "exports" / "out"}


def test_keys_of_one_cache_are_named_and_the_rest_is_written(tmp_path):
    store = write_store(tmp_path / "store", {(32, 32): ["x.png", "y.png", "x.jpg", "x.webp", "a/x.png"]})
    done = run(store, tmp_path / "out", "npz-kohya")
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert written == {"y_0032x0032_sdxl.npz", "a/x_0032x0032_sdxl.npz", "export.json"}
    assert (done.rows, done.files, done.clashes) == (2, 3, [["x.png", "x.jpg", "x.webp"]])
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == done.about
    assert (done.about["rows"], done.about["clashes"]) == (2, done.clashes)


def test_a_key_that_is_not_utf_8_is_exported_to_tars_alone(tmp_path):
    store = write_store(tmp_path / "store", {(32, 32): ["\udcff.png"]})
    with pytest.raises(ValueError, match="is not UTF-8"):
        run(store, tmp_path / "out", "parquet")
    run(store, tmp_path / "out", "wds")


def test_a_full_disk_leaves_nothing(store, tmp_path, monkeypatch):
    def full(path, parts):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(exports, "write_atomically", full)
    with pytest.raises(OSError, match="no space"):
        run(store, tmp_path / "out", "wds")
    assert os.listdir(tmp_path) == ["store"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"to": "mds"}, "to must be one of 'npz-kohya', 'wds', 'parquet', 'hf', got 'mds'"),
        ({"to": "wds", "posterior": "std"}, "posterior must be one of 'dist'"),
        ({"to": "npz-kohya", "posterior": "dist"}, "holds one latent an image"),
        ({"to": "npz-kohya", "scaled": True}, "scaled must be left out for npz-kohya"),
        ({"to": "npz-kohya", "family": "sdx"}, "family must be one of"),
        ({"to": "wds", "family": "sdxl"}, "family must be left out for wds: it is of npz-kohya's caches, got 'sdxl'"),
        ({"to": "wds", "shard_mb": 0}, "shard_mb must be above 0"),
        ({"to": "wds", "seed": -1}, "seed must be"),
    ],
)
def test_wrong_arguments_are_refused(store, tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words):
        export(store, tmp_path / "out", progress=False, **wrong)


def test_a_folder_that_is_not_a_store_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"it has no store\.json"):
        run(tmp_path, tmp_path / "out", "wds")


def test_kohyas_caches_go_beside_their_images_and_a_clash_is_named(tmp_path):
    store = write_store(tmp_path / "store", {(32, 32): ["a/x.png", "a/x.jpg", "a/y.png", "z.png"]})
    images = tmp_path / "images"
    (images / "a").mkdir(parents=True)
    (images / "a" / "x.png").write_bytes(b"an image")
    done = export(store, images, to="npz-kohya", family="sdxl", beside_images=True, progress=False)
    assert sorted(path.relative_to(images).as_posix() for path in images.rglob("*.*")) == [
        "a/x.png", "a/y_0032x0032_sdxl.npz", "z_0032x0032_sdxl.npz"
    ]  # fmt: skip
    assert (done.rows, done.files, [sorted(keys) for keys in done.clashes]) == (2, 2, [["a/x.jpg", "a/x.png"]])
    export(store, images, to="npz-kohya", family="sdxl", beside_images=True, progress=False)  # replaces them
    assert sorted(tmp_path.iterdir()) == [images, tmp_path / "store"]
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"dst must be the folder of the images with beside_images, .*other has none"):
        export(store, tmp_path / "other", to="npz-kohya", beside_images=True, progress=False)
    assert not list((tmp_path / "other").iterdir())
    for to, place in (("wds", images), ("npz-kohya", tmp_path / "nothing")):
        with pytest.raises(ValueError, match="beside_images must be used with npz-kohya and the folder of the images"):
            export(store, place, to=to, beside_images=True)
