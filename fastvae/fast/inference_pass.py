"""The blocks without a gradient: bare convolutions in channels_last, everything between them in the fused kernels.

A convolution's bias is folded into the norm or the residual pass behind it; bias, residual and the next norm's
statistics are one pass; the residual pass before a downsample writes the padding; attention reads one tensor for keys
and values where weights are frozen and that errs no more; nearest 2x and its convolution are one. All of it is exact in
real arithmetic.

In half precision the residual stream is carried times a power of two, ``stream``, and what lies between conv1 and norm2
times ``inner``: GroupNorm does not see the scale of its input, and values up to 65,504 / stream fit (without, the
SDXL VAE overflows: docs/numerics.md). Inputs of products are scaled where they are normalised anyway, and no weight is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from fastvae_kernels.attention import spatial_attention, spatial_attention_shared
from fastvae_kernels.group_norm import group_norm_affine, group_norm_statistics, scale_shift, scale_shift_silu
from fastvae_kernels.pixels import pixels_conv_in
from fastvae_kernels.residual import residual_add
from torch import Tensor

from fastvae.fast import fallback_reasons as reasons
from fastvae.fast import layer_checks as layers
from fastvae.fast.layer_checks import Layer
from fastvae.fast.network_walk import Activation, Pass
from fastvae.fast.packed_weights import PackedWeights, channels_last, is_channels_last, weights_of
from fastvae.latents.pixels import normalized


class Inference(Pass):
    """One forward pass that nobody will differentiate."""

    differentiable = False

    def __init__(
        self,
        derived: PackedWeights,
        *,
        deterministic: bool = False,
        stream: float = 1.0,
        inner: float = 1.0,
        quant_conv: Layer | None = None,
    ):
        self.derived = derived
        self.deterministic = deterministic
        self.stream = stream
        self.inner = inner
        self.quant_conv = quant_conv
        self.laid_out = False

    def begin(self, part: Layer, x: Tensor) -> Activation:
        self.laid_out = is_channels_last(x)
        conv = part.conv_in
        if hasattr(part, "down_blocks") and conv.in_channels <= reasons.MOST_COLOURS and conv.bias is not None:
            return Activation(*pixels_conv_in(x, conv.weight, conv.bias, self.stream))
        if x.dtype == torch.uint8:
            x = normalized(x).to(conv.weight.dtype)
        x = channels_last(x)
        return Activation(self._convolve(conv, x if self.stream == 1.0 else x * self.stream), bias=conv.bias)

    def resnet(self, block: Layer, flow: Activation, pad: bool) -> Activation:
        h = self._normalized(flow, block.norm1, True, self.stream, self.inner)
        h = self._convolve(block.conv1, h)
        h = self._normalized(Activation(h, bias=block.conv1.bias), block.norm2, True, self.inner, self.stream)
        h = self._convolve(block.conv2, h)
        residual, residual_bias = flow.x, flow.bias
        if block.conv_shortcut is not None:
            residual_bias = self.derived.shortcut_bias(block.conv_shortcut, flow.bias)
            residual = self._convolve(block.conv_shortcut, flow.x)
        y, partials = residual_add(h, residual, block.conv2.bias, residual_bias, int(pad), self.stream)
        return Activation(y, partials, padded=pad)

    def attention(self, layer: Layer, flow: Activation, pad: bool) -> Activation:
        batch, channels, height, width = flow.x.shape
        x = self._normalized(flow, layer.group_norm, False, self.stream, self.stream)
        tokens = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        mixed, bias = self._shared(layer, tokens) if self._is_shared(layer) else self._plain(layer, tokens)
        h = mixed.view(batch, height, width, channels).permute(0, 3, 1, 2)
        y, partials = residual_add(h, flow.x, bias, flow.bias, int(pad), self.stream)
        return Activation(y, partials, padded=pad)

    def downsample(self, sampler: Layer, flow: Activation) -> Activation:
        x = flow.x if flow.padded else F.pad(self._whole(flow), (0, 1, 0, 1))
        return Activation(self._convolve(sampler.conv, x), bias=sampler.conv.bias)

    def upsample(self, sampler: Layer, flow: Activation) -> Activation:
        folded = self.derived.upsample(sampler.conv)
        return Activation(self._product(self._whole(flow), folded, None, 2, 1, transposed=True), bias=sampler.conv.bias)

    def as_module(self, module: Layer, flow: Activation) -> Activation:
        y = layers.as_module(module, self._unscaled(flow))
        y = y if self.stream == 1.0 else y * self.stream
        return Activation(channels_last(y))

    def end(self, part: Layer, flow: Activation) -> Tensor:
        if flow.x.requires_grad:
            y = part.conv_out(part.conv_act(part.conv_norm_out(self._unscaled(flow))))
            y = y if self.quant_conv is None else self.quant_conv(y)
            return y if self.laid_out else y.contiguous()
        h = self._normalized(flow, part.conv_norm_out, True, self.stream, 1.0)
        weight, bias = self.derived.output(part.conv_out, self.quant_conv)
        y = self._product(h, weight, None, 1, 1)
        if bias is None:
            return y if self.laid_out else y.contiguous()
        # The bias and the layout of the input in one pass: `view` is what callers do with latents.
        bias = bias.view(-1, 1, 1)
        if torch.compiler.is_compiling():  # one pass by itself
            return y + bias if self.laid_out else (y + bias).contiguous()
        form = torch.channels_last if self.laid_out else torch.contiguous_format
        return torch.add(y, bias, out=torch.empty_like(y, memory_format=form))

    def _normalized(self, flow: Activation, norm: Layer, silu: bool, carried: float, factor: float) -> Tensor:
        """act(GroupNorm(flow / carried)) * factor."""
        partials = group_norm_statistics(flow.x) if flow.partials is None else flow.partials
        affine = group_norm_affine(partials, norm.weight, norm.bias, norm.num_groups, norm.eps, flow.bias, carried)
        return scale_shift_silu(flow.x, *affine, factor) if silu else scale_shift(flow.x, *affine, factor)

    def _whole(self, flow: Activation) -> Tensor:
        """The activation with its bias."""
        return flow.x if flow.bias is None else flow.x + (flow.bias * self.stream).to(flow.x.dtype)[:, None, None]

    def _unscaled(self, flow: Activation) -> Tensor:
        """The activation as eager has it."""
        x = self._whole(flow)
        return x if self.stream == 1.0 else x / self.stream

    def _is_shared(self, layer: Layer) -> bool:
        square = weights_of(layer)[0][0].shape[0] == layer.group_norm.num_channels
        return square and self.derived.takes_the_shared_form(layer)

    def _shared(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor | None]:
        # x is carried times s and so are queries and biases: the scores come out times s², the mixture times s.
        inward, added, outward, bias = self.derived.shared_attention(layer)
        query = self._linear(x, inward, added)
        scale = x.shape[2] ** -0.5 / self.stream**2
        mixed, _ = spatial_attention_shared(query, x, scale)
        return self._linear(mixed, outward.mT, None), bias

    def _plain(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor | None]:
        query, key, value = (self._linear(x, weight.mT, bias) for weight, bias in weights_of(layer))
        scale = query.shape[2] ** -0.5 / self.stream**2
        mixed, _ = spatial_attention(query, key, value, scale)
        out = layer.to_out[0]
        return self._linear(mixed, out.weight.mT, None), out.bias

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x weight + bias * stream, for x [N, S, C] and weight [C, D]."""
        if bias is not None:
            bias = (bias if self.stream == 1.0 else bias * self.stream).to(x.dtype)
        rows = [part.reshape(-1, x.shape[2]) for part in (x.split(1) if self.deterministic else (x,))]
        done = [row @ weight if bias is None else torch.addmm(bias, row, weight) for row in rows]
        return (torch.cat(done) if len(done) > 1 else done[0]).view(*x.shape[:2], weight.shape[1])

    def _convolve(self, conv: Layer, x: Tensor) -> Tensor:
        """The convolution without its bias."""
        return self._product(x, self.derived.convolution(conv), None, conv.stride[0], conv.padding[0])

    def _product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, transposed: bool = False
    ) -> Tensor:
        if not self.deterministic:
            convolve = F.conv_transpose2d if transposed else F.conv2d
            return convolve(x, weight, bias, stride, padding)
        # Image by image: which algorithm cuDNN takes, and with it the order of its sums, hangs on the batch. Flags by
        # the call, since the caller's are not ours to set; allow_tf32 without a name raises where conv's was set alone.
        # "none" is what stands there after allow_tf32 = False, and is no tf32.
        cudnn: Any = torch.backends.cudnn
        flags = cudnn.benchmark, True, cudnn.enabled, cudnn.conv.fp32_precision == "tf32"
        sizes = [stride] * 2, [padding] * 2, [1, 1], transposed, [0, 0], 1
        return torch.cat([torch.ops.aten._convolution(part, weight, bias, *sizes, *flags) for part in x.split(1)])
