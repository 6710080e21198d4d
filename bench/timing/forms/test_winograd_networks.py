"""Times of the encoder and decoder with Winograd's forms beside the direct one, after a check of every result.

python -m pytest bench/timing/forms/test_winograd_networks.py --results FILE [--dry]
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

import fastvae
from bench.timing import cases, networks, roofline
from bench.timing.cases import Network
from bench.timing.contestants import CONTESTANTS, EAGER, Job, Ready, channels_last
from bench.timing.stopwatch import interval, median
from fastvae.fast.accelerate import path_of
from fastvae.fast.forms.form import Entry, Form, Forms

_SHAPES = [("encoder", 512, 8), ("decoder", 512, 8), ("decoder", 1024, 1), ("encoder", 512, 1)]
TABLE = {
    "cuda": [
        *(Network(part, "sd15", side, batch) for part, side, batch in _SHAPES),
        Network("encoder", "sd15", 512, 8, "float16"),
    ],
    "cpu": [],
    "dry": [Network("encoder", cases.TINY, 4)],
}
# Layers with at least so many channels on both sides; 32 are those of a dry run.
LEAST = (512, 256, 128, 32)


def with_forms(least: int) -> Callable[[Job], Ready]:
    """Return the contestant that runs layers from ``least`` channels on by Winograd's form for the dtype."""

    def prepare(job: Job) -> Ready:
        form = Form.WINOGRAD4 if job.case.dtype == "bfloat16" else Form.WINOGRAD2
        channels = [count for count in (32, 128, 256, 512) if count >= least]
        pairs = itertools.product(channels, channels)
        vae = fastvae.accelerate(job.copy(), freeze=True, graphs=True)
        path_of(vae).forms = Forms([Entry("conv", *pair, job.case.dtype, 1, form) for pair in pairs])
        return Ready(vae.encode_moments if job.case.part == "encoder" else job.call(vae), channels_last)

    return prepare


@torch.no_grad()
def test_network(case, device, dry, stopwatch, results, tmp_path):
    torch._dynamo.reset()
    job = Job(case, device, tmp_path)
    costs = roofline.count(case.part, case.side, case.batch, config=job.vae.config, dtype=job.dtype)
    line = networks.Line(job, costs)
    for name in (*EAGER, "fastvae, frozen"):
        line.admit(name, CONTESTANTS[name])
    for least in LEAST[-1:] if dry else LEAST[:-1]:
        line.admit(f"fastvae, frozen, Winograd from {least} channels", with_forms(least))
    failed = networks.failures({"contestants": line.rows})
    seconds = stopwatch.interleaved({name: calls for name, calls in line.calls.items() if name not in EAGER})
    for name, taken in seconds.items():
        line.rows[name] |= {"median_seconds": median(taken), "interval": interval(taken), "seconds": taken}
    results["winograd"][case.name] = {
        "part": case.part, "preset": case.preset, "side": case.side, "batch": case.batch, "dtype": case.dtype,
        "gate": str(line.wide).removeprefix("torch."), "contestants": line.rows,
    }  # fmt: skip
    assert not failed, "\n".join(failed)
