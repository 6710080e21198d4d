"""Failure modes 15 and 16 of exports: a real SIGKILL during one, and a real disk that fills up."""

import contextlib
import os
import shutil
import signal
import time

import pytest
from click.testing import CliRunner
from support.small_store import write_store

from fastvae.cli.main import cli
from fastvae.data.exporting import export as exports
from fastvae.data.exporting.export import export

NO_SPACE = 6
ROWS = 200
# For each folder after argv[1], a store, a process that exports to it and stops at row 100 until it is sent SIGUSR1;
# its number is printed when it is there, and when all have ended their exit codes.
STOPPED = """
import os, signal, sys
from fastvae.data.exporting import export as exports
real = exports._rows
def rows(*arguments):
    for number, row in enumerate(real(*arguments)):
        if number == 100:
            print(os.getpid(), flush=True)
            signal.sigwait({signal.SIGUSR1})
        yield row
exports._rows = rows
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
children = []
for out in sys.argv[2:]:
    children.append(os.fork())
    if children[-1] == 0:
        exports.export(sys.argv[1], out, to="wds", shard_mb=0.01, progress=False)
        os._exit(0)
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
"""


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "store", {(32, 32): [f"{number:03d}.png" for number in range(ROWS)]}, rows_per_unit=9)


def begun(forks, store, *outs):
    """Return a process whose children are in the middle of an export to each of ``outs``, and their numbers."""
    process = forks.start(STOPPED, store, *outs)
    return process, [int(line) for line in process.lines(len(outs))]


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.skipif(os.name != "posix", reason="this system has no such signals")
def test_row_16_the_next_export_sweeps_the_files_of_a_killed_one(forks, store, tmp_path):
    out, beside = tmp_path / "exports" / "out", tmp_path / "exports" / "other"
    process, exporting = begun(forks, store, out, beside)
    for number in exporting:
        os.kill(number, signal.SIGKILL)
    assert process.communicate(timeout=60)[0].splitlines()[2:] == ["-9 -9"]
    left = {path.name.split(".")[0]: path for path in (tmp_path / "exports").iterdir()}
    assert set(left) == {"out", "other"}
    assert all(list(path.rglob("*.tar")) for path in left.values())
    users = tmp_path / "exports" / f"out.tmp.{exporting[0]}.0123abcd"  # of that name, and none of ours
    users.mkdir()
    (users / "thesis.txt").write_text("mine")
    os.utime(users, (0, 0))
    done = export(store, out, to="wds", progress=False)
    assert done.rows == ROWS
    assert {path.name for path in (tmp_path / "exports").iterdir()} == {"out", left["other"].name, users.name}
    export(store, beside, to="wds", progress=False)
    assert {path.name for path in (tmp_path / "exports").iterdir()} == {"out", "other", users.name}
    assert content(out) == content(beside)
    assert "leases" not in os.listdir(out)


@pytest.mark.skipif(os.name != "posix", reason="this system has no such signals")
def test_row_24_an_export_that_is_alive_is_not_swept_and_replaces_nothing(forks, store, tmp_path):
    out = tmp_path / "exports" / "out"
    process, (number,) = begun(forks, store, out)
    (theirs,) = (tmp_path / "exports").iterdir()
    export(store, out, to="wds", progress=False)
    assert list(theirs.rglob("*.tar"))
    whole = content(out)
    os.kill(number, signal.SIGUSR1)
    codes, said = process.communicate(timeout=60)
    assert codes.splitlines()[1:] == ["1"]
    assert said.splitlines()[-1].endswith(f"dst must be a new folder, {out} came up meanwhile")
    assert content(out) == whole
    assert os.listdir(tmp_path / "exports") == ["out"]


def test_one_that_has_just_begun_is_left_and_one_that_never_got_on_is_swept(store, tmp_path):
    young, old = (tmp_path / f"out.tmp.7.0000000{number}" for number in range(2))
    for path in (young, old):
        (path / "content").mkdir(parents=True)
    os.utime(old, (time.time() - 61,) * 2)
    export(store, tmp_path / "out", to="wds", progress=False)
    assert (young.exists(), old.exists()) == (True, False)


def fill(ballast):
    with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**16))
    assert shutil.disk_usage(ballast.parent).free == 0


@pytest.mark.parametrize("to", exports.FORMATS)
def test_row_15_a_disk_that_fills_up_under_an_export_leaves_nothing(store, small_disk, monkeypatch, to):
    real, ballast = exports._rows, small_disk / "ballast"

    def rows(*arguments):
        for number, row in enumerate(real(*arguments)):
            if number == 100:
                fill(ballast)
            yield row

    monkeypatch.setattr(exports, "_rows", rows)
    arguments = ["export", str(store), str(small_disk / "out"), "--to", to, "--shard-mb", "0.01", "-q"]
    failed = CliRunner().invoke(cli, arguments)
    assert (failed.exit_code, failed.stdout) == (NO_SPACE, ""), failed.output
    assert failed.stderr.startswith("fastvae: no space left")
    assert len(failed.stderr.splitlines()) == 1
    assert os.listdir(small_disk) == ["ballast"]
    fill(ballast)
    early = CliRunner().invoke(cli, arguments)
    assert (early.exit_code, "bytes are needed and" in early.stderr) == (NO_SPACE, True)
    ballast.unlink()
    monkeypatch.setattr(exports, "_rows", real)
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    assert os.listdir(small_disk) == ["out"]
