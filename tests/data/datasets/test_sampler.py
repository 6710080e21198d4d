"""BucketBatchSampler returns every row once an epoch and one bucket a batch, in an order fixed by its numbers."""

import collections

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_store import small_vae, write_store
from torch.utils.data import DataLoader

from fastvae.data.datasets.collate import collate
from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.datasets.iterable import LatentIterable
from fastvae.data.datasets.loader import LatentLoader
from fastvae.data.datasets.sampler import BucketBatchSampler, Order

ROWS = {(32, 32): [f"square {index}" for index in range(11)], (24, 48): [f"wide {index}" for index in range(6)]}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("sampler") / "store", ROWS)


def shards_of(sizes):
    """Return shards of (bucket, row numbers) for (side, number of rows)."""
    shards, first = [], 0
    for side, rows in sizes:
        shards.append(((side, side), torch.arange(first, first + rows)))
        first += rows
    return shards


LAYOUTS = st.lists(st.tuples(st.sampled_from([8, 16, 24]), st.integers(1, 9)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    layout=LAYOUTS,
    batch_size=st.integers(1, 5),
    ranks=st.integers(1, 4),
    window=st.one_of(st.none(), st.integers(1, 7)),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_an_epoch_has_every_row_and_every_step_one_bucket(layout, batch_size, ranks, window, shuffle, drop_last, epoch):
    shards = shards_of(layout)
    bucket_of = {number: bucket for bucket, rows in shards for number in rows.tolist()}
    orders = [Order(batch_size, 5, shuffle, drop_last, rank, ranks, window) for rank in range(ranks)]
    taken = [list(order.batches(shards, epoch)) for order in orders]
    seen = collections.Counter(number for batches in taken for batch in batches for number in batch)
    for step in zip(*taken, strict=True):  # strict: every rank has the same number of batches
        assert len({len(batch) for batch in step}) == 1
        assert len({bucket_of[number] for batch in step for number in batch}) == 1
    assert [order.count(shards) for order in orders] == [len(taken[0])] * ranks
    sizes = collections.Counter(bucket_of.values())
    for bucket, rows in sizes.items():
        own = {number: seen[number] for number in bucket_of if bucket_of[number] == bucket}
        if drop_last:
            assert sum(own.values()) == rows - rows % (batch_size * ranks)
            assert max(own.values()) <= 1
        else:
            assert min(own.values()) >= 1
            assert sum(own.values()) - rows < ranks  # only the rows that fill the last step


def test_an_order_depends_on_seed_and_epoch_alone(store):
    dataset = LatentDataset(store)
    sampler, twin = (BucketBatchSampler(dataset, 3, seed=1) for _ in range(2))
    first = list(sampler)
    assert first == list(twin) == list(sampler)
    assert len(sampler) == len(first) == 4 + 2
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    for epoch in (first, second):
        assert sorted(number for batch in epoch for number in batch) == list(range(17))
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(BucketBatchSampler(dataset, 3, seed=2)) != first
    assert list(BucketBatchSampler(dataset, 3, shuffle=False))[:4] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [11, 12, 13]]


def test_rows_of_a_bucket_are_shuffled_across_its_shards(store):
    dataset = LatentDataset(store)
    shard_of = {number: index for index, (_, rows) in enumerate(dataset.shards()) for number in rows.tolist()}
    mixed = [batch for batch in BucketBatchSampler(dataset, 4) if len({shard_of[number] for number in batch}) > 1]
    assert mixed


@pytest.mark.parametrize("done", [0, 1, 4, 6])
def test_a_resumed_epoch_returns_the_rest_and_the_next_one_all(store, done):
    dataset = LatentDataset(store, seed=9)
    sampler = BucketBatchSampler(dataset, 3, seed=9)
    sampler.set_epoch(2)
    complete = list(sampler)
    state = sampler.state_dict(done)
    again = BucketBatchSampler(LatentDataset(store, seed=9), 3, seed=9)
    again.load_state_dict(state)
    assert again.dataset.epoch == 2
    again.set_epoch(2)  # as a loop over epochs does again
    assert list(again) == complete[done:]
    sampler.set_epoch(3)
    again.set_epoch(3)
    assert list(again) == list(sampler)


def test_the_state_counts_the_returned_batches(store):
    sampler = BucketBatchSampler(LatentDataset(store), 3)
    batches = iter(sampler)
    taken = [next(batches), next(batches)]
    again = BucketBatchSampler(LatentDataset(store), 3)
    again.load_state_dict(sampler.state_dict())
    assert taken + list(again) == list(BucketBatchSampler(LatentDataset(store), 3))


def test_a_state_of_another_order_is_refused(store):
    dataset = LatentDataset(store)
    state = BucketBatchSampler(dataset, 3).state_dict()
    with pytest.raises(ValueError, match="batch_size was 3 and is 4"):
        BucketBatchSampler(dataset, 4).load_state_dict(state)
    with pytest.raises(ValueError, match="seed was 0 and is 1, shuffle was True and is False"):
        BucketBatchSampler(dataset, 3, seed=1, shuffle=False).load_state_dict(state)


def test_anything_but_a_state_is_refused_by_all_that_load_one(store):
    dataset = LatentDataset(store)
    objects = [dataset, BucketBatchSampler(dataset, 3), LatentIterable(store, 3), LatentLoader([], small_vae())]
    for each in objects:
        with pytest.raises(ValueError, match=r"^state must be what state_dict\(\) gave, got one without .*seed"):
            each.load_state_dict({})
        with pytest.raises(ValueError, match=r"^state must be what state_dict\(\) gave, got None"):
            each.load_state_dict(None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2.0}, "batch_size must be at least 1, got 2.0"),
        ({"rank": 2, "ranks": 2}, "rank must be from 0 to 1, for 2 ranks, got 2"),
        ({"ranks": 0}, "ranks must be at least 1"),
        ({"seed": -1}, "seed must be an integer"),
    ],
)
def test_invalid_numbers_are_refused(store, options, message):
    with pytest.raises(ValueError, match=message):
        BucketBatchSampler(LatentDataset(store), **{"batch_size": 2, **options})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataloader_returns_the_samplers_batches(store, workers):
    dataset = LatentDataset(store)
    sampler = BucketBatchSampler(dataset, 3)
    expected = [[dataset.keys()[number] for number in batch] for batch in sampler]
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers)
    assert [batch["key"] for batch in loader] == expected
