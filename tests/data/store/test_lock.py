"""The lock of a store that another process holds."""

import os

import pytest
from support.small_store import SIDE, small_vae, write_pictures

from fastvae.data.encoding.encode import encode
from fastvae.data.store.errors import StoreLocked
from fastvae.data.store.lock import locked

OPTIONS = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu"}


@pytest.fixture
def source(tmp_path):
    """A folder of two pictures."""
    write_pictures(tmp_path / "in", 2)
    return tmp_path / "in"


def test_a_lock_that_is_held_too_long_is_an_error(source, tmp_path, monkeypatch):
    pytest.importorskip("fcntl", reason="this system has no such lock")
    out = tmp_path / "out"
    encode(source, out, vae=small_vae(), limit=1, **OPTIONS)
    monkeypatch.setattr("fastvae.data.store.lock.LOCK_TIMEOUT", 0.1)
    with locked(out), pytest.raises(StoreLocked, match=f"is locked: process {os.getpid()} has been planning it"):
        encode(source, out, vae=small_vae(), **OPTIONS)
    assert encode(source, out, vae=small_vae(), **OPTIONS).ok == 1
