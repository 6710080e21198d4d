"""bench/device.sh: its results files, and its status after a wrong or killed part."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run_script(out, *arguments, **environment):
    return subprocess.run(
        ["bash", ROOT / "bench" / "device.sh", *arguments],
        env=os.environ | {"OUT": str(out), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


needs_bash = pytest.mark.skipif(shutil.which("timeout") is None, reason="the script is for Linux: bash and timeout")


# The tests of wrong and killed parts below check the results of one part.
@needs_bash
@pytest.mark.slow
def test_a_dry_run_writes_its_results(tmp_path):
    done = run_script(tmp_path, "--dry")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all parts passed"
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "logs.txt", "summary.txt"}
    whole = json.loads((tmp_path / "results.json").read_text())
    assert whole["dry"] is whole["passed"] is True
    measured = {"ops", "philox", "encoder", "decoder", "profile", "loader", "winograd", "upsample", "resize"}
    assert whole["parts"].keys() == {"tests"} | measured
    for part in whole["parts"].values():
        assert part["passed"] is True
        assert (part["status"], part["failed"]) == ("passed", [])
        assert part["versions"]["torch"] == torch.__version__
        assert {"commit", "kernel_sources", "device", "driver", "date"} <= set(part)
    assert set(whole["parts"]["ops"]["roof"]) == {"bytes", "bfloat16", "float16", "float32"}
    assert {row["op"] for row in whole["cases"].values()} >= {
        "group_norm_silu",
        "spatial_attention",
        "sample_posterior",
    }
    for row in whole["cases"].values():
        assert row["seconds"].keys() == row["median_seconds"].keys() == row["spread"].keys() >= {"ours"}
        work = row["bytes"] if row["unit"] == "TB/s" else row["flops"]
        assert row["rate"] == pytest.approx(work / row["median_seconds"]["ours"])
        assert row["gate"] == "float64"
    for part in ("encoder", "decoder"):
        (entry,) = (entry for entry in whole["networks"].values() if entry["part"] == part)
        rows = entry["contestants"]
        assert "(--without)" in rows["diffusers"]["left_out"]
        timed = {name for name, row in rows.items() if "median_seconds" in row}
        assert timed == {"eager, NCHW", "eager, channels_last", "fastvae", "fastvae, frozen"}
        assert all("left_out" in rows[name] for name in rows.keys() - timed), "all others have a reason"
        assert f"{part} tiny" in done.stdout
    assert whole["generator"]
    assert all(row["largest_difference"] <= 2e-6 for row in whole["generator"].values())
    layer, network = whole["winograd"].values()
    assert layer["times_direct"].keys() == {"direct", *(f"winograd{n}{end}" for n in (2, 4) for end in ("", ", in L2"))}
    assert layer["tflops"].keys() == {"winograd2, products", "winograd4, products"}
    (pictures,) = whole["resize"].values()
    assert pictures["median_seconds"].keys() == {"kernels", "bicubic"}
    (layer,) = whole["upsample"].values()
    assert layer["times_direct"].keys() == {"direct", "four_taps"}
    assert "fastvae, frozen, Winograd from 32 channels" in network["contestants"]
    (profile,) = whole["profiles"].values()
    assert profile["contestants"].keys() == {"eager, NCHW", "fastvae", "fastvae, frozen"}


WRONG = """
def pytest_collection_finish(session):
    from fastvae_kernels import residual
    right = residual.launch
    def wrong(*given):
        y, partials = right(*given)
        y[0, 0, 0, 0] += 1
        return y, partials
    residual.launch = wrong
    for item in list(session.items):
        if "residual" not in item.nodeid:
            session.items.remove(item)
