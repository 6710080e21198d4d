"""LatentDataset: what an item is, in this process, in workers, and in either space."""

import math
import os
import pickle

import numpy as np
import pytest
import torch
from small_store import SIDE, picture, small_vae, write_pictures
from torch.utils.data import DataLoader

import fastvae
from fastvae.data.dataset import LatentDataset
from fastvae.data.encode import encode
from fastvae.data.shards import sample_id
from fastvae.data.store import StoreError

OPTIONS = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu", "shard_mb": 0.002}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("dataset")
    write_pictures(root / "in", 5)
    picture(9, 64, 40).save(root / "in" / "zz wide.png")
    encode(root / "in", root / "out", vae=small_vae(), **OPTIONS)
    return root / "out"


def test_an_item(made):
    dataset = LatentDataset(made)
    assert len(dataset) == 6
    assert dataset.keys() == [*(f"{index:03d}.png" for index in range(5)), "zz wide.png"]
    item = dataset[5]
    assert item["mean"].shape == item["logvar"].shape == (4, 4, 4)
    assert item["mean"].dtype == item["logvar"].dtype == torch.float16
    assert item["key"] == "zz wide.png"
    assert item["original_hw"].tolist() == [40, 64]
    assert item["crop_tlhw"].tolist() == [0, 9, 32, 32]  # 64 * 32 / 40 = 51.2 -> 51 wide, (51 - 32) // 2
    assert item["bucket"].tolist() == [32, 32]
    assert item["variant"] == 0
    assert item["sample_id"].dtype == torch.uint64
    assert int(item["sample_id"]) == sample_id("zz wide.png")
    assert torch.equal(dataset[-1]["mean"], item["mean"])
    with pytest.raises(IndexError):
        dataset[6]
    assert dataset.scaling["space"] == "raw"
    assert dataset.downsample_factor == 8


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_the_same_rows(made, context):
    dataset = LatentDataset(made)
    own = {item["key"]: item["mean"] for item in dataset}  # opens handles, which must not be carried over
    loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context=context, shuffle=True)
    seen = {}
    for batch in loader:
        seen |= dict(zip(batch["key"], batch["mean"], strict=True))
        assert batch["sample_id"].tolist() == [sample_id(key) for key in batch["key"]]
    assert seen.keys() == own.keys()
    for key in own:
        assert torch.equal(seen[key], own[key])


def test_a_pickle_carries_no_open_file(made):
    dataset = LatentDataset(made)
    dataset[0]
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[3]["mean"], dataset[3]["mean"])


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
def test_scaled_is_what_scale_latents_gives_and_sampling_commutes(tmp_path, case):
    vae = small_vae(**SCALINGS[case])
    write_pictures(tmp_path / "in", 2)
    encode(tmp_path / "in", tmp_path / "out", vae=vae, **OPTIONS)
    raw, scaled = LatentDataset(tmp_path / "out")[1], LatentDataset(tmp_path / "out", scaled=True)[1]
    assert scaled["mean"].dtype == torch.float32
    wanted = fastvae.scale_latents(vae, raw["mean"][None].double())[0]
    step = np.finfo(np.float32).eps
    # Three fp32 roundings: the subtraction, the factor itself, the product.
    assert (scaled["mean"] - wanted).abs().max() <= 3 * step * wanted.abs().max() + 3 * step
    # mean + std * noise, scaled, is scaled mean + scaled std * noise.
    noise = torch.randn(4, 4, 4, dtype=torch.float64)
    sampled = raw["mean"].double() + (0.5 * raw["logvar"].double()).exp() * noise
    ours = scaled["mean"].double() + (0.5 * scaled["logvar"].double()).exp() * noise
    target = fastvae.scale_latents(vae, sampled[None])[0]
    # exp turns the log-variance's absolute rounding, at most |logvar| + |2 ln factor| fp32 steps, into a relative one.
    bound = 8 * step * (scaled["logvar"].abs().max() + 2 * abs(math.log(0.05)) + 1) * target.abs().max()
    assert (ours - target).abs().max() <= bound


def test_means_alone(tmp_path):
    write_pictures(tmp_path / "in", 1)
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), posterior="mean", **OPTIONS)
    for scaled in (False, True):
        assert "logvar" not in LatentDataset(tmp_path / "out", scaled=scaled)[0]


def test_names_that_are_no_text_come_back(tmp_path):
    (tmp_path / "in").mkdir()
    name = os.fsdecode(b"caf\xe9\n\xff.png")
    picture(0).save(tmp_path / "in" / "x.png")
    os.rename(tmp_path / "in" / "x.png", tmp_path / "in" / name)
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **OPTIONS)
    assert LatentDataset(tmp_path / "out").keys() == [name]


def test_what_cannot_be_read_is_said(tmp_path, made):
    with pytest.raises(StoreError, match="is not a latent store"):
        LatentDataset(tmp_path)
    dataset = LatentDataset(made)
    dataset._places[0] = ("gone.safetensors", 0)
    with pytest.raises(StoreError, match=r"gone\.safetensors cannot be read"):
        dataset[0]
