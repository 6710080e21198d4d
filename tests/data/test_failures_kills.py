"""Failure modes 16 and 22: processes that are killed, by kill_series.py. The long form is the table's own figure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_store import write_pictures

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system starts no process by fork")
# Rows of a shard, and of images that the threads have under way beside the two shards that are not yet committed: one
# is being written, one is encoded.
SHARD, UNDER_WAY = 4, 3
SIZES = [pytest.param(False, id="short"), pytest.param(True, id="long", marks=pytest.mark.slow)]


def series(tmp_path: Path, what: str, pictures: int, count: int, period: float = 0, seed: int = 0) -> list[dict]:
    """What kill_series.py says of each kill; its own assertions hold, or this raises with what they said."""
    write_pictures(tmp_path / "in", pictures)
    script = Path(__file__).with_name("kill_series.py")
    command = [sys.executable, script, what, count, period, seed, tmp_path / "in", tmp_path / "stores"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def say(row: int, text: str) -> None:
    """A figure for docs/reliability.md, shown by pytest -s."""
    print(f"\nrow {row}: {text}")  # noqa: T201


@pytest.mark.parametrize("long", SIZES)
def test_row_16_killed_at_random_moments(tmp_path, long):
    """Nothing that was committed is bad or gone, and what is lost is at most two shards and what threads have begun."""
    kills = [line for line in series(tmp_path, "random", 32, 200 if long else 16) if line["killed"]]
    assert len(kills) == (200 if long else 16)
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
def test_row_16_killed_at_named_points(tmp_path, long):
    kills = series(tmp_path, "points", 32, 20 if long else 4)
    assert [line["killed"] for line in kills] == [True] * (20 if long else 4)
    assert len({line["point"] for line in kills}) == 4
    assert max(line["lost"] for line in kills) <= 2 * SHARD + UNDER_WAY
    say(
        16,
        f"{len(kills)} kills at named points, 0 bad or lost rows; {max(line['lost'] for line in kills)} rows at most",
    )


@pytest.mark.parametrize("long", SIZES)
def test_row_22_one_of_four_workers_is_killed_again_and_again(tmp_path, long):
    """Another takes over what it held, none waits for it, and no row is there twice."""
    pictures, period = (3000, 5) if long else (160, 0.7)
    (line,) = series(tmp_path, "workers", pictures, 0, period)
    assert line["rows"] == pictures
    assert line["units_twice"] == 0
    assert line["kills"] >= (4 if long else 1)
    assert line["encoded"] - pictures <= line["kills"] * (2 * SHARD + UNDER_WAY)
    say(22, f"{line['kills']} kills in {line['seconds']} s, one every {period} s: {line['rows']} rows, 0 twice, "
            f"{line['encoded'] - pictures} encoded again")  # fmt: skip
