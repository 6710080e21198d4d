"""Subset and ConcatDataset of LatentDatasets, several stores as one dataset, and keys without private memory."""

import pickle

import pytest
import torch
from support.small_store import write_store
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from fastvae.data.datasets.collate import collate
from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.datasets.row_view import PackedKeys
from fastvae.data.datasets.sampler import BucketBatchSampler

FIRST = {(32, 32): ["a", "b", "c"], (48, 32): ["d", "e"]}
SECOND = {(32, 32): ["f", "g"], (32, 48): ["h"]}


@pytest.fixture
def stores(tmp_path):
    return write_store(tmp_path / "first", FIRST), write_store(tmp_path / "second", SECOND)


def batches(dataset, **options):
    """Return the sorted keys of each batch of an epoch."""
    sampler = BucketBatchSampler(dataset, 2, seed=1, **options)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)
    found = [sorted(batch["key"]) for batch in loader]
    assert len(found) == len(sampler)
    return found


def keys_of(found):
    return sorted(key for batch in found for key in batch)


def test_the_sampler_takes_a_subset(stores):
    dataset = LatentDataset(stores[0])
    wanted = [row for row, key in enumerate(dataset.keys()) if key in "ace"]
    assert keys_of(batches(Subset(dataset, wanted))) == ["a", "c", "e"]
    assert keys_of(batches(Subset(Subset(dataset, wanted), [0]))) == [dataset.keys()[wanted[0]]]


@pytest.mark.parametrize("combine", [ConcatDataset, None], ids=["ConcatDataset", "a list of stores"])
def test_the_sampler_takes_several_stores(stores, combine):
    dataset = LatentDataset(list(stores)) if combine is None else combine([LatentDataset(store) for store in stores])
    assert len(dataset) == 8
    assert keys_of(batches(dataset)) == list("abcdefgh")
    parts = random_parts(dataset)
    assert keys_of([*batches(parts[0]), *batches(parts[1])]) == list("abcdefgh")
    sampler = BucketBatchSampler(dataset, 2, seed=1)
    sampler.set_epoch(3)
    assert {part.epoch for part in dataset.datasets} == {3}
    state = sampler.state_dict(done=1)
    again = BucketBatchSampler(dataset, 2, seed=1)
    again.load_state_dict(state)
    assert list(again) == list(sampler)[1:]


def random_parts(dataset):
    return torch.utils.data.random_split(dataset, [5, 3], torch.Generator().manual_seed(0))


def test_several_stores_have_the_items_of_each(stores):
    dataset = LatentDataset(list(stores), scaled=True)
    parts = [LatentDataset(store, scaled=True) for store in stores]
    assert dataset.keys() == [*parts[0].keys(), *parts[1].keys()]
    assert torch.equal(dataset[5]["mean"], parts[1][0]["mean"])
    dataset.set_epoch(2)
    assert dataset.epoch == 2
    assert dataset[0]["noise_key"] != parts[0][0]["noise_key"]


def test_another_dataset_is_refused():
    with pytest.raises(TypeError, match=r"dataset must be LatentDataset, ImageDataset, or Subset .* got TensorDataset"):
        BucketBatchSampler(TensorDataset(torch.zeros(2)), 2)


def test_keys_are_two_blocks_of_memory():
    names = ["a", "", "ü/☃.png", "\udcff"]
    keys = PackedKeys(names)
    assert list(keys) == list(pickle.loads(pickle.dumps(keys))) == names
    assert not any(isinstance(value, (list, tuple, dict)) for value in vars(keys).values())
    assert list(PackedKeys([])) == []
