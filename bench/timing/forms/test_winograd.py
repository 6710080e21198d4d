"""Times of Stable Diffusion's layers in each form, and of the pieces of Winograd's, after a check of every result.

python -m pytest bench/timing/forms/test_winograd.py --results FILE [--dry]
"""

from __future__ import annotations

import torch
from support.accuracy import assert_as_accurate  # pyright: ignore[reportMissingImports]  (tests/ is on the path)

from bench.timing.forms import layers
from bench.timing.forms.layers import Layer
from bench.timing.gate import in_full, truth_dtype
from bench.timing.stopwatch import median

# Those of 8 x 512², the most important first, and of 1 x 512²; in fp16 those that decide.
_LAYERS = [
    Layer(512, 512, 128), Layer(512, 512, 64), Layer(256, 256, 256), Layer(256, 512, 128), Layer(512, 256, 256),
    Layer(128, 256, 256), Layer(128, 128, 512), Layer(256, 128, 512), Layer(512, 512, 64, 1), Layer(512, 512, 128, 1),
    Layer(256, 256, 256, 1), Layer(512, 512, 128, dtype="float16"), Layer(256, 256, 256, dtype="float16"),
    Layer(512, 512, 128, dtype="float32"),
]  # fmt: skip
TABLE = {"cuda": _LAYERS, "cpu": [], "dry": [Layer(16, 16, 8, 1)]}
# The forms that a whole network may take in a dtype without being tried on its weights.
CHECKED = {"bfloat16": ("winograd2", "winograd4"), "float16": ("winograd2",), "float32": ("winograd2",)}


@torch.no_grad()
def test_layer(case, device, roof, stopwatch, results):
    made = layers.make(case, device)
    operations = 18 * case.inputs * case.outputs * case.side**2
    wide = truth_dtype(case.inputs * case.side**2, operations, device)
    (true,) = in_full(lambda: layers.truth(made, wide))
    plain = layers.direct(made)[:1]
    allowed = (plain.double() - true).square().mean().sqrt()
    errors, calls, work = {}, {"direct": lambda: layers.direct(made)}, {}
    for name in ("winograd4", "winograd2"):
        ours = layers.by(name, made)[:1]
        errors[name] = ((ours.double() - true).square().mean().sqrt() / allowed).item()
        if name in CHECKED[case.dtype]:
            assert_as_accurate(ours, plain, true)
        calls[name] = lambda name=name: layers.by(name, made)
        small = layers.workspace_in_cache(device)
        calls[f"{name}, in L2"] = lambda name=name, small=small: layers.by(name, made, small)
        own, of_each = layers.pieces(name, made)
        calls, work = calls | own, work | of_each
    seconds = stopwatch.interleaved({name: [call] for name, call in calls.items()})
    medians = {name: median(taken) for name, taken in seconds.items()}
    rates = {name: amount / medians[name] for name, amount in work.items()}
    results["winograd"][case.name] = {
        "inputs": case.inputs, "outputs": case.outputs, "side": case.side, "batch": case.batch, "dtype": case.dtype,
        "gate": str(wide).removeprefix("torch."), "rms_error_times_direct": errors, "median_seconds": medians,
        "times_direct": {name: medians["direct"] / medians[name] for name in calls if name not in work},
        "tflops": {name: rate / 1e12 for name, rate in rates.items() if "products" in name},
        "share_of_copy_rate": {name: rate / roof["bytes"] for name, rate in rates.items() if "pass" in name},
        "host_seconds": dict(stopwatch.host_seconds), "seconds": seconds,
    }  # fmt: skip
