"""Blocks without a gradient: convolutions without bias in channels_last, everything between them on fused kernels.

A convolution's bias is folded into the norm or residual pass after it. Bias, residual and the next norm's statistics
are one pass. The residual pass before a downsample writes its padding. Where the tables of forms say so, convolutions
of residual blocks take Winograd's form, whose transforms are these passes too. With frozen weights attention reads one
tensor as keys and values, if that is at least as accurate. Nearest 2x and its convolution are one, transposed or, where
the tables say so, of four taps. All of this is exact in real arithmetic.

In fp16 the residual stream is multiplied by a power of two, ``stream_factor``, and activations between conv1 and norm2
by ``inner_factor``: GroupNorm does not depend on the scale of its input, and values up to 65,504 / stream_factor fit
(without it the SDXL VAE overflows: docs/numerics.md). The norms apply the factors; no weight is scaled.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from fastvae_kernels.attention import spatial_attention, spatial_attention_shared
from fastvae_kernels.group_norm import group_norm_affine, group_norm_statistics, scale_shift, scale_shift_silu
from fastvae_kernels.interleave import upsample_interleave
from fastvae_kernels.pixels import pixels_conv_in
from fastvae_kernels.residual import residual_add
from fastvae_kernels.winograd import winograd_conv
from torch import Tensor

from fastvae.fast import fallback_reasons, layer_checks
from fastvae.fast.forms.form import DIRECT_ONLY, FUSED, Form, Forms
from fastvae.fast.layer_checks import Layer
from fastvae.fast.network_walk import Activation, Pass
from fastvae.fast.packed_weights import PackedWeights, channels_last, images_of, is_channels_last, weights_of
from fastvae.latents.pixels import normalized


class InferencePass(Pass):
    """One forward pass without a gradient, on fused kernels."""

    differentiable = False

    def __init__(
        self,
        packed: PackedWeights,
        *,
        deterministic: bool = False,
        stream_factor: float = 1.0,
        inner_factor: float = 1.0,
        quant_conv: Layer | None = None,
        forms: Forms = DIRECT_ONLY,
    ):
        self.packed = packed
        self.deterministic = deterministic
        self.stream_factor = stream_factor
        self.inner_factor = inner_factor
        self.quant_conv = quant_conv
        self.forms = forms
        self.channels_last = False

    def begin(self, part: Layer, x: Tensor) -> Activation:
        self.channels_last = is_channels_last(x)
        conv = part.conv_in
        if hasattr(part, "down_blocks") and conv.in_channels <= fallback_reasons.MAX_COLOURS and conv.bias is not None:
            return Activation(*pixels_conv_in(x, conv.weight, conv.bias, self.stream_factor))
        if x.dtype == torch.uint8:
            x = normalized(x).to(conv.weight.dtype)
        x = channels_last(x)
        x = x if self.stream_factor == 1.0 else x * self.stream_factor
        return Activation(self._convolve(conv, x), bias=conv.bias)

    def resnet(self, block: Layer, activation: Activation, pad: bool) -> Activation:
        inner = self._first(block, activation)
        factors, form = (self.inner_factor, self.stream_factor), self._form(block.conv2, inner.x)
        bias, pad_by = block.conv2.bias, int(pad)
        if form is Form.DIRECT:
            h = self._convolve(block.conv2, self._normalized(inner, block.norm2, True, *factors))
            # After conv2, so that fewer tensors live at once.
            residual, residual_bias = self._shortcut(block, activation)
            y, partials = residual_add(h, residual, bias, residual_bias, pad_by, factors[1])
        else:
            affine = self._affine(inner, block.norm2, factors[0])
            residual, residual_bias = self._shortcut(block, activation)
            added = bias, residual, residual_bias, pad_by
            y, partials = self._winograd(block.conv2, form, inner.x, affine, factors[1], *added)
        return Activation(y, partials, padded=pad)

    def attention(self, layer: Layer, activation: Activation, pad: bool) -> Activation:
        batch, channels, height, width = activation.x.shape
        x = self._normalized(activation, layer.group_norm, False, self.stream_factor, self.stream_factor)
        tokens = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        mixed, bias = self._shared(layer, tokens) if self._is_shared(layer) else self._plain(layer, tokens)
        h = mixed.view(batch, height, width, channels).permute(0, 3, 1, 2)
        y, partials = residual_add(h, activation.x, bias, activation.bias, int(pad), self.stream_factor)
        return Activation(y, partials, padded=pad)

    def downsample(self, sampler: Layer, activation: Activation) -> Activation:
        x = activation.x if activation.padded else F.pad(self._with_bias(activation), (0, 1, 0, 1))
        return Activation(self._convolve(sampler.conv, x), bias=sampler.conv.bias)

    def upsample(self, sampler: Layer, activation: Activation) -> Activation:
        x, conv = self._with_bias(activation), sampler.conv
        if self._form(conv, x, "upsample") is Form.FOUR_TAPS:
            phases = self._product(x, self.packed.four_taps(conv), 1, 1)
            return Activation(*upsample_interleave(phases), bias=conv.bias)
        return Activation(self._product(x, self.packed.upsample(conv), 2, 1, transposed=True), bias=conv.bias)

    def as_module(self, module: Layer, activation: Activation) -> Activation:
        y = layer_checks.as_module(module, self._unscaled(activation))
        y = y if self.stream_factor == 1.0 else y * self.stream_factor
        return Activation(channels_last(y))

    def end(self, part: Layer, activation: Activation) -> Tensor:
        if activation.x.requires_grad:
            y = part.conv_out(part.conv_act(part.conv_norm_out(self._unscaled(activation))))
            y = y if self.quant_conv is None else self.quant_conv(y)
            return y if self.channels_last else y.contiguous()
        h = self._normalized(activation, part.conv_norm_out, True, self.stream_factor, 1.0)
        weight, bias = self.packed.output(part.conv_out, self.quant_conv)
        y = self._product(h, weight, 1, 1)
        if bias is None:
            return y if self.channels_last else y.contiguous()
        # Bias and the input's layout in one pass: callers use `view` on latents.
        bias = bias.view(-1, 1, 1)
        if torch.compiler.is_compiling():  # which fuses it into one pass
            return y + bias if self.channels_last else (y + bias).contiguous()
        form = torch.channels_last if self.channels_last else torch.contiguous_format
        return torch.add(y, bias, out=torch.empty_like(y, memory_format=form))

    def _first(self, block: Layer, activation: Activation) -> Activation:
        """Return what conv1 of a residual block makes of its normalised input, without conv1's bias."""
        factors, form = (self.stream_factor, self.inner_factor), self._form(block.conv1, activation.x)
        if form is Form.DIRECT:
            h = self._normalized(activation, block.norm1, True, *factors)
            return Activation(self._convolve(block.conv1, h), bias=block.conv1.bias)
        affine = self._affine(activation, block.norm1, factors[0])
        h, partials = self._winograd(block.conv1, form, activation.x, affine, factors[1])
        return Activation(h, partials, bias=block.conv1.bias)

    def _shortcut(self, block: Layer, activation: Activation) -> tuple[Tensor, Tensor | None]:
        """Return what a residual block adds to conv2's result, and its bias."""
        if block.conv_shortcut is None:
            return activation.x, activation.bias
        bias = self.packed.shortcut_bias(block.conv_shortcut, activation.bias)
        return self._convolve(block.conv_shortcut, activation.x), bias

    def _form(self, conv: Layer, x: Tensor, kind: str = "conv") -> Form:
        """Return the form of a 3x3 convolution of x; the direct one where no fused kernels have another."""
        if torch.compiler.is_compiling():  # a compiled pass keeps no packed weights: it would transform at each call
            return Form.DIRECT
        form = self.forms.of(conv.weight, x.shape[2] * x.shape[3] * (4 if kind == "upsample" else 1), kind)
        return form if form in FUSED[kind] else Form.DIRECT

    def _winograd(
        self,
        conv: Layer,
        form: Form,
        x: Tensor,
        affine: tuple[Tensor, Tensor],
        factor: float,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        residual_bias: Tensor | None = None,
        pad: int = 0,
    ) -> tuple[Tensor, Tensor]:
        weights = self.packed.winograd(conv, form)
        if not self.deterministic:
            return winograd_conv(x, *affine, *weights, bias, residual, residual_bias, pad, factor)
        # Image by image: the algorithm of the product, and with it the summation order, depends on the batch.
        residuals = residual.split(1) if residual is not None else [None] * max(1, x.shape[0])
        given = zip(images_of(x), *(value.split(1) for value in affine), residuals, strict=True)
        done = [
            winograd_conv(part, scale, shift, *weights, bias, row, residual_bias, pad, factor)
            for part, scale, shift, row in given
        ]
        y, partials = zip(*done, strict=True)
        return torch.cat(y), torch.cat(partials)

    def _affine(self, activation: Activation, norm: Layer, factor_in: float) -> tuple[Tensor, Tensor]:
        """Return scale and shift of GroupNorm(activation / factor_in)."""
        partials = group_norm_statistics(activation.x) if activation.partials is None else activation.partials
        return group_norm_affine(
            partials, norm.weight, norm.bias, norm.num_groups, norm.eps, activation.bias, factor_in
        )

    def _normalized(
        self, activation: Activation, norm: Layer, silu: bool, factor_in: float, factor_out: float
    ) -> Tensor:
        """Return act(GroupNorm(activation / factor_in)) * factor_out, with SiLU or nothing as act."""
        apply = scale_shift_silu if silu else scale_shift
        return apply(activation.x, *self._affine(activation, norm, factor_in), factor_out)

    def _with_bias(self, activation: Activation) -> Tensor:
        """Return the activation with its pending bias added."""
        x = activation.x
        if activation.bias is None:
            return x
        return x + (activation.bias * self.stream_factor).to(x.dtype)[:, None, None]

    def _unscaled(self, activation: Activation) -> Tensor:
        """Return the activation as eager computes it: with its bias, without the factor."""
        x = self._with_bias(activation)
        return x if self.stream_factor == 1.0 else x / self.stream_factor

    def _is_shared(self, layer: Layer) -> bool:
        square = weights_of(layer)[0][0].shape[0] == layer.group_norm.num_channels
        return square and self.packed.uses_shared_attention(layer)

    def _shared(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor | None]:
        # With x, queries and biases times s = stream_factor, the scores are times s² and the result times s.
        inward, added, outward, bias = self.packed.shared_attention(layer)
        query = self._linear(x, inward, added)
        scale = x.shape[2] ** -0.5 / self.stream_factor**2
        mixed, _ = spatial_attention_shared(query, x, scale)
        return self._linear(mixed, outward.mT, None), bias

    def _plain(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor | None]:
        query, key, value = (self._linear(x, weight.mT, bias) for weight, bias in weights_of(layer))
        scale = query.shape[2] ** -0.5 / self.stream_factor**2
        mixed, _ = spatial_attention(query, key, value, scale)
        out = layer.to_out[0]
        return self._linear(mixed, out.weight.mT, None), out.bias

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x weight + bias * stream_factor, for x [N, S, C] and weight [C, D]."""
        if bias is not None:
            bias = (bias if self.stream_factor == 1.0 else bias * self.stream_factor).to(x.dtype)
        rows = [part.reshape(-1, x.shape[2]) for part in (images_of(x) if self.deterministic else (x,))]
        done = [row @ weight if bias is None else torch.addmm(bias, row, weight) for row in rows]
        return (torch.cat(done) if len(done) > 1 else done[0]).view(*x.shape[:2], weight.shape[1])

    def _convolve(self, conv: Layer, x: Tensor) -> Tensor:
        """Return the convolution without its bias."""
        return self._product(x, self.packed.convolution(conv), conv.stride[0], conv.padding[0])

    def _product(self, x: Tensor, weight: Tensor, stride: int, padding: int, transposed: bool = False) -> Tensor:
        if not self.deterministic:
            convolve = F.conv_transpose2d if transposed else F.conv2d
            return convolve(x, weight, None, stride, padding)
        # Image by image: cuDNN's algorithm, and with it the summation order, depends on the batch. The flags go with
        # the call, which leaves the caller's flags alone. Reading cudnn.allow_tf32 raises if only conv's was set;
        # fp32_precision is "none" after allow_tf32 = False, which is no tf32 either.
        cudnn: Any = torch.backends.cudnn
        flags = cudnn.benchmark, True, cudnn.enabled, cudnn.conv.fp32_precision == "tf32"
        sizes = [stride] * 2, [padding] * 2, [1, 1], transposed, [0, 0], 1
        return torch.cat([torch.ops.aten._convolution(part, weight, None, *sizes, *flags) for part in images_of(x)])
