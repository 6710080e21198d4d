"""Search of tiles: the choice of a tile, the table it writes, and a run on every op."""

import json
import os
import subprocess
import sys

import pytest
import torch
from fastvae_kernels.shared import tiles
from fastvae_kernels.shared.tiles import Tile

from bench.kernels import tune
from bench.timing import cases, operations
from bench.timing.environment import ROOT


def tile(rows):
    return Tile(rows, 32, 0, 4, 1)


def chosen(seconds, shipped=64, wobble=0.0):
    """Return the rows of the tile that select returns if tile(rows) needs seconds[rows]; None is refused."""

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
def test_the_tile_that_is_chosen(seconds, wobble, best):
    assert chosen(seconds, wobble=wobble) == best


def test_no_tile_at_all_is_an_error():
    with pytest.raises(ValueError, match="no tile runs on this device, not even the shipped"):
        chosen({32: None, 64: None})


def test_the_table_that_is_written_is_the_one_that_is_read(tmp_path, monkeypatch):
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


def test_every_op_of_the_tables_is_searched():
    listed = {line["op"] for line in json.loads((tiles.TABLES / "default.json").read_text())}
    assert {search.op for search in tune.searches()} == listed
    for search in tune.searches():
        for found in search.candidates():
            for size in (found.rows, found.columns, found.num_warps, found.depth or 1):
                assert size & (size - 1) == 0, f"{found}: Triton takes powers of two"


def test_a_search_runs_what_asks_for_its_tile(monkeypatch):
    """Or all candidates would be timed alike. On the tiny case of the operation."""
    asked, choose = set(), tiles.choose

    def recording(op, **described):
        asked.add(op)
        return choose(op, **described)

    monkeypatch.setattr(tiles, "choose", recording)
    for op, run, dtype in {(search.op, search.case.op, search.case.dtype) for search in tune.searches()}:
        case = min((case for case in cases.DRY if case.op == run), key=lambda case: case.dtype != dtype)
        operation = operations.OPERATIONS[run]
        inputs = operation.make(case, torch.device("cpu"))
        asked.clear()
        operation.ours(*inputs)()
        assert op in asked, run


def test_a_tile_is_answered_to_its_op_alone():
    described = {"dtype": torch.float32, "channels": 128, "target": tiles.INTERPRETER}
    before = tiles.choose("residual_add", **described)
    with tune.answering("statistics", tile(8)):
        assert tiles.choose("statistics", **described) == tile(8)
        assert tiles.choose("residual_add", **described) == before
    assert tiles.choose("statistics", **described) != tile(8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_tuning_without_a_gpu_is_refused_in_words(capsys):
    assert tune.main([]) == 2
    assert "times tiles on a GPU, and torch sees none here" in capsys.readouterr().err


def test_the_script_runs_from_the_root_without_the_tests_on_the_path():
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels")}
    command = [sys.executable, "-m", "bench.kernels.tune", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "python -m bench.kernels.tune" in done.stdout
