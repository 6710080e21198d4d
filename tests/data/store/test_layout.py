"""Links, pipes, sockets, devices and folders at the paths of a store's files are refused by name, never opened."""

import contextlib
import os
import shutil
import signal
import socket

import pytest
from support.repairs import state
from support.small_store import SIDE, small_vae, write_pictures, write_store

from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.repair import repair
from fastvae.data.store.errors import StoreError
from fastvae.data.store.info import store_facts
from fastvae.data.store.leases import Leases
from fastvae.data.store.lock import locked
from fastvae.data.store.store import Store
from fastvae.data.store.verify import rebuild_index, verify

pytestmark = pytest.mark.skipif(os.name != "posix", reason="this system has no such files")
OPTIONS = {"device": "cpu", "progress": False}
FIXED = {"buckets": SIDE, "dtype": "fp32"} | OPTIONS
LOCKS = (".lock", "leases/.lock", "leases/.clock")


def bind_socket(path, own):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))  # the path of a socket has at most 107 bytes


LOCK_KINDS = {
    "a link": lambda path, own: path.symlink_to(own),
    "a folder": lambda path, own: path.mkdir(),
    "a pipe": lambda path, own: os.mkfifo(path),
    "a socket": bind_socket,
}


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A source of two pictures and a store of it."""
    folder = tmp_path_factory.mktemp("encoded")
    write_pictures(folder / "in", 2)
    with pytest.MonkeyPatch.context() as patch:  # conftest.py patches after fixtures of the module
        patch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", ())
        encode(folder / "in", folder / "out", vae=small_vae(), **FIXED)
    return folder


@pytest.fixture
def own(tmp_path):
    """A file of the user's, with an old modification time."""
    path = tmp_path / "thesis.txt"
    path.write_text("mine")
    os.utime(path, (1e9, 1e9))
    return path


@pytest.mark.parametrize("kind", LOCK_KINDS)
@pytest.mark.parametrize("name", LOCKS)
def test_row_13_a_lock_that_is_not_a_file_is_refused_by_name(encoded, tmp_path, own, monkeypatch, name, kind):
    monkeypatch.chdir(tmp_path)
    out = shutil.copytree(encoded / "out", tmp_path / "out")
    (out / name).unlink(missing_ok=True)
    LOCK_KINDS[kind](out / name, own)
    before = state(out / "shards") | state(out / "plan")
    next((out / "shards").glob("*.json")).unlink()
    with pytest.raises(StoreError, match=rf"{name} is {kind}, not a file: move it away"):
        encode(encoded / "in", out, vae=small_vae(), **FIXED)
    with pytest.raises(StoreError, match=rf"{name} is {kind}, not a file"):
        repair(out, **OPTIONS)
    assert own.read_text() == "mine"
    assert own.stat().st_mtime == 1e9
    assert (state(out / "shards") | state(out / "plan")).items() <= before.items()


@pytest.mark.parametrize("name", ["plan", "shards", "leases"])
@pytest.mark.parametrize("kind", ["a link", "a pipe", "a file"])
def test_row_13_a_folder_of_another_kind_is_refused_by_name(encoded, tmp_path, name, kind):
    out, elsewhere = shutil.copytree(encoded / "out", tmp_path / "out"), tmp_path / "elsewhere"
    (out / name).rename(elsewhere)
    if kind == "a file":
        (out / name).write_text("")
    else:
        LOCK_KINDS[kind](out / name, elsewhere)
    before = state(elsewhere)
    words = rf"{name} is {kind}, not a folder: move it away"
    for dry_run in (True, False):
        with pytest.raises(StoreError, match=words):
            encode(encoded / "in", out, vae=small_vae(), dry_run=dry_run, **FIXED)
    with pytest.raises(StoreError, match=words):
        repair(out, **OPTIONS)
    assert state(elsewhere) == before


