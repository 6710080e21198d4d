"""fastvae.calibrate: how large a model's activations are, and the factors that carry them through half precision.

They are measured in fp32 on the images that are given, at every place where the fast path stores one: the outputs of
convolutions and projections without their biases, and the sums of residuals.
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

from fastvae.fast import fallback_reasons as reasons
from fastvae.fast import network_walk as walk
from fastvae.fast.accelerate import path_of, vae_of
from fastvae.fast.fast_path import Factors
from fastvae.fast.inference_pass import Inference
from fastvae.fast.layer_checks import Layer
from fastvae.fast.network_walk import Activation
from fastvae.fast.packed_weights import PackedWeights, weights_of
from fastvae.latents.autoencoder import ACCELERATED
from fastvae.latents.pixels import pixels_from_images
from fastvae.latents.scaling import unscale_latents

LARGEST = torch.finfo(torch.float16).max
# Other images reach further than those that were looked at: sixteen times as far are left to them.
HEADROOM = 2.0**4
# Smaller factors lose what they carry to fp16's subnormals: at 2^-14 the tiny model already errs 1.8 times as much as
# eager (docs/numerics.md). Beyond it values overflow instead, which is seen, and such rows are done again in fp32.
SMALLEST = 2.0**-12


@dataclass(frozen=True)
class Calibration:
    """What was measured on an encoder or a decoder, and the powers of two that its activations are carried times."""

    largest_stream: float
    """The largest absolute value of the residual stream, and of what is computed in its scale."""
    largest_inner: float
    """The same between conv1 and norm2."""
    factors: Factors


@torch.no_grad()
def calibrate(vae_or_pipe: Any, images: Any, *, latents: Tensor | None = None) -> dict[str, Calibration]:
    """Choose the factors of an accelerated fp16 model by what its activations reach, {"encoder": ..., "decoder": ...}.

    images: a few typical ones, as encode_latents takes them. latents: scaled latents [B, L, h, w] for the decoder, by
    default the modes of the images. Each factor is the largest power of two, up to 1, at which sixteen times the
    largest value still fits; fast_report states it. A model whose values stay below 4,094 is then carried as it is,
    with the full precision of fp16; one that reaches beyond 16 million keeps 2^-12, and rows that overflow then are
    done again in fp32 wherever latents are handed out. Runs in fp32, image by image, on a copy of the model.
    A model in another dtype overflows nowhere near here: nothing is measured or set, a warning says so, and {} is
    returned. Raises ValueError for a model that is not accelerated, for no images or what encode_latents refuses of
    them, and where activations are not finite in fp32.
    """
    vae: Any = vae_of(vae_or_pipe)
    path = path_of(vae)
    parts = {name: part for name in ("encoder", "decoder") if (part := _half(vae, name)) is not None}
    if not parts:
        dtype = next(vae.parameters()).dtype
        warnings.warn(f"calibrate: activations in {dtype} need no factors, and none were set", stacklevel=2)
        return {}
    wide = copy.deepcopy(vae, {id(path): None}).float()
    runs = {name: Measuring() for name in parts}
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


class Measuring(Inference):
    """A pass in fp32 that keeps the largest absolute values of what the fast path would store scaled."""

    def __init__(self):
        super().__init__(PackedWeights())
        self.inner_convolutions: set[Layer] = set()
        self.reached: dict[str, list[Tensor]] = {"stream": [], "inner": []}

    def begin(self, part: Layer, x: Tensor) -> Activation:
        return self._seen(super().begin(part, x))

    def resnet(self, block: Layer, flow: Activation, pad: bool) -> Activation:
        self.inner_convolutions.add(block.conv1)
        return self._seen(super().resnet(block, flow, pad))

    def attention(self, layer: Layer, flow: Activation, pad: bool) -> Activation:
        return self._seen(super().attention(layer, flow, pad))

    def upsample(self, sampler: Layer, flow: Activation) -> Activation:
        return self._seen(super().upsample(sampler, flow))

    def as_module(self, module: Layer, flow: Activation) -> Activation:
        return self._seen(super().as_module(module, flow))

    def result(self, name: str) -> Calibration:
        """What was reached, and the factors for it; ValueError where that is not finite."""
        stream, inner = (float(torch.stack(values).max()) for values in self.reached.values())
        if not math.isfinite(stream + inner):
            raise ValueError(f"the activations of the {name} must be finite, got NaN or infinity in fp32")
        return Calibration(stream, inner, Factors(_factor(stream), _factor(inner)))

    def _shared(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor | None]:
        self._plain(layer, x)  # half precision may take either form
        return super()._shared(layer, x)

    def _is_shared(self, layer: Layer) -> bool:
        return weights_of(layer)[0][0].shape[0] == layer.group_norm.num_channels

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._see("stream", super()._linear(x, weight, bias))

    def _convolve(self, conv: Layer, x: Tensor) -> Tensor:
        return self._see("inner" if conv in self.inner_convolutions else "stream", super()._convolve(conv, x))

    def _seen(self, flow: Activation) -> Activation:
        self._see("stream", flow.x)
        return flow

    def _see(self, place: str, values: Tensor) -> Tensor:
        self.reached[place].append(values.abs().amax())
        return values


def _half(vae: Any, name: str) -> Layer | None:
    """The part of this name, where it is walked and in fp16."""
    part = getattr(vae, name, None)
    if part is None or ACCELERATED not in vars(part) or part.conv_in.weight.dtype != torch.float16:
        return None
    return part if reasons.why_not_part(part) is None else None


def _measured(part: Layer, run: Measuring, x: Tensor) -> Tensor:
    return walk.run_part(part, x, run)


def _factor(reached: float) -> float:
    """The largest power of two up to 1, and SMALLEST at least, that carries what was reached with its headroom."""
    fits = LARGEST / HEADROOM
    return 1.0 if reached <= fits else max(SMALLEST, 2.0 ** math.floor(math.log2(fits / reached)))
