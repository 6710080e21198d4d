"""A folder, a pipe or a device where a store has a file: named in a sentence, and never waited for."""

import contextlib
import os
import shutil
import signal

import pytest
from support.repairs import state
from support.small_store import SIDE, small_vae, write_pictures, write_store

from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.repair import repair
from fastvae.data.store.errors import StoreError
from fastvae.data.store.info import store_facts
from fastvae.data.store.store import Store
from fastvae.data.store.verify import verify

pytestmark = pytest.mark.skipif(os.name != "posix", reason="this system has no such files")
KINDS = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}
SHARD = f"shards/000000-{SIDE}x{SIDE}.safetensors"
RECORD = SHARD.replace(".safetensors", ".json")


@contextlib.contextmanager
def within(seconds: float):
    """TimeoutError in whatever waits longer: for a pipe that nobody writes, or a device that has no end."""

    def stop(number, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def replace(path, kind):
    path.unlink()
    KINDS[kind](path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = write_store(tmp_path_factory.mktemp("made") / "out", {(SIDE, SIDE): [f"{n}.png" for n in range(6)]})
    Store.open(out).write_derived()
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [RECORD, SHARD, "index.jsonl", "failures.jsonl"])
def test_verify_names_it(made, tmp_path, kind, name):
    out = shutil.copytree(made, tmp_path / "out")
    replace(out / name, kind)
    for deep in (False, True):
        with within(20):
            found = verify(out, deep=deep, progress=False).damaged
        assert [(damage.file, damage.what) for damage in found] == [(name, f"is {kind}, not a file")]


def test_a_record_that_is_a_link_to_itself_ends_no_verb(tmp_path):
    write_pictures(tmp_path / "in", 5)
    fixed = {"buckets": SIDE, "dtype": "fp32", "shard_mb": 0.002, "device": "cpu", "progress": False}
    out, record = tmp_path / "out", tmp_path / "out" / RECORD
    encode(tmp_path / "in", out, vae=small_vae(), **fixed)
    record.unlink()
    record.symlink_to(record.name)
    assert len(LatentDataset(out)) == store_facts(out)["rows"] == 1
    (damage,) = verify(out, progress=False).damaged
    assert (damage.file, damage.what) == (RECORD, "cannot be read: Too many levels of symbolic links")
    assert encode(tmp_path / "in", out, vae=small_vae(), **fixed).ok == 4
    assert verify(out, deep=True, progress=False).damaged == []
    assert not record.is_symlink()


@pytest.mark.parametrize("name", [RECORD, SHARD, "index.jsonl", "failures.jsonl"])
def test_a_run_leaves_a_folder_to_its_owner_before_anything_is_written(tmp_path, name):
    write_pictures(tmp_path / "in", 6)
    out = tmp_path / "out"
    options = {"vae": small_vae(), "buckets": SIDE, "dtype": "fp32", "device": "cpu", "progress": False}
    encode(tmp_path / "in", out, **options)
    replace(out / name, "a folder")
    before = state(out)
    for dry_run in (True, False):
        with pytest.raises(StoreError, match=rf"{name} is a folder, not a file: move it away"):
            encode(tmp_path / "in", out, dry_run=dry_run, **options)
    assert state(out) == before
    (out / name).rmdir()
    encode(tmp_path / "in", out, **options)
    assert verify(out, deep=True, progress=False).damaged == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["store.json", "plan/units-00000.jsonl"])
def test_without_store_json_or_plan_there_is_nothing_to_verify(made, tmp_path, kind, name):
    out = shutil.copytree(made, tmp_path / "out")
    replace(out / name, kind)
    with within(20), pytest.raises(StoreError, match=rf"{name} is damaged: it is {kind}, not a file"):
        verify(out, progress=False)


def test_a_repair_takes_the_place_of_a_pipe_and_leaves_a_folder_to_its_owner(tmp_path):
    write_pictures(tmp_path / "in", 5)
    options = {"device": "cpu", "progress": False}
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), buckets=SIDE, dtype="fp32", shard_mb=0.002, **options)
    out = tmp_path / "out"
    for name in (RECORD, SHARD.replace("000000", "000001"), "index.jsonl"):
        replace(out / name, "a pipe")
    with within(60):
        assert repair(out, tmp_path / "in", vae=small_vae(), **options).units == [0, 1]
    assert verify(out, deep=True, progress=False).damaged == []
    replace(out / "failures.jsonl", "a pipe")
    with within(60):
        assert repair(out, **options).units == []
    assert verify(out, deep=True, progress=False).damaged == []
    whole = shutil.copytree(out, tmp_path / "whole")
    for name in (RECORD, SHARD, "index.jsonl"):
        shutil.copytree(whole, tmp_path / name.replace("/", " "))
        replace(tmp_path / name.replace("/", " ") / name, "a folder")
        with pytest.raises(StoreError, match=rf"{name} is a folder, not a file: move it away"):
            repair(tmp_path / name.replace("/", " "), tmp_path / "in", vae=small_vae(), **options)
