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


# Encodes until a process ends without being killed, at most argv[3] times; prints the exit codes. The image "poison"
# kills the process that reads it.
POISONED = """
import os, sys
import torch
torch.set_num_threads(1)
from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.image_reader import ImageReader
from support.small_store import SIDE, small_vae
real = ImageReader.picture
def picture(reader, file, bucket):
    if "poison" in file.key:
        os.kill(os.getpid(), 9)
    return real(reader, file, bucket)
ImageReader.picture = picture
for _ in range(int(sys.argv[3])):
    child = os.fork()
    if child == 0:
        encode(sys.argv[1], sys.argv[2], vae=small_vae(), buckets=SIDE, dtype="fp32", device="cpu", shard_mb=0.002,
               workers=2, max_failures=4, progress=False)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, flush=True)
    if code == 0:
        break
"""


def test_row_22_a_unit_that_crashes_three_processes_is_given_up(forks, tmp_path):
    names = write_pictures(tmp_path / "in", 32)
    (tmp_path / "in" / "013.png").rename(tmp_path / "in" / "012 poison.png")
    done = forks.run(POISONED, tmp_path / "in", tmp_path / "out", 9)
    assert done.stdout.split() == ["-9", "-9", "-9", "0"], done.stderr
    with_it = {"012 poison.png", "012.png", "014.png", "015.png"}  # of a unit: four at a time, by name
    assert failures(tmp_path / "out") == dict.fromkeys(with_it, "worker_died")
    rows = {key for key, _ in committed(tmp_path / "out")}
    assert rows == {*names, "012 poison.png"} - {"013.png"} - with_it
    assert not list((tmp_path / "out" / "leases").glob("*.lease"))
    (line,) = [line for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines() if '"012.png"' in line]
    assert json.loads(line)["detail"] == "3 processes died while they encoded the unit of 012.png"
    (tmp_path / "in" / "012 poison.png").unlink()
    options = {"buckets": SIDE, "dtype": "fp32", "device": "cpu", "progress": False, "retry_failed": True}
    assert encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), max_failures=1, **options).ok == 3
    say(22, f"a poisoned unit: 3 deaths, {len(with_it)} rows given up of 32, the others whole")
