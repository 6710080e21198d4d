"""The steps of an encoder or decoder with their sizes, found by the walk of the other passes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.fast import network_walk
from fastvae.fast.fallback_reasons import Reason
from fastvae.fast.layer_checks import Layer
from fastvae.fast.network_walk import Activation, Pass


class Size(NamedTuple):
    """Size of an activation of one image."""

    height: int
    width: int
    channels: int

    @property
    def values(self) -> int:
        return self.height * self.width * self.channels

    @property
    def pixels(self) -> int:
        return self.height * self.width


class Kind(StrEnum):
    """Kinds of steps."""

    FIRST = "conv_in"
    RESNET = "residual block"
    ATTENTION = "attention"
    DOWNSAMPLE = "downsample"
    UPSAMPLE = "upsample"
    LAST = "conv_norm_out and conv_out"


@dataclass(frozen=True)
class Step:
    """A block or layer with the sizes of its input and its output."""

    kind: Kind
    layer: Layer
    given: Size
    made: Size

    @property
    def norm(self) -> Layer | None:
        """The GroupNorm that reads the step's input, if there is one."""
        names = {Kind.RESNET: "norm1", Kind.ATTENTION: "group_norm", Kind.LAST: "conv_norm_out"}
        return getattr(self.layer, names[self.kind]) if self.kind in names else None


class StepsPass(Pass):
    """A pass that computes nothing and collects ``steps``. Raises ValueError for a block that runs as a module."""

    differentiable = True  # as a survey's

    def __init__(self, part: Layer, name: str):
        self.part, self.name = part, name
        self.steps: list[Step] = []
        self.reasons: dict[Layer, Reason] = {}

    def note(self, module: Layer, reason: Reason | None) -> None:
        if reason is not None:
            self.reasons[module] = reason

    def begin(self, part: Layer, x: Tensor) -> Activation:
        return self._add(Kind.FIRST, part, Activation(x), part.conv_in.out_channels, *x.shape[2:])

    def resnet(self, block: Layer, activation: Activation, pad: bool) -> Activation:
        return self._add(Kind.RESNET, block, activation, block.conv2.out_channels, *activation.x.shape[2:])

    def attention(self, layer: Layer, activation: Activation, pad: bool) -> Activation:
        return self._add(Kind.ATTENTION, layer, activation, *activation.x.shape[1:])

    def downsample(self, sampler: Layer, activation: Activation) -> Activation:
        height, width = activation.x.shape[2:]
        return self._add(Kind.DOWNSAMPLE, sampler, activation, sampler.conv.out_channels, height // 2, width // 2)

    def upsample(self, sampler: Layer, activation: Activation) -> Activation:
        height, width = activation.x.shape[2:]
        return self._add(Kind.UPSAMPLE, sampler, activation, sampler.conv.out_channels, 2 * height, 2 * width)

    def as_module(self, module: Layer, activation: Activation) -> Activation:
        inside = next(name for name, candidate in self.part.named_modules() if candidate is module)
        raise ValueError(
            f"exact tiling cannot run {self.name}.{inside} in bands: {self.reasons[module]}; remove it, or call "
            "disable_tiling"
        )

    def end(self, part: Layer, activation: Activation) -> Tensor:
        self._add(Kind.LAST, part, activation, part.conv_out.out_channels, *activation.x.shape[2:])
        return activation.x

    def _add(
        self, kind: Kind, layer: Layer, activation: Activation, channels: int, height: int, width: int
    ) -> Activation:
        x = activation.x
        self.steps.append(Step(kind, layer, Size(x.shape[2], x.shape[3], x.shape[1]), Size(height, width, channels)))
        return Activation(torch.empty(1, dtype=x.dtype, device=x.device).expand(1, channels, height, width))


def steps_of(part: Layer, name: str, x: Tensor) -> list[Step]:
    """Return the steps of an encoder or decoder, called ``name``, for images like those of x [N, C, H, W].

    Raises ValueError for a block that runs as a module, and for an image that the part halves to nothing.
    """
    found = StepsPass(part, name)
    network_walk.run_part(part, x, found)
    if found.steps[-1].made.values == 0:
        raise ValueError(
            f"the {name}'s input must have at least one row and column left in each block, got {tuple(x.shape)}"
        )
    return found.steps
