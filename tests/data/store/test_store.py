"""The store on disk: its files, runs that are killed, and damage that is not trusted."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from support.repairs import copy_of
from support.small_store import SIDE, small_vae, write_pictures

from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.encoding.encode import encode
from fastvae.data.rows import key_bytes, key_text, sample_id
from fastvae.data.store.errors import StoreError
from fastvae.data.store.identity import canonical_json, differences, digest
from fastvae.data.store.shard import row_checksum
from fastvae.data.store.store import Store
from fastvae.system.atomic_files import sha256_of, write_atomically

OPTIONS = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu", "shard_mb": 0.002}


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """Folder in which the first test that takes ``made`` makes its store."""
    return tmp_path_factory.mktemp("once")


@pytest.fixture
def made(once, tmp_path):
    """A copy of a store of five pictures, two to a shard, and of its source beside it."""
    if not (once / "out").exists():
        write_pictures(once / "in", 5)
        encode(once / "in", once / "out", vae=small_vae(), **OPTIONS)
    return copy_of(once, tmp_path)


def read(store) -> dict[str, tuple]:
    """Return mean and log-variance of each key."""
    return {item["key"]: (item["mean"].tolist(), item["logvar"].tolist()) for item in LatentDataset(store)}


def test_a_shard_reads_with_safetensors_alone(made):
    shards = sorted((made / "shards").glob("*.safetensors"))
    record = json.loads((made / "shards" / f"{shards[0].stem}.json").read_text())
    assert record["bytes"] == shards[0].stat().st_size
    assert record["sha256"] == sha256_of(shards[0])
    with safe_open(shards[0], framework="np") as shard:
        tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (not a dict)
        metadata = shard.metadata()
    shapes = {name: (tensor.dtype.str, tensor.shape[1:]) for name, tensor in tensors.items()}
    assert shapes == {
        "mean": ("<f2", (4, 4, 4)),
        "logvar": ("<f2", (4, 4, 4)),
        "sample_id": ("<u8", ()),
        "original_hw": ("<i4", (2,)),
        "crop_tlhw": ("<i4", (4,)),
        "variant": ("<u2", ()),
        "row_crc32": ("<u4", ()),
        "key_utf8": ("|u1", ()),
        "key_offset": ("<i8", ()),
    }
    assert metadata["fvl"] == "1"
    assert metadata["space"] == "raw"
    assert metadata["scaling_factor"] == "0.18215"
    assert metadata["identity"] == json.loads((made / "store.json").read_text())["identity_digest"]
    keys = [
        tensors["key_utf8"][a:b].tobytes().decode()
        for a, b in zip(tensors["key_offset"][:-1], tensors["key_offset"][1:], strict=True)
    ]
    assert keys == [f"{index:03d}.png" for index in range(len(keys))]
    assert tensors["sample_id"].tolist() == [sample_id(key) for key in keys]
    for row in range(len(keys)):
        assert tensors["row_crc32"][row] == row_checksum(tensors["mean"][row], tensors["logvar"][row])


def test_row_16_a_killed_run_is_finished_by_the_next(tmp_path, forks, monkeypatch):
    """A run is killed before and after every rename: no committed shard is damaged, and none is lost."""
    # The check before a run is a second of CPU time, in each of twenty runs.
    monkeypatch.setattr("fastvae.data.encoding.run.check_fast_path", lambda encoder: None)
    write_pictures(tmp_path / "in", 5)
    encode(tmp_path / "in", tmp_path / "whole", vae=small_vae(), **OPTIONS)
    expected = read(tmp_path / "whole")
    script = Path(__file__).parent / "killed_runs.py"
    done = forks.run(script, tmp_path / "in", tmp_path / "killed")
    assert done.returncode == 0, done.stderr
    points = [line.split("\t") for line in done.stdout.splitlines()]
    killed = [name for name, code in points if code == "137"]
    # Atomic writes: a rename each for store.json, shards, records, failures and index, and a link for the plan.
    files = 4 + 2 * len(list((tmp_path / "whole" / "shards").glob("*.safetensors")))
    assert len(killed) == 2 * files
    assert [code for name, code in points if name not in killed] == ["0"] * 4
    for name in killed:
        out = tmp_path / "killed" / name
        committed = 0
        if (out / "store.json").exists():
            store = Store.open(out)
            for commit in store.commits().values():
                assert sha256_of(out / "shards" / str(commit.shard)) == commit.sha256
                committed += commit.rows
        report = encode(tmp_path / "in", out, vae=small_vae(), **OPTIONS)
        assert (report.resumed, report.ok) == (committed, 5 - committed), name
        assert read(out) == expected, name
        assert not list(out.rglob("*.tmp.*"))


@pytest.mark.parametrize(
    "damage", ["truncated shard", "missing shard", "missing record", "record of noise", "record of another identity"]
)
def test_a_damaged_unit_is_not_trusted_and_encoded_again(made, tmp_path, damage):
    expected = read(made)
    shard = made / "shards" / "000001-32x32.safetensors"
    record = shard.with_suffix(".json")
    if damage == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "missing shard":
        shard.unlink()
    elif damage == "missing record":
        record.unlink()
    elif damage == "record of noise":
        record.write_text("[]")
    else:
        record.write_text(json.dumps(json.loads(record.read_text()) | {"identity": "0" * 64}))
    assert 1 not in Store.open(made).commits()
    left = LatentDataset(made).keys()
    assert 0 < len(left) < 5
    report = encode(tmp_path / "in", made, vae=small_vae(), **OPTIONS)
    assert report.ok == 5 - len(left)
    assert read(made) == expected


def test_temporary_files_of_killed_runs_are_deleted(made, tmp_path):
    leftover = made / "shards" / "000009-32x32.safetensors.tmp.123.0123abcd"
    leftover.write_bytes(b"half a shard")
    encode(tmp_path / "in", made, vae=small_vae(), **OPTIONS)
    assert not leftover.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no store.json"),
        ("{", "not readable as JSON"),
        ('{"fvl": 2}', r'must have "fvl": 1'),
        ('{"fvl": 1}', "is damaged: it lacks identity, identity_digest, buckets, latent_channels"),
        ('{"fvl": 1, "scaling": NaN}', "not readable as JSON: NaN is no JSON"),
        ("lacks a mean", r"is damaged: it lacks identity\.numerics\.mean, scaling\.batch_norm"),
        ("[]", r'must have "fvl": 1'),
        ("edited", "was edited"),
    ],
)
def test_a_damaged_store_json_is_refused(made, content, words):
    path = made / "store.json"
    if content is None:
        path.unlink()
    elif content == "edited":
        facts = json.loads(path.read_text())
        facts["identity"]["numerics"]["dtype"] = "fp16"
        path.write_text(json.dumps(facts))
    elif content == "lacks a mean":
        facts = json.loads(path.read_text())
        del facts["identity"]["numerics"]["mean"], facts["scaling"]["batch_norm"]
        path.write_text(json.dumps(facts))
    else:
        path.write_text(content)
    with pytest.raises(StoreError, match=words):
        Store.open(made)


def test_a_damaged_plan_is_named(made):
    (made / "plan" / "units-00000.jsonl").write_text('{"unit": 0}\n')
    with pytest.raises(StoreError, match=r"units-00000\.jsonl is damaged"):
        Store.open(made).units()


def test_a_damaged_shard_is_named(made):
    shard = made / "shards" / "000001-32x32.safetensors"
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(StoreError, match=r"000001-32x32\.safetensors is damaged: .*; fastvae repair makes it again"):
        LatentDataset(made)


def test_derived_files_are_written_again_from_the_records(made):
    index, failures = (made / "index.jsonl").read_bytes(), (made / "failures.jsonl").read_bytes()
    assert len(index.splitlines()) == 5
    (made / "index.jsonl").unlink()
    (made / "failures.jsonl").unlink()
    Store.open(made).write_derived()
    assert (made / "index.jsonl").read_bytes() == index
    assert (made / "failures.jsonl").read_bytes() == failures


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, [b"old"])

    def parts():
        yield b"new"
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_atomically(path, parts())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_reads_back_with_other_bytes_does_not_get_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("fastvae.system.atomic_files.sha256_of", lambda path: "0" * 64)
    with pytest.raises(OSError, match="read back with other bytes"):
        write_atomically(tmp_path / "file", [b"data"])
    assert not list(tmp_path.iterdir())


def test_the_hash_is_that_of_the_written_bytes(tmp_path):
    array = np.arange(6, dtype="<f4").reshape(2, 3)
    size, hashed = write_atomically(tmp_path / "file", [b"head", memoryview(array), memoryview(np.empty((0, 2)))])
    assert (tmp_path / "file").read_bytes() == b"head" + array.tobytes()
    assert (size, hashed) == (28, sha256_of(tmp_path / "file"))


def test_an_identity_has_one_json_and_one_digest():
    assert digest({"a": 1, "b": [1.5, None]}) == digest({"b": [1.5, None], "a": 1})
    assert canonical_json({"b": "é", "a": 1}) == '{"a":1,"b":"\\u00e9"}'
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 0}) == [
        "a.c: the store has 2, this run 3",
        "d: the store has null, this run 0",
    ]


def test_keys_keep_bytes_that_are_not_utf_8():
    name = os.fsdecode(b"caf\xe9 \xff.png")
    assert key_text(key_bytes(name)) == name
    # The first 8 bytes, little-endian, of sha256(b"abc") = ba7816bf8f01cfea...
    assert sample_id("abc") == 0xEACF018FBF1678BA
