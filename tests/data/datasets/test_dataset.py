"""LatentDataset: every latent beside its own key, in this process, in workers, and in either space."""

import json
import math
import os
import pickle
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.accuracy import assert_as_accurate
from support.small_store import moments_of, small_vae, write_store
from torch.utils.data import DataLoader, default_collate

import fastvae
from fastvae.data.datasets.collate import collate
from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.datasets.sampler import BucketBatchSampler
from fastvae.data.rows import noise_key, sample_id
from fastvae.data.store.errors import StoreError
from fastvae.data.store.shard import read_metadata
from fastvae.latents.cpu_sampling import draw

SQUARE, WIDE = (32, 32), (24, 48)
ROWS = {SQUARE: ["a", "b.png", "b.jpg", "c/b.png", ("b.png", 1), "f"], WIDE: ["g", ("g", 1), "h"]}
COLUMNS = {"a": {"txt": "an image", "score": 3}, "g": {"txt": "wide"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("dataset") / "store", ROWS, columns=COLUMNS)


def assert_is_its_own(item):
    """Nothing of another row has got into ``item``."""
    bucket = tuple(item["bucket"].tolist())
    mean, logvar = moments_of(item["key"], int(item["variant"]), bucket)
    assert np.array_equal(item["mean"], mean)
    assert np.array_equal(item["logvar"], logvar)
    assert item["sample_id"].item() == sample_id(item["key"])
    assert item["original_hw"].tolist() == list(bucket)


def test_an_item(made):
    dataset = LatentDataset(made)
    assert len(dataset) == 9
    assert dataset.keys() == ["a", "b.png", "b.jpg", "c/b.png", "b.png", "f", "g", "g", "h"]
    item = dataset[7]
    assert list(item) == [
        "mean",
        "logvar",
        "noise_key",
        "key",
        "original_hw",
        "crop_tlhw",
        "variant",
        "sample_id",
        "bucket",
    ]
    assert item["mean"].shape == item["logvar"].shape == (4, 3, 6)
    assert item["mean"].dtype == item["logvar"].dtype == torch.float16
    assert (item["key"], int(item["variant"])) == ("g", 1)
    assert item["crop_tlhw"].tolist() == [0, 0, 24, 48]
    assert item["bucket"].tolist() == [24, 48]
    assert item["noise_key"].dtype == item["sample_id"].dtype == torch.uint64
    assert item["noise_key"].item() == noise_key(0, 0, "g", 1)
    assert torch.equal(dataset[-2]["mean"], item["mean"])
    for outside in (9, -10):
        with pytest.raises(IndexError, match="within the dataset's 9 rows"):
            dataset[outside]
        with pytest.raises(IndexError, match=f"indices must be within the dataset's 9 rows, got {outside}"):
            dataset.__getitems__([0, outside])
    for wrong in (1.5, torch.tensor(1.5), "a", slice(2)):
        with pytest.raises(TypeError, match="index must be the number of one row, got "):
            dataset[wrong]
    with pytest.raises(TypeError, match="indices must be numbers of rows, got values of type float64"):
        dataset.__getitems__([1, 1.5])
    assert dataset[torch.tensor(7)]["key"] == dataset.__getitems__([np.int16(7)])[0]["key"] == "g"
    assert dataset.scaling["space"] == "raw"
    assert dataset.downsample_factor == 8
    assert dataset.latent_channels == 4
    for item in dataset:
        assert_is_its_own(item)


def test_any_selection_of_rows_is_each_rows_own(made):
    dataset = LatentDataset(made, seed=2)
    chooser = random.Random(0)
    for _ in range(40):
        numbers = chooser.choices(range(9), k=chooser.randint(1, 7))  # with repetitions, across shards and buckets
        items = dataset.__getitems__(numbers)
        assert [(item["key"], int(item["variant"])) for item in items] == [
            (dataset.keys()[number], int(dataset[number]["variant"])) for number in numbers
        ]
        for item in items:
            assert_is_its_own(item)
            assert item["noise_key"].item() == noise_key(2, 0, item["key"], int(item["variant"]))


def test_a_map_is_shown_to_other_threads_when_its_rows_facts_are_there(made):
    """And the map that a thread made is its own to read, whatever another forgets meanwhile."""
    dataset, truth = LatentDataset(made), LatentDataset(made)[0]["sample_id"]
    dataset._row_info[:] = -1
    shown = []

    class Forgetful(dict):
        def __setitem__(self, shard, mapped):
            shown.append((dataset._row_info[dataset._shard_of == shard] == -1).any())

    dataset._maps = Forgetful()
    assert dataset[0]["sample_id"] == truth
    assert shown == [False]


def test_reading_copies_what_it_hands_out(made):
    dataset = LatentDataset(made)
    for read in (lambda: dataset[0]["mean"], lambda: dataset.__getitems__([0])[0]["mean"]):
        read().zero_()
    assert_is_its_own(dataset[0])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
def test_opening_a_shard_reads_no_latents(made):
    mean = LatentDataset(made)._mapped_shard(0).columns["mean"]
    shard = next((made / "shards").glob("000000-*.safetensors"))
    maps = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if shard.name in line
    ]
    assert any(int(start, 16) <= mean.data_ptr() < int(end, 16) for start, end in maps)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_the_same_rows(made, context):
    dataset = LatentDataset(made, seed=1)
    own = [dataset[number] for number in range(6)]  # opens maps, which must not be carried over
    loader = DataLoader(
        torch.utils.data.Subset(dataset, range(6)),
        batch_size=2,
        num_workers=2 if context == "fork" else 1,  # each that is spawned imports torch anew
        multiprocessing_context=context,
        collate_fn=collate,
        persistent_workers=True,
    )
    for epoch in (0, 1):
        dataset.set_epoch(epoch)  # must reach workers that are there already
        seen = 0
        for batch in loader:
            for row, key in enumerate(batch["key"]):
                assert key == own[seen]["key"]
                assert torch.equal(batch["mean"][row], own[seen]["mean"])
                assert batch["noise_key"][row].item() == noise_key(1, epoch, key, int(batch["variant"][row]))
                seen += 1
        assert seen == 6


