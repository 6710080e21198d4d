"""Random valid images of other libraries' encoders: fastvae's pixels are those of a second reader, or it refuses.

See support/foreign_images.py. Each case runs in a forked child.
"""

import collections
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "tests" / "support" / "foreign_images.py"
CODECS = importlib.util.find_spec("imagecodecs") is not None

# Refusals that are no errors of the file: Pillow lacks the layout. None is silent.
REFUSED_KINDS = {"TIFF": "unsupported", "refused": "unsupported"}


def results(first: int, count: int) -> list[dict]:
    places = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    child = subprocess.run(
        [sys.executable, str(SCRIPT), str(first), str(count)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return [json.loads(line) for line in child.stdout.splitlines()]


def check(cases: list[dict]) -> None:
    died = sorted({case["kind"] for case in cases if case["result"] == "died"})
    assert not died, f"the decoder of these formats ended its process: {died}"
    assert [case for case in cases if case["result"] in ("error", "encoder error", "different")] == []
    refused = collections.Counter(
        (case["kind"].partition(":")[0], case["reason"]) for case in cases if case["result"] == "refused"
    )
    assert set(refused) <= set(REFUSED_KINDS.items())
    # Most cases of every format are read, so that the comparison is one.
    for kind in {case["kind"] for case in cases if not case["kind"].startswith("refused")}:
        found = [case["result"] for case in cases if case["kind"] == kind]
        assert found.count("refused") < len(found) / 2


def test_foreign_images_have_the_pixels_of_a_second_reader():
    cases = results(0, 48)
    check(cases)
    assert len({case["kind"] for case in cases}) >= (12 if CODECS else 1)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 7000, 1000))
def test_many_foreign_images_have_the_pixels_of_a_second_reader(first):
    check(results(first, 1000))


def test_the_comparison_notices_a_wrong_level_a_wrong_size_and_a_death():
    script = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}, {str(ROOT / "tests")!r}]
import numpy as np
from support import foreign_images, foreign_tiffs
def case(change):
    made = foreign_tiffs.packed_tiff(__import__("random").Random(0))
    change(made)
    return made
def brighter(made): made.expected = (made.expected // 2)
def turned(made): made.expected = made.expected[:, 1:]
def end(case): os.kill(os.getpid(), signal.SIGKILL)
for change in (lambda made: None, brighter, turned):
    foreign_images.makers = lambda change=change: [lambda rng: case(change)]
    print(foreign_images.run(0)["result"])
foreign_images.judge = end
print(sorted(foreign_images.run(0).items(), key=str))
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    same, brighter, turned, died = child.stdout.splitlines()
    assert (same, brighter, turned) == ("same", "different", "different")
    assert died == "[('kind', 'TIFF'), ('result', 'died'), ('seed', None)]"
