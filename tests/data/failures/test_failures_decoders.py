"""Failure mode 22: `fastvae encode` with decoders that end the process at random rows, each by a signal of its own."""

import itertools
import json
import os
import random
import signal

import pytest
from support.short_run import short_run
from support.small_store import SIDE, small_vae, write_pictures
from support.store_checks import committed, failures

from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.encoding.worker import MAX_DEATHS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system starts no process by fork")
ROWS, UNIT = 16, 4
OPTIONS = ("--buckets", SIDE, "--dtype", "fp32", "--device", "cpu", "--shard-mb", 0.002, "--json", "--quiet")
SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
FATAL = """
from support.fatal_reader import FatalReader
from fastvae.data.encoding import run
run.ImageReader = FatalReader
from fastvae.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def whole(forks, tmp_path_factory):
    """A folder of pictures, a model, and the latents of a run without a death."""
    folder = tmp_path_factory.mktemp("whole")
    write_pictures(folder / "in", ROWS)
    small_vae().save_pretrained(folder / "vae")
    done = forks.fastvae("encode", folder / "in", folder / "out", "--vae", folder / "vae", *OPTIONS)
    assert done.returncode == 0, done.stderr
    return folder, committed(folder / "out")


@pytest.mark.parametrize(
    ("workers", "count", "seed"),
    short_run(itertools.product(("auto", "1", "3"), (1, 2), range(4)), [("auto", 1, 0)]),
)
def test_row_22_decoders_that_die_at_random_rows_cost_these_rows_alone(forks, whole, tmp_path, workers, count, seed):
    """A unit with such a row ends MAX_DEATHS runs of a single process, and the next run decodes its images apart.

    Threads may have begun two units when a process ends: both have that death.
    """
    (folder, expected), chance = whole, random.Random(f"{workers} {count} {seed}")
    fatal = {f"{row:03d}.png": chance.choice(SIGNALS) for row in chance.sample(range(ROWS), count)}
    print(f"{fatal} with --workers {workers}")  # noqa: T201
    command = ["encode", folder / "in", tmp_path / "out", "--vae", folder / "vae", *OPTIONS, "--workers", workers]
    units = {int(key[:3]) // UNIT for key in fatal}
    codes = []
    while not codes or codes[-1] < 0:
        done = forks.run(FATAL, *command, environment={"FATAL_KEYS": json.dumps(fatal)})
        codes.append(done.returncode)
        assert len(codes) <= len(units) * MAX_DEATHS + 1, codes
    assert len(codes) > MAX_DEATHS
    assert {-code for code in codes[:-1]} <= {*fatal.values()}, done.stderr
    assert codes[-1] == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["reasons"] == {"worker_died": count}
    assert [line.partition(" while they decoded ")[2][:7] for line in report["failures"]] == sorted(fatal)
    assert any(note.startswith(f"{MAX_DEATHS} processes died while they encoded") for note in report["notes"])
    assert report["ok"] + report["resumed"] == ROWS - count
    assert failures(tmp_path / "out") == dict.fromkeys(fatal, "worker_died")
    assert committed(tmp_path / "out") == {name: row for name, row in expected.items() if name[0] not in fatal}
    assert sorted(LatentDataset(tmp_path / "out").keys()) == sorted(key for key, _ in expected if key not in fatal)
