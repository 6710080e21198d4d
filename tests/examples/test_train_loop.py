"""The two loops of the example: both train, on the same latents, with captions, time ids and a broken image."""

import ast
import math
import sys

import pytest
import torch
from examples.conftest import EXAMPLES
from support.small_store import small_vae, write_pictures

import fastvae

SIDE = 32


@pytest.fixture
def train_loop(example):
    return example("train_loop")


@pytest.fixture
def vae():
    return small_vae(scaling_factor=0.5)


@pytest.fixture
def made(vae, tmp_path):
    for name in write_pictures(tmp_path / "in", 6):
        (tmp_path / "in" / name).with_suffix(".txt").write_text(f"a picture named {name}")
    given = {"vae": vae, "buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu"}
    fastvae.encode(tmp_path / "in", tmp_path / "out", **given)
    images = fastvae.ImageDataset(tmp_path / "in", SIDE, columns=["txt"])
    return images, fastvae.LatentDataset(tmp_path / "out", scaled=True, columns=["txt"], seed=5)


def test_both_loops_see_the_same_batches(train_loop, vae, made):
    images, rows = made
    by_key = []
    for epoch in (
        train_loop.encoded_in_the_loop(images, vae, 4, 5, 0),
        train_loop.stored(rows, torch.device("cpu"), 4, 5, 0),
    ):
        found = {}
        for batch in epoch(1):
            parts = batch["latents"], batch["txt"], fastvae.time_ids(batch).tolist()
            found |= dict(zip(batch["key"], zip(*parts, strict=True), strict=True))
        by_key.append(found)
    encoded, read = by_key
    assert sorted(encoded) == sorted(read) == [f"{index:03d}.png" for index in range(6)]
    # Moments are stored in fp16, with errors of half a unit of the mean and of the log-variance.
    unit = torch.finfo(torch.float16).eps
    for key, (latents, *conditions) in encoded.items():
        stored, *stored_conditions = read[key]
        assert conditions == stored_conditions == [f"a picture named {key}", [40, 48, 0, 3, 32, 32]]
        assert (latents - stored).abs().max() <= 2 * unit * latents.abs().max()


def test_both_loops_train(train_loop, vae, made):
    images, rows = made
    for epoch in (
        train_loop.encoded_in_the_loop(images, vae, 3, 0, 0),
        train_loop.stored(rows, torch.device("cpu"), 3, 0, 0),
    ):
        denoiser = train_loop.Denoiser(4, torch.device("cpu"), "txt", width=8)
        before = [weight.clone() for weight in denoiser.unet.parameters()]
        letters = denoiser.text.weight.clone()
        losses = train_loop.train(denoiser, epoch, 5)  # beyond one epoch of two batches
        assert len(losses) == 5
        assert all(map(math.isfinite, losses))
        after = list(denoiser.unet.parameters())
        assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
        assert not torch.equal(letters, denoiser.text.weight)


@pytest.mark.filterwarnings("ignore:")
def test_the_script_survives_broken_images(train_loop, tmp_path, monkeypatch, capsys):
    """One without a usable header, one that is cut; captions beside two of the others."""
    for name in write_pictures(tmp_path, 4)[:2]:
        (tmp_path / name).with_suffix(".txt").write_text("a picture")
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    cut = tmp_path / "002.png"
    cut.write_bytes(cut.read_bytes()[:600])
    given = ["--side", "32", "--steps", "1", "--captions", "txt", "--batch-size", "3"]
    monkeypatch.setattr(sys, "argv", ["train_loop.py", str(tmp_path), *given])
    train_loop.main()
    said = capsys.readouterr().out
    assert "encoded in the loop: loss" in said
    assert "stored: loss" in said
    assert "2 of 5 images skipped (truncated 1, unsupported 1): bad.jpg, 002.png" in said


def test_it_uses_public_names_alone():
    tree = ast.parse((EXAMPLES / "train_loop.py").read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {module for module in modules if module and module.startswith("fastvae")}
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    used = {node.attr for node in attributes if ast.unparse(node.value) == "fastvae"}
    assert used <= set(fastvae.__all__)
