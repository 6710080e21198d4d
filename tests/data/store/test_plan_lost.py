"""A lost plan file: its records are never used for rows that are planned again."""

import json

import numpy as np
import pytest
from PIL import Image
from support.repairs import state
from support.small_store import SIDE, small_vae, write_pictures

from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.repair import repair
from fastvae.data.store.errors import StoreError
from fastvae.data.store.store import Store
from fastvae.data.store.verify import verify

OPTIONS = {"device": "cpu", "progress": False}
FIXED = {"buckets": SIDE, "dtype": "fp32", "max_failures": 1} | OPTIONS
LOST = r"1 records with a shard beside them are of no unit in .*plan: put the missing plan back, or take both away"


def paint(path, colour):
    Image.new("RGB", (48, 40), colour).save(path)


@pytest.fixture
def edited(tmp_path):
    """A store of four pictures, one of which was then painted red and encoded again, in a second plan file."""
    write_pictures(tmp_path / "in", 4)
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **FIXED)
    paint(tmp_path / "in" / "001.png", (200, 0, 0))
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **FIXED)
    return tmp_path


@pytest.mark.parametrize("lost", ["units-00000.jsonl", "units-00001.jsonl"])
def test_rows_of_a_lost_plan_are_not_used_for_an_edited_image(edited, lost):
    out = edited / "out"
    kept = (out / "plan" / lost).read_bytes()
    (out / "plan" / lost).unlink()
    paint(edited / "in" / "001.png", (0, 0, 255))
    before = state(out)
    for dry_run in (True, False):
        with pytest.raises(StoreError, match=LOST):
            encode(edited / "in", out, vae=small_vae(), dry_run=dry_run, **FIXED)
    with pytest.raises(StoreError, match=LOST):
        repair(out, edited / "in", vae=small_vae(), retry_failed=True, **OPTIONS)
    assert state(out) == before
    (out / "plan" / lost).write_bytes(kept)
    assert encode(edited / "in", out, vae=small_vae(), **FIXED).ok == 1
    encode(edited / "in", edited / "fresh", vae=small_vae(), **FIXED)
    rows, fresh = (
        {row["key"]: row["mean"].numpy() for row in LatentDataset(edited / name)} for name in ("out", "fresh")
    )
    assert rows.keys() == fresh.keys()
    assert all(np.array_equal(rows[key], fresh[key]) for key in rows)


def test_a_plan_lost_while_the_run_waits_for_the_lock_is_an_error(edited, monkeypatch):
    out = edited / "out"
    paint(edited / "in" / "001.png", (0, 0, 255))

    def lost(*arguments):
        (out / "plan" / "units-00001.jsonl").unlink()

    monkeypatch.setattr("fastvae.data.encoding.run.check_fast_path", lambda encoder: pytest.fail("the run continued"))
    monkeypatch.setattr("fastvae.data.encoding.encode.check_room", lost)  # the last check before the lock
    with pytest.raises(StoreError, match=LOST):
        encode(edited / "in", out, vae=small_vae(), **FIXED)


def test_a_failure_of_a_lost_plan_is_not_used_for_a_mended_image(tmp_path):
    write_pictures(tmp_path / "in", 2)
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **FIXED)
    (tmp_path / "in" / "bad.png").write_bytes(b"")
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **FIXED)
    record = tmp_path / "out" / "shards" / f"000001-{SIDE}x{SIDE}.json"
    assert json.loads(record.read_text())["shard"] is None
    (tmp_path / "out" / "plan" / "units-00001.jsonl").unlink()
    paint(tmp_path / "in" / "bad.png", (0, 0, 255))
    assert encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **FIXED).ok == 1
    assert [unit.number for unit in Store.open(tmp_path / "out").units()] == [0, 2]
    assert "bad.png" in list(LatentDataset(tmp_path / "out").keys())
    assert [damage.what for damage in verify(tmp_path / "out", progress=False).damaged] == [
        "belongs to no unit of the plan"
    ]
    repair(tmp_path / "out", **OPTIONS)
    assert verify(tmp_path / "out", deep=True, progress=False).damaged == []
    assert not record.exists()
