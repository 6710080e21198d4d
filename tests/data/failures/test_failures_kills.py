"""Failure modes 16 and 22: processes killed by kill_series.py. The long form measures the table's figures."""

import json
import os
from pathlib import Path

import pytest
from support.small_store import SIDE, small_vae, write_pictures
from support.store_checks import committed, failures

from fastvae.data.encoding.encode import encode

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system starts no process by fork")
# Rows of a shard, and of images that the threads have under way beside the two shards that are not yet committed: one
# is being written, one is encoded.
SHARD, UNDER_WAY = 4, 3
SIZES = [pytest.param(False, id="short"), pytest.param(True, id="long", marks=pytest.mark.slow)]


def series(forks, tmp_path: Path, what: str, pictures: int, count: int, period=0.0, seed=0) -> list[dict]:
    """Run kill_series.py and return its line for each kill; raises AssertionError if one of its assertions fails."""
    write_pictures(tmp_path / "in", pictures)
    script = Path(__file__).with_name("kill_series.py")
    done = forks.run(script, what, count, period, seed, tmp_path / "in", tmp_path / "stores", timeout=7200)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def say(row: int, text: str) -> None:
    """Print a figure for docs/reliability.md, shown by pytest -s."""
    print(f"\nrow {row}: {text}")  # noqa: T201


@pytest.mark.parametrize("long", SIZES)
def test_row_16_killed_at_random_moments(forks, tmp_path, long):
    """No committed row is bad or missing; at most two shards and the threads' images are lost."""
    kills = [line for line in series(forks, tmp_path, "random", 32, 200 if long else 8) if line["killed"]]
    assert len(kills) == (200 if long else 8)
    later = sum(line["committed"] > 0 for line in kills)
    assert 2 * later >= len(kills)
    lost = sorted(line["lost"] for line in kills)
    assert lost[-1] <= 2 * SHARD + UNDER_WAY
    within = sum(rows <= SHARD for rows in lost)
    say(
        16,
        f"{len(kills)} kills, {later} after the first commit, 0 bad or lost rows; work lost: at most {lost[-1]} rows,",
    )
    say(16, f"{within} times no more than the {SHARD} of a shard, {sum(lost) / len(lost):.1f} on average")


@pytest.mark.parametrize("long", SIZES)
def test_row_16_killed_at_named_points(forks, tmp_path, long):
    kills = series(forks, tmp_path, "points", 32, 20 if long else 4)
    assert [line["killed"] for line in kills] == [True] * (20 if long else 4)
    assert len({line["point"] for line in kills}) == 4
    assert max(line["lost"] for line in kills) <= 2 * SHARD + UNDER_WAY
    say(
        16,
        f"{len(kills)} kills at named points, 0 bad or lost rows; {max(line['lost'] for line in kills)} rows at most",
    )


@pytest.mark.parametrize("long", SIZES)
def test_row_22_one_of_four_workers_is_killed_again_and_again(forks, tmp_path, long):
    """Another takes over its units, none waits for it, and no row is there twice."""
    pictures, period = (3000, 5) if long else (160, 0.7)
    (line,) = series(forks, tmp_path, "workers", pictures, 0, period)
    assert line["rows"] == pictures
    assert line["units_twice"] == 0
    assert line["kills"] >= (4 if long else 1)
    assert line["encoded"] - pictures <= line["kills"] * (2 * SHARD + UNDER_WAY)
    say(22, f"{line['kills']} kills in {line['seconds']} s, one every {period} s: {line['rows']} rows, 0 twice, "
            f"{line['encoded'] - pictures} encoded again")  # fmt: skip


