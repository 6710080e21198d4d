"""Posteriors and scaling of LatentDataset."""

import math

import numpy as np
import pytest
import torch
from support.accuracy import assert_as_accurate
from support.small_store import moments_of, small_vae, write_store

import fastvae
from fastvae.data.datasets.collate import collate
from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.store.errors import StoreError
from fastvae.latents.cpu_sampling import draw

SQUARE, WIDE = (32, 32), (24, 48)


ROWS = {SQUARE: ["a", "b.png", "b.jpg", "c/b.png", ("b.png", 1), "f"], WIDE: ["g", ("g", 1), "h"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("dataset") / "store", ROWS)


def test_a_rows_draw_is_the_same_in_any_batch(made):
    dataset = LatentDataset(made, scaled=True, posterior="sample", seed=3)
    moments = LatentDataset(made, scaled=True, seed=3)
    batch = collate(dataset.__getitems__([4, 2, 0]))
    assert "mean" not in batch
    assert batch["latents"].dtype == torch.float32
    for row, number in enumerate([4, 2, 0]):
        assert torch.equal(batch["latents"][row], dataset[number]["latents"])
        item = moments[number]
        key = [item["noise_key"].item()]
        assert torch.equal(batch["latents"][row], draw(item["mean"][None], item["logvar"][None], key)[0])
    first = dataset[0]["latents"]
    dataset.set_epoch(1)
    assert not torch.equal(dataset[0]["latents"], first)


SCALINGS = {
    "factor": {"scaling_factor": 0.5},
    "factor and shift": {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "per channel": {
        "scaling_factor": 0.5,
        "latents_mean": (-1.6, 1.9, -1.4, 2.5),
        "latents_std": (8.5, 5.9, 6.5, 5.2),
    },
}


@pytest.mark.parametrize("case", SCALINGS)
def test_scaled_latents_are_those_of_scale_latents_and_sampling_commutes(tmp_path, case):
    vae = small_vae(**SCALINGS[case])
    write_store(tmp_path / "out", {SQUARE: ["x", "y"]}, **SCALINGS[case])
    raw, scaled = LatentDataset(tmp_path / "out")[1], LatentDataset(tmp_path / "out", scaled=True)[1]
    truth = fastvae.scale_latents(vae, raw["mean"][None].double())
    assert_as_accurate(scaled["mean"][None], fastvae.scale_latents(vae, raw["mean"][None].float()), truth)
    # mean + std * noise, scaled, is scaled mean + scaled std * noise.
    step = np.finfo(np.float32).eps
    noise = torch.randn(4, 4, 4, dtype=torch.float64)
    sampled = raw["mean"].double() + (0.5 * raw["logvar"].double()).exp() * noise
    ours = scaled["mean"].double() + (0.5 * scaled["logvar"].double()).exp() * noise
    target = fastvae.scale_latents(vae, sampled[None])[0]
    # exp turns the log-variance's absolute rounding, at most |logvar| + |2 ln factor| fp32 steps, into a relative one.
    bound = 8 * step * (scaled["logvar"].abs().max() + 2 * abs(math.log(0.05)) + 1) * target.abs().max()
    assert (ours - target).abs().max() <= bound


@pytest.mark.parametrize("scaled", [False, True])
def test_a_logvar_of_eight_bits_is_within_half_a_level(tmp_path, scaled):
    write_store(tmp_path / "bytes", {SQUARE: ["x", "y", "z"]}, logvar="u8")
    batch = collate(LatentDataset(tmp_path / "bytes", scaled=scaled).__getitems__([2, 0]))
    for row, key in enumerate(["z", "x"]):
        logvar = torch.from_numpy(moments_of(key, 0, SQUARE)[1]).double()
        half = (logvar.max() - logvar.min()) / 255 / 2
        if scaled:
            logvar, rounding = logvar + 2 * math.log(0.5), torch.finfo(torch.float32).eps
        else:
            rounding = torch.finfo(torch.float16).eps / 2
        error = (batch["logvar"][row].double() - logvar).abs().max()
        assert half / 2 < error <= half + 2 * rounding * logvar.abs().max()
    assert batch["logvar"].dtype == batch["mean"].dtype


def test_a_store_or_a_dataset_of_means_has_no_logvar(tmp_path, made):
    write_store(tmp_path / "out", {SQUARE: ["x"]}, posterior="mean")
    for scaled in (False, True):
        assert "logvar" not in LatentDataset(tmp_path / "out", scaled=scaled)[0]
    assert "logvar" not in LatentDataset(made, posterior="mean")[0]
    with pytest.raises(StoreError, match="has no posterior 'sample': it was made with 'mean'"):
        LatentDataset(tmp_path / "out", posterior="sample")


def test_a_store_of_draws_returns_them_as_latents(tmp_path):
    write_store(tmp_path / "out", {SQUARE: ["x"]}, posterior="sample")
    item = LatentDataset(tmp_path / "out")[0]
    assert np.array_equal(item["latents"], moments_of("x", 0, SQUARE)[0])
    assert "mean" not in item
    with pytest.raises(StoreError, match="has no posterior 'mean'"):
        LatentDataset(tmp_path / "out", posterior="mean")
