"""LatentIterable has one order of batches for any number of workers, splits it by rank, and resumes exactly."""

import pytest
import torch
from support.small_store import moments_of, write_store
from torch.utils.data import DataLoader

from fastvae.data.datasets.iterable import LatentIterable

ROWS = {(32, 32): [f"square {index}" for index in range(13)], (24, 48): [f"wide {index}" for index in range(7)]}
KEYS = sorted(key for keys in ROWS.values() for key in keys)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("iterable") / "store", ROWS, rows_per_unit=3)


def batches_of(iterable, workers=0):
    return [(batch["key"], batch) for batch in DataLoader(iterable, batch_size=None, num_workers=workers)]


def test_every_row_is_returned_once_with_its_own_latent(store):
    seen = []
    for keys, batch in batches_of(LatentIterable(store, 2, window=2)):
        for row, key in enumerate(keys):
            mean, _ = moments_of(key, 0, tuple(batch["bucket"][row].tolist()))
            assert torch.equal(batch["mean"][row], torch.from_numpy(mean))
        seen += keys
    assert sorted(seen) == KEYS


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(store, workers):
    iterable = LatentIterable(store, 2, seed=3, window=2, posterior="sample")
    iterable.set_epoch(1)
    alone, shared = batches_of(iterable), batches_of(iterable, workers)
    assert [keys for keys, _ in alone] == [keys for keys, _ in shared]
    for (_, own), (_, other) in zip(alone, shared, strict=True):
        assert torch.equal(own["latents"], other["latents"])
        assert torch.equal(own["noise_key"], other["noise_key"])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 3, 11])
def test_a_resumed_epoch_returns_the_rest(store, workers, done):
    iterable = LatentIterable(store, 2, window=3)
    iterable.set_epoch(2)
    complete = [keys for keys, _ in batches_of(iterable)]
    assert len(iterable) == len(complete) == 7 + 4
    again = LatentIterable(store, 2, window=3)
    again.load_state_dict(iterable.state_dict(done))
    again.set_epoch(2)
    assert len(again) == len(complete) - done
    assert [keys for keys, _ in batches_of(again, workers)] == complete[done:]
    iterable.set_epoch(3)
    again.set_epoch(3)
    assert [keys for keys, _ in batches_of(again)] == [keys for keys, _ in batches_of(iterable)] != complete


def test_persistent_workers_take_the_next_epoch(store):
    iterable = LatentIterable(store, 2)
    loader = DataLoader(iterable, batch_size=None, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in (0, 1):
        iterable.set_epoch(epoch)
        epochs.append([batch["key"] for batch in loader])
        assert epochs[-1] == [keys for keys, _ in batches_of(iterable)]
    assert epochs[0] != epochs[1]


def test_ranks_split_the_rows(store):
    parts = [batches_of(LatentIterable(store, 2, rank=rank, ranks=2)) for rank in range(2)]
    assert len(parts[0]) == len(parts[1])
    keys = [key for part in parts for keys, _ in part for key in keys]
    assert {*keys} == {*KEYS}
    assert len(keys) - len({*keys}) <= 2  # at most one row a bucket is repeated, to fill the last step


def test_rows_are_shuffled_within_a_window_of_shards(store):
    iterable = LatentIterable(store, 2, window=1, drop_last=True)
    shard_of = {
        iterable.dataset.keys()[number]: index
        for index, (_, rows) in enumerate(iterable.dataset.shards())
        for number in rows.tolist()
    }
    order = [shard_of[key] for keys, _ in batches_of(iterable) for key in keys]
    # A row waits at most for the next shard of its bucket: few other rows are between the first and last of a shard.
    for shard in {*order}:
        places = [place for place, each in enumerate(order) if each == shard]
        assert places[-1] - places[0] < 12
    assert order != sorted(order)


def test_a_state_of_another_order_is_refused(store):
    state = LatentIterable(store, 2).state_dict(1)
    with pytest.raises(ValueError, match="window was 8 and is 2"):
        LatentIterable(store, 2, window=2).load_state_dict(state)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        LatentIterable(store, 2, window=0)
