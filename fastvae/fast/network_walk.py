"""The order of the blocks of encoder and decoder.

An Activation goes from block to block. A pass computes the blocks (inference_pass, training_pass, cpu/cpu_pass). This
file calls them in order, and runs a block that cannot be fused as a module.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from fastvae.fast import fallback_reasons
from fastvae.fast.fallback_reasons import Reason
from fastvae.fast.layer_checks import Layer


class Activation(NamedTuple):
    """An activation [N, C, H, W] in channels_last, with what its producer computed ahead or left to the next block."""

    x: Tensor
    partials: Tensor | None = None
    """Partial statistics of x, if its producer computed them."""
    bias: Tensor | None = None
    """Bias [C] of the convolution that made x, not added yet."""
    padded: bool = False
    """True if x ends with the row and the column of zeros that a downsample needs."""


class Pass(Protocol):
    """Computation of the blocks of an encoder or decoder, from ``begin`` to ``end``."""

    differentiable: bool
    sure: bool = False
    """True if a survey found that every block is fused: no block is asked again."""

    def begin(self, part: Layer, x: Tensor) -> Activation:
        """Return the activation of x [N, C, H, W] behind conv_in."""
        ...

    def resnet(self, block: Layer, activation: Activation, pad: bool) -> Activation:
        """Return the activation behind a residual block. pad: a downsample follows, which needs padding."""
        ...

    def attention(self, layer: Layer, activation: Activation, pad: bool) -> Activation:
        """Return the activation behind an attention layer and its residual. pad: as of ``resnet``."""
        ...

    def downsample(self, sampler: Layer, activation: Activation) -> Activation:
        """Return the activation [N, C, H // 2, W // 2] behind a convolution of stride 2."""
        ...

    def upsample(self, sampler: Layer, activation: Activation) -> Activation:
        """Return the activation [N, C, 2H, 2W] behind nearest 2x and its convolution."""
        ...

    def as_module(self, module: Layer, activation: Activation) -> Activation:
        """Return the activation behind a block or layer that is called as torch does, with its hooks."""
        ...

    def end(self, part: Layer, activation: Activation) -> Tensor:
        """Return the output of conv_out for the activation behind the last block."""
        ...

    def block(self, part: Layer, block: Layer, activation: Activation) -> Activation:
        """Return the activation behind a down, mid or up block."""
        return run_block(block, activation, self)

    def note(self, module: Layer, reason: Reason | None) -> None:
        """Receive each block with the reason why it is not fused, or None; explain records them."""


def run_part(part: Layer, x: Tensor, run: Pass) -> Tensor:
    """Return the output of an encoder or decoder for its input x [N, C, H, W]."""
    run.note(part, None)
    activation = run.begin(part, x)
    for block in blocks_of(part):
        activation = run.block(part, block, activation)
    run.note(part, None)
    return run.end(part, activation)


def blocks_of(part: Layer) -> list[Layer]:
    """Return the blocks of an encoder or decoder, in the order of the data."""
    mid = [] if getattr(part, "mid_block", None) is None else [part.mid_block]
    return [*part.down_blocks, *mid] if hasattr(part, "down_blocks") else [*mid, *part.up_blocks]


def run_block(block: Layer, activation: Activation, run: Pass) -> Activation:
    """Run a down, mid or up block: residual blocks, attention between them, and at most one change of size."""
    reason = None if run.sure else fallback_reasons.why_not_block(block)
    if reason is not None:
        run.note(block, reason)
        return run.as_module(block, activation)
    samplers = [*(getattr(block, "downsamplers", None) or ()), *(getattr(block, "upsamplers", None) or ())]
    layers = _layers(block)
    for place, layer in enumerate(layers):
        is_last = place == len(layers) - 1
        pad = is_last and bool(samplers) and _fused_downsample(block, samplers[0], activation, run)
        activation = _run_layer(layer, activation, run, pad)
    for sampler in samplers:
        activation = _run_sampler(block, sampler, activation, run)
    return activation


def _layers(block: Layer) -> list[Layer]:
    """Return residual blocks and attention layers in order; a mid block has one more residual block."""
    resnets, attentions = list(block.resnets), list(getattr(block, "attentions", None) or ())
    layers = [resnets.pop(0)] if len(resnets) > len(attentions) > 0 else []
    if not attentions:
        return resnets
    # In a mid block attention comes first in each pair, elsewhere last.
    pairs = zip(attentions, resnets, strict=True) if layers else zip(resnets, attentions, strict=True)
    return layers + [layer for pair in pairs for layer in pair if layer is not None]


def _run_layer(layer: Layer, activation: Activation, run: Pass, pad: bool) -> Activation:
    is_attention = hasattr(layer, "to_out")
    why_not = fallback_reasons.why_not_attention if is_attention else fallback_reasons.why_not_resnet
    reason = None if run.sure else why_not(layer, activation.x) or _why_not_gradient(activation, run)
    run.note(layer, reason)
    if reason is not None:
        return run.as_module(layer, activation)
    return run.attention(layer, activation, pad) if is_attention else run.resnet(layer, activation, pad)


def _why_not_gradient(activation: Activation, run: Pass) -> Reason | None:
    """Return GRADIENT if an earlier module or hook brought in a gradient that this pass cannot compute."""
    return Reason.GRADIENT if activation.x.requires_grad and not run.differentiable else None


def _fused_downsample(block: Layer, sampler: Layer, activation: Activation, run: Pass) -> bool:
    if not getattr(block, "downsamplers", None):
        return False
    return run.sure or fallback_reasons.why_not_downsample(sampler, activation.x) is None


def _run_sampler(block: Layer, sampler: Layer, activation: Activation, run: Pass) -> Activation:
    is_down = bool(getattr(block, "downsamplers", None))
    why_not = fallback_reasons.why_not_downsample if is_down else fallback_reasons.why_not_upsample
    reason = None if run.sure else why_not(sampler, activation.x) or _why_not_gradient(activation, run)
    run.note(sampler, reason)
    if reason is not None:
        return run.as_module(sampler, activation)
    return run.downsample(sampler, activation) if is_down else run.upsample(sampler, activation)
