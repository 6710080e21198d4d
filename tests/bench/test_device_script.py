"""bench/device.sh runs, writes what it promises and turns red on a wrong result; tune.py chooses as it says."""

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastvae_kernels.shared import tiles
from fastvae_kernels.shared.tiles import Tile

ROOT = Path(__file__).parents[2]


def run_script(out, *arguments, **environment):
    return subprocess.run(
        ["bash", ROOT / "bench" / "device.sh", *arguments],
        env=os.environ | {"OUT": str(out), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


needs_bash = pytest.mark.skipif(shutil.which("timeout") is None, reason="the script is for Linux: bash and timeout")


# What one part writes is in the tests of wrong and killed ones below.
@needs_bash
@pytest.mark.slow
def test_a_dry_run_writes_its_results(tmp_path):
    done = run_script(tmp_path, "--dry")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all parts passed"
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "logs.txt", "summary.txt"}
    whole = json.loads((tmp_path / "results.json").read_text())
    assert whole["dry"] is whole["passed"] is True
    assert whole["parts"].keys() == {"tests", "ops", "philox", "encoder", "decoder", "profile", "loader"}
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
        assert all("left_out" in rows[name] for name in rows.keys() - timed), "a reason for everybody else"
        assert f"{part} tiny" in done.stdout
    assert whole["generator"]
    assert all(row["largest_difference"] <= 2e-6 for row in whole["generator"].values())
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
def test_a_wrong_result_is_red_and_has_no_time(tmp_path):
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
def test_a_part_that_is_killed_keeps_the_cases_it_had_done(tmp_path):
    """As a case is that hangs in a compiler, and does not hear that its time is up."""
    (tmp_path / "planted.py").write_text(KILLED)
    out = tmp_path / "out"
    done = run_script(out, "--dry", "--only", "ops", PYTHONPATH=str(tmp_path), PYTEST_ADDOPTS="-p planted")
    assert done.stdout.splitlines()[-1] == "failed: ops"
    whole = json.loads((out / "results.json").read_text())
    assert len(whole["cases"]) == 2
    assert whole["passed"] is whole["parts"]["ops"]["passed"] is False


WRONG_NETWORK = """
def pytest_collection_finish(session):
    from fastvae.fast import network_walk as walk
    right = walk.through
    walk.through = lambda *given: right(*given) + 1
"""


@needs_bash
def test_a_wrong_network_is_red_and_has_no_time(tmp_path):
    (tmp_path / "planted.py").write_text(WRONG_NETWORK)
    out = tmp_path / "out"
    done = run_script(out, "--dry", "--only", "encoder", PYTHONPATH=str(tmp_path), PYTEST_ADDOPTS="-p planted")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "failed: encoder"
    assert "fastvae                      failed: AssertionError: largest error" in done.stdout
    (entry,) = json.loads((out / "results.json").read_text())["networks"].values()
    assert entry["contestants"]["fastvae"].keys() == {"failed"}
    assert "median_seconds" in entry["contestants"]["eager, NCHW"], "the others are measured all the same"


@needs_bash
def test_what_the_script_does_not_know_is_refused_in_words(tmp_path):
    done = run_script(tmp_path, "--only", "everything")
    assert done.returncode == 2
    assert "--only takes tests, ops, philox, encoder, decoder, profile, loader or tune, got 'everything'" in done.stderr
    if not torch.cuda.is_available():
        done = run_script(tmp_path, "--only", "ops")
        assert done.returncode == 2
        assert "no GPU that torch can see" in done.stderr


FULL_SIZE = """
import sys
sys.path[:0] = [{bench!r}, {kernels!r}, {tests!r}]
import torch, cases, operations, tune
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.jit import JITFunction
from fastvae_kernels.shared import tiles
launched = []
JITFunction.run = lambda kernel, *args, grid, warmup, **kwargs: launched.append(kernel)
tiles.target_of = lambda device: tiles.TARGETS["sm_90"]
shapes = lambda result: [tuple(v.shape) for v in ([result] if isinstance(result, torch.Tensor) else result)]
for case in [*cases.CASES, *(search.case for search in tune.searches())]:
    operation = operations.OPERATIONS[case.op]
    with FakeTensorMode():
        inputs = operation.make(case, torch.device("cpu"))
        assert operation.cost(*inputs).bytes > 0, case
        ours = shapes(operation.ours(*operations.copied(inputs))())
        for layout in operations.FORMATS:
            operation.eager(*operations.copied(inputs, layout))()
        if case.op == "sample_posterior":  # its twin draws real numbers
            continue
        plain = operation.plain or operation.eager
        assert ours == shapes(plain(*inputs)()), case
        assert ours == shapes((operation.truth or plain)(*operations.widened(inputs, torch.float64))()), case
print(len(launched))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="records Triton's launches")
def test_every_full_size_case_is_well_formed():
    """Inputs, layouts, costs and results of all cases and searches, on tensors without memory and launches not done."""
    folders = {name: str(ROOT / name) for name in ("bench", "kernels", "tests")}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", FULL_SIZE.format(**folders)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


@pytest.fixture(scope="module")
def tune():
    specification = importlib.util.spec_from_file_location("tune", ROOT / "bench" / "tune.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    before = list(sys.path)
    sys.modules["tune"] = module
    specification.loader.exec_module(module)
    yield module
    sys.path[:] = before
    del sys.modules["tune"]


def tile(rows):
    return Tile(rows, 32, 0, 4, 1)


def chosen(tune, seconds, shipped=64, wobble=0.0):
    """What select takes when tile(rows) needs seconds[rows], None being refused."""

    def careful(finalists):
        assert len(finalists) <= tune.FINALISTS + 1
        return {t: [seconds[t.rows] * (1 + wobble * step) for step in (-1, 0, 1)] for t in finalists}

    return tune.select(tile(shipped), map(tile, seconds), lambda t: seconds[t.rows], careful).rows


@pytest.mark.parametrize(
    ("seconds", "wobble", "best"),
    [
        ({16: 3.0, 32: 1.0, 64: 2.0}, 0.0, 32),
        ({32: 0.99, 64: 1.0}, 0.0, 64),  # a gain of 1 % is noise
        ({32: 0.9, 64: 1.0}, 0.1, 64),  # and so is one within the spread
        ({32: None, 64: 2.0, 128: 1.0}, 0.0, 128),
        ({32: 1.0, 64: None}, 0.0, 32),  # the shipped tile does not run here
        ({8: 1.0, 16: 1.1, 32: 1.2, 128: 1.3, 256: 1.4, 64: 1.01}, 0.0, 64),
        ({8: 1.0, 16: 1.1, 32: 1.2, 128: 1.3, 256: 1.4, 64: 1.5}, 0.0, 8),
    ],
)
def test_the_tile_that_is_chosen(tune, seconds, wobble, best):
    assert chosen(tune, seconds, wobble=wobble) == best


def test_no_tile_at_all_is_an_error(tune):
    with pytest.raises(ValueError, match="no tile runs on this device, not even the shipped"):
        chosen(tune, {32: None, 64: None})


def test_the_table_that_is_written_is_the_one_that_is_read(tune, tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "TABLES", tmp_path)
    tiles.clear()
    search = next(s for s in tune.searches() if s.op == "attention_scores")
    path = tmp_path / "a-card.json"
    path.write_text('[\n  {"op": "other", "dtypes": ["float32"], "rows": 1, "columns": 1}\n]\n')
    for rows in (64, 128):  # the second search replaces the first
        tune.write(path, [tune.entry(search, Tile(rows, 256, 64, 8, 3))])
    assert len(json.loads(path.read_text())) == 2
    target = tiles.Target("sm_90", 227 * 1024, "a-card")
    for dtype in (torch.float16, torch.bfloat16):
        found = tiles.choose("attention_scores", dtype=dtype, channels=512, target=target)
        assert found == Tile(128, 256, 64, 8, 3)
    tiles.clear()


def test_every_op_of_the_tables_is_searched(tune):
    listed = {line["op"] for line in json.loads((tiles.TABLES / "default.json").read_text())}
    assert {search.op for search in tune.searches()} == listed
    for search in tune.searches():
        for found in search.candidates():
            for size in (found.rows, found.columns, found.num_warps, found.depth or 1):
                assert size & (size - 1) == 0, f"{found}: Triton takes powers of two"


def test_a_search_runs_what_asks_for_its_tile(tune, monkeypatch):
    """Or all candidates would be timed alike. On the tiny case of the operation."""
    asked, choose = set(), tiles.choose

    def recording(op, **described):
        asked.add(op)
        return choose(op, **described)

    monkeypatch.setattr(tiles, "choose", recording)
    cases = importlib.import_module("cases")
    for op, run in {(search.op, search.case.op) for search in tune.searches()}:
        case = next(case for case in cases.DRY if case.op == run)
        operation = tune.operations.OPERATIONS[run]
        inputs = operation.make(case, torch.device("cpu"))
        asked.clear()
        operation.ours(*inputs)()
        assert op in asked, run


def test_a_tile_is_answered_to_its_op_alone(tune):
    described = {"dtype": torch.float32, "channels": 128, "target": tiles.INTERPRETER}
    before = tiles.choose("residual_add", **described)
    with tune.answering("statistics", tile(8)):
        assert tiles.choose("statistics", **described) == tile(8)
        assert tiles.choose("residual_add", **described) == before
    assert tiles.choose("statistics", **described) != tile(8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_tuning_without_a_gpu_is_refused_in_words(tune, capsys):
    assert tune.main([]) == 2
    assert "times tiles on a GPU, and torch sees none here" in capsys.readouterr().err
