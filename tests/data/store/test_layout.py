"""A stranger's store whose locks and folders are links, pipes or sockets: named, and nothing of yours is written."""

import os
import shutil
import socket

import pytest
from support.repairs import state
from support.small_store import SIDE, small_vae, write_pictures

from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.repair import repair
from fastvae.data.store.errors import StoreError
from fastvae.data.store.leases import Leases
from fastvae.data.store.lock import locked
from fastvae.data.store.verify import rebuild_index

pytestmark = pytest.mark.skipif(os.name != "posix", reason="this system has no such files")
OPTIONS = {"device": "cpu", "progress": False}
FIXED = {"buckets": SIDE, "dtype": "fp32"} | OPTIONS
LOCKS = (".lock", "leases/.lock", "leases/.clock")


def bind(path, own):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))  # a socket's whole path has at most 107 bytes


KINDS = {
    "a link": lambda path, own: path.symlink_to(own),
    "a folder": lambda path, own: path.mkdir(),
    "a pipe": lambda path, own: os.mkfifo(path),
    "a socket": bind,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    write_pictures(folder / "in", 2)
    encode(folder / "in", folder / "out", vae=small_vae(), **FIXED)
    return folder


@pytest.fixture
def own(tmp_path):
    """A file of the user's, of a time that is told from now."""
    path = tmp_path / "thesis.txt"
    path.write_text("mine")
    os.utime(path, (1e9, 1e9))
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOCKS)
def test_row_13_a_lock_that_is_no_file_is_refused_by_its_name(made, tmp_path, own, monkeypatch, name, kind):
    monkeypatch.chdir(tmp_path)
    out = shutil.copytree(made / "out", tmp_path / "out")
    (out / name).unlink(missing_ok=True)
    KINDS[kind](out / name, own)
    before = state(out / "shards") | state(out / "plan")
    next((out / "shards").glob("*.json")).unlink()
    with pytest.raises(StoreError, match=rf"{name} is {kind}, not a file: move it away"):
        encode(made / "in", out, vae=small_vae(), **FIXED)
    with pytest.raises(StoreError, match=rf"{name} is {kind}, not a file"):
        repair(out, **OPTIONS)
    assert own.read_text() == "mine"
    assert own.stat().st_mtime == 1e9
    assert (state(out / "shards") | state(out / "plan")).items() <= before.items()


@pytest.mark.parametrize("name", ["plan", "shards", "leases"])
@pytest.mark.parametrize("kind", ["a link", "a pipe", "a file"])
def test_row_13_a_folder_that_is_none_is_refused_by_its_name(made, tmp_path, name, kind):
    out, elsewhere = shutil.copytree(made / "out", tmp_path / "out"), tmp_path / "elsewhere"
    (out / name).rename(elsewhere)
    if kind == "a file":
        (out / name).write_text("")
    else:
        KINDS[kind](out / name, elsewhere)
    before = state(elsewhere)
    words = rf"{name} is {kind}, not a folder: move it away"
    for dry_run in (True, False):
        with pytest.raises(StoreError, match=words):
            encode(made / "in", out, vae=small_vae(), dry_run=dry_run, **FIXED)
    with pytest.raises(StoreError, match=words):
        repair(out, **OPTIONS)
    assert state(elsewhere) == before


def test_row_13_an_index_is_rebuilt_through_no_link(made, tmp_path, own):
    out = shutil.copytree(made / "out", tmp_path / "out")
    (out / ".lock").unlink()
    (out / ".lock").symlink_to(own)
    with pytest.raises(StoreError, match=r"\.lock is a link, not a file"):
        rebuild_index(out)
    assert own.read_text() == "mine"


def test_row_13_a_lock_that_is_another_name_of_a_file_locks_and_writes_nothing(tmp_path, own):
    (tmp_path / "out").mkdir()
    os.link(own, tmp_path / "out" / ".lock")
    with locked(tmp_path / "out"):
        assert own.read_text() == "mine"


def test_row_13_what_was_put_there_since_is_refused_by_whoever_opens_it(tmp_path, own):
    with Leases(tmp_path / "leases") as leases:
        (tmp_path / "leases" / ".clock").symlink_to(own)
        with pytest.raises(StoreError, match=r"\.clock is a link, not a file"):
            leases.is_live(f"run-{leases.owner}")
    assert own.stat().st_mtime == 1e9


def test_row_13_a_lease_that_is_a_pipe_is_not_waited_for(tmp_path):
    with Leases(tmp_path / "leases") as leases:
        os.mkfifo(tmp_path / "leases" / "000000.lease")
        os.utime(tmp_path / "leases" / "000000.lease", (1e9, 1e9))
        assert not leases.holds("000000")
        assert leases.acquire("000000")