def test_a_pickle_carries_no_open_file(made):
    dataset = LatentDataset(made)
    dataset[0]
    content = pickle.dumps(dataset)
    assert len(content) < 20_000
    again = pickle.loads(content)
    assert torch.equal(again[3]["mean"], dataset[3]["mean"])


def test_a_batch_is_what_collation_makes_of_its_items(made):
    dataset = LatentDataset(made, columns=["txt"])
    batch = collate(dataset.__getitems__([4, 0, 1]))
    items = [dataset[4], dataset[0], dataset[1]]
    for other in (collate(items), default_collate([{**item, "txt": str(item["txt"])} for item in items])):
        assert other.keys() == batch.keys()
        for name, values in batch.items():
            if isinstance(values, torch.Tensor):
                assert torch.equal(values, other[name])
                assert values.dtype == other[name].dtype
            else:
                assert list(map(str, other[name])) == list(map(str, values))
    assert batch["txt"] == [None, "an image", None]


def test_a_batch_of_two_buckets_is_refused_by_name(made):
    with pytest.raises(ValueError, match="of one bucket, got 24x48, 32x32: take BucketBatchSampler"):
        collate(LatentDataset(made).__getitems__([0, 6]))
    with pytest.raises(ValueError, match="at least one item, got none"):
        collate([])


def test_columns_of_the_source_come_with_their_key(made):
    dataset = LatentDataset(made, columns=["score", "txt"])
    assert (dataset[0]["txt"], dataset[0]["score"]) == ("an image", 3)
    assert (dataset[6]["txt"], dataset[7]["txt"], dataset[6]["score"]) == ("wide", "wide", None)
    with pytest.raises(ValueError, match="among those of the source, score, txt, got caption"):
        LatentDataset(made, columns=["caption"])
    with pytest.raises(ValueError, match="the name of another part of an item, got key"):
        LatentDataset(made, columns=["key"])


def test_a_state_brings_back_the_epoch(made):
    dataset = LatentDataset(made, seed=4)
    dataset.set_epoch(3)
    again = LatentDataset(made, seed=4)
    again.load_state_dict(dataset.state_dict())
    assert torch.equal(again[2]["noise_key"], dataset[2]["noise_key"])
    assert not torch.equal(LatentDataset(made, seed=4)[2]["noise_key"], dataset[2]["noise_key"])
    with pytest.raises(ValueError, match="the state is of seed 4, this dataset has seed 5"):
        LatentDataset(made, seed=5).load_state_dict(dataset.state_dict())


def test_draws_are_the_rows_own_in_any_batch(made):
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
def test_scaled_is_what_scale_latents_gives_and_sampling_commutes(tmp_path, case):
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


def test_means_alone(tmp_path, made):
    write_store(tmp_path / "out", {SQUARE: ["x"]}, posterior="mean")
    for scaled in (False, True):
        assert "logvar" not in LatentDataset(tmp_path / "out", scaled=scaled)[0]
    assert "logvar" not in LatentDataset(made, posterior="mean")[0]
    with pytest.raises(StoreError, match="has no posterior 'sample': it was made with 'mean'"):
        LatentDataset(tmp_path / "out", posterior="sample")


