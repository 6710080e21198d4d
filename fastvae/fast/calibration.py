"""fastvae.calibrate: measures a model's activations and chooses the factors that keep them in fp16's range.

Measured in fp32 on the given images, wherever the fast path stores an activation: outputs of convolutions and
projections without their biases, and residual sums.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvae.fast import fallback_reasons, network_walk
from fastvae.fast.accelerate import path_of, vae_of
from fastvae.fast.fast_path import Factors
from fastvae.fast.inference_pass import InferencePass
from fastvae.fast.layer_checks import Layer
from fastvae.fast.network_walk import Activation
from fastvae.fast.packed_weights import PackedWeights, weights_of
from fastvae.latents.autoencoder import ACCELERATED
from fastvae.latents.interpreter import without_interpreter
from fastvae.latents.pixels import pixels_from_images
from fastvae.latents.scaling import unscale_latents

LARGEST = torch.finfo(torch.float16).max
# Other images have larger activations than those measured: sixteen times as large still fit.
HEADROOM = 2.0**4
# Smaller factors push values into fp16's subnormals: at 2^-14 the tiny model's error is 1.8 times eager's
# (docs/numerics.md). With this minimum larger values overflow instead; that is detected, and the rows redone in fp32.
SMALLEST = 2.0**-12


@dataclass(frozen=True)
class Calibration:
    """Largest activations measured in an encoder or decoder, and the factors chosen for them."""

    largest_stream: float
    """Largest absolute value of the residual stream and of everything computed in its scale."""
    largest_inner: float
    """Largest absolute value between conv1 and norm2."""
    factors: Factors


@torch.no_grad()
def calibrate(vae_or_pipe: Any, images: Any, *, latents: Tensor | None = None) -> dict[str, Calibration]:
    """Choose the fp16 factors of an accelerated model from its activations; return {"encoder": ..., "decoder": ...}.

    images: a few typical ones, as encode_latents takes them. latents: scaled latents [B, L, h, w] for the decoder, by
    default the modes of the images. Each factor is the largest power of two, up to 1, at which sixteen times the
    largest value still fits; fast_report shows it. A model whose values stay below 4,094 gets factors of 1 and the full
    precision of fp16. A model with values above 16 million gets 2^-12; encode_latents and the loaders redo rows that
    still overflow in fp32. Runs in fp32, image by image, on a copy of the model.
    A model in another dtype needs no factors: nothing is measured or set, a warning says so, and {} is returned.
    Raises ValueError if the model is not accelerated, for images that are empty or that encode_latents refuses, and for
    activations that are not finite in fp32.
    """
    vae: Any = vae_of(vae_or_pipe)
    path = path_of(vae)
    parts = {name: part for name in ("encoder", "decoder") if (part := _fp16_part(vae, name)) is not None}
    if not parts:
        dtype = next(vae.parameters()).dtype
        warnings.warn(f"calibrate: activations in {dtype} need no factors, and none were set", stacklevel=2)
        return {}
    wide = copy.deepcopy(vae, {id(path): None}).float()
    runs = {name: MeasuringPass() for name in parts}
    for name, run in runs.items():
        vars(getattr(wide, name))["forward"] = functools.partial(_measured, getattr(wide, name), run)
    pixels = pixels_from_images(vae, images).to(next(wide.parameters()))
    if not pixels.shape[0]:
        raise ValueError("images must hold at least one image, got none")
    if latents is not None and not (isinstance(latents, Tensor) and latents.ndim == 4 and latents.numel()):
        raise ValueError(f"latents must be a tensor [B, L, h, w] of at least one row, got {type(latents).__name__}")
    if latents is None and "encoder" not in runs:
        raise ValueError("latents must be given for a model without its encoder, got None")
    raw = None if latents is None else unscale_latents(wide, latents.to(pixels))
    modes = [wide.encode(row).latent_dist.mode() for row in pixels.split(1)] if "encoder" in runs else []
    if "decoder" in runs:
        for row in modes if raw is None else raw.split(1):
            wide.decode(row)
    found = {name: run.result(name) for name, run in runs.items()}
    path.factors.update({name: calibration.factors for name, calibration in found.items()})
    path.forget()
    return found


class MeasuringPass(InferencePass):
    """A pass in fp32 that records the largest absolute values of the tensors that the fast path scales in fp16."""

    def __init__(self):
        super().__init__(PackedWeights())
        self.inner_convolutions: set[Layer] = set()
        self.largest: dict[str, list[Tensor]] = {"stream": [], "inner": []}

    def begin(self, part: Layer, x: Tensor) -> Activation:
        return self._record_stream(super().begin(part, x))

    def resnet(self, block: Layer, activation: Activation, pad: bool) -> Activation:
        self.inner_convolutions.add(block.conv1)
        return self._record_stream(super().resnet(block, activation, pad))

    def attention(self, layer: Layer, activation: Activation, pad: bool) -> Activation:
        return self._record_stream(super().attention(layer, activation, pad))

    def upsample(self, sampler: Layer, activation: Activation) -> Activation:
        return self._record_stream(super().upsample(sampler, activation))

    def as_module(self, module: Layer, activation: Activation) -> Activation:
        return self._record_stream(super().as_module(module, activation))

    def result(self, name: str) -> Calibration:
        """Return the largest values and the factors for them; raise ValueError if they are not finite."""
        stream, inner = (float(torch.stack(values).max()) for values in self.largest.values())
        if not math.isfinite(stream + inner):
            raise ValueError(f"the activations of the {name} must be finite, got NaN or infinity in fp32")
        return Calibration(stream, inner, Factors(_factor(stream), _factor(inner)))

    def _shared(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor | None]:
        self._plain(layer, x)  # fp16 may take either form
        return super()._shared(layer, x)

    def _is_shared(self, layer: Layer) -> bool:
        return weights_of(layer)[0][0].shape[0] == layer.group_norm.num_channels

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._record("stream", super()._linear(x, weight, bias))

    def _convolve(self, conv: Layer, x: Tensor) -> Tensor:
        return self._record("inner" if conv in self.inner_convolutions else "stream", super()._convolve(conv, x))

    def _record_stream(self, activation: Activation) -> Activation:
        self._record("stream", activation.x)
        return activation

    def _record(self, place: str, values: Tensor) -> Tensor:
        self.largest[place].append(values.abs().amax())
        return values


def _fp16_part(vae: Any, name: str) -> Layer | None:
    """Return the part of this name if it takes the fast path and is in fp16, else None."""
    part = getattr(vae, name, None)
    if part is None or ACCELERATED not in vars(part) or part.conv_in.weight.dtype != torch.float16:
        return None
    return part if fallback_reasons.why_not_part(part) is None else None


def _measured(part: Layer, run: MeasuringPass, x: Tensor) -> Tensor:
    with without_interpreter(x.device):
        return network_walk.run_part(part, x, run)


def _factor(largest: float) -> float:
    """Return the largest power of two, from SMALLEST to 1, at which HEADROOM times the largest value fits."""
    fits = LARGEST / HEADROOM
    return 1.0 if largest <= fits else max(SMALLEST, 2.0 ** math.floor(math.log2(fits / largest)))
