"""Repair: damaged units encoded again and failed images tried again, by the store's own settings, and nothing else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from data.store_checks import committed, failures
from small_store import SIDE, picture, small_vae, write_pictures

from fastvae.checkpoints.atomic import sha256_of
from fastvae.data.encode import encode
from fastvae.data.leases import Leases
from fastvae.data.records import IdentityMismatch, StoreError, StoreLocked
from fastvae.data.repair import repair
from fastvae.data.verify import verify

OPTIONS = {"progress": False, "device": "cpu"}
# Of no reading's: a run may touch them.
PASSING = (".lock", "leases")


_first: list[Path] = []


@pytest.fixture
def first(tmp_path_factory):
    """A store of twelve pictures, four to a shard, and a file that was no picture; its source and model beside it.

    Made once, but inside a test: what conftest.py sets for each decides which layers run.
    """
    if _first:
        return _first[0]
    folder = tmp_path_factory.mktemp("first")
    small_vae().save_pretrained(folder / "vae")
    write_pictures(folder / "in", 12)
    (folder / "in" / "bad.png").write_bytes(b"")
    fixed = {"buckets": SIDE, "dtype": "fp32", "shard_mb": 0.002, "max_failures": 1}
    encode(folder / "in", folder / "out", vae=folder / "vae", **fixed, **OPTIONS)
    _first.append(folder)
    return folder


@pytest.fixture
def made(first, tmp_path):
    """A copy of that store, and of its source."""
    shutil.copytree(first / "in", tmp_path / "in")
    return shutil.copytree(first / "out", tmp_path / "out")


def state(out: Path) -> dict[str, tuple[str, int]]:
    """The hash and the time of change of every file that a repair has no business with."""
    files = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    return {
        name: (sha256_of(path), path.stat().st_mtime_ns)
        for name, path in files.items()
        if name.split("/")[0] not in PASSING
    }


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-40] ^= 4
    path.write_bytes(data)


def mend(out, src=None, **more):
    return repair(out, src, **{"max_failures": 1, **OPTIONS, **more})


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


def test_a_source_is_asked_for_in_a_sentence_and_nothing_is_changed(made):
    flip(made / "shards" / "000000-32x32.safetensors")
    before = state(made)
    with pytest.raises(ValueError, match=r"src must be named, since 1 units of .*out are encoded again .*repair .*SRC"):
        mend(made)
    with pytest.raises(ValueError, match="since 1 units and 1 images that failed of "):
        mend(made, retry_failed=True)
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


def test_what_fails_again_is_told_and_counts_against_the_limit(made, tmp_path):
    done = mend(made, tmp_path / "in", retry_failed=True, max_failures=0)
    assert (done.retried, done.report.failed, done.report.exceeded) == (1, 1, True)
    assert failures(made) == {"bad.png": "empty"}


def test_what_fails_again_in_a_row_that_a_later_unit_serves_is_no_negative_count(made, tmp_path):
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


def test_another_model_is_refused_and_nothing_is_changed(made, tmp_path):
    small_vae(seed=1).save_pretrained(tmp_path / "other")
    flip(made / "shards" / "000000-32x32.safetensors")
    before = state(made)
    with pytest.raises(IdentityMismatch, match="encoder_weights_sha256"):
        mend(made, tmp_path / "in", vae=tmp_path / "other")
    facts = json.loads((made / "store.json").read_text())  # what it names holds other weights by now
    facts["source"]["vae"] = str(tmp_path / "other")
    (made / "store.json").write_text(json.dumps(facts))
    before = state(made)
    with pytest.raises(IdentityMismatch, match="encoder_weights_sha256"):
        mend(made, tmp_path / "in")
    assert changed(before, state(made)) == set()


def test_another_source_is_refused_before_anything_is_lost(made, tmp_path):
    flip(made / "shards" / "000000-32x32.safetensors")
    before = state(made)
    write_pictures(tmp_path / "elsewhere" / "deeper", 2)
    with pytest.raises(ValueError, match=r"src must hold the images that .* none of the 4 that are damaged is in"):
        mend(made, tmp_path / "elsewhere")
    assert changed(before, state(made)) == set()


@pytest.mark.parametrize("hash_files", ["none", "full"])
def test_other_pictures_of_the_same_names_are_never_taken_for_those_that_were_planned(first, tmp_path, hash_files):
    fixed = {"buckets": SIDE, "dtype": "fp32", "shard_mb": 0.002, "max_failures": 1, "hash": hash_files}
    shutil.copytree(first / "in", tmp_path / "in")
    encode(tmp_path / "in", tmp_path / "out", vae=first / "vae", **fixed, **OPTIONS)
    flip(tmp_path / "out" / "shards" / f"000001-{SIDE}x{SIDE}.safetensors")
    (tmp_path / "other").mkdir()
    for number, path in enumerate(sorted((tmp_path / "in").glob("*.png"))):
        picture(100 + number).save(tmp_path / "other" / path.name)
    before = state(tmp_path / "out")
    with pytest.raises(ValueError, match=r"src must hold the images as they were planned: \d+ of \d+ in damaged units"):
        mend(tmp_path / "out", tmp_path / "other", vae=first / "vae")
    assert state(tmp_path / "out") == before


def test_a_copy_of_the_source_with_other_times_serves_where_the_bytes_were_hashed(first, tmp_path):
    fixed = {"buckets": SIDE, "dtype": "fp32", "shard_mb": 0.002, "max_failures": 1, "hash": "full"}
    encode(first / "in", tmp_path / "out", vae=first / "vae", **fixed, **OPTIONS)
    flip(tmp_path / "out" / "shards" / f"000001-{SIDE}x{SIDE}.safetensors")
    (tmp_path / "copy").mkdir()
    for path in (first / "in").iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    assert mend(tmp_path / "out", tmp_path / "copy", vae=first / "vae").units == [1]
    assert not verify(tmp_path / "out", deep=True, progress=False).damaged


def test_records_whose_plan_is_gone_are_not_deleted(made, tmp_path):
    for path in (made / "plan").iterdir():
        path.unlink()
    before = state(made)
    with pytest.raises(StoreError, match=r"records with a shard beside them are of no unit in .*plan: put the missing"):
        mend(made, tmp_path / "in")
    assert state(made) == before


@pytest.mark.parametrize("wrong", [{"max_failures": "abc"}, {"workers": 0}, {"batch": "many"}, {"max_pixels": 0}])
def test_a_wrong_amount_is_refused_before_anything_is_done(made, tmp_path, wrong):
    flip(made / "shards" / "000000-32x32.safetensors")
    before = state(made)
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be "):
        mend(made, tmp_path / "in", **wrong)
    assert changed(before, state(made)) == set()


def test_failures_that_are_not_in_the_source_are_said(made, tmp_path):
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


def test_a_record_that_an_encode_made_during_the_look_is_not_deleted(made, first, tmp_path, monkeypatch):
    """It is of no unit by the plan that was read before, and of one by now."""
    picture(78).save(tmp_path / "in" / "new.png")
    options = {"buckets": SIDE, "dtype": "fp32", "shard_mb": 0.002, "max_failures": 1, **OPTIONS}
    encodes = iter([lambda: encode(tmp_path / "in", made, vae=first / "vae", **options)])
    monkeypatch.setattr("fastvae.data.verify.say", lambda text: next(encodes)())
    done = mend(made, progress=True)
    assert [damage.file for damage in done.damaged] == ["shards/000004-32x32.json"]
    assert ("new.png", 0) in committed(made)


def test_a_running_writer_is_waited_for_by_the_user(made, tmp_path):
    flip(made / "shards" / "000000-32x32.safetensors")
    with (
        Leases(made / "leases") as other,
        pytest.raises(StoreLocked, match=f"is being written, lease run-{other.owner}"),
    ):
        mend(made, tmp_path / "in")
    assert mend(made, tmp_path / "in").units == [0]


def test_row_13_a_plan_of_anothers_opens_nothing_outside_the_source_that_is_named(made, tmp_path):
    """Their damaged unit names a picture of the user's beside the source: it is quarantined, not encoded."""
    picture(9).save(tmp_path / "private.png")
    (plan,) = (made / "plan").iterdir()
    plan.write_text(plan.read_text().replace('"000.png"', '"../private.png"'))
    flip(made / "shards" / "000000-32x32.safetensors")
    done = mend(made, tmp_path / "in", max_failures=2)
    assert (done.report.ok, done.report.reasons["unreadable"]) == (3, 1)
    assert not {key for key, _ in committed(made)} & {"../private.png", "000.png"}


