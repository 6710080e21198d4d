"""Blocks without a gradient on a CPU, where no fused kernel runs: torch's own operators, in channels_last.

Memory is reused: SiLU runs in place, the second convolution of a residual block adds into the residual, and nearest 2x
with its convolution is one. At 256² on two cores (AVX512, AMX) page faults of fresh memory were a fifth of a bf16
encode. Frozen weights are kept in oneDNN's blocked layout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.fast import layer_checks
from fastvae.fast.layer_checks import Layer
from fastvae.fast.network_walk import Activation, Pass
from fastvae.fast.packed_weights import PackedWeights, channels_last, takes_onednn

# oneDNN's convolutions fused with an addition, which torch.compile calls too.
ONEDNN: Any = torch.ops.mkldnn


class CpuPass(Pass):
    """One forward pass without a gradient. Every activation owns its memory; none has a pending bias."""

    differentiable = False

    def __init__(self, packed: PackedWeights):
        self.packed = packed

    def begin(self, part: Layer, x: Tensor) -> Activation:
        return Activation(self._convolve(part.conv_in, channels_last(x)))

    def resnet(self, block: Layer, activation: Activation, pad: bool) -> Activation:
        h = self._convolve(block.conv1, _activated(block.norm1, activation.x))
        h = _activated(block.norm2, h)
        shortcut = block.conv_shortcut
        residual = activation.x if shortcut is None else self._convolve(shortcut, activation.x)
        return Activation(self._add_convolved(block.conv2, h, residual))

    def attention(self, layer: Layer, activation: Activation, pad: bool) -> Activation:
        return Activation(channels_last(layer(activation.x)))

    def downsample(self, sampler: Layer, activation: Activation) -> Activation:
        return Activation(self._convolve(sampler.conv, _padded(activation.x)))

    def upsample(self, sampler: Layer, activation: Activation) -> Activation:
        return Activation(F.conv_transpose2d(activation.x, self.packed.upsample(sampler.conv), sampler.conv.bias, 2, 1))

    def as_module(self, module: Layer, activation: Activation) -> Activation:
        # A copy: a hook may keep the module's output, and the next block writes into it.
        return Activation(layer_checks.as_module(module, activation.x).clone(memory_format=torch.channels_last))

    def end(self, part: Layer, activation: Activation) -> Tensor:
        if activation.x.requires_grad:
            return part.conv_out(part.conv_act(part.conv_norm_out(activation.x)))
        return self._convolve(part.conv_out, _activated(part.conv_norm_out, activation.x))

    def _convolve(self, conv: Layer, x: Tensor) -> Tensor:
        weight = self.packed.onednn_weight(conv)
        if not weight.is_mkldnn:
            return F.conv2d(x, weight, conv.bias, conv.stride, conv.padding)
        return ONEDNN._convolution_pointwise(x, weight, _bias(conv), *_geometry(conv), "none", [], None)

    def _add_convolved(self, conv: Layer, x: Tensor, y: Tensor) -> Tensor:
        """Return y + conv(x), in the memory of one of them."""
        if not takes_onednn(conv.weight):
            return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding).add_(y)
        given = x, self.packed.onednn_weight(conv), _bias(conv), *_geometry(conv)
        return ONEDNN._convolution_pointwise_.binary(y, *given, "add", None, None, [], None)


def _activated(norm: Layer, x: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps), inplace=True)


def _padded(x: Tensor) -> Tensor:
    """Return x with a row of zeros below and a column to the right. F.pad would write zeros everywhere first."""
    batch, channels, height, width = x.shape
    size = batch, channels, height + 1, width + 1
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    y[:, :, :height, :width] = x
    y[:, :, height] = 0
    y[:, :, :, width] = 0
    return y


def _bias(conv: Layer) -> Tensor | None:
    # oneDNN reads a bias as contiguous, past its end if it is not. F.conv2d handles that, these operators do not.
    return None if conv.bias is None else conv.bias.contiguous()


def _geometry(conv: Layer) -> tuple[list[int], list[int], list[int], int]:
    return list(conv.padding), list(conv.stride), [1, 1], 1
