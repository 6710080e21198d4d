"""Runs that are stopped, full and slow disks, errors in threads: complete shards are kept."""

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from support.latent_checks import latents
from support.small_store import SIDE, small_vae, write_pictures

import fastvae
import fastvae.system.atomic_files
from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.encoder import MomentEncoder
from fastvae.data.images.errors import ImageError
from fastvae.data.store.store import Store

OPTIONS = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu"}


@pytest.mark.parametrize("way", ["a bad image", "an interruption"])
def test_a_run_that_is_stopped_keeps_the_shards_that_were_complete(tmp_path, monkeypatch, way):
    write_pictures(tmp_path / "in", 5)
    vae, written = small_vae(), threading.Event()
    real = Store.commit

    def slow(store, *arguments, **facts):  # the run has failed long before the first shard is on disk
        written.wait(10)
        return real(store, *arguments, **facts)

    monkeypatch.setattr(Store, "commit", slow)
    threading.Timer(0.5, written.set).start()
    if way == "a bad image":
        (tmp_path / "in" / "002.png").write_bytes(b"")
        raised = pytest.raises(ImageError, match=r"empty: 002\.png holds no bytes")
    else:
        calls = iter(range(5))
        start = MomentEncoder.start

        def interrupted(encoder, pixels):
            if next(calls) == 2:
                raise KeyboardInterrupt
            return start(encoder, pixels)

        monkeypatch.setattr(MomentEncoder, "start", interrupted)
        raised = pytest.raises(KeyboardInterrupt)
    with raised:
        encode(tmp_path / "in", tmp_path / "out", vae=vae, on_error="fail", workers=1, shard_mb=0.001, **OPTIONS)
    assert sorted(latents(tmp_path / "out")) == ["000.png", "001.png"]


def test_a_slow_disk_does_not_hold_the_encoder_up(tmp_path, monkeypatch):
    write_pictures(tmp_path / "in", 6)
    calls, later = [], threading.Event()
    start, commit, waited = MomentEncoder.start, Store.commit, []

    def counted(encoder, pixels):
        calls.append(1)
        if len(calls) == 4:
            later.set()
        return start(encoder, pixels)

    def slow(store, *arguments, **facts):
        # One worker is three images ahead of a main thread that waits for a write, and four ahead of one that does not.
        waited.append(later.wait(5))
        return commit(store, *arguments, **facts)

    monkeypatch.setattr(MomentEncoder, "start", counted)
    monkeypatch.setattr(Store, "commit", slow)
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), workers=1, shard_mb=0.0001, **OPTIONS)
    assert waited == [True] * 6


def test_row_15_a_full_disk_leaves_the_committed_shards(tmp_path, monkeypatch):
    names = write_pictures(tmp_path / "in", 6)
    calls = {"left": 11}  # store.json, its folders, plan, shard, record: two calls each, then one, and the disk is full
    real = os.fsync

    def full(descriptor):
        calls["left"] -= 1
        if calls["left"] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with (
        monkeypatch.context() as patch
    ):  # undo() would undo the conftest's patches as well, and enable the slow interpreter
        patch.setattr(fastvae.system.atomic_files.os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as caught:
            encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), shard_mb=0.002, **OPTIONS)
    assert caught.value.errno == errno.ENOSPC
    assert len(Store.open(tmp_path / "out").commits()) == 1
    assert not list((tmp_path / "out").rglob("*.tmp.*"))
    report = encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), shard_mb=0.002, **OPTIONS)
    assert report.ok + report.resumed == 6
    assert report.resumed > 0
    assert sorted(latents(tmp_path / "out")) == names


def test_row_15_too_little_room_is_reported_before_encoding(tmp_path, monkeypatch):
    write_pictures(tmp_path / "in", 2)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(OSError, match="are needed and 100 are free") as caught:
        encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **OPTIONS)
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "out").exists()


def test_an_error_in_a_thread_is_raised_and_the_threads_setting_comes_back(tmp_path, monkeypatch):
    write_pictures(tmp_path / "in", 4)
    vae = small_vae()
    vae.encoder.conv_in.register_forward_hook(lambda module, args, out: 1 / 0)
    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        encode(tmp_path / "in", tmp_path / "out", vae=vae, workers=2, **OPTIONS)
    assert torch.get_num_threads() == threads


def test_a_store_that_another_process_makes_during_the_check_is_joined(tmp_path, monkeypatch):
    """Several processes may start on a new output at once: store.json appears between two looks at the folder."""
    write_pictures(tmp_path / "in", 2)
    options = {"vae": small_vae(), "buckets": SIDE, "dtype": "fp32", "device": "cpu", "progress": False}
    encode(tmp_path / "in", tmp_path / "out", **options)
    (tmp_path / "out" / "store.json").rename(tmp_path / "store.json")
    real = Path.iterdir

    def iterdir(path):
        if path == tmp_path / "out" and (tmp_path / "store.json").exists():
            (tmp_path / "store.json").rename(path / "store.json")
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert encode(tmp_path / "in", tmp_path / "out", **options).resumed == 2
