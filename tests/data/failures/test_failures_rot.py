"""Failure mode 32: a bit that changes on disk, in a committed shard."""

import json
import random
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.repairs import copy_of
from support.small_store import SIDE, picture, small_vae, write_pictures

from fastvae.data.encoding.encode import encode
from fastvae.data.store.store import Store
from fastvae.data.store.verify import verify
from fastvae.system.atomic_files import sha256_of

OPTIONS = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu", "shard_mb": 0.002}


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """Folder in which the first test that takes ``made`` makes its store."""
    return tmp_path_factory.mktemp("once")


@pytest.fixture
def made(once, tmp_path):
    """A copy of a store of twelve pictures, four to a shard, and one that failed, and of its source beside it."""
    if not (once / "out").exists():
        write_pictures(once / "in", 12)
        (once / "in" / "bad.png").write_bytes(b"")
        encode(once / "in", once / "out", vae=small_vae(), max_failures=1, **OPTIONS)
    return copy_of(once, tmp_path)


def shards_of(out):
    return {path.name: path.read_bytes() for path in sorted((out / "shards").glob("*.safetensors"))}


FLIPS = [pytest.param(200, id="short"), pytest.param(1000, id="long", marks=pytest.mark.slow)]


@pytest.mark.parametrize("flips", FLIPS)
def test_row_32_every_single_bit_that_flips_is_found(made, flips):
    found = verify(made, deep=True, progress=False)
    assert (found.damaged, found.stale, found.rows, found.failed, found.pending) == ([], [], 12, 1, 0)
    generator, whole, seen = random.Random(0), shards_of(made), 0
    for number in range(flips):
        name = generator.choice(sorted(whole))
        data = bytearray(whole[name])
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        (made / "shards" / name).write_bytes(data)
        damaged = verify(made, deep=bool(number % 2), progress=False).damaged
        seen += [damage.file for damage in damaged] == [f"shards/{name}"]
        (made / "shards" / name).write_bytes(whole[name])
    assert seen == flips
    assert verify(made, deep=True, progress=False).damaged == []
    print(f"\nrow 32: {seen} of {flips} single bit flips found, each by its shard's name")  # noqa: T201


def test_row_32_rows_are_checked_separately_if_a_hash_is_made_to_fit(made):
    """A changed shard whose record has its new hash still has checksums, values or names that do not fit."""
    from fastvae.data.store.shard import ShardRow, pack, read_metadata

    shard = sorted((made / "shards").glob("*.safetensors"))[0]
    record = shard.with_suffix(".json")
    told, whole = json.loads(record.read_text()), shard.read_bytes()
    tensors, stated = load_file(shard), read_metadata(shard)

    def believed(data: bytes) -> list[str]:
        shard.write_bytes(data)
        record.write_text(json.dumps(told | {"sha256": sha256_of(shard), "bytes": len(data)}))
        assert verify(made, progress=False).damaged == []
        return [damage.what for damage in verify(made, deep=True, progress=False).damaged]

    at = whole.index(tensors["mean"].tobytes()) + 3
    (what,) = believed(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert "row 0 (000.png) has another checksum" in what

    def row(key, mean):
        return ShardRow(key, mean, tensors["logvar"][0], (40, 48), (0, 0, 32, 32))

    names = [f"{number:03d}.png" for number in range(4)]
    infinite = np.full_like(tensors["mean"][0], np.inf)
    for rows, wrong in (
        ([row(name, infinite) for name in names], "row 0 (000.png) is not finite"),
        ([row(name, tensors["mean"][0]) for name in ("a", *names[1:])], "has other rows than its unit"),
        ([row(name, tensors["mean"][0][:, :2]) for name in names], "is damaged: "),
    ):
        (what,) = believed(b"".join(bytes(part) for part in pack(rows, stated)))
        assert wrong in what
    assert believed(whole) == []


DAMAGE = {
    "a record of noise": (lambda shard, record: record.write_text("[]"), "is no commit record"),
    "a record of another store": (
        lambda shard, record: record.write_text(json.dumps(json.loads(record.read_text()) | {"identity": "0" * 64})),
        "has another identity",
    ),
    "a record of other rows": (
        lambda shard, record: record.write_text(json.dumps(json.loads(record.read_text()) | {"rows": 3})),
        "lists other rows than its unit",
    ),
    "a shard that is gone": (lambda shard, record: shard.unlink(), "cannot be read: No such file"),
    "a shard that is cut": (lambda shard, record: shard.write_bytes(shard.read_bytes()[:-1]), "bytes, and its record"),
    "a record of no unit": (
        lambda shard, record: shutil.copy(record, record.with_name("000099-32x32.json")),
        "belongs to no unit of the plan",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_row_32_every_damage_is_named(made, case):
    damage, words = DAMAGE[case]
    shard = sorted((made / "shards").glob("*.safetensors"))[0]
    damage(shard, shard.with_suffix(".json"))
    (found,) = verify(made, deep=True, progress=False).damaged
    assert words in found.what
    assert (made / found.file).name.startswith(shard.stem.split("-")[0] if case != "a record of no unit" else "000099")


def test_a_failure_of_an_image_that_was_made_since_is_counted_no_more(made, tmp_path):
    picture(50).save(tmp_path / "in" / "bad.png")
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), max_failures=1, **OPTIONS)
    found = verify(made, progress=False)
    assert (found.rows, found.failed, found.damaged) == (13, 0, [])


def test_row_32_a_unit_that_is_not_yet_done_is_no_damage(made):
    for path in (made / "shards").glob("000001-*.json"):
        path.unlink()
    found = verify(made, deep=True, progress=False)
    assert (found.damaged, found.pending, found.stale) == ([], 1, ["index.jsonl"])
    assert Store.open(made).commits().keys() == {0, 2, 3}


KINDS = {
    "eight bits of log-variance": {"logvar": "u8"},
    "single precision": {"store_dtype": "fp32"},
    "means": {"posterior": "mean"},
    "draws": {"posterior": "sample"},
    "masks": {"alpha": "mask"},
    "crops, mirrored, in many buckets": {"buckets": "sdxl@64", "crop": "random", "variants": 2, "flip": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_row_32_every_kind_of_store_is_sound_and_a_bit_of_each_tensor_is_seen(tmp_path, kind):
    """Also if the hash is made to fit: every tensor under a row's checksum, and the sample id of its key."""
    write_pictures(tmp_path / "in", 5)
    out = tmp_path / "out"
    encode(tmp_path / "in", out, vae=small_vae(), **OPTIONS | KINDS[kind])
    found = verify(out, deep=True, progress=False)
    assert (found.damaged, found.stale) == ([], [])
    assert found.rows == 5 * (4 if "crop" in KINDS[kind] else 1)
    shard = sorted((out / "shards").glob("*.safetensors"))[0]
    record, whole, tensors = shard.with_suffix(".json"), shard.read_bytes(), load_file(shard)
    told = json.loads(record.read_text())
    summed = {"mean", "logvar", "logvar_range", "alpha", "sample_id", "row_crc32", "variant", "key_utf8"}
    for name in summed & tensors.keys():
        damaged = bytearray(whole)
        damaged[whole.index(tensors[name].tobytes())] ^= 1
        shard.write_bytes(damaged)
        record.write_text(json.dumps(told | {"sha256": sha256_of(shard)}))
        assert [damage.file for damage in verify(out, deep=True, progress=False).damaged] == [f"shards/{shard.name}"], (
            name
        )