def test_row_13_rebuilding_an_index_follows_no_link(encoded, tmp_path, own):
    out = shutil.copytree(encoded / "out", tmp_path / "out")
    (out / ".lock").unlink()
    (out / ".lock").symlink_to(own)
    with pytest.raises(StoreError, match=r"\.lock is a link, not a file"):
        rebuild_index(out)
    assert own.read_text() == "mine"


def test_row_13_a_lock_that_is_a_hard_link_is_not_written(tmp_path, own):
    (tmp_path / "out").mkdir()
    os.link(own, tmp_path / "out" / ".lock")
    with locked(tmp_path / "out"):
        assert own.read_text() == "mine"


def test_row_13_a_link_made_during_a_run_is_refused_when_opened(tmp_path, own):
    with Leases(tmp_path / "leases") as leases:
        (tmp_path / "leases" / ".clock").symlink_to(own)
        with pytest.raises(StoreError, match=r"\.clock is a link, not a file"):
            leases.is_live(f"run-{leases.owner}")
    assert own.stat().st_mtime == 1e9


def test_row_13_a_lease_that_is_a_pipe_does_not_block(tmp_path):
    with Leases(tmp_path / "leases") as leases:
        os.mkfifo(tmp_path / "leases" / "000000.lease")
        os.utime(tmp_path / "leases" / "000000.lease", (1e9, 1e9))
        assert not leases.holds("000000")
        assert leases.acquire("000000")


FILE_KINDS = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}
SHARD = f"shards/000000-{SIDE}x{SIDE}.safetensors"
RECORD = SHARD.replace(".safetensors", ".json")


@contextlib.contextmanager
def within(seconds: float):
    """Raise TimeoutError in a block that takes longer: one that reads a pipe without a writer, or an endless device."""

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
    """Delete a file and make something of another kind at its path."""
    path.unlink()
    FILE_KINDS[kind](path)


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """A store of generated latents."""
    out = write_store(tmp_path_factory.mktemp("generated") / "out", {(SIDE, SIDE): [f"{n}.png" for n in range(6)]})
    Store.open(out).write_derived()
    return out


@pytest.mark.parametrize("kind", FILE_KINDS)
@pytest.mark.parametrize("name", [RECORD, SHARD, "index.jsonl", "failures.jsonl"])
def test_verify_names_a_file_of_another_kind(generated, tmp_path, kind, name):
    out = shutil.copytree(generated, tmp_path / "out")
    replace(out / name, kind)
    for deep in (False, True):
        with within(20):
            found = verify(out, deep=deep, progress=False).damaged
        assert [(damage.file, damage.what) for damage in found] == [(name, f"is {kind}, not a file")]


def test_a_record_that_links_to_itself_is_damage_for_every_verb(tmp_path):
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
def test_encode_refuses_a_folder_at_a_files_path_before_it_writes(tmp_path, name):
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


@pytest.mark.parametrize("kind", FILE_KINDS)
@pytest.mark.parametrize("name", ["store.json", "plan/units-00000.jsonl"])
def test_verify_refuses_a_store_json_or_plan_of_another_kind(generated, tmp_path, kind, name):
    out = shutil.copytree(generated, tmp_path / "out")
    replace(out / name, kind)
    with within(20), pytest.raises(StoreError, match=rf"{name} is damaged: it is {kind}, not a file"):
        verify(out, progress=False)


def test_repair_replaces_a_pipe_and_refuses_a_folder(tmp_path):
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
    repaired = shutil.copytree(out, tmp_path / "repaired")
    for name in (RECORD, SHARD, "index.jsonl"):
        shutil.copytree(repaired, tmp_path / name.replace("/", " "))
        replace(tmp_path / name.replace("/", " ") / name, "a folder")
        with pytest.raises(StoreError, match=rf"{name} is a folder, not a file: move it away"):
            repair(tmp_path / name.replace("/", " "), tmp_path / "in", vae=small_vae(), **options)
