"""Profiles of an encode and a decode, ours and eager's (profiles.py), after a check of every result.

python -m pytest bench/timing/test_profile.py --results FILE [--dry]
"""

from __future__ import annotations

import torch

from bench.timing import cases, networks, profiles, roofline
from bench.timing.contestants import CONTESTANTS, EAGER, Job

TABLE = cases.PROFILES
# eager in channels_last is there for the check only: its error sets the tolerance.
CHECKED = (*EAGER, "fastvae", "fastvae, frozen")
PROFILED = (EAGER[0], "fastvae", "fastvae, frozen")
CALLS = 3


@torch.no_grad()
def test_profile(case, device, dry, results, tmp_path):
    torch._dynamo.reset()
    job = Job(case, device, tmp_path)
    costs = roofline.count(case.part, case.side, case.batch, config=job.vae.config, dtype=job.dtype)
    line = networks.Line(job, costs)
    for name in CHECKED:
        line.admit(name, CONTESTANTS[name])
    failed = networks.failures({"contestants": line.rows})
    samples = {name: [] for name in PROFILED if name in line.calls}
    # The check warmed up. In turns, as all measurements are.
    for number in range(1 if dry else CALLS):
        for name, taken in samples.items():
            calls = line.calls[name]
            taken.append(profiles.spent(calls[number % len(calls)], device))
    results["profiles"][case.name] = {
        "part": case.part, "preset": case.preset, "side": case.side, "batch": case.batch, "dtype": case.dtype,
        "counted": "kernels" if device.type == "cuda" else "operators", "calls": 1 if dry else CALLS,
        "contestants": {name: profiles.row(profiles.middle(taken)) for name, taken in samples.items()},
    }  # fmt: skip
    assert not failed, "\n".join(failed)
