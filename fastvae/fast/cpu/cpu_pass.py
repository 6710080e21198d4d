"""Blocks without a gradient on a CPU: C kernels where they are built, else torch's own operators; in channels_last.

Norms and the convolutions whose form is Winograd's are C (fastvae_kernels.cpu), other convolutions oneDNN's. Memory is
reused: the second norm of a residual block overwrites its input, the second convolution adds into the residual, and
nearest 2x with its convolution is one. At 256² on two cores (AVX512, AMX) page faults of fresh memory were a fifth of a
bf16 encode.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from fastvae_kernels.cpu import library, winograd
from torch import Tensor

from fastvae.fast import layer_checks
from fastvae.fast.cpu.attention import attend
from fastvae.fast.cpu.group_norm import ContiguousGroupNorm, band_norm, group_norm_silu
from fastvae.fast.forms.form import DIRECT_ONLY, ON_CPU, Form, Forms
from fastvae.fast.layer_checks import Layer
from fastvae.fast.network_walk import Activation, Pass
from fastvae.fast.packed_weights import PackedWeights, channels_last, is_small, takes_onednn

# oneDNN's convolutions fused with an addition, which torch.compile calls too.
ONEDNN: Any = torch.ops.mkldnn


class CpuPass(Pass):
    """One forward pass without a gradient. Every activation owns its memory; none has a pending bias."""

    differentiable = False

    def __init__(self, packed: PackedWeights, forms: Forms = DIRECT_ONLY):
        self.packed = packed
        self.forms = forms
        # Memory of what one block leaves to no other, by dtype: a normalised input, a first convolution, a workspace.
        self.inside: dict[tuple[str, torch.dtype], Tensor] = {}

    def begin(self, part: Layer, x: Tensor) -> Activation:
        return Activation(self._convolve(part.conv_in, channels_last(x)))

    def resnet(self, block: Layer, activation: Activation, pad: bool) -> Activation:
        x = activation.x
        h = group_norm_silu(block.norm1, x, into=self._memory("normalized", x, x.shape[1]))
        h = self._convolve(block.conv1, h, "convolved")
        h = group_norm_silu(block.norm2, h, into=h)
        shortcut = block.conv_shortcut
        residual = activation.x if shortcut is None else self._convolve(shortcut, activation.x)
        return Activation(self._add_convolved(block.conv2, h, residual))

    def attention(self, layer: Layer, activation: Activation, pad: bool) -> Activation:
        x = activation.x
        for image in x:
            norm = band_norm(layer.group_norm, x.dtype, *x.shape[2:])
            tokens = image.permute(1, 2, 0).view(-1, x.shape[1])
            norm.add(tokens)
            norm.close()
            attend(layer, tokens, norm)
        return activation

    def downsample(self, sampler: Layer, activation: Activation) -> Activation:
        return Activation(self._convolve(sampler.conv, self._padded(activation.x)))

    def upsample(self, sampler: Layer, activation: Activation) -> Activation:
        form = self._form(sampler.conv, activation.x, "upsample")
        if form is not Form.DIRECT:
            batch, _, height, width = activation.x.shape
            y = _empty(activation.x, batch, sampler.conv.out_channels, 2 * height, 2 * width)
            return Activation(self._winograd(sampler.conv, activation.x, form, y))
        return Activation(F.conv_transpose2d(activation.x, self.packed.upsample(sampler.conv), sampler.conv.bias, 2, 1))

    def as_module(self, module: Layer, activation: Activation) -> Activation:
        # A copy: a hook may keep the module's output, and the next block writes into it.
        with ContiguousGroupNorm():
            y = layer_checks.as_module(module, activation.x)
        return Activation(y.clone(memory_format=torch.channels_last))

    def end(self, part: Layer, activation: Activation) -> Tensor:
        if activation.x.requires_grad:
            with ContiguousGroupNorm():
                return part.conv_out(part.conv_act(part.conv_norm_out(activation.x)))
        return self._convolve(part.conv_out, group_norm_silu(part.conv_norm_out, activation.x, into=activation.x))

    def _padded(self, x: Tensor) -> Tensor:
        """Return x with a row of zeros below and a column to the right. F.pad would write zeros everywhere first."""
        batch, channels, height, width = x.shape
        y = self._memory("normalized", x.new_empty(batch, 0, height + 1, width + 1), channels)
        y[:, :, :height, :width] = x
        y[:, :, height] = 0
        y[:, :, :, width] = 0
        return y

    def _memory(self, name: str, x: Tensor, channels: int) -> Tensor:
        """Return memory [N, channels, H, W] in channels_last for what the next block overwrites."""
        batch, _, height, width = x.shape
        size = batch * height * width * channels
        return self._values(name, x.dtype, size)[:size].view(batch, height, width, channels).permute(0, 3, 1, 2)

    def _values(self, name: str, dtype: torch.dtype, size: int) -> Tensor:
        """Return memory for at least so many values, which the next call of this name gives again."""
        place = name, dtype
        if place not in self.inside or self.inside[place].numel() < size:
            self.inside.pop(place, None)  # its memory first
            self.inside[place] = library.empty(size, dtype)
        return self.inside[place]

    def _form(self, conv: Layer, x: Tensor, kind: str = "conv") -> Form:
        pixels = x.shape[2] * x.shape[3] * (4 if kind == "upsample" else 1)
        return Form.DIRECT if x.shape[0] == 0 else form_on_cpu(self.forms, conv, pixels, kind)

    def _winograd(self, conv: Layer, x: Tensor, form: Form, y: Tensor, residual: Tensor | None = None) -> Tensor:
        weight = self.packed.winograd_on_cpu(conv, form, lambda size: self._values("weight", torch.float32, size))
        size = winograd.workspace_size(x.shape[1], y.shape, form)
        workspace = self._values("workspace", torch.float32, size)
        return winograd.convolve(x, weight, conv.bias, form, y, residual, workspace=workspace)

    def _convolve(self, conv: Layer, x: Tensor, name: str = "") -> Tensor:
        """Return conv(x), in the memory of this name where the form can write there."""
        form = self._form(conv, x)
        if form is not Form.DIRECT:
            size = x.shape[0], conv.out_channels, *x.shape[2:]
            y = self._memory(name, x, conv.out_channels) if name else _empty(x, *size)
            return self._winograd(conv, x, form, y)
        weight = self.packed.onednn_weight(conv, x.shape)
        if not takes_onednn(conv.weight) or is_small(conv, x.shape):
            y = F.conv2d(x, weight, conv.bias, conv.stride, conv.padding)
        else:
            y = ONEDNN._convolution_pointwise(x, weight, _bias(conv), *_geometry(conv), "none", [], None)
        return channels_last(y)  # images of one colour have both layouts, and torch takes the other one

    def _add_convolved(self, conv: Layer, x: Tensor, y: Tensor) -> Tensor:
        """Return y + conv(x), in the memory of one of them."""
        form = self._form(conv, x)
        if form is not Form.DIRECT:
            return self._winograd(conv, x, form, y, residual=y)
        if not takes_onednn(conv.weight):
            return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding).add_(y)
        given = x, self.packed.onednn_weight(conv, x.shape), _bias(conv), *_geometry(conv)
        return ONEDNN._convolution_pointwise_.binary(y, *given, "add", None, None, [], None)


def form_on_cpu(forms: Forms, conv: Layer, pixels: int, kind: str = "conv") -> Form:
    """Return the form of a convolution with results of so many pixels; the direct one where no C kernel computes it."""
    if conv.kernel_size != (3, 3) or conv.stride != (1, 1) or not winograd.takes(conv.weight):
        return Form.DIRECT
    form = forms.of(conv.weight, pixels, kind)
    return form if form in ON_CPU[kind] else Form.DIRECT


def _empty(x: Tensor, *size: int) -> Tensor:
    """Return memory of this size in channels_last, for values of x's dtype. Defaults of torch do not matter."""
    batch, channels, height, width = size
    return library.empty(math.prod(size), x.dtype).view(batch, height, width, channels).permute(0, 3, 1, 2)


def _bias(conv: Layer) -> Tensor | None:
    # oneDNN reads a bias as contiguous, past its end if it is not. F.conv2d handles that, these operators do not.
    return None if conv.bias is None else conv.bias.contiguous()


def _geometry(conv: Layer) -> tuple[list[int], list[int], list[int], int]:
    return list(conv.padding), list(conv.stride), [1, 1], 1
