"""LatentDataset returns every latent with its own key, in this process and in workers."""

import json
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
from support.small_store import moments_of, write_store
from torch.utils.data import DataLoader

from fastvae.data.datasets.collate import collate
from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.datasets.sampler import BucketBatchSampler
from fastvae.data.rows import noise_key, sample_id
from fastvae.data.store.errors import StoreError
from fastvae.data.store.shard import read_metadata

SQUARE, WIDE = (32, 32), (24, 48)


ROWS = {SQUARE: ["a", "b.png", "b.jpg", "c/b.png", ("b.png", 1), "f"], WIDE: ["g", ("g", 1), "h"]}


COLUMNS = {"a": {"txt": "an image", "score": 3}, "g": {"txt": "wide"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("dataset") / "store", ROWS, columns=COLUMNS)


def assert_is_its_own(item):
    """Check that ``item`` has the values of its own key, and none of another row."""
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


def test_any_selection_of_rows_returns_each_row_with_its_own_values(made):
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


def test_items_are_copies(made):
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
    own = [dataset[number] for number in range(6)]  # opens maps, which workers must not inherit
    loader = DataLoader(
        torch.utils.data.Subset(dataset, range(6)),
        batch_size=2,
        num_workers=2 if context == "fork" else 1,  # each spawned worker imports torch
        multiprocessing_context=context,
        collate_fn=collate,
        persistent_workers=True,
    )
    for epoch in (0, 1):
        dataset.set_epoch(epoch)  # must reach persistent workers
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


def test_columns_are_listed_for_every_row(made, tmp_path):
    dataset = LatentDataset(made)
    none = [{}] * 5
    assert dataset.columns() == [COLUMNS["a"], *none, COLUMNS["g"], COLUMNS["g"], {}]
    other = write_store(tmp_path / "other", {SQUARE: ["a"]}, columns={"a": {"txt": "another image"}})
    assert LatentDataset([made, other]).columns() == [*dataset.columns(), {"txt": "another image"}]


def test_source_columns_are_those_of_the_key(made):
    dataset = LatentDataset(made, columns=["score", "txt"])
    assert (dataset[0]["txt"], dataset[0]["score"]) == ("an image", 3)
    assert (dataset[6]["txt"], dataset[7]["txt"], dataset[6]["score"]) == ("wide", "wide", None)
    with pytest.raises(ValueError, match="among those of the source, score, txt, got caption"):
        LatentDataset(made, columns=["caption"])
    with pytest.raises(ValueError, match="the name of another part of an item, got key"):
        LatentDataset(made, columns=["key"])


def test_a_state_restores_the_epoch(made):
    dataset = LatentDataset(made, seed=4)
    dataset.set_epoch(3)
    again = LatentDataset(made, seed=4)
    again.load_state_dict(dataset.state_dict())
    assert torch.equal(again[2]["noise_key"], dataset[2]["noise_key"])
    assert not torch.equal(LatentDataset(made, seed=4)[2]["noise_key"], dataset[2]["noise_key"])
    with pytest.raises(ValueError, match="the state is of seed 4, this dataset has seed 5"):
        LatentDataset(made, seed=5).load_state_dict(dataset.state_dict())


def test_keys_that_are_not_utf_8_are_returned(tmp_path):
    name = os.fsdecode(b"caf\xe9\n\xff.png")
    write_store(tmp_path / "out", {SQUARE: [name]})
    dataset = LatentDataset(tmp_path / "out")
    assert dataset.keys() == [name]
    assert dataset[0]["sample_id"].item() == sample_id(name)


def test_a_shard_that_is_exchanged_after_opening_is_refused(tmp_path):
    """Its rows would be returned under the keys of other images."""
    write_store(tmp_path / "out", {SQUARE: ["a", "b", "c", "d"]}, rows_per_unit=2)
    dataset = LatentDataset(tmp_path / "out")
    first, second = sorted((tmp_path / "out" / "shards").glob("*.safetensors"))
    shutil.copy(first, second)
    assert_is_its_own(dataset[0])
    with pytest.raises(StoreError, match="holds other rows than when it was listed: open the dataset again"):
        dataset[2]


def test_a_shard_of_another_dtype_is_refused_and_not_rounded(tmp_path):
    write_store(tmp_path / "out", {SQUARE: ["a", "b", "c", "d"]}, rows_per_unit=2)
    second = sorted((tmp_path / "out" / "shards").glob("*.safetensors"))[1]
    tensors = load_file(second)
    save_file({**tensors, "mean": tensors["mean"].astype(np.float32)}, second, read_metadata(second))
    record = second.with_suffix(".json")
    record.write_text(json.dumps({**json.loads(record.read_text()), "bytes": second.stat().st_size}))
    with pytest.raises(StoreError, match=r"000001-32x32\.safetensors is damaged: its tensors are of other types"):
        LatentDataset(tmp_path / "out").__getitems__([0, 2])


def test_damaged_shards_and_wrong_arguments_are_refused(tmp_path, made):
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
def test_reading_takes_little_more_than_a_copy(tmp_path, monkeypatch):
    """Moments of SDXL's size, 256 KiB a row, from a warm cache, in batches of 16 shuffled rows of one 256 MB shard.

    Measured in CPU seconds of this process, in the best of eight pairs of passes: others may share cores and memory.
    """
    # Deterministic mode, which the tests set, would write every batch twice.
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


@pytest.mark.parametrize("posterior", ["sample", "dist"])
def test_another_default_device_or_dtype_changes_nothing(made, posterior):
    """A default of cuda would place tensors of a worker on the GPU."""

    def batches():
        dataset = LatentDataset(made, posterior=posterior, scaled=True)
        sampler = BucketBatchSampler(dataset, 2, seed=3)
        return [collate(dataset.__getitems__(rows)) for rows in sampler]

    expected = batches()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = batches()
    finally:
        torch.set_default_dtype(before)
    for batch, other in zip(expected, found, strict=True):
        tensors = {name for name, values in batch.items() if isinstance(values, torch.Tensor)}
        assert tensors
        assert all(torch.equal(batch[name], other[name]) for name in tensors)
