"""Caches in the format of sd-scripts: names, arrays, sizes, and latents that depend only on the picture."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from support.accuracy import assert_as_accurate
from support.small_store import picture, small_vae

import fastvae

SIDE, STEP, LEAST, MOST = 64, 16, 32, 128


@pytest.fixture(scope="module")
def kohya(example):
    return example("cache_latents")


@pytest.fixture(scope="module")
def vae():
    return small_vae(scaling_factor=0.5, shift_factor=0.25)


@pytest.fixture
def photographs(tmp_path):
    (tmp_path / "deep").mkdir()
    picture(0, 96, 80).save(tmp_path / "wide.png")
    picture(1, 80, 96).save(tmp_path / "deep" / "tall.jpg")
    picture(2, 100, 80).save(tmp_path / "other.webp")
    picture(3, 160, 64).save(tmp_path / "long.png")
    (tmp_path / "caption.txt").write_text("a beach")
    return tmp_path


def planned(kohya, folder):
    return kohya.plan(folder, kohya.bucket_sizes(SIDE, STEP, LEAST, MOST), [])


def arrays(path):
    with np.load(path) as file:
        return dict(file)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_a_cache_has_the_names_that_are_read(kohya, vae, photographs, family):
    """SD3 and FLUX.1 keep several resolutions in one file, the others one."""
    assert kohya.cache(vae, planned(kohya, photographs), family, [], batch=2, flip=True) == 4
    written = {str(path.relative_to(photographs)) for path in photographs.rglob("*.npz")}
    sizes = {"wide": "0096x0080", "deep/tall": "0080x0096", "other": "0100x0080", "long": "0160x0064"}
    assert written == {f"{name}_{size}_{family}.npz" for name, size in sizes.items()}
    assert not list(photographs.rglob("*.tmp"))
    held = arrays(photographs / f"long_0160x0064_{family}.npz")
    ending = "_4x12" if family in ("sd3", "flux") else ""
    assert set(held) == {f"{name}{ending}" for name in ("latents", "latents_flipped", "original_size", "crop_ltrb")}


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_latents_are_draws_raw_or_scaled(kohya, vae, photographs, family):
    kohya.cache(vae, planned(kohya, photographs), family, [], batch=1, flip=True)
    values = arrays(photographs / f"long_0160x0064_{family}.npz")
    held = {name.split("_4x12")[0]: value for name, value in values.items()}
    assert held["latents"].dtype == np.float32
    assert held["latents"].shape == (4, 4, 12)
    assert held["original_size"].tolist() == [160, 64]
    # 160 x 64 fitted inside 96 x 32: full height, 80 wide, 8 from the left.
    assert held["crop_ltrb"].tolist() == [8, 0, 88, 32]
    with Image.open(photographs / "long.png") as image:
        pixels = torch.from_numpy(np.array(image.resize((96, 38), Image.Resampling.LANCZOS).crop((0, 3, 96, 35))))
    x = pixels.permute(2, 0, 1)[None] / 127.5 - 1
    for name, seen in (("latents", x), ("latents_flipped", x.flip(3))):
        eager, truth = (
            drawn(model, seen.to(model.dtype), fastvae.noise_key(0, 0, "long.png", 0), scaled=family == "flux")
            for model in (vae, copy.deepcopy(vae).double())
        )
        assert_as_accurate(torch.from_numpy(held[name]), eager, truth)


@torch.no_grad()
def drawn(vae, x, seed, *, scaled):
    z = vae.encode(x).latent_dist.sample(seeds=[seed])[0]
    return (z - 0.25) * 0.5 if scaled else z


def test_neither_batch_nor_order_changes_a_picture(kohya, vae, photographs, tmp_path):
    one = fastvae.accelerate(copy.deepcopy(vae), deterministic=True)
    pictures = planned(kohya, photographs)
    kohya.cache(one, pictures, "sdxl", [], batch=1)
    alone = {path: path.read_bytes() for path in photographs.rglob("*.npz")}
    for path in alone:
        path.unlink()
    kohya.cache(one, sorted(pictures, key=lambda picture: picture.bucket, reverse=True), "sdxl", [], batch=4)
    for path, bytes_ in alone.items():
        assert path.read_bytes() == bytes_, path
    kohya.cache(one, pictures, "sd", [], batch=4, seed=1)
    latents = [arrays(photographs / f"long_0160x0064_{family}.npz")["latents"] for family in ("sdxl", "sd")]
    assert not np.array_equal(*latents), "another seed, another draw"


def test_cached_pictures_are_not_encoded_again(kohya, vae, photographs):
    pictures = planned(kohya, photographs)
    assert kohya.cache(vae, pictures, "sd3", [], batch=2) == 4
    assert kohya.cache(vae, pictures, "sd3", [], batch=2) == 0
    kept = arrays(photographs / "wide_0096x0080_sd3.npz")
    # Another resolution is added to the same file.
    assert kohya.cache(vae, kohya.plan(photographs, [(32, 32)], []), "sd3", [], batch=2) == 4
    both = arrays(photographs / "wide_0096x0080_sd3.npz")
    assert {name: value.tolist() for name, value in both.items() if "4x4" not in name} == {
        name: value.tolist() for name, value in kept.items()
    }
    assert both["latents_4x4"].shape == (4, 4, 4)
    # The caches have no mirrored latents yet.
    assert kohya.cache(vae, pictures, "sd3", [], batch=2, flip=True) == 4


def test_two_pictures_of_one_cache_are_named_and_left_out(kohya, photographs, capsys):
    picture(3, 96, 80).save(photographs / "wide.jpg")
    assert len(planned(kohya, photographs)) == 3
    assert capsys.readouterr().out == (
        f"left out: {photographs / 'wide.jpg'}, {photographs / 'wide.png'} would share one cache: rename one\n"
    )
    picture(3, 96, 81).save(photographs / "wide.jpg")
    assert len(planned(kohya, photographs)) == 5


def test_buckets(kohya):
    sizes = kohya.bucket_sizes(512)
    # The bucket sizes of sd-scripts for a model of 512.
    narrow = [(256, side) for side in range(832, 1025, 64)] + [(320, 704), (320, 768), (384, 640), (448, 576)]
    assert set(sizes) == {(512, 512), *narrow, *((high, wide) for wide, high in narrow)}
    assert kohya.bucket_for((1024, 1024), sizes) == (512, 512)
    assert kohya.bucket_for((3000, 2000), sizes) == (640, 384)
    assert kohya.bucket_for((320, 704), sizes) == (320, 704)
    assert max(map(max, kohya.bucket_sizes(1536))) == 1536


def test_as_a_command(kohya, vae, photographs, tmp_path_factory, monkeypatch, capsys):
    model = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(model)
    options = ["--side", SIDE, "--step", STEP, "--least", LEAST, "--most", MOST, "--family", "sdxl"]
    monkeypatch.setattr("sys.argv", ["cache_latents.py", *map(str, [photographs, "--vae", model, *options])])
    kohya.main()
    assert capsys.readouterr().out == "4 of 4 pictures encoded, in 2 buckets; 0 skipped\n"
    assert arrays(photographs / "long_0160x0064_sdxl.npz")["latents"].shape == (4, 4, 12)


def test_broken_pictures_are_skipped_named_and_counted(kohya, vae, photographs, tmp_path_factory, monkeypatch, capsys):
    """One that is no picture, and one that is cut: its header is read, its pixels are not."""
    (photographs / "text.png").write_text("no picture")
    whole = (photographs / "wide.png").read_bytes()
    (photographs / "cut.png").write_bytes(whole[: len(whole) // 2])
    model = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(model)
    options = ["--side", SIDE, "--step", STEP, "--least", LEAST, "--most", MOST, "--family", "sd3", "--flip"]
    monkeypatch.setattr("sys.argv", ["cache_latents.py", *map(str, [photographs, "--vae", model, *options])])
    kohya.main()
    *named, last = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2].partition(": ")[0] for line in named] == [
        str(photographs / "text.png"),
        str(photographs / "cut.png"),
    ]
    assert last == "4 of 5 pictures encoded, in 2 buckets; 2 skipped"
    assert len(list(photographs.rglob("*_sd3.npz"))) == 4


def test_a_folder_without_pictures_is_refused(kohya, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cache_latents.py", str(tmp_path), "--vae", "nowhere", "--family", "sd"])
    with pytest.raises(SystemExit):
        kohya.main()
    assert "there is no picture (.bmp, .jpeg, .jpg, .png, .webp) under" in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(kohya, photographs, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(
        "sys.argv", ["cache_latents.py", str(photographs), "--vae", str(tmp_path / "empty"), "--family", "sd"]
    )
    with pytest.raises(SystemExit) as ended:
        kohya.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"cache_latents.py: error: {tmp_path / 'empty'}")
