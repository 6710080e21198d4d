"""Error and time of one layer in every form, inside its block: a form reaches into the passes before and after it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastvae.fast import layer_checks
from fastvae.fast.fast_path import FastPath
from fastvae.fast.forms.form import Entry, Form, Forms
from fastvae.fast.forms.shapes import Convolution
from fastvae.fast.network_walk import Activation, Pass
from fastvae.fast.packed_weights import channels_last
from fastvae.report.timing import interleaved, median, median_interval

# A smaller gain is noise from one day to the next.
LEAST_GAIN = 0.02
# The largest float for an error that is not finite, which JSON does not have.
LARGEST = 1e300
# The error hardly depends on the size; float64 on a CPU needs much memory.
MOST_SIDE = 64
# Pixels of a batch on a GPU, which small images do not fill.
BATCH_PIXELS = 2**20


def error_ratios(convolution: Convolution, path: FastPath) -> dict[str, float]:
    """Return the rms error of the block in each form, against float64, as a multiple of eager torch's, at most LARGEST.

    An error of eager's own size is 1, also where both are exact, as with weights of zeros. A form that gives the direct
    one's bits does not run on this device, and is left out.
    """
    channels, height, width = convolution.shape
    x = _random(convolution, 1, channels, min(height, MOST_SIDE), min(width, MOST_SIDE))
    # Not every accelerator has float64.
    place = x.device if x.device.type == "cuda" else torch.device("cpu")
    truth = layer_checks.as_module(copy.deepcopy(convolution.block).to(place).double(), x.to(place).double())
    own = _rms(layer_checks.as_module(convolution.block, x).to(place).double() - truth)
    results = {form: block_call(convolution, path, form, x)().to(place) for form in Form}
    there = {form: y for form, y in results.items() if form is Form.DIRECT or not y.equal(results[Form.DIRECT])}
    return {form.value: _ratio(_rms(y.double() - truth), own) for form, y in there.items()}


def seconds(convolution: Convolution, path: FastPath, forms: list[Form], budget: float) -> dict[str, list[float]]:
    """Return samples of the block's time in each form, in turns, for about ``budget`` seconds."""
    weight = convolution.part.conv_in.weight
    channels, height, width = convolution.shape
    batch = 1 if weight.device.type == "cpu" else max(1, BATCH_PIXELS // max(convolution.pixels, height * width))
    x = _random(convolution, batch, channels, height, width)
    calls: Mapping[str, Callable[[], Any]] = {form.value: block_call(convolution, path, form, x) for form in forms}
    for call in calls.values():
        call()  # compiles, and packs the weights
    return interleaved(calls, x.device, budget)


def _random(convolution: Convolution, *size: int) -> Tensor:
    """Return normal values of this size, the same every time, with the device and dtype of the convolution's part."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
    return x.to(convolution.part.conv_in.weight)


def fastest(samples: Mapping[str, list[float]]) -> Form:
    """Return the form with the least median, if it beats the direct form by 2 % and beyond both intervals."""
    best = min(samples, key=lambda form: median(samples[form]))
    direct = samples[Form.DIRECT.value]
    clear = median_interval(samples[best])[1] < median_interval(direct)[0]
    return Form(best) if clear and median(samples[best]) < (1 - LEAST_GAIN) * median(direct) else Form.DIRECT


def block_call(convolution: Convolution, path: FastPath, form: Form, x: Tensor) -> Callable[[], Tensor]:
    """Return a call of the convolution's block with it in this form: the values for x [B, C, H, W]."""
    forms = Forms([Entry(*convolution.key, 0, form)])
    run = path.pass_without_gradient(convolution.part, x)
    run.forms = forms
    stream = getattr(run, "stream_factor", 1.0)
    given = channels_last(x * stream)
    step = run.upsample if convolution.key.kind == "upsample" else _resnet(run)

    @torch.no_grad()
    def call() -> Tensor:
        activation = step(convolution.block, Activation(given.clone()))  # a pass may write into its input
        y = activation.x / stream if stream != 1.0 else activation.x
        return y if activation.bias is None else y + activation.bias.to(y.dtype).view(-1, 1, 1)

    return call


def _resnet(run: Pass) -> Callable[[Any, Activation], Activation]:
    return lambda block, activation: run.resnet(block, activation, False)


def _ratio(error: float, own: float) -> float:
    return 1.0 if error == own else bounded(error / own if own else LARGEST)


def bounded(error: float) -> float:
    """Return an error, or LARGEST for one that is not finite."""
    return error if error < LARGEST else LARGEST


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
