"""Files that appear complete or not at all."""

import os
import stat

import pytest
import torch

from fastvae.system import atomic_files as atomic


def test_a_file_is_renamed_when_it_is_complete(tmp_path):
    path = tmp_path / "training.pt"
    path.write_bytes(b"old")
    seen = []

    def write(temporary):
        seen.append((temporary.parent, path.read_bytes()))
        torch.save({"step": 3}, temporary)

    atomic.replace_atomically(path, write)
    assert seen == [(tmp_path, b"old")]
    assert torch.load(path) == {"step": 3}
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_writer_leaves_only_the_old_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"old")

    def fail(temporary):
        temporary.write_bytes(b"half")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        atomic.replace_together(tmp_path, {"a": lambda temporary: temporary.write_bytes(b"new"), "b": fail})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old", "b": b"old"}


def test_files_are_synchronised_by_a_writable_descriptor_before_the_rename(tmp_path, monkeypatch):
    """Windows cannot synchronise a file that is open for reading only."""
    events = []
    flags = pytest.importorskip("fcntl", reason="asks the system how a descriptor was opened")
    fsync, replace = os.fsync, os.replace

    def synchronise(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        may_write = flags.fcntl(descriptor, flags.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        events.append("folder" if is_folder else f"file {'rw' if may_write else 'r'}")
        fsync(descriptor)

    monkeypatch.setattr(atomic.os, "fsync", synchronise)
    monkeypatch.setattr(atomic.os, "replace", lambda *paths: (events.append("replace"), replace(*paths)))
    atomic.replace_atomically(tmp_path / "x", lambda temporary: temporary.write_bytes(b"x"))
    assert events == ["file rw", "replace", "folder"]
    events.clear()
    atomic.write_atomically(tmp_path / "y", [b"y"])
    assert events == ["file rw", "replace", "folder"]


def test_the_mode_of_a_file_follows_the_umask(tmp_path):
    (tmp_path / "plain").touch()

    def private(temporary):
        temporary.unlink()
        temporary.touch(mode=0o600)

    atomic.replace_atomically(tmp_path / "x", private)
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode
