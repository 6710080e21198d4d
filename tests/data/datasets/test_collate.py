"""Collation of items of LatentDataset."""

import pytest
import torch
from support.small_store import write_store
from torch.utils.data import default_collate

from fastvae.data.datasets.collate import collate
from fastvae.data.datasets.dataset import LatentDataset

SQUARE, WIDE = (32, 32), (24, 48)


ROWS = {SQUARE: ["a", "b.png", "b.jpg", "c/b.png", ("b.png", 1), "f"], WIDE: ["g", ("g", 1), "h"]}


COLUMNS = {"a": {"txt": "an image", "score": 3}, "g": {"txt": "wide"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("dataset") / "store", ROWS, columns=COLUMNS)


def test_rows_read_together_equal_their_collated_items(made):
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


def test_a_batch_of_two_buckets_is_refused(made):
    with pytest.raises(ValueError, match="of one bucket, got 24x48, 32x32: take BucketBatchSampler"):
        collate(LatentDataset(made).__getitems__([0, 6]))
    with pytest.raises(ValueError, match="at least one item, got none"):
        collate([])