def test_a_store_of_draws_hands_them_out_as_latents(tmp_path):
    write_store(tmp_path / "out", {SQUARE: ["x"]}, posterior="sample")
    item = LatentDataset(tmp_path / "out")[0]
    assert np.array_equal(item["latents"], moments_of("x", 0, SQUARE)[0])
    assert "mean" not in item
    with pytest.raises(StoreError, match="has no posterior 'mean'"):
        LatentDataset(tmp_path / "out", posterior="mean")


def test_names_that_are_no_text_come_back(tmp_path):
    name = os.fsdecode(b"caf\xe9\n\xff.png")
    write_store(tmp_path / "out", {SQUARE: [name]})
    dataset = LatentDataset(tmp_path / "out")
    assert dataset.keys() == [name]
    assert dataset[0]["sample_id"].item() == sample_id(name)


def test_a_shard_that_is_exchanged_under_way_is_refused(tmp_path):
    """Its rows would be handed out under other images' keys."""
    write_store(tmp_path / "out", {SQUARE: ["a", "b", "c", "d"]}, rows_per_unit=2)
    dataset = LatentDataset(tmp_path / "out")
    first, second = sorted((tmp_path / "out" / "shards").glob("*.safetensors"))
    shutil.copy(first, second)
    assert_is_its_own(dataset[0])
    with pytest.raises(StoreError, match="holds other rows than when it was listed: open the dataset again"):
        dataset[2]


def test_a_shard_of_another_type_is_not_rounded_to_its_neighbours(tmp_path):
    write_store(tmp_path / "out", {SQUARE: ["a", "b", "c", "d"]}, rows_per_unit=2)
    second = sorted((tmp_path / "out" / "shards").glob("*.safetensors"))[1]
    tensors = load_file(second)
    save_file({**tensors, "mean": tensors["mean"].astype(np.float32)}, second, read_metadata(second))
    record = second.with_suffix(".json")
    record.write_text(json.dumps({**json.loads(record.read_text()), "bytes": second.stat().st_size}))
    with pytest.raises(StoreError, match=r"000001-32x32\.safetensors is damaged: its tensors are of other types"):
        LatentDataset(tmp_path / "out").__getitems__([0, 2])


def test_what_cannot_be_read_is_said(tmp_path, made):
    with pytest.raises(StoreError, match="is not a latent store"):
        LatentDataset(tmp_path)
    with pytest.raises(ValueError, match="posterior must be 'dist', 'mean' or 'sample', got 'mode'"):
        LatentDataset(made, posterior="mode")
    shutil.copytree(made, tmp_path / "store")
    dataset = LatentDataset(tmp_path / "store")
    shard = next((tmp_path / "store" / "shards").glob("000000-*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b'"logvar":', b'"logwar":'))
    with pytest.raises(StoreError, match=r"000000-32x32\.safetensors cannot be read: .*logvar"):
        dataset[0]
    shard.write_bytes(content.replace(b"[4,4,4,4]", b"[4,4,2,8]"))
    with pytest.raises(
        StoreError, match=r"is damaged: mean is float16 \[4, 4, 2, 8\], and should be float16 or float32"
    ):
        dataset[0]
    shard.unlink()
    with pytest.raises(StoreError, match="cannot be read"):
        dataset[0]


@pytest.mark.slow
def test_reading_takes_little_more_than_a_bare_copy(tmp_path, monkeypatch):
    """SDXL's size, moments of 256 KiB a row, from a warm cache, in batches of 16 mixed rows of one 256 MB shard.

    Counted in seconds of this process's CPU, in the best of eight pairs of passes: others may share cores and memory.
    """
    # The tests' deterministic mode would write every batch twice.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    keys = [f"{index}.jpg" for index in range(1000)]
    dataset = LatentDataset(write_store(tmp_path / "out", {(1024, 1024): keys}, rows_per_unit=1000))
    loader = DataLoader(dataset, batch_sampler=BucketBatchSampler(dataset, 16), collate_fn=collate)
    columns = dataset._mapped_shard(0).columns
    pairs = []
    for _ in range(8):
        started = time.process_time()
        for numbers in loader.batch_sampler:
            for name in ("mean", "logvar"):
                columns[name].index_select(0, torch.tensor(numbers))
        copied = time.process_time()
        for _ in loader:
            pass
        pairs.append((1000 / (copied - started), 1000 / (time.process_time() - copied)))
    rows = ", ".join(f"{read:,.0f} read, {copied:,.0f} copied" for copied, read in pairs)
    sys.stdout.write(f"rows a second of the CPU: {rows}\n")
    assert max(read / copied for copied, read in pairs) >= 0.6
