"""The blocks with a gradient: the differentiable fused ops, which equal eager's gradients within the derived tolerance.

Biases stay with their convolutions where a gradient of theirs is cheap (cuDNN's), and weights are as the layers hold
them: nothing is folded that an optimiser would have to see. Gradient checkpointing follows the part's own switch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fastvae_kernels.attention import spatial_attention
from fastvae_kernels.group_norm_silu import group_norm, group_norm_silu
from fastvae_kernels.residual import residual_add
from fastvae_kernels.upsample import upsample_conv
from torch import Tensor

from fastvae.fast import layer_checks as layers
from fastvae.fast import network_walk as walk
from fastvae.fast.layer_checks import Layer
from fastvae.fast.network_walk import Activation, Pass
from fastvae.fast.packed_weights import channels_last, weights_of


class Training(Pass):
    """One forward pass through which a gradient will go. Its flows carry no pending bias."""

    differentiable = True

    def begin(self, part: Layer, x: Tensor) -> Activation:
        return Activation(part.conv_in(channels_last(x)))

    def block(self, part: Layer, block: Layer, flow: Activation) -> Activation:
        if not (torch.is_grad_enabled() and getattr(part, "gradient_checkpointing", False)):
            return walk.through_block(block, flow, self)

        def again(x: Tensor, partials: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return walk.through_block(block, Activation(x, partials), self)[:2]

        return Activation(*part._gradient_checkpointing_func(again, *flow[:2]))

    def resnet(self, block: Layer, flow: Activation, pad: bool) -> Activation:
        h = block.conv1(self._activated(block.norm1, flow.x, flow.partials))
        h = F.conv2d(self._activated(block.norm2, h), block.conv2.weight, padding=1)
        residual, residual_bias = flow.x, None
        if block.conv_shortcut is not None:
            residual, residual_bias = F.conv2d(flow.x, block.conv_shortcut.weight), block.conv_shortcut.bias
        y, partials = residual_add(h, residual, block.conv2.bias, residual_bias, int(pad))
        return Activation(y, partials, padded=pad)

    def attention(self, layer: Layer, flow: Activation, pad: bool) -> Activation:
        batch, channels, height, width = flow.x.shape
        norm, out = layer.group_norm, layer.to_out[0]
        x = group_norm(flow.x, norm.weight, norm.bias, norm.num_groups, norm.eps, flow.partials)
        tokens = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        query, key, value = (F.linear(tokens, *pair) for pair in weights_of(layer))
        mixed, _ = spatial_attention(query, key, value, query.shape[2] ** -0.5)
        h = F.linear(mixed, out.weight).view(batch, height, width, channels).permute(0, 3, 1, 2)
        y, partials = residual_add(h, flow.x, out.bias, None, int(pad))
        return Activation(y, partials, padded=pad)

    def downsample(self, sampler: Layer, flow: Activation) -> Activation:
        return Activation(sampler.conv(flow.x if flow.padded else F.pad(flow.x, (0, 1, 0, 1))))

    def upsample(self, sampler: Layer, flow: Activation) -> Activation:
        return Activation(upsample_conv(flow.x, sampler.conv.weight, sampler.conv.bias))

    def as_module(self, module: Layer, flow: Activation) -> Activation:
        return Activation(layers.as_module(module, flow.x))

    def end(self, part: Layer, flow: Activation) -> Tensor:
        return part.conv_out(self._activated(part.conv_norm_out, flow.x, flow.partials))

    def _activated(self, norm: Layer, x: Tensor, partials: Tensor | None = None) -> Tensor:
        return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, partials)
