"""Leases: several processes share one output, take over units of dead ones, and encode each row once."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.small_store import SIDE, small_vae, write_pictures

import fastvae.data.store.leases as leases_module
from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.worker import rotated_for_rank
from fastvae.data.store.errors import IdentityMismatch
from fastvae.data.store.leases import STALE, Leases
from fastvae.data.store.store import Store

OPTIONS = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu", "shard_mb": 0.001}
pytestmark = pytest.mark.skipif(os.name != "posix", reason="this system cannot test for a process by its number")


def lease_of(folder: Path, name: str, **changes) -> Path:
    """Write a lease of another process of this host: by default this test's parent, which is alive."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"owner": "another", "pid": os.getppid(), "host": leases_module._host(), **changes}
    path = folder / f"{name}.lease"
    path.write_text(json.dumps(content))
    return path


def ended_process() -> int:
    """Return the number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def make_old(path: Path) -> None:
    """Give a lease a heartbeat that is older than STALE."""
    then = time.time() - STALE - 5
    os.utime(path, (then, then))


def test_a_lease_has_one_holder_and_is_released(tmp_path):
    with Leases(tmp_path) as ours, Leases(tmp_path) as theirs:
        assert ours.acquire("000001")
        assert not theirs.acquire("000001")
        assert theirs.acquire("000002")
        assert ours.holds("000001")
        assert not theirs.holds("000001")
        assert theirs.live() == ["000001", f"run-{ours.owner}"]
        ours.release("000001")
        assert theirs.acquire("000001")
    assert not list(tmp_path.glob("*.lease"))


@pytest.mark.parametrize(
    ("changes", "old", "taken"),
    [
        ({}, False, False),
        ({}, True, True),  # alive, but without a heartbeat
        ({"pid": "ended"}, False, True),
        ({"pid": "ended", "host": "another"}, False, False),  # processes of another host cannot be tested for
        ({"pid": "ended", "host": "another"}, True, True),
        ({"pid": "x"}, False, False),
    ],
)
def test_only_leases_of_dead_processes_are_taken_over(tmp_path, changes, old, taken):
    if changes.get("pid") == "ended":
        changes = {**changes, "pid": ended_process()}
    path = lease_of(tmp_path, "000001", **changes)
    if old:
        make_old(path)
    with Leases(tmp_path) as ours:
        assert ours.acquire("000001") is taken
        assert ours.holds("000001") is taken
    assert path.exists() is not taken


def test_a_lease_that_is_being_written_is_live(tmp_path):
    (tmp_path / "000001.lease").touch()
    with Leases(tmp_path) as ours:
        assert not ours.acquire("000001")
        make_old(tmp_path / "000001.lease")
        assert ours.acquire("000001")


def test_one_of_many_takes_over_and_the_late_holder_does_not_release_it(tmp_path):
    with Leases(tmp_path) as stopped:
        stopped.acquire("000001")
        make_old(tmp_path / "000001.lease")
        others = [Leases(tmp_path) for _ in range(8)]
        won = []
        threads = [threading.Thread(target=lambda one=one: won.append(one.acquire("000001"))) for one in others]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(won) == [False] * 7 + [True]
        assert not stopped.holds("000001")
        stopped.release("000001")
        assert [one.holds("000001") for one in others].count(True) == 1
    assert (tmp_path / "000001.lease").exists()


def test_a_heartbeat_keeps_a_lease_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(leases_module, "HEARTBEAT", 0.01)
    with Leases(tmp_path) as ours:
        ours.acquire("000001")
        make_old(tmp_path / "000001.lease")
        until = time.monotonic() + 10
        while time.time() - (tmp_path / "000001.lease").stat().st_mtime > STALE and time.monotonic() < until:
            time.sleep(0.01)
        with Leases(tmp_path) as theirs:
            assert not theirs.acquire("000001")


def test_only_leases_of_dead_processes_are_swept(tmp_path):
    live, dead = lease_of(tmp_path, "000001"), lease_of(tmp_path, "000002", pid=ended_process())
    other = tmp_path / "mine.lease"
    other.write_text("mine")
    with Leases(tmp_path) as ours:
        ours.sweep()
        assert (tmp_path / f"run-{ours.owner}.lease").exists()
    assert (live.exists(), dead.exists(), other.exists()) == (True, False, True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A source of 24 pictures, their keys, and the bytes of the shards that one process makes of them."""
    root = tmp_path_factory.mktemp("leases")
    names = write_pictures(root / "in", 24)
    with pytest.MonkeyPatch.context() as patch:  # conftest.py patches after fixtures of the module
        patch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", ())
        encode(root / "in", root / "out", vae=small_vae(), **OPTIONS)
    return root / "in", names, shards(root / "out")


def shards(out):
    """Return the bytes of each shard."""
    return {path.name: path.read_bytes() for path in sorted((out / "shards").glob("*.safetensors"))}


