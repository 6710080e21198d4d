"""BufferPool reuses memory, never while anything refers to it, and keeps a bounded amount."""

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


def test_memory_is_reused_when_the_tensor_is_freed():
    pool = BufferPool()
    first = pool.empty(SHAPE, HALF)
    place = first.data_ptr()
    assert (first.shape, first.dtype) == (SHAPE, torch.float16)
    assert pool.empty(SHAPE, HALF).data_ptr() != place
    del first
    again = [pool.empty((3, 4, 16, 16), HALF), pool.empty(SHAPE, HALF)]  # a smaller one fits as well
    assert place in [tensor.data_ptr() for tensor in again]


def test_a_small_tensor_does_not_take_the_memory_of_a_batch():
    pool = BufferPool()
    place = pool.empty(SHAPE, HALF).data_ptr()  # freed at once
    small = pool.empty((1, 4, 16, 16), HALF)
    assert small.data_ptr() != place
    assert pool.empty(SHAPE, HALF).data_ptr() == place


REFERENCES = {
    "a view": lambda tensor: tensor[1:],
    "an array": lambda tensor: tensor.numpy(),
    "an array of a view": lambda tensor: tensor[2].numpy()[0],
    "another type's view": lambda tensor: tensor.view(torch.int16),
    "a storage": lambda tensor: tensor.untyped_storage(),
    "a detached one": lambda tensor: tensor.detach(),
    "dlpack": lambda tensor: np.from_dlpack(tensor),
}


@pytest.mark.parametrize("reference", REFERENCES)
def test_memory_is_not_reused_while_something_refers_to_it(reference):
    pool = BufferPool()
    tensor = pool.empty(SHAPE, HALF).fill_(3)
    kept, place = REFERENCES[reference](tensor), tensor.data_ptr()
    del tensor
    others = [pool.empty(SHAPE, HALF) for _ in range(3)]
    assert place not in [other.data_ptr() for other in others]
    del kept
    assert pool.empty(SHAPE, HALF).data_ptr() == place


def test_free_memory_is_bounded():
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


def test_kept_batches_do_not_change(tmp_path):
    """Rows are read into the memory of freed batches, and never into that of a kept one."""
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
def test_batches_of_worker_processes_do_not_change(tmp_path):
    """A worker's tensors are moved to shared memory, and their old memory is reused for the batch after next."""
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


def test_a_pickled_dataset_has_a_pool_of_its_own(tmp_path):
    dataset = LatentDataset(write_store(tmp_path / "out", {(32, 32): ["a.png", "b.png"]}))
    dataset[0]
    again = pickle.loads(pickle.dumps(dataset))
    assert again._pool._free == []
    assert torch.equal(again[1]["mean"], dataset[1]["mean"])
