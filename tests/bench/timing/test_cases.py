"""Cases of the benchmarks: inputs, layouts, costs and results at full size, on tensors without memory."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastvae_kernels.shared import tiles
from fastvae_kernels.shared.runtime import INTERPRETED
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.kernels import tune
from bench.timing import cases, operations

ROOT = Path(__file__).parents[3]
ALL = [*cases.CASES, *(search.case for search in tune.searches())]


def shapes(result):
    return [tuple(value.shape) for value in ([result] if isinstance(result, torch.Tensor) else result)]


def check(case, launch):
    """Compare the shapes of every form of a case; the kernel's launcher too if ``launch`` is true."""
    operation = operations.OPERATIONS[case.op]
    with FakeTensorMode():
        inputs = operation.make(case, torch.device("cpu"))
        assert operation.cost(*inputs).bytes > 0, case
        for layout in operations.FORMATS:
            operation.eager(*operations.copied(inputs, layout))()
        found = [operation.ours(*operations.copied(inputs))()] if launch else []
        if case.op != "sample_posterior":  # its reference draws real numbers
            plain = operation.plain or operation.eager
            found += [plain(*inputs)(), (operation.truth or plain)(*operations.widened(inputs, torch.float64))()]
        assert all(shapes(result) == shapes(found[0]) for result in found), case


def test_every_case_is_well_formed():
    for case in ALL:
        check(case, launch=False)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="records Triton's launches")
def test_every_launcher_takes_its_case(monkeypatch):
    """The launchers too, in a process without the interpreter; a launch is recorded and not made."""
    if INTERPRETED:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "slow", __file__]
        done = subprocess.run(
            command, env=os.environ | {"TRITON_INTERPRET": "0"}, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "1 passed" in done.stdout
        return
    from triton.runtime.jit import JITFunction

    launched = []
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, grid, warmup, **named: launched.append(kernel))
    monkeypatch.setattr(tiles, "target_of", lambda device: tiles.TARGETS["sm_90"])
    for case in ALL:
        check(case, launch=True)
    assert len(launched) > 100
