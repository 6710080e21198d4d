"""The blocks without a gradient where no fused kernel runs, as on a CPU: torch's own operators, in channels_last.

Nothing is written that need not be: SiLU works in its input's memory, a residual block's second convolution adds into
the residual's, and nearest 2x with its convolution is one. At 256² on two cores (AVX512, AMX) fresh memory alone, page
by page, was a fifth of a bf16 encode. Frozen weights are kept in the blocked layout that oneDNN multiplies by.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.fast import layer_checks as layers
from fastvae.fast.layer_checks import Layer
from fastvae.fast.network_walk import Activation, Pass
from fastvae.fast.packed_weights import PackedWeights, channels_last, takes_onednn

# oneDNN's convolutions with something behind them, as torch.compile calls them too.
ONEDNN: Any = torch.ops.mkldnn


class InPlace(Pass):
    """One forward pass that nobody will differentiate. Every flow owns its memory; none has a bias."""

    differentiable = False

    def __init__(self, derived: PackedWeights):
        self.derived = derived

    def begin(self, part: Layer, x: Tensor) -> Activation:
        return Activation(self._convolve(part.conv_in, channels_last(x)))

    def resnet(self, block: Layer, flow: Activation, pad: bool) -> Activation:
        h = self._convolve(block.conv1, _activated(block.norm1, flow.x))
        h = _activated(block.norm2, h)
        shortcut = block.conv_shortcut
        residual = flow.x if shortcut is None else self._convolve(shortcut, flow.x)
        return Activation(self._add_convolved(block.conv2, h, residual))

    def attention(self, layer: Layer, flow: Activation, pad: bool) -> Activation:
        return Activation(channels_last(layer(flow.x)))

    def downsample(self, sampler: Layer, flow: Activation) -> Activation:
        return Activation(self._convolve(sampler.conv, _padded(flow.x)))

    def upsample(self, sampler: Layer, flow: Activation) -> Activation:
        return Activation(F.conv_transpose2d(flow.x, self.derived.upsample(sampler.conv), sampler.conv.bias, 2, 1))

    def as_module(self, module: Layer, flow: Activation) -> Activation:
        # A copy: whoever listens may keep what the module gave, and the next block writes into it.
        return Activation(layers.as_module(module, flow.x).clone(memory_format=torch.channels_last))

    def end(self, part: Layer, flow: Activation) -> Tensor:
        if flow.x.requires_grad:
            return part.conv_out(part.conv_act(part.conv_norm_out(flow.x)))
        return self._convolve(part.conv_out, _activated(part.conv_norm_out, flow.x))

    def _convolve(self, conv: Layer, x: Tensor) -> Tensor:
        weight = self.derived.onednn_weight(conv)
        if not weight.is_mkldnn:
            return F.conv2d(x, weight, conv.bias, conv.stride, conv.padding)
        return ONEDNN._convolution_pointwise(x, weight, _bias(conv), *_geometry(conv), "none", [], None)

    def _add_convolved(self, conv: Layer, x: Tensor, y: Tensor) -> Tensor:
        """y + conv(x), in the memory of either."""
        if not takes_onednn(conv.weight):
            return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding).add_(y)
        given = x, self.derived.onednn_weight(conv), _bias(conv), *_geometry(conv)
        return ONEDNN._convolution_pointwise_.binary(y, *given, "add", None, None, [], None)


def _activated(norm: Layer, x: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps), inplace=True)


def _padded(x: Tensor) -> Tensor:
    """x with a row and a column of zeros at its far ends. F.pad fills the whole with zeros first."""
    batch, channels, height, width = x.shape
    size = batch, channels, height + 1, width + 1
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    y[:, :, :height, :width] = x
    y[:, :, height] = 0
    y[:, :, :, width] = 0
    return y


def _bias(conv: Layer) -> Tensor | None:
    # oneDNN reads it as if it lay in one piece, past its end where it does not: F.conv2d sees to that, these do not.
    return None if conv.bias is None else conv.bias.contiguous()


def _geometry(conv: Layer) -> tuple[list[int], list[int], list[int], int]:
    return list(conv.padding), list(conv.stride), [1, 1], 1
