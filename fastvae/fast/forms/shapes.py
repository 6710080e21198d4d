"""The convolutions of a part whose form can be chosen, with the sizes that they have for one input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastvae.fast import cost_trace, network_walk
from fastvae.fast.forms.form import LayerKey, dtype_name
from fastvae.fast.layer_checks import Layer
from fastvae.fast.network_walk import Activation, Pass


@dataclass(frozen=True)
class Convolution:
    """A convolution in its place: what the tables know of it, and the block in which it runs."""

    key: LayerKey
    pixels: int
    """Of an output image."""
    part: Layer
    block: Layer
    conv: Layer
    shape: tuple[int, int, int]
    """(C, H, W) of the block's input."""

    @property
    def name(self) -> str:
        """Name of the layer and size, the same in every model."""
        return f"{self.key} from {self.pixels} pixels"


class ShapePass(Pass):
    """A pass that computes nothing and notes each layer with its size, in ``found``."""

    differentiable = True  # as a survey's

    def __init__(self, part: Layer):
        self.part = part
        self.found: list[Convolution] = []

    def begin(self, part: Layer, x: Tensor) -> Activation:
        return Activation(_like(x, part.conv_in.out_channels, *x.shape[2:]))

    def resnet(self, block: Layer, activation: Activation, pad: bool) -> Activation:
        for conv in (block.conv1, block.conv2):
            self._note("conv", conv, block, activation.x, 1)
        return Activation(_like(activation.x, block.conv2.out_channels, *activation.x.shape[2:]))

    def attention(self, layer: Layer, activation: Activation, pad: bool) -> Activation:
        return activation

    def downsample(self, sampler: Layer, activation: Activation) -> Activation:
        height, width = activation.x.shape[2:]
        return Activation(_like(activation.x, sampler.conv.out_channels, height // 2, width // 2))

    def upsample(self, sampler: Layer, activation: Activation) -> Activation:
        self._note("upsample", sampler.conv, sampler, activation.x, 4)
        height, width = activation.x.shape[2:]
        return Activation(_like(activation.x, sampler.conv.out_channels, 2 * height, 2 * width))

    def as_module(self, module: Layer, activation: Activation) -> Activation:
        return cost_trace.output_of_same_shape(module, activation)

    def end(self, part: Layer, activation: Activation) -> Tensor:
        return activation.x

    def _note(self, kind: str, conv: Layer, block: Layer, x: Tensor, larger: int) -> None:
        key = LayerKey(kind, conv.in_channels, conv.out_channels, dtype_name(conv.weight.dtype))
        pixels = larger * x.shape[2] * x.shape[3]
        self.found.append(Convolution(key, pixels, self.part, block, conv, tuple(x.shape[1:])))  # type: ignore[arg-type]


def convolutions_of(part: Layer, x: Tensor) -> list[Convolution]:
    """Return the convolutions of an encoder or decoder for an input like x [N, C, H, W], in the order of the data.

    Those of blocks that run as modules are left out, and so are the first and the last convolution.
    """
    run = ShapePass(part)
    network_walk.run_part(part, x, run)
    return run.found


def input_of(part: Layer, batch: int, height: int, width: int) -> Tensor:
    """Return an input of an encoder or decoder for images of this size, with the memory of one value."""
    if hasattr(part, "up_blocks"):
        factor = 2 ** (len(part.up_blocks) - 1)
        height, width = height // factor, width // factor
    channels = getattr(part.conv_in, "in_channels", 0)  # an adapter has no in_channels, and its part falls back
    weight = next(part.parameters())
    return torch.empty(1, dtype=weight.dtype, device=weight.device).expand(batch, channels, height, width)


def _like(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Return a tensor like x of this size, with the memory of one value."""
    return torch.empty(1, dtype=x.dtype, device=x.device).expand(1, channels, height, width)