def test_the_models_name_is_said_before_it_is_opened_and_drives_no_terminal(made, tmp_path, capsys):
    flip(made / "shards" / "000000-32x32.safetensors")
    facts = json.loads((made / "store.json").read_text())
    facts["source"]["vae"] = f"{tmp_path}/\x1b[2Jgone\nfastvae: all is well"
    (made / "store.json").write_text(json.dumps(facts))
    with pytest.raises((OSError, ValueError)):
        mend(made, tmp_path / "in")
    said = capsys.readouterr().err
    assert f"model   {tmp_path}/?[2Jgone fastvae: all is well: what the store names; --vae takes another\n" in said
    facts["source"]["subfolder"] = ["vae"]
    (made / "store.json").write_text(json.dumps(facts))
    with pytest.raises(StoreError, match=r"source\.subfolder and source.revision must be text"):
        mend(made, tmp_path / "in")


def test_a_store_of_an_object_needs_the_model(tmp_path):
    write_pictures(tmp_path / "in", 2)
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), buckets=SIDE, dtype="fp32", **OPTIONS)
    flip(tmp_path / "out" / "shards" / "000000-32x32.safetensors")
    with pytest.raises(ValueError, match="vae must be given: the store was made with a AutoencoderKL object"):
        mend(tmp_path / "out", tmp_path / "in")
    assert mend(tmp_path / "out", tmp_path / "in", vae=small_vae()).report.ok == 2