"""


@needs_bash
@pytest.mark.slow  # its short form is the test of a wrong and killed part below
def test_a_wrong_result_fails_and_has_no_time(tmp_path):
    (tmp_path / "planted.py").write_text(WRONG)
    out = tmp_path / "out"
    done = run_script(out, "--dry", "--only", "ops", PYTHONPATH=str(tmp_path), PYTEST_ADDOPTS="-p planted")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "failed: ops"
    whole = json.loads((out / "results.json").read_text())
    assert whole["passed"] is whole["parts"]["ops"]["passed"] is False
    assert whole["cases"] == {}
    assert len(whole["parts"]["ops"]["failed"]) == 2
    assert all("residual_add" in name for name in whole["parts"]["ops"]["failed"])


KILLED = """
import os, signal
ran = []
def pytest_runtest_setup(item):
    ran.append(item)
    if len(ran) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@needs_bash
@pytest.mark.slow  # as above
def test_a_killed_part_keeps_its_finished_cases(tmp_path):
    """A case that hangs in a compiler is killed in this way."""
    (tmp_path / "planted.py").write_text(KILLED)
    out = tmp_path / "out"
    done = run_script(out, "--dry", "--only", "ops", PYTHONPATH=str(tmp_path), PYTEST_ADDOPTS="-p planted")
    assert done.stdout.splitlines()[-1] == "failed: ops"
    whole = json.loads((out / "results.json").read_text())
    assert len(whole["cases"]) == 2
    assert whole["passed"] is whole["parts"]["ops"]["passed"] is False


WRONG_AND_KILLED = WRONG.replace(
    'if "residual" not in item.nodeid:', 'if item is not session.items[0] and "residual" not in item.nodeid:'
)


@needs_bash
def test_a_wrong_and_killed_part_keeps_its_right_case(tmp_path):
    """Three cases: a right one, a wrong one, and one in which the process is killed."""
    (tmp_path / "planted.py").write_text(WRONG_AND_KILLED + KILLED)
    out = tmp_path / "out"
    done = run_script(out, "--dry", "--only", "ops", PYTHONPATH=str(tmp_path), PYTEST_ADDOPTS="-p planted")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "failed: ops"
    whole = json.loads((out / "results.json").read_text())
    assert whole["passed"] is whole["parts"]["ops"]["passed"] is False
    assert [row["op"] for row in whole["cases"].values()] == ["group_norm_silu"]
    (failed,) = whole["parts"]["ops"]["failed"]
    assert "residual_add" in failed


WRONG_NETWORK = """
def pytest_collection_finish(session):
    from fastvae.fast import network_walk
    right = network_walk.run_part
    network_walk.run_part = lambda *given: right(*given) + 1
"""


@needs_bash
@pytest.mark.slow  # its short form is tests/bench/timing/test_networks.py
def test_a_wrong_network_fails_and_has_no_time(tmp_path):
    (tmp_path / "planted.py").write_text(WRONG_NETWORK)
    out = tmp_path / "out"
    done = run_script(out, "--dry", "--only", "encoder", PYTHONPATH=str(tmp_path), PYTEST_ADDOPTS="-p planted")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "failed: encoder"
    assert "fastvae                      failed: AssertionError: largest error" in done.stdout
    (entry,) = json.loads((out / "results.json").read_text())["networks"].values()
    assert entry["contestants"]["fastvae"].keys() == {"failed"}
    assert "median_seconds" in entry["contestants"]["eager, NCHW"], "the others are measured"


@needs_bash
def test_unknown_arguments_are_refused(tmp_path):
    done = run_script(tmp_path, "--only", "everything")
    assert done.returncode == 2
    parts = "tests, ops, philox, encoder, decoder, profile, loader, resize, winograd, upsample, compile or tune"
    assert f"--only takes {parts}, got 'everything'" in done.stderr
    if not torch.cuda.is_available():
        done = run_script(tmp_path, "--only", "ops")
        assert done.returncode == 2
        assert "no GPU that torch can see" in done.stderr


@needs_bash
def test_help_prints_the_header(tmp_path):
    done = run_script(tmp_path / "out", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Runs all tests and benchmarks that need a GPU.")
    assert done.stdout.endswith("Exits non-zero if a part failed, and names it.\n")
    assert not (tmp_path / "out").exists()
