"""Times of a decoder's upsampling convolutions in both forms, and of the pieces, after a check of every result.

Both leave what the next norm needs: y and its partial statistics.

python -m pytest bench/timing/forms/test_upsample.py --results FILE [--dry]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fastvae_kernels.group_norm import group_norm_statistics
from fastvae_kernels.interleave import cost, upsample_interleave
from fastvae_kernels.upsample import fold_upsample_weights, four_tap_weights
from support.accuracy import assert_as_accurate  # pyright: ignore[reportMissingImports]  (tests/ is on the path)

from bench.timing.forms.layers import Layer
from bench.timing.gate import in_full, truth_dtype
from bench.timing.stopwatch import median

# Stable Diffusion's decoder at 8 x 512², 1 x 1024² and 1 x 512²; side: of the image before it is doubled.
_LAYERS = [
    *(Layer(channels, channels, side, 8) for channels, side in ((512, 64), (512, 128), (256, 256))),
    *(Layer(channels, channels, side, 1) for channels, side in ((512, 128), (512, 256), (256, 512))),
    *(Layer(channels, channels, side, 1) for channels, side in ((512, 64), (256, 256))),
    Layer(512, 512, 128, dtype="float16"), Layer(256, 256, 256, dtype="float16"),
]  # fmt: skip
TABLE = {"cuda": _LAYERS, "cpu": [], "dry": [Layer(16, 16, 6, 1)]}


def make(layer: Layer, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x and weight of a layer, random, in channels_last."""
    torch.manual_seed(0)
    dtype, shape = getattr(torch, layer.dtype), (layer.batch, layer.inputs, layer.side, layer.side)
    weight = torch.randn(layer.outputs, layer.inputs, 3, 3, device=device) / (9 * layer.inputs) ** 0.5
    x = torch.randn(shape, device=device)
    return x.to(dtype, memory_format=torch.channels_last), weight.to(dtype, memory_format=torch.channels_last)


def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the layer's result by doubling the image."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0), weight, padding=1)


def forms(x: torch.Tensor, weight: torch.Tensor) -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Return the product and the pass behind it of each form."""
    layout = torch.channels_last
    folded = fold_upsample_weights(weight).contiguous(memory_format=layout)
    taps = four_tap_weights(weight).contiguous(memory_format=layout)
    return {
        "direct": (
            lambda: F.conv_transpose2d(x, folded, stride=2, padding=1),
            lambda y: (y, group_norm_statistics(y)),
        ),
        "four_taps": (lambda: F.conv2d(x, taps, padding=1), upsample_interleave),
    }


@torch.no_grad()
def test_layer(case, device, roof, stopwatch, results):
    x, weight = make(case, device)
    operations = 32 * case.inputs * case.outputs * case.side**2
    wide = truth_dtype(4 * case.outputs * case.side**2, operations, device)
    (true,) = in_full(lambda: plain(x[:1].to(wide), weight.to(wide)))
    eager = plain(x[:1], weight)
    calls, work, errors = {}, {}, {}
    for name, (product, end) in forms(x, weight).items():
        made = product()
        y, partials = end(made)
        assert_as_accurate(y[:1], eager, true)
        errors[name] = (y[:1].double() - true).square().mean().sqrt().item()
        calls[name] = lambda product=product, end=end: end(product())
        calls |= {f"{name}, product": product, f"{name}, pass": lambda end=end, made=made: end(made)}
        work[f"{name}, product"] = case.batch * operations
        work[f"{name}, pass"] = cost(made).bytes if made.shape != y.shape else y.nbytes + partials.nbytes
    seconds = stopwatch.interleaved({name: [call] for name, call in calls.items()})
    medians = {name: median(taken) for name, taken in seconds.items()}
    rates = {name: amount / medians[name] for name, amount in work.items()}
    results["upsample"][case.name] = {
        "inputs": case.inputs, "outputs": case.outputs, "side": case.side, "batch": case.batch, "dtype": case.dtype,
        "gate": str(wide).removeprefix("torch."), "median_seconds": medians,
        "rms_error_times_direct": {name: error / errors["direct"] for name, error in errors.items()},
        "times_direct": {name: medians["direct"] / medians[name] for name in errors},
        "tflops": {name: rate / 1e12 for name, rate in rates.items() if "product" in name},
        "share_of_copy_rate": {name: rate / roof["bytes"] for name, rate in rates.items() if "pass" in name},
        "host_seconds": dict(stopwatch.host_seconds), "seconds": seconds,
    }  # fmt: skip