KILLED = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import fastvae.checkpoints.atomic as atomic
from fastvae.data.repair import repair
source, retry, real, calls = sys.argv[1], sys.argv[2] == "retry", os.replace, []
def killing(number):
    def replace(*paths):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), 9)
        real(*paths)
    return replace
for number, out in enumerate(sys.argv[3:], 1):
    child = os.fork()
    if child == 0:
        atomic.os.replace = killing(number)
        repair(out, source, retry_failed=retry, max_failures=1, device="cpu", progress=False, workers=1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def killed(source: Path, retry: str, *stores: Path) -> None:
    """A repair of each store, killed at its first rename, at the second of the next, and so on."""
    command = [sys.executable, "-c", KILLED, source, retry, *stores]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["-9"] * len(stores), done.stderr


@pytest.mark.skipif(os.name != "posix", reason="this system has no such signals")
def test_row_16_a_repair_that_is_killed_while_it_tries_failures_again_goes_on(made, tmp_path):
    """The unit that it had planned is neither damaged nor a failure, and still the same call's."""
    picture(77).save(tmp_path / "in" / "bad.png")
    stores = [shutil.copytree(made, tmp_path / name) for name in ("before the shard", "before its record")]
    killed(tmp_path / "in", "retry", *stores)
    for out in stores:
        with pytest.raises(ValueError, match="src must be named, since 1 images that failed of "):
            mend(out, retry_failed=True)
        assert mend(out, tmp_path / "in").pending == 1
        done = mend(out, tmp_path / "in", retry_failed=True, max_failures=0)
        assert (done.retried, done.pending, done.report.ok) == (1, 0, 1)
        assert failures(out) == {}
        assert ("bad.png", 0) in committed(out)
        assert len(list((out / "plan").iterdir())) == 2


@pytest.mark.skipif(os.name != "posix", reason="this system has no such signals")
def test_row_16_a_repair_that_is_killed_goes_on(made, tmp_path):
    """Before the shard's rename, and between it and the record's: SIGKILL, then the same call."""
    whole = committed(made)
    stores = [shutil.copytree(made, tmp_path / name) for name in ("before the shard", "before its record")]
    for out in stores:
        for shard in (out / "shards").glob("*.safetensors"):
            flip(shard)
    killed(tmp_path / "in", "", *stores)
    for out, damaged in zip(stores, (3, 2), strict=True):
        assert len(verify(out, deep=True, progress=False).damaged) == damaged
        mend(out, tmp_path / "in")
        assert committed(out) == whole
        assert not list(out.rglob("*.tmp.*"))
