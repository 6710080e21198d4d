"""The network by its structure: encoder and decoder as one page, in the order the data meets them.

What goes from block to block is a Flow. How a block is computed is the pass's own matter (inference.py, training.py);
here stands only which block comes when, and that a block which cannot be fused runs as the module that it is.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from fastvae.fast import fallback_reasons as reasons
from fastvae.fast.layer_checks import Layer, Reason


class Activation(NamedTuple):
    """An activation [N, C, H, W] in channels_last, and what is known of it."""

    x: Tensor
    partials: Tensor | None = None
    """The partial statistics of x, where its producer left them."""
    bias: Tensor | None = None
    """[C], of the convolution that made x and not added yet."""
    padded: bool = False
    """Whether a row and a column of zeros follow, as the downsample wants them."""


class Pass(Protocol):
    """How the blocks are computed. Each method takes a Flow and gives one; ``begin`` and ``end`` are its ends."""

    differentiable: bool

    def begin(self, part: Layer, x: Tensor) -> Activation: ...
    def resnet(self, block: Layer, flow: Activation, pad: bool) -> Activation: ...
    def attention(self, layer: Layer, flow: Activation, pad: bool) -> Activation: ...
    def downsample(self, sampler: Layer, flow: Activation) -> Activation: ...
    def upsample(self, sampler: Layer, flow: Activation) -> Activation: ...
    def as_module(self, module: Layer, flow: Activation) -> Activation: ...
    def end(self, part: Layer, flow: Activation) -> Tensor: ...

    def block(self, part: Layer, block: Layer, flow: Activation) -> Activation:
        return through_block(block, flow, self)

    def note(self, module: Layer, reason: Reason | None) -> None:
        """Told of each block that is fused (None) or not; explain listens."""


def run_part(part: Layer, x: Tensor, run: Pass) -> Tensor:
    """The output of an encoder or decoder for its input x [N, C, H, W]."""
    run.note(part, None)
    flow = run.begin(part, x)
    for block in blocks_of(part):
        flow = run.block(part, block, flow)
    run.note(part, None)
    return run.end(part, flow)


def blocks_of(part: Layer) -> list[Layer]:
    """The blocks of an encoder or decoder, in the order of the data."""
    mid = [] if getattr(part, "mid_block", None) is None else [part.mid_block]
    return [*part.down_blocks, *mid] if hasattr(part, "down_blocks") else [*mid, *part.up_blocks]


def through_block(block: Layer, flow: Activation, run: Pass) -> Activation:
    """Residual blocks, attention between them, and one change of size: a down, mid or up block."""
    reason = reasons.why_not_block(block)
    if reason is not None:
        run.note(block, reason)
        return run.as_module(block, flow)
    samplers = [*(getattr(block, "downsamplers", None) or ()), *(getattr(block, "upsamplers", None) or ())]
    layers = _layers(block)
    for place, layer in enumerate(layers):
        is_last = place == len(layers) - 1
        pad = is_last and bool(samplers) and _fused_downsample(block, samplers[0], flow)
        flow = _through_layer(layer, flow, run, pad)
    for sampler in samplers:
        flow = _through_sampler(block, sampler, flow, run)
    return flow


def _layers(block: Layer) -> list[Layer]:
    """Residual blocks and attention layers as they alternate; a mid block has one residual block more."""
    resnets, attentions = list(block.resnets), list(getattr(block, "attentions", None) or ())
    layers = [resnets.pop(0)] if len(resnets) > len(attentions) > 0 else []
    if not attentions:
        return resnets
    # In a mid block attention comes first in each pair, elsewhere last.
    pairs = zip(attentions, resnets, strict=True) if layers else zip(resnets, attentions, strict=True)
    return layers + [layer for pair in pairs for layer in pair if layer is not None]


def _through_layer(layer: Layer, flow: Activation, run: Pass, pad: bool) -> Activation:
    is_attention = hasattr(layer, "to_out")
    reason = reasons.why_not_attention(layer, flow.x) if is_attention else reasons.why_not_resnet(layer, flow.x)
    reason = reason or _gradient(flow, run)
    run.note(layer, reason)
    if reason is not None:
        return run.as_module(layer, flow)
    return run.attention(layer, flow, pad) if is_attention else run.resnet(layer, flow, pad)


def _gradient(flow: Activation, run: Pass) -> Reason | None:
    """Whether a module before this one, or a hook on it, brought in what requires a gradient, as no parameter does."""
    return Reason.GRADIENT if flow.x.requires_grad and not run.differentiable else None


def _fused_downsample(block: Layer, sampler: Layer, flow: Activation) -> bool:
    down = getattr(block, "downsamplers", None)
    return bool(down) and reasons.why_not_downsample(sampler, flow.x) is None


def _through_sampler(block: Layer, sampler: Layer, flow: Activation, run: Pass) -> Activation:
    is_down = bool(getattr(block, "downsamplers", None))
    reason = reasons.why_not_downsample(sampler, flow.x) if is_down else reasons.why_not_upsample(sampler, flow.x)
    reason = reason or _gradient(flow, run)
    run.note(sampler, reason)
    if reason is not None:
        return run.as_module(sampler, flow)
    return run.downsample(sampler, flow) if is_down else run.upsample(sampler, flow)
