"""Blocks with a gradient: differentiable fused ops, whose gradients equal eager's within the derived tolerance.

The biases of a residual block's convolutions are added in the norm or residual pass after them. No weight is folded
into another, so each parameter receives its own gradient. Gradient checkpointing follows the part's own switch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fastvae_kernels.attention import spatial_attention
from fastvae_kernels.group_norm_silu import group_norm, group_norm_silu
from fastvae_kernels.residual import residual_add
from fastvae_kernels.upsample import upsample_conv
from torch import Tensor

from fastvae.fast import layer_checks, network_walk
from fastvae.fast.layer_checks import Layer
from fastvae.fast.network_walk import Activation, Pass
from fastvae.fast.packed_weights import channels_last, weights_of


class TrainingPass(Pass):
    """One forward pass with a gradient. Its activations have no pending bias."""

    differentiable = True

    def begin(self, part: Layer, x: Tensor) -> Activation:
        return Activation(part.conv_in(channels_last(x)))

    def block(self, part: Layer, block: Layer, activation: Activation) -> Activation:
        if not (torch.is_grad_enabled() and getattr(part, "gradient_checkpointing", False)):
            return network_walk.run_block(block, activation, self)

        def again(x: Tensor, partials: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return network_walk.run_block(block, Activation(x, partials), self)[:2]

        return Activation(*part._gradient_checkpointing_func(again, *activation[:2]))

    def resnet(self, block: Layer, activation: Activation, pad: bool) -> Activation:
        h = self._activated(block.norm1, activation.x, activation.partials)
        h = F.conv2d(h, block.conv1.weight, padding=1)
        h = self._activated(block.norm2, h, conv_bias=block.conv1.bias)
        h = F.conv2d(h, block.conv2.weight, padding=1)
        residual, residual_bias = activation.x, None
        if block.conv_shortcut is not None:
            residual, residual_bias = F.conv2d(activation.x, block.conv_shortcut.weight), block.conv_shortcut.bias
        y, partials = residual_add(h, residual, block.conv2.bias, residual_bias, int(pad))
        return Activation(y, partials, padded=pad)

    def attention(self, layer: Layer, activation: Activation, pad: bool) -> Activation:
        batch, channels, height, width = activation.x.shape
        norm, out = layer.group_norm, layer.to_out[0]
        x = group_norm(activation.x, norm.weight, norm.bias, norm.num_groups, norm.eps, activation.partials)
        tokens = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        query, key, value = (F.linear(tokens, *pair) for pair in weights_of(layer))
        mixed, _ = spatial_attention(query, key, value, query.shape[2] ** -0.5)
        h = F.linear(mixed, out.weight).view(batch, height, width, channels).permute(0, 3, 1, 2)
        y, partials = residual_add(h, activation.x, out.bias, None, int(pad))
        return Activation(y, partials, padded=pad)

    def downsample(self, sampler: Layer, activation: Activation) -> Activation:
        return Activation(sampler.conv(activation.x if activation.padded else F.pad(activation.x, (0, 1, 0, 1))))

    def upsample(self, sampler: Layer, activation: Activation) -> Activation:
        return Activation(upsample_conv(activation.x, sampler.conv.weight, sampler.conv.bias))

    def as_module(self, module: Layer, activation: Activation) -> Activation:
        return Activation(layer_checks.as_module(module, activation.x))

    def end(self, part: Layer, activation: Activation) -> Tensor:
        return part.conv_out(self._activated(part.conv_norm_out, activation.x, activation.partials))

    def _activated(
        self, norm: Layer, x: Tensor, partials: Tensor | None = None, conv_bias: Tensor | None = None
    ) -> Tensor:
        return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, partials, conv_bias)
