"""Commit records and shards that do not fit their unit are not trusted."""

import json

import numpy as np
import pytest
from support.small_store import SIDE, small_vae, write_pictures

from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.encoding.encode import encode
from fastvae.data.store.errors import StoreError
from fastvae.data.store.store import Store

OPTIONS = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu"}


def means(store) -> dict[str, np.ndarray]:
    """Return the mean of each key."""
    return {item["key"]: item["mean"].clone().numpy() for item in LatentDataset(store)}


@pytest.fixture
def source(tmp_path):
    """A folder of two pictures."""
    write_pictures(tmp_path / "in", 2)
    return tmp_path / "in"


@pytest.mark.parametrize(
    "change", [{"rows": 1}, {"rows": 3}, {"shard": "../in/000.png"}, {"unit": "0"}, {"shard": None}]
)
def test_a_record_that_does_not_fit_its_unit_is_not_trusted(source, tmp_path, change):
    out = tmp_path / "out"
    encode(source, out, vae=small_vae(), **OPTIONS)
    record = next(out.glob("shards/*.json"))
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    assert Store.open(out).commits() == {}
    assert encode(source, out, vae=small_vae(), **OPTIONS).ok == 2


def test_a_damaged_shard_is_encoded_again_by_the_same_command(source, tmp_path):
    out = tmp_path / "out"
    encode(source, out, vae=small_vae(), **OPTIONS)
    expected = means(out)
    shard = next(out.glob("shards/*.safetensors"))
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(StoreError, match="is damaged"):
        LatentDataset(out)
    assert encode(source, out, vae=small_vae(), **OPTIONS).ok == 2
    assert all(np.array_equal(expected[key], value) for key, value in means(out).items())
