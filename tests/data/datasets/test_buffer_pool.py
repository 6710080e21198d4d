"""Memory that is used again: never while anything still looks at it, and not without bound."""

import os
import pickle
import threading

import numpy as np
import pytest
import torch
from support.small_store import write_store
from torch.utils.data import DataLoader

import fastvae.data.datasets.buffer_pool
from fastvae.data.datasets.buffer_pool import MAX_FREE, BufferPool
from fastvae.data.datasets.collate import collate
from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.datasets.sampler import BucketBatchSampler

HALF = np.dtype(np.float16)
SHAPE = (4, 4, 16, 16)


@pytest.fixture(autouse=True)
def _for_small_tensors_too(monkeypatch):
    monkeypatch.setattr(fastvae.data.datasets.buffer_pool, "MIN_BYTES", 1)


def test_memory_comes_back_when_the_tensor_is_gone():
    pool = BufferPool()
    first = pool.empty(SHAPE, HALF)
    place = first.data_ptr()
    assert (first.shape, first.dtype) == (SHAPE, torch.float16)
    assert pool.empty(SHAPE, HALF).data_ptr() != place
    del first
    again = [pool.empty((3, 4, 16, 16), HALF), pool.empty(SHAPE, HALF)]  # a smaller one fits as well
    assert place in [tensor.data_ptr() for tensor in again]


def test_a_small_tensor_leaves_a_batchs_memory_to_the_next_batch():
    pool = BufferPool()
    place = pool.empty(SHAPE, HALF).data_ptr()  # let go at once
    small = pool.empty((1, 4, 16, 16), HALF)
    assert small.data_ptr() != place
    assert pool.empty(SHAPE, HALF).data_ptr() == place


LOOKS = {
    "a view": lambda tensor: tensor[1:],
    "an array": lambda tensor: tensor.numpy(),
    "an array of a view": lambda tensor: tensor[2].numpy()[0],
    "another type's view": lambda tensor: tensor.view(torch.int16),
    "a storage": lambda tensor: tensor.untyped_storage(),
    "a detached one": lambda tensor: tensor.detach(),
    "dlpack": lambda tensor: np.from_dlpack(tensor),
}


@pytest.mark.parametrize("look", LOOKS)
def test_memory_that_is_looked_at_is_not_given_out(look):
    pool = BufferPool()
    tensor = pool.empty(SHAPE, HALF).fill_(3)
    kept, place = LOOKS[look](tensor), tensor.data_ptr()
    del tensor
    others = [pool.empty(SHAPE, HALF) for _ in range(3)]
    assert place not in [other.data_ptr() for other in others]
    del kept
    assert pool.empty(SHAPE, HALF).data_ptr() == place


def test_what_lies_free_is_bounded():
    pool = BufferPool()
    many = [pool.empty(SHAPE, HALF) for _ in range(3 * MAX_FREE)]
    many.clear()
    assert len(pool._free) == MAX_FREE


def test_threads_never_share_memory():
    pool, wrong = BufferPool(), []

    def work(number: int) -> None:
        for turn in range(300):
            held = [pool.empty((2, 64 + 64 * (turn % 3)), HALF).fill_(number) for _ in range(3)]
            if any((tensor != number).any() for tensor in held):
                wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_batches_that_are_kept_stay_what_they_were(tmp_path):
    """Rows are read into memory of batches that were let go, and never into that of one that is still there."""
    keys = [f"{number}.png" for number in range(12)]
    dataset = LatentDataset(write_store(tmp_path / "out", {(32, 32): keys}))
    truth = {key: LatentDataset(tmp_path / "out")[number]["mean"].clone() for number, key in enumerate(keys)}
    kept, order = [], np.random.default_rng(0)
    for turn in range(60):
        batch = dataset.__getitems__(order.integers(0, 12, 3).tolist())
        kept.append(batch[1] if turn % 2 else batch)
        if len(kept) > 5:
            kept.pop(int(order.integers(0, 5)))
        for item in kept:
            for row in [item] if isinstance(item, dict) else item:
                assert torch.equal(row["mean"], truth[row["key"]])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system starts no process by fork")
def test_worker_processes_hand_over_what_they_read(tmp_path):
    """A worker's tensors move to shared memory, and their own memory takes the batch after next."""
    keys = [f"{number}.png" for number in range(24)]
    dataset = LatentDataset(write_store(tmp_path / "out", {(32, 32): keys}))
    truth = {key: dataset[number]["mean"].clone() for number, key in enumerate(keys)}
    sampler = BucketBatchSampler(dataset, 3)
    loader = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate, num_workers=2, multiprocessing_context="fork"
    )
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = list(loader)
        assert sorted(key for batch in batches for key in batch["key"]) == sorted(keys)
        for batch in batches:
            for key, mean in zip(batch["key"], batch["mean"], strict=True):
                assert torch.equal(mean, truth[key])


def test_a_pickled_dataset_has_buffers_of_its_own(tmp_path):
    dataset = LatentDataset(write_store(tmp_path / "out", {(32, 32): ["a.png", "b.png"]}))
    dataset[0]
    again = pickle.loads(pickle.dumps(dataset))
    assert again._pool._free == []
    assert torch.equal(again[1]["mean"], dataset[1]["mean"])
