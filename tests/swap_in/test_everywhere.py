"""The plugin that accelerates models at construction: every way of building a model, and the counts."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from fast.small_models import SMALLEST
from swap_in import everywhere, own_class_everywhere
from swap_in.stock import is_accelerated, moments_of, pixels, tiny

import fastvae

pytestmark = pytest.mark.usefixtures("users_cpu")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def _everywhere(monkeypatch):
    monkeypatch.setattr(everywhere, "COUNTS", {"models": 0, "calls": 0})
    undo = [everywhere.accelerate_at_construction(diffusers.AutoencoderKL), everywhere.count_calls()]
    yield
    for step in undo:
        step()


@pytest.mark.usefixtures("_everywhere")
def test_every_way_of_building_a_model(tmp_path):
    built = [diffusers.AutoencoderKL(**SMALLEST), diffusers.AutoencoderKL.from_config(SMALLEST)]
    built[0].save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": False}):
        built.append(diffusers.AutoencoderKL.from_pretrained(tmp_path, **options))
    assert everywhere.COUNTS["models"] == 4
    for vae in (*built, copy.deepcopy(built[0])):
        assert type(vae) is diffusers.AutoencoderKL
        assert is_accelerated(vae)
        moments_of(vae, pixels())
    assert everywhere.COUNTS["calls"] == 5
    assert built[2].config["block_out_channels"] == list(SMALLEST["block_out_channels"])


@pytest.mark.usefixtures("_everywhere")
def test_a_class_by_another_name_is_left_alone():
    assert not is_accelerated(fastvae.AutoencoderKL(**SMALLEST))
    assert not everywhere.COUNTS["models"]


def test_afterwards_models_are_stock():
    everywhere.accelerate_at_construction(diffusers.AutoencoderKL)()
    assert not is_accelerated(tiny())


SUITE = """
import diffusers, torch

def test_one():
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2)
    assert vae(torch.zeros(1, 3, 8, 8)).sample.shape == (1, 3, 8, 8)
    assert "_fastvae" in vars(vae)
"""


def test_the_plugin_counts_and_undoes_itself(monkeypatch):
    """The hooks that pytest calls, without the process that the slow test starts."""
    monkeypatch.setattr(everywhere, "COUNTS", {"models": 0, "calls": 0})
    stock, lines, undo = diffusers.AutoencoderKL.__init__, [], []
    everywhere.pytest_configure(SimpleNamespace(add_cleanup=undo.append))
    try:
        diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2)(torch.zeros(1, 3, 8, 8))
    finally:
        for step in undo:
            step()
    everywhere.pytest_terminal_summary(SimpleNamespace(write_line=lines.append))
    assert lines == ["fastvae: 1 models accelerated at construction, 2 calls on the fast path"]
    assert diffusers.AutoencoderKL.__init__ is stock


@pytest.mark.slow
def test_as_a_plugin_of_another_projects_tests(tmp_path):
    (tmp_path / "test_elsewhere.py").write_text(SUITE)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "swap_in.everywhere", "-p", "no:cacheprovider", "."]
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fastvae: 1 models accelerated at construction, 2 calls on the fast path" in done.stdout


def test_the_plugin_of_the_own_class_undoes_itself():
    stock, undo = diffusers.AutoencoderKL, []
    own_class_everywhere.pytest_configure(SimpleNamespace(add_cleanup=undo.append))
    assert diffusers.AutoencoderKL is fastvae.AutoencoderKL
    undo[0]()
    assert diffusers.AutoencoderKL is stock