@pytest.fixture(scope="module")
def shared(tmp_path_factory, alone, forks):
    """(output, [(exit code, report), ...]) of two processes, and of two of which the first is killed."""
    root, script = tmp_path_factory.mktemp("shared"), Path(__file__).parent / "shared_run.py"
    done = forks.run(script, alone[0], root / "both", "0,0", root / "killed", "1,0")
    assert done.returncode == 0, done.stderr
    return list(zip((root / "both", root / "killed"), map(json.loads, done.stdout.splitlines()), strict=True))


def test_row_24_two_processes_share_an_output_and_encode_each_row_once(shared, alone):
    _, names, expected = alone
    out, ((one, first), (two, second)) = shared[0]
    assert one == two == 0
    assert first["ok"] + second["ok"] == len(names)
    for report in (first, second):
        assert report["ok"] + report["elsewhere"] + report["resumed"] == len(names)
        assert report["taken_over"] == 0
    assert shards(out) == expected
    index = [json.loads(line)["key"] for line in (out / "index.jsonl").read_text().splitlines()]
    assert sorted(index) == names
    assert len(list((out / "plan").iterdir())) == 1
    assert not list((out / "leases").glob("*.lease"))


def test_row_22_units_of_a_killed_process_are_encoded_by_the_other(shared, alone):
    source, names, expected = alone
    out, ((killed, _), (lived, report)) = shared[1]
    assert (killed, lived) == (137, 0)
    assert report["ok"] + report["elsewhere"] + report["resumed"] == len(names)
    assert shards(out) == expected
    assert encode(source, out, vae=small_vae(), **OPTIONS).resumed == len(names)
    assert not list((out / "leases").glob("*.lease"))


def test_a_unit_that_another_process_holds_is_waited_for_and_taken_over(tmp_path, alone, monkeypatch):
    monkeypatch.setattr("fastvae.data.encoding.worker.POLL_SECONDS", 0.01)
    source, names, expected = alone
    held = lease_of(tmp_path / "out" / "leases", "000003")
    threading.Timer(1.0, make_old, [held]).start()
    started = time.monotonic()
    report = encode(source, tmp_path / "out", vae=small_vae(), **OPTIONS)
    assert time.monotonic() - started > 0.9
    assert report.ok == len(names)
    assert shards(tmp_path / "out") == expected


def test_the_late_holder_does_not_commit_a_unit_that_was_taken_over(tmp_path, alone, monkeypatch):
    monkeypatch.setattr("fastvae.data.encoding.worker.POLL_SECONDS", 0.01)
    source, names, _ = alone
    out, real, taken = tmp_path / "out", Leases.holds, []

    def holds(leases, name):
        if name == "000001" and not taken:  # as if stopped here, while another took the lease and died
            taken.append(lease_of(out / "leases", name, pid=ended_process()))
        return real(leases, name)

    monkeypatch.setattr(Leases, "holds", holds)
    report = encode(source, out, vae=small_vae(), **OPTIONS)
    assert (report.ok, report.taken_over) == (len(names), 1)
    assert len(Store.open(out).resolve()) == len(names)


def test_files_that_a_living_process_writes_are_not_swept(tmp_path, alone):
    source, _, _ = alone
    out = tmp_path / "out"
    encode(source, out, vae=small_vae(), limit=1, **OPTIONS)
    writing, left = (out / "shards" / f"{n}-32x32.safetensors.tmp.1.0123abcd" for n in ("000007", "000008"))
    writing.write_bytes(b"half")
    left.write_bytes(b"half")
    lease = lease_of(out / "leases", "000007")
    encode(source, out, vae=small_vae(), limit=1, **OPTIONS)
    assert (writing.exists(), left.exists(), lease.exists()) == (True, False, True)


def test_a_store_that_another_process_has_begun_is_not_replaced(tmp_path, alone):
    source, _, _ = alone
    out = tmp_path / "out"
    encode(source, out, vae=small_vae(), limit=1, **OPTIONS)
    for path in (out / "shards").iterdir():
        path.unlink()
    before = (out / "store.json").read_bytes()
    lease_of(out / "leases", "run-0123456789abcdef")
    with pytest.raises(IdentityMismatch, match=r"preprocess\.alpha"):
        encode(source, out, vae=small_vae(), alpha="drop", **OPTIONS)
    assert (out / "store.json").read_bytes() == before
    (out / "leases" / "run-0123456789abcdef.lease").unlink()
    assert encode(source, out, vae=small_vae(), alpha="drop", limit=1, **OPTIONS).ok == 1


def test_ranks_start_at_different_units():
    units = list(range(10))
    assert [rotated_for_rank(units, rank, 3)[0] for rank in range(3)] == [0, 3, 6]
    assert all(sorted(rotated_for_rank(units, rank, 3)) == units for rank in range(3))
