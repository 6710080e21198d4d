"""regressions.py reports a slower kernel, a slower network and a wrong result, and passes the same tree."""

import shutil
import subprocess
from pathlib import Path

import pytest

from bench.timing import regressions

ROOT = Path(__file__).parents[3]

SLOWER = """

_right = {function}


def {function}(*given, **named):
    import time

    begin = time.process_time()
    result = _right(*given, **named)
    done = time.process_time()
    while time.process_time() < done + 0.2 * (done - begin):
        pass
    return result
"""
WRONG = """

_right = reference


def reference(*given, **named):
    y, partials = _right(*given, **named)
    y[0, 0, 0, 0] += 1
    return y, partials
"""


@pytest.fixture
def tree(tmp_path):
    """A repository with this tree's package in one commit."""
    for name in ("fastvae", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").write_text("")  # must not be imported instead of this tree's
    git = ["git", "-C", str(tmp_path), "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    return tmp_path


# Tests of speed are slow tests: on a shared processor the noise is sometimes a fifth.
timed = pytest.mark.slow

RESIDUAL, WALK = "kernels/fastvae_kernels/residual.py", "fastvae/fast/network_walk.py"


def plant(tree, text, where=RESIDUAL):
    path = tree / where
    path.write_text(path.read_text() + text)


def run(tree, capsys, only="residual_add 1x128x256x256"):
    # CPU seconds of one thread: other processes do not count.
    given = ["HEAD", "--only", only, "--clock", "cpu", "--rounds", "15", "--dry"]
    return regressions.main(given, root=tree), capsys.readouterr().out


@timed
def test_the_same_tree_is_not_slower(tree, capsys):
    status, output = run(tree, capsys, only="encoder")
    assert status == 0, output
    assert output.startswith("encoder tiny 1x64x64 float32")
    assert output.splitlines()[-1] == "1 cases, none slower than x1.10"


@timed
def test_a_network_slower_by_a_fifth_is_seen(tree, capsys):
    plant(tree, SLOWER.format(function="run_part"), WALK)
    status, output = run(tree, capsys, only="encoder")
    assert status == 1, output
    assert output.splitlines()[-1].startswith("red: slower than x1.10: encoder tiny")


@timed
def test_a_slow_down_of_a_fifth_is_seen(tree, capsys):
    plant(tree, SLOWER.format(function="reference"))
    status, output = run(tree, capsys)
    assert status == 1, output
    assert "SLOWER" in output
    assert output.splitlines()[-1].startswith("red: slower than x1.10: residual_add")
    # The checkout of the base is removed, and git no longer lists it.
    listed = subprocess.run(["git", "worktree", "list"], cwd=tree, capture_output=True, text=True, check=True).stdout
    assert len(listed.splitlines()) == 1


def test_a_wrong_result_has_no_ratio(tree, capsys):
    plant(tree, WRONG)
    status, output = run(tree, capsys)
    assert status == 1, output
    assert "this tree cannot run it: AssertionError: largest error" in output
    assert " ms x" not in output


def verdict(ratio, wobble=0.0, rounds=15):
    return regressions.Verdict("case", [ratio + wobble * (i % 3 - 1) for i in range(rounds)], 1.0)


def test_what_counts_as_slower():
    assert verdict(1.2).slower(1.1)
    assert not verdict(1.05).slower(1.1)
    assert not verdict(1.0).slower(1.1)
    # The median is above the threshold, the interval reaches below 1: noise.
    assert not verdict(1.15, wobble=0.3).slower(1.1)


def test_the_exit_status(capsys):
    assert regressions.verdict_of([verdict(1.0)], 1.1) == 0
    assert regressions.verdict_of([verdict(1.0), regressions.Verdict("new", no_base="ImportError: no")], 1.1) == 0
    assert regressions.verdict_of([verdict(1.0), regressions.Verdict("gone", no_head="ImportError: no")], 1.1) == 1
    assert regressions.verdict_of([regressions.Verdict("new", no_base="ImportError: no")], 1.1) == 2
    assert "no case ran in both trees" in capsys.readouterr().out


def test_a_base_that_git_does_not_know(tree, capsys):
    assert regressions.main(["nowhere"], root=tree) == 2
    assert "nowhere could not be checked out" in capsys.readouterr().err
