"""repair: encodes damaged units and failed images again, with the store's settings, and changes nothing else."""

import json
import shutil

import pytest
from support.repairs import OPTIONS, changed, flip, mend, state
from support.small_store import SIDE, picture, write_pictures
from support.store_checks import committed, failures

from fastvae.data.encoding.encode import encode
from fastvae.data.store.verify import verify


def test_row_32_a_damaged_unit_is_made_again_and_no_other_file_is_touched(made, tmp_path):
    whole = state(made)
    shard = made / "shards" / "000001-32x32.safetensors"
    flip(shard)
    flipped = state(made)
    done = mend(made, tmp_path / "in")
    assert (done.units, done.retried, done.report.ok, done.report.resumed) == ([1], 0, 4, 8)
    after = state(made)
    assert changed(flipped, after) == {f"shards/000001-32x32{ending}" for ending in (".safetensors", ".json")}
    assert {name: digest for name, (digest, _) in after.items() if name.endswith(".safetensors")} == {
        name: digest for name, (digest, _) in whole.items() if name.endswith(".safetensors")
    }
    assert verify(made, deep=True, progress=False).damaged == []


def test_nothing_to_do_needs_no_source_and_touches_nothing(made):
    before = state(made)
    done = mend(made)
    assert (done.units, done.retried, done.report) == ([], 0, None)
    assert changed(before, state(made)) == set()


def test_retry_failed_tries_those_alone_in_units_of_their_own(made, tmp_path):
    before = state(made)
    assert mend(made, tmp_path / "in").report is None
    picture(77).save(tmp_path / "in" / "bad.png")
    picture(78).save(tmp_path / "in" / "new.png")  # encode's work
    done = mend(made, tmp_path / "in", retry_failed=True, max_failures=0)
    assert (done.units, done.retried, done.report.ok) == ([], 1, 1)
    assert failures(made) == {}
    assert ("bad.png", 0) in committed(made)
    assert ("new.png", 0) not in committed(made)
    after = state(made)
    added = {"plan/units-00001.jsonl", "shards/000004-32x32.safetensors", "shards/000004-32x32.json"}
    assert changed(before, after) == {*added, "index.jsonl", "failures.jsonl"}


def test_an_image_that_fails_again_is_reported_and_counts(made, tmp_path):
    done = mend(made, tmp_path / "in", retry_failed=True, max_failures=0)
    assert (done.retried, done.report.failed, done.report.exceeded) == (1, 1, True)
    assert failures(made) == {"bad.png": "empty"}


def test_a_failure_of_a_row_in_a_later_unit_is_no_negative_count(made, tmp_path):
    picture(77).save(tmp_path / "in" / "bad.png")
    assert mend(made, tmp_path / "in", retry_failed=True).report.ok == 1
    (made / "shards" / "000003-32x32.json").write_text("[]")
    (tmp_path / "in" / "bad.png").write_bytes(b"")
    report = mend(made, tmp_path / "in").report
    assert (report.failed, report.failed_before, report.reasons) == (1, 0, {})


def test_units_that_no_run_has_made_are_left_to_encode(made, tmp_path):
    for path in (made / "shards").glob("000002-*"):
        path.unlink()
    flip(made / "shards" / "000000-32x32.safetensors")
    done = mend(made, tmp_path / "in")
    assert (done.units, done.pending, done.report.ok) == ([0], 1, 4)
    assert not list((made / "shards").glob("000002-*"))


