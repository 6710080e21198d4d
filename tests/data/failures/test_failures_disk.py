"""Failure mode 15: a real file system of 64 MB, in memory, that fills up during the run."""

import contextlib
import json
import random
import shutil
from pathlib import Path

import pytest
from support.small_store import SIDE, small_vae, write_pictures
from support.store_checks import committed

SIZES = [pytest.param(2, id="short"), pytest.param(20, id="long", marks=pytest.mark.slow)]
NO_SPACE = 6


# Encodes to OUT. Before its NUMBER-th file the disk is filled, all but LEFT bytes.
FILLED = """
import json, os, sys
from pathlib import Path
disk, source, vae, side = Path(sys.argv[1]), *sys.argv[2:5]
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

run(int(sys.argv[5]), int(sys.argv[6]), sys.argv[7])
"""


@pytest.fixture
def prepared(forks, tmp_path, small_disk):
    """Return a disk, the number of pictures, and a function that encodes them in a process.

    Before its ``number``-th file, all of the disk but ``left`` bytes is filled. It returns exit code and output.
    """
    write_pictures(tmp_path / "in", 120)
    small_vae().save_pretrained(tmp_path / "vae")

    def run(out: Path, number: int = 0, left: int = 0) -> tuple[int, str]:
        done = forks.run(FILLED, small_disk, tmp_path / "in", tmp_path / "vae", SIDE, number, left, out)
        return done.returncode, done.stdout + done.stderr

    return small_disk, 120, run


@pytest.mark.parametrize("count", SIZES)
def test_row_15_a_full_disk_leaves_whole_files_and_the_run_resumes(prepared, count):
    """Exit code 6 in one sentence, nothing half written is left, and what was committed is whole."""
    (disk, pictures, run), generator, kept = prepared, random.Random(0), []
    for number in range(count):
        # The 3rd file is the first shard; three shards and their records follow store.json and the plan.
        file, left = generator.randrange(3, 9), generator.choice((0, 0, 4096))
        out = disk / f"{number}"
        code, said = run(out, file, left)
        error, sentence = said.splitlines()
        assert (code, json.loads(error)["exit_code"]) == (NO_SPACE, NO_SPACE)
        assert sentence.startswith("fastvae: no space left")
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
    print(f"\nrow 15: {count} runs into a full disk of 64 MB, exit code 6 each, 0 torn, {sum(kept)} rows committed")  # noqa: T201


def test_row_15_too_little_room_is_reported_before_the_first_image(prepared):
    disk, _, run = prepared
    with open(disk / "ballast", "wb") as ballast, contextlib.suppress(OSError):
        ballast.write(bytes(64 * 2**20 - 8192))
    code, said = run(disk / "out")
    assert code == NO_SPACE
    assert "bytes are needed and" in said
    assert not (disk / "out").exists()
