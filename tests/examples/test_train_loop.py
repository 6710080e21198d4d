"""The two loops of the example: both train, on the same latents."""

import math

import pytest
import torch
from support.small_store import small_vae, write_pictures

from fastvae.data.encoding.encode import encode

SIDE = 32


@pytest.fixture
def train_loop(example):
    return example("train_loop")


@pytest.fixture
def vae():
    return small_vae(scaling_factor=0.5)


@pytest.fixture
def made(vae, tmp_path):
    write_pictures(tmp_path / "in", 6)
    encode(tmp_path / "in", tmp_path / "out", vae=vae, buckets=SIDE, dtype="fp32", progress=False, device="cpu")
    return tmp_path


def test_both_loops_see_the_same_latents(train_loop, vae, made):
    by_key = []
    for epoch in (
        train_loop.encoded_in_the_loop(made / "in", SIDE, vae, 4, 5, 0),
        train_loop.stored(made / "out", torch.device("cpu"), 4, 5, 0),
    ):
        latents = {}
        for batch in epoch(1):
            latents |= dict(zip(batch["key"], batch["latents"], strict=True))
        by_key.append(latents)
    encoded, read = by_key
    assert sorted(encoded) == sorted(read) == [f"{index:03d}.png" for index in range(6)]
    # Moments are stored in fp16, with errors of half a unit of the mean and of the log-variance.
    unit = torch.finfo(torch.float16).eps
    for key in encoded:
        assert (encoded[key] - read[key]).abs().max() <= 2 * unit * encoded[key].abs().max()


def test_both_loops_train(train_loop, vae, made):
    for epoch in (
        train_loop.encoded_in_the_loop(made / "in", SIDE, vae, 3, 0, 0),
        train_loop.stored(made / "out", torch.device("cpu"), 3, 0, 0),
    ):
        denoiser = train_loop.Denoiser(4, torch.device("cpu"), width=8)
        before = [weight.clone() for weight in denoiser.unet.parameters()]
        losses = train_loop.train(denoiser, epoch, 5)  # beyond one epoch of two batches
        assert len(losses) == 5
        assert all(map(math.isfinite, losses))
        after = list(denoiser.unet.parameters())
        assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
