"""Tile choice: pure, complete for every target, and by the tables alone."""

import json

import pytest
import torch
from fastvae_kernels.shared import tiles

CHANNELS = (3, 8, 32, 48, 80, 96, 128, 256, 512, 1024)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = sorted({entry["op"] for entry in json.loads((tiles.TABLES / "default.json").read_text())})


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Function that writes a table into a folder which replaces the shipped tables."""
    monkeypatch.setattr(tiles, "TABLES", tmp_path)
    tiles.clear()

    def write(name, *entries):
        full = [{"dtypes": ["float32"], "rows": 1, "columns": 1, "num_warps": 4, "num_stages": 1} | e for e in entries]
        (tmp_path / f"{name}.json").write_text(json.dumps(full))

    yield write
    tiles.clear()


@pytest.mark.parametrize("target", [*tiles.TARGETS.values(), tiles.INTERPRETER], ids=lambda t: t.architecture)
@pytest.mark.parametrize("op", OPS)
def test_the_default_serves_every_op_on_every_target(op, target):
    for dtype in DTYPES:
        for channels in CHANNELS if op != "spatial_attention" else CHANNELS[:-2]:
            tile = tiles.choose(op, dtype=dtype, channels=channels, target=target)
            for size in (tile.rows, tile.columns, tile.num_warps, tile.depth or 1):
                assert size & (size - 1) == 0, f"{tile}: Triton takes powers of two"


def test_a_shipped_table_has_no_misspelt_key():
    known = {"op", "dtypes", "channels", "shared_memory", "rows", "columns", "depth", "num_warps", "num_stages"}
    for path in tiles.TABLES.glob("*.json"):
        for entry in json.loads(path.read_text()):
            assert set(entry) <= known, (path.name, entry)
            assert set(entry["dtypes"]) <= {"float32", "float16", "bfloat16"}, (path.name, entry)


def test_the_card_comes_before_the_architecture_and_that_before_the_default(tables):
    target = tiles.Target("sm_90", 227 * 1024, "nvidia-h200")
    for rows, name in ((1, "default"), (2, "sm_90"), (4, "nvidia-h200")):
        tables(name, {"op": "op", "rows": rows})
        tiles.clear()
        assert tiles.choose("op", dtype=torch.float32, channels=8, target=target).rows == rows


def test_the_fewest_channels_that_are_enough(tables):
    tables("default", *({"op": "op", "channels": c, "rows": c} for c in (512, 64, 128)), {"op": "op", "rows": 4096})
    chosen = [
        tiles.choose("op", dtype=torch.float32, channels=c, target=tiles.INTERPRETER).rows
        for c in (1, 64, 65, 300, 513)
    ]
    assert chosen == [64, 64, 128, 512, 4096]


def test_as_much_shared_memory_as_there_is(tables):
    tables("default", *({"op": "op", "shared_memory": kib * 1024, "rows": kib} for kib in (64, 192, 99)))
    chosen = {a: tiles.choose("op", dtype=torch.float32, channels=8, target=t).rows for a, t in tiles.TARGETS.items()}
    assert chosen == {"sm_80": 99, "sm_86": 99, "sm_89": 99, "sm_90": 192, "sm_100": 192, "sm_120": 99, "gfx942": 64}


def test_no_fitting_tile_is_an_error(tables):
    tables("default", {"op": "op", "shared_memory": 99 * 1024})
    with pytest.raises(ValueError, match=r"no tile for op 'op', dtype float32, 8 channels on gfx942 with 65536 bytes"):
        tiles.choose("op", dtype=torch.float32, channels=8, target=tiles.TARGETS["gfx942"])


def test_the_cpu_is_the_interpreter():
    assert tiles.target_of(torch.device("cpu")) is tiles.INTERPRETER