# Encodes until a process ends without being killed, at most six times; prints the exit codes. An image named "fatal"
# ends the process that decodes it (argv[4] "reader"), or the one whose model encodes it.
FATAL = """
import os, sys
import torch
torch.set_num_threads(1)
from fastvae.data.encoding import pipeline, run
from fastvae.data.encoding.encode import encode
from support.fatal_reader import FatalReader
from support.small_store import SIDE, small_vae
source, out, dtype, part = sys.argv[1:]
real = pipeline.start_chunk
def start_chunk(chunk, encoding):
    if any("fatal" in item.row.file.key for item in chunk.decoded):
        os.kill(os.getpid(), 9)
    return real(chunk, encoding)
if part == "reader":
    run.ImageReader = FatalReader
else:
    pipeline.start_chunk = start_chunk
for _ in range(6):
    child = os.fork()
    if child == 0:
        encode(source, out, vae=small_vae(), buckets=SIDE, dtype=dtype, device="cpu", shard_mb=0.002, workers=2,
               max_failures=4, deterministic=True, progress=False)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, flush=True)
    if code == 0:
        break
"""
OPTIONS = {"buckets": SIDE, "dtype": "fp32", "device": "cpu", "progress": False}


@pytest.mark.parametrize(("fatal", "dtype"), [((13, 14), "fp32"), ((0,), "bf16")], ids=["two of a unit", "first, bf16"])
def test_row_22_an_image_that_ends_each_process_that_decodes_it_costs_its_own_row(forks, tmp_path, fatal, dtype):
    """After three deaths its unit's images are decoded in a child process; the others have the latents of any run.

    In bf16 the first image is also decoded before the run, for the dtype's error.
    """
    names = write_pictures(tmp_path / "in", 16)
    lost = {names[number]: names[number].replace(".png", " fatal.png") for number in fatal}
    for name, renamed in lost.items():
        (tmp_path / "in" / name).rename(tmp_path / "in" / renamed)
    done = forks.run(FATAL, tmp_path / "in", tmp_path / "out", dtype, "reader")
    assert done.stdout.split() == ["-9", "-9", "-9", "0"], done.stderr
    assert failures(tmp_path / "out") == dict.fromkeys(lost.values(), "worker_died")
    rows = committed(tmp_path / "out")
    assert {key for key, _ in rows} == {*names} - {*lost}
    assert not list((tmp_path / "out" / "leases").glob("*.lease"))
    details = [json.loads(line)["detail"] for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    expected = "2 child processes ended while they decoded {}: signal 9 (SIGKILL)"
    assert details == [expected.format(name) for name in lost.values()]
    for name, renamed in lost.items():
        (tmp_path / "in" / renamed).rename(tmp_path / "in" / name)
    options = OPTIONS | {"dtype": dtype, "deterministic": True}
    encode(tmp_path / "in", tmp_path / "whole", vae=small_vae(), **options)
    whole = committed(tmp_path / "whole")
    assert [name for name in rows if rows[name] != whole[name]] == []
    say(22, f"{len(lost)} images that end every process: 3 deaths, {len(lost)} rows of {len(names)} lost")


def test_row_22_a_unit_that_ends_processes_with_decoded_images_too_is_given_up(forks, tmp_path):
    names = write_pictures(tmp_path / "in", 16)
    (tmp_path / "in" / "013.png").rename(tmp_path / "in" / "012 fatal.png")
    done = forks.run(FATAL, tmp_path / "in", tmp_path / "out", "fp32", "model")
    assert done.stdout.split() == ["-9"] * 6, done.stderr
    with_it = {"012 fatal.png", "012.png", "014.png", "015.png"}  # of a unit: four at a time, by name
    report = encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), shard_mb=0.002, max_failures=4, **OPTIONS)
    assert (report.ok, report.failed) == (0, 4)
    assert failures(tmp_path / "out") == dict.fromkeys(with_it, "worker_died")
    rows = {key for key, _ in committed(tmp_path / "out")}
    assert rows == {*names, "012 fatal.png"} - {"013.png"} - with_it
    assert not list((tmp_path / "out" / "leases").glob("*.lease"))
    (line,) = [line for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines() if '"012.png"' in line]
    assert json.loads(line)["detail"] == "6 processes died while they encoded the unit of 012.png"
    (tmp_path / "in" / "012 fatal.png").unlink()
    options = OPTIONS | {"retry_failed": True, "max_failures": 1}
    assert encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **options).ok == 3
    say(22, f"a unit whose encoding ends the process: 6 deaths, {len(with_it)} rows given up of 16, the others whole")