DAMAGE = {
    "a record of noise": lambda shard, record: record.write_text("[]"),
    "a record of another store": lambda shard, record: record.write_text(
        json.dumps(json.loads(record.read_text()) | {"identity": "0" * 64})
    ),
    "a shard that is gone": lambda shard, record: shard.unlink(),
    "a shard that is cut": lambda shard, record: shard.write_bytes(shard.read_bytes()[:-1]),
    "a shard whose keys are noise": lambda shard, record: shard.write_bytes(b"\xff" * shard.stat().st_size),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_every_damage_is_mended(made, tmp_path, case):
    whole = committed(made)
    shard = made / "shards" / "000001-32x32.safetensors"
    DAMAGE[case](shard, shard.with_suffix(".json"))
    assert mend(made, tmp_path / "in", retry_failed=True).units == [1]
    assert committed(made) == whole
    assert verify(made, deep=True, progress=False).damaged == []


def test_a_record_of_no_unit_is_deleted_without_a_source(made):
    stray = made / "shards" / "000099-32x32.json"
    shutil.copy(made / "shards" / "000000-32x32.json", stray)
    before = state(made)
    assert [damage.file for damage in mend(made).damaged] == ["shards/000099-32x32.json"]
    assert changed(before, state(made)) == {"shards/000099-32x32.json"}


KINDS = {
    "eight bits of log-variance, single precision": {"logvar": "u8", "store_dtype": "fp32"},
    "means, transparency dropped": {"posterior": "mean", "alpha": "drop"},
    "means, and masks": {"posterior": "mean", "alpha": "mask"},
    "draws by a seed": {"posterior": "sample", "seed": 2**64 - 1},
    "crops by a seed, mirrored, in many buckets": {
        "buckets": "sdxl@64", "crop": "random", "variants": 2, "flip": True, "seed": 5,
    },
    "half precision": {"dtype": "bf16"},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_taken_from_the_store(tmp_path, first, kind):
    write_pictures(tmp_path / "in", 3)
    out = tmp_path / "out"
    options = {"buckets": SIDE, "dtype": "fp32", **KINDS[kind]}
    encode(tmp_path / "in", out, vae=first / "vae", **options, **OPTIONS)
    whole = state(out)
    for shard in (out / "shards").glob("*.safetensors"):
        flip(shard)
    done = mend(out, tmp_path / "in")
    assert len(done.units) == len(list((out / "shards").glob("*.safetensors")))
    after = state(out)
    same = {name for name in whole if name.endswith(".safetensors") and whole[name][0] == after[name][0]}
    assert len(same) == len(done.units)


def test_a_copy_of_the_source_with_other_times_serves_where_the_bytes_were_hashed(first, tmp_path):
    fixed = {"buckets": SIDE, "dtype": "fp32", "shard_mb": 0.002, "max_failures": 1, "hash": "full"}
    encode(first / "in", tmp_path / "out", vae=first / "vae", **fixed, **OPTIONS)
    flip(tmp_path / "out" / "shards" / f"000001-{SIDE}x{SIDE}.safetensors")
    (tmp_path / "copy").mkdir()
    for path in (first / "in").iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    assert mend(tmp_path / "out", tmp_path / "copy", vae=first / "vae").units == [1]
    assert not verify(tmp_path / "out", deep=True, progress=False).damaged


def test_failures_that_are_not_in_the_source_are_reported(made, tmp_path):
    write_pictures(tmp_path / "elsewhere" / "deeper", 2)
    with pytest.raises(
        ValueError, match=r"src must hold the images that .* none of the 1 that failed is in .*elsewhere"
    ):
        mend(made, tmp_path / "elsewhere", retry_failed=True)
    (tmp_path / "in" / "worse.png").write_bytes(b"")
    options = {"buckets": SIDE, "dtype": "fp32", "shard_mb": 0.002, "max_failures": 2}
    encode(
        tmp_path / "in", made, vae=json.loads((made / "store.json").read_text())["source"]["vae"], **options, **OPTIONS
    )
    (tmp_path / "in" / "bad.png").unlink()
    done = mend(made, tmp_path / "in", retry_failed=True, max_failures=2)
    assert (done.retried, done.missing, done.report.failed, done.report.failed_before) == (1, 1, 1, 1)


def test_a_record_that_an_encode_made_during_the_look_is_no_damage_and_is_not_deleted(
    made, first, tmp_path, monkeypatch
):
    """Its unit is not in the plan that was read before, and is in the plan now."""
    picture(78).save(tmp_path / "in" / "new.png")
    options = {"buckets": SIDE, "dtype": "fp32", "shard_mb": 0.002, "max_failures": 1, **OPTIONS}
    encodes = iter([lambda: encode(tmp_path / "in", made, vae=first / "vae", **options)])
    monkeypatch.setattr("fastvae.data.store.verify.print_stderr", lambda text: next(encodes)())
    done = mend(made, progress=True)
    assert done.damaged == []
    assert ("new.png", 0) in committed(made)
