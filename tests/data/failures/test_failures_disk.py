"""Failure mode 15: a file system of 64 MB that fills up under the run, by a real one in memory."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.small_store import SIDE, small_vae, write_pictures
from support.store_checks import committed

SIZES = [pytest.param(2, id="short"), pytest.param(20, id="long", marks=pytest.mark.slow)]
NO_SPACE = 6


# For each line [NUMBER, LEFT, OUT] on stdin a process encodes, prints into OUT.said, and its exit code is printed.
# When it comes to its NUMBER-th file, another program has filled the disk, all but LEFT bytes.
FILLED = """
import json, os, sys
from pathlib import Path
disk, source, vae, side = Path(sys.argv[1]), *sys.argv[2:]
import torch
torch.set_num_threads(1)
import fastvae.system.atomic_files as atomic
import fastvae.data.encoding.encode
from fastvae.cli.main import cli

def fill(left):
    with open(disk / "ballast", "wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(2**16))
        except OSError as error:
            assert error.errno == 28, error
        ballast.truncate(ballast.tell() // 4096 * 4096 - left)

def run(number, left, out):
    real, files = os.fdopen, []

    def opened(*arguments):
        files.append(1)
        if len(files) == number:
            fill(left)
        return real(*arguments)

    atomic.os.fdopen = opened
    cli(["encode", source, out, "--vae", vae, "--buckets", side, "--dtype", "fp32", "--shard-mb", "0.02",
         "--workers", "1", "--device", "cpu", "-q", "--json"])

for line in sys.stdin:
    number, left, out = json.loads(line)
    child = os.fork()
    if child == 0:
        said = os.open(f"{vae}/{Path(out).name}.said", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        try:
            run(number, left, out)
        except SystemExit as stop:
            sys.stdout.flush()
            os._exit(stop.code or 0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Runs:
    """Runs of the command line, one after another, each a process of its own that imports nothing anew."""

    def __init__(self, disk: Path, source: Path, vae: Path):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", FILLED, disk, source, vae, SIDE]
        self.vae, pipes = vae, {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([*map(str, command)], env=environment, text=True, **pipes)

    def __call__(self, out: Path, number: int = 0, left: int = 0) -> tuple[int, str]:
        """Exit code and output of a run into ``out``; before its ``number``-th file but ``left`` bytes are taken."""
        self.process.stdin.write(json.dumps([number, left, str(out)]) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        return code, (self.vae / f"{out.name}.said").read_text()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.communicate()


@pytest.fixture
def prepared(tmp_path, small_disk):
    """(disk, pictures, runs)."""
    write_pictures(tmp_path / "in", 120)
    small_vae().save_pretrained(tmp_path / "vae")
    with Runs(small_disk, tmp_path / "in", tmp_path / "vae") as runs:
        yield small_disk, 120, runs


@pytest.mark.parametrize("count", SIZES)
def test_row_15_a_full_disk_tears_nothing_and_the_run_goes_on_when_there_is_room(prepared, count):
    """Exit code 6 in one sentence, nothing half written is left, and what was committed is whole."""
    (disk, pictures, run), generator, kept = prepared, random.Random(0), []
    for number in range(count):
        # The 3rd file is the first shard; three shards and their records follow store.json and the plan.
        file, left = generator.randrange(3, 9), generator.choice((0, 0, 4096))
        out = disk / f"{number}"
        code, said = run(out, file, left)
        assert (code, len(said.splitlines())) == (NO_SPACE, 1), said
        assert said.startswith("fastvae: no space left")
        rows = committed(out)
        assert not list(out.rglob("*.tmp.*"))
        kept.append(len(rows))
        (disk / "ballast").unlink()
        code, said = run(out)
        assert code == 0, said
        report = json.loads(said)
        assert (report["resumed"], report["ok"]) == (len(rows), pictures - len(rows))
        whole = committed(out)
        assert len(whole) == pictures
        assert {name: whole[name] for name in rows} == rows
        shutil.rmtree(out)
    assert max(kept) > 0
    print(f"\nrow 15: {count} runs into a full disk of 64 MB, exit code 6 each, 0 torn, {sum(kept)} rows kept")  # noqa: T201


def test_row_15_too_little_room_is_said_before_the_first_image(prepared):
    disk, _, run = prepared
    with open(disk / "ballast", "wb") as ballast, contextlib.suppress(OSError):
        ballast.write(bytes(64 * 2**20 - 8192))
    code, said = run(disk / "out")
    assert code == NO_SPACE
    assert "bytes are needed and" in said
    assert not (disk / "out").exists()
