"""Sound rows of a damaged shard, which repair keeps if their images no longer encode."""

import json
import os

import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from support.repairs import OPTIONS, flip, mend
from support.small_store import SIDE, small_vae, write_pictures
from support.store_checks import committed, failures

from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.salvage import sound_rows
from fastvae.data.encoding.settings import stored_settings
from fastvae.data.encoding.worker import MAX_DEATHS
from fastvae.data.store.leases import Leases
from fastvae.data.store.store import Store
from fastvae.data.store.verify import verify


def test_sound_rows_of_a_damaged_shard_are_kept_where_their_images_are_gone(made, tmp_path):
    """The images of 004, 005 and 007 are missing; a bit of 007's mean is flipped."""
    whole = committed(made)
    flip(made / "shards" / "000001-32x32.safetensors")
    for number in (4, 5, 7):
        (tmp_path / "in" / f"00{number}.png").unlink()
    report = mend(made, tmp_path / "in", max_failures=2).report
    assert (report.ok, report.kept, report.failed) == (1, 2, 1)
    assert "kept    2 sound rows of damaged shards, whose images gave no latent any more" in report.lines()
    assert failures(made) == {"bad.png": "empty", "007.png": "unreadable"}
    assert committed(made) == {name: row for name, row in whole.items() if name != ("007.png", 0)}
    assert verify(made, deep=True, progress=False).damaged == []


def test_masks_of_images_that_are_gone_are_kept_and_a_level_of_one_is_not_changed_unseen(tmp_path, first):
    """Three rows with masks: the images of the first and third are missing, and the third's mask is changed."""
    keys = write_pictures(tmp_path / "in", 3)
    for key in keys:
        image = Image.open(tmp_path / "in" / key)
        image.putalpha(image.convert("L"))
        image.save(tmp_path / "in" / key)
    out = tmp_path / "out"
    encode(tmp_path / "in", out, vae=first / "vae", buckets=SIDE, dtype="fp32", alpha="mask", **OPTIONS)
    whole = committed(out)
    (shard,) = (out / "shards").glob("*.safetensors")
    data, levels = bytearray(shard.read_bytes()), load_file(shard)["alpha"].tobytes()
    data[data.index(levels) + len(levels) - 1] ^= 1
    shard.write_bytes(data)
    for key in (keys[0], keys[2]):
        (tmp_path / "in" / key).unlink()
    report = mend(out, tmp_path / "in").report
    assert (report.ok, report.kept, report.failed) == (1, 1, 1)
    assert committed(out) == {name: row for name, row in whole.items() if name != (keys[2], 0)}


def test_a_row_with_a_changed_bit_or_of_another_identity_is_not_kept(made):
    store = Store.open(made)
    unit, shard = store.units()[1], made / "shards" / "000001-32x32.safetensors"
    settings, whole = stored_settings(store, small_vae(), torch.device("cpu")), shard.read_bytes()
    assert [*sound_rows(shard, unit, store.facts, settings)] == [row.name for row in unit.rows]
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    for name in header.keys() - {"__metadata__"}:
        data = bytearray(whole)
        data[8 + length + header[name]["data_offsets"][0]] ^= 1
        shard.write_bytes(data)
        kept = [*sound_rows(shard, unit, store.facts, settings)]
        assert kept == ([] if name == "key_offset" else [row.name for row in unit.rows[1:]]), name
    shard.write_bytes(whole.replace(store.facts["identity_digest"].encode(), b"0" * 64))
    assert sound_rows(shard, unit, store.facts, settings) == {}


def test_a_damaged_unit_all_of_whose_rows_fail_leaves_no_shard(made, tmp_path):
    flip(made / "shards" / "000000-32x32.safetensors")
    shard = made / "shards" / "000001-32x32.safetensors"
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    for number in range(4, 8):
        (tmp_path / "in" / f"00{number}.png").unlink()
    report = mend(made, tmp_path / "in", max_failures=5).report
    assert (report.ok, report.kept, report.failed) == (4, 0, 4)
    assert not shard.exists()
    assert json.loads(shard.with_suffix(".json").read_text())["shard"] is None
    assert verify(made, deep=True, progress=False).damaged == []


def test_a_sound_row_is_kept_if_its_image_is_broken(made, tmp_path):
    """A shard and a picture are damaged; the picture has its old size and time."""
    whole = committed(made)
    flip(made / "shards" / "000001-32x32.safetensors")
    path = tmp_path / "in" / "005.png"
    data, time = bytearray(path.read_bytes()), path.stat().st_mtime_ns
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    os.utime(path, ns=(time, time))
    report = mend(made, tmp_path / "in").report
    assert (report.ok, report.kept, report.failed) == (3, 1, 0)
    assert committed(made) == whole


def test_sound_rows_are_kept_of_a_unit_that_crashes_processes(made, tmp_path, monkeypatch):
    """Row 007 is damaged."""
    whole = committed(made)
    flip(made / "shards" / "000001-32x32.safetensors")
    monkeypatch.setattr(Leases, "is_taken", lambda leases, name: name.isdigit())
    monkeypatch.setattr(Leases, "deaths", lambda leases, name: 2 * MAX_DEATHS)
    report = mend(made, tmp_path / "in", max_failures=2).report
    assert (report.ok, report.kept, report.failed) == (0, 3, 1)
    assert failures(made) == {"bad.png": "empty", "007.png": "worker_died"}
    assert committed(made) == {name: row for name, row in whole.items() if name != ("007.png", 0)}
    assert verify(made, deep=True, progress=False).damaged == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with a name")
def test_a_pipe_in_the_place_of_a_shard_is_not_opened_for_the_rows_it_may_have(made, tmp_path):
    shard = made / "shards" / "000001-32x32.safetensors"
    shard.unlink()
    os.mkfifo(shard)
    (tmp_path / "in" / "005.png").unlink()
    report = mend(made, tmp_path / "in", max_failures=2).report
    assert (report.ok, report.kept, report.failed) == (3, 0, 1)
