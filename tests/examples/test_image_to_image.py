"""The swap-in example as a command, and the calls that its clock counts."""

import re
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import fastvae


@pytest.fixture(scope="module")
def image_to_image(example):
    return example("image_to_image")


@pytest.fixture
def run(image_to_image, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["image_to_image.py", *map(str, arguments)])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            image_to_image.main()
        return capsys.readouterr().out

    return call


def test_it_prints_the_vaes_share_before_and_after(run, tmp_path):
    printed = run("--tiny", "--side", 32, "--steps", 2, "--repeat", 1, "--out", tmp_path / "out.png")
    clocks = re.findall(r"^(diffusers|fastvae) +([\d.]+) s, ([\d.]+) s of it \((\d+)%\) in the VAE$", printed, re.M)
    assert [name for name, *_ in clocks] == ["diffusers", "fastvae"]
    assert all(0 < int(share) <= 100 for *_, share in clocks)
    # Random weights in fp32: only rounding differs.
    assert int(re.search(r"by (\d+) of 255 at most", printed)[1]) <= 1
    assert "not fused  2 x CPU: no fused kernel runs on this device" in printed
    written = np.asarray(Image.open(tmp_path / "out.png"))
    assert written.shape == (32, 32, 3)
    assert written.std() > 5, "a picture of one colour has no differences"


def test_it_starts_from_a_picture(run, tmp_path):
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "in.png")
    options = ["--tiny", "--side", 32, "--steps", 2, "--repeat", 1]
    run(tmp_path / "in.png", *options, "--out", tmp_path / "red.png")
    run(*options, "--out", tmp_path / "grey.png")
    red, grey = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("red", "grey"))
    assert not np.array_equal(red, grey)


@pytest.mark.parametrize("arguments", [[], ["--model", "there"], ["--model", "there", "--tiny", "in.png"]])
def test_missing_arguments_are_refused(run, arguments, capsys):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert "give a picture and --model, or --tiny" in capsys.readouterr().err


def test_the_clock_counts_only_the_vae_and_is_removed(image_to_image):
    vae = image_to_image.tiny_pipeline().vae
    stock = dict(vars(vae))
    with torch.no_grad(), image_to_image.clocked(vae) as seconds:
        started = time.perf_counter()
        z = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mode()
        time.sleep(0.2)
        vae.decode(z)
        passed = time.perf_counter() - started
    assert 0 < seconds["vae"] <= passed - 0.2
    assert vars(vae).keys() == stock.keys()


def test_before_is_stock_and_after_is_accelerated(image_to_image, monkeypatch):
    pipe = image_to_image.tiny_pipeline()
    seen = []
    monkeypatch.setattr(
        image_to_image, "fastest", lambda pipe, repeat, **call: seen.append("_fastvae" in vars(pipe.vae))
    )
    image_to_image.before_and_after(pipe, 1)
    assert seen == [False, True]
    fastvae.restore(pipe)
