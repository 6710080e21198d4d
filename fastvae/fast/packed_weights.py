"""Tensors computed from weights alone: copies in another layout and small products. Kept only for frozen weights.

A write through ``.data`` cannot be detected, so without ``freeze`` nothing outlives a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastvae_kernels.attention import reference
from fastvae_kernels.cpu import winograd
from fastvae_kernels.shared.winograd_matrices import FORMS
from fastvae_kernels.upsample import fold_upsample_weights, four_tap_weights
from fastvae_kernels.winograd import transform_weights
from torch import Tensor, nn

from fastvae.fast import fallback_reasons
from fastvae.fast.forms.form import Form
from fastvae.fast.layer_checks import Layer, assume_constant_result, is_fake

ALIGNMENT = 64  # bytes: torch's on a CPU
# Of one image of so many values in fp32 torch computes the convolution itself (ConvParams::use_mkldnn).
FEW_VALUES = 20480


class PackedWeights:
    """Weights in the form that the fast path reads: computed at each call, or once if ``frozen``."""

    def __init__(self, frozen: bool = False):
        self.frozen = frozen
        self.is_of_a_trace = False
        # Keyed by dtype and device too, which SDXL's pipelines change within one call.
        self.kept: dict[tuple[Layer, str, torch.dtype, torch.device], Any] = {}
        self.shared: dict[tuple[Layer, torch.dtype], bool] = {}

    def clear(self) -> None:
        """Drop everything: the weights have changed."""
        self.kept.clear()
        self.shared.clear()

    def for_trace(self) -> PackedWeights:
        """Return an empty one for a trace, with the same decisions on shared attention."""
        packed = PackedWeights(self.frozen)
        packed.is_of_a_trace = True
        packed.shared.update(self.shared)
        return packed

    def bytes(self) -> int:
        """Return the bytes of the kept copies."""
        return sum(_bytes_of(entry) for entry in list(self.kept.values()))  # another thread may be packing

    def _get(self, module: Layer, name: str, make: Callable[[], Any]) -> Any:
        # torch.compile would guard a kept copy, and compile again when the copy appears.
        if not self.frozen or torch.compiler.is_compiling():
            return make()
        weight = next(module.parameters())
        key = (module, name, weight.dtype, weight.device)
        kept = self.kept.get(key)  # one look-up: another thread may clear the dictionary
        if kept is None:
            with torch.no_grad():
                kept = make()
            # Under a FakeTensorMode of the caller it has no values, so later calls must not find it.
            if self.is_of_a_trace or not any(map(is_fake, kept if isinstance(kept, tuple) else (kept,))):
                self.kept[key] = kept
        return kept

    def convolution(self, conv: Layer) -> Tensor:
        """Return the weight in channels_last, for cuDNN; the weight itself if it has that layout."""
        if conv.weight.is_contiguous(memory_format=torch.channels_last):
            return conv.weight
        return self._get(conv, "weight", lambda: channels_last(conv.weight))

    def onednn_weight(self, conv: Layer, shape: torch.Size) -> Tensor:
        """Return the weight in oneDNN's blocked layout for inputs of ``shape``; the weight itself unless it is frozen.

        oneDNN chooses the layout by the batch (512 channels at 32², batch 4: half the speed in the layout of batch 1),
        so the copy of another batch is replaced. One small image in fp32 keeps the weight, and with it torch's own
        convolution: oneDNN's errs three times as much there.
        """
        if not self.frozen or is_small(conv, shape) or not takes_onednn(conv.weight):
            return conv.weight
        name = f"blocked for a batch of {shape[0]}"

        def reordered() -> Tensor:
            for key in [key for key in list(self.kept) if key[0] is conv and key[1].startswith("blocked")]:
                self.kept.pop(key, None)
            geometry = conv.padding, conv.stride, conv.dilation, conv.groups, list(shape)
            return torch.ops.mkldnn._reorder_convolution_weight(conv.weight, *geometry)

        return self._get(conv, name, reordered)

    def winograd_on_cpu(self, conv: Layer, form: str, memory: Callable[[int], Tensor]) -> Tensor:
        """Return the weight transformed for a Winograd form, fp32 [planes, O / 16, C, 16]: 1.8 or 4 times its values.

        memory: gives memory for so many values, which the next layer's may overwrite; frozen weights have their own.
        """
        if not self.frozen:
            return winograd.pack(conv.weight, form, memory(winograd.packed_size(conv.weight, form)))
        return self._get(conv, f"{form} on a CPU", lambda: winograd.pack(conv.weight, form))

    def upsample(self, conv: Layer) -> Tensor:
        """Return the 4x4 weights of nearest 2x and this convolution as one (fastvae_kernels.upsample)."""

        def fold() -> Tensor:
            return channels_last(fold_upsample_weights(conv.weight))

        return self._get(conv, "folded", fold)

    def four_taps(self, conv: Layer) -> Tensor:
        """Return the 2x2 weights of nearest 2x and this convolution as four phases (fastvae_kernels.upsample)."""
        return self._get(conv, Form.FOUR_TAPS, lambda: channels_last(four_tap_weights(conv.weight)))

    def winograd(self, conv: Layer, form: Form) -> tuple[Tensor, Tensor]:
        """Return the transformed weights of a 3x3 convolution and their gain (fastvae_kernels.winograd)."""
        return self._get(conv, form, lambda: transform_weights(conv.weight, FORMS[form]))

    def shortcut_bias(self, conv: Layer, bias: Tensor | None) -> Tensor | None:
        """Return W bias + b, fp32 [D]: the bias of a 1x1 convolution whose input lacks ``bias`` [C]."""
        if bias is None:
            return conv.bias

        def fold() -> Tensor:
            added = _wide(conv.weight).flatten(1) @ _wide(bias)
            return added if conv.bias is None else added + _wide(conv.bias)

        return self._get(conv, "bias", fold)

    def output(self, conv: Layer, quant_conv: Layer | None) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of conv_out, with quant_conv folded in if there is one."""
        if quant_conv is None:
            return self.convolution(conv), conv.bias

        def fold() -> tuple[Tensor, Tensor]:
            mix = _wide(quant_conv.weight).flatten(1)
            weight = (mix @ _wide(conv.weight).flatten(1)).view(mix.shape[0], *conv.weight.shape[1:])
            bias = _wide(conv.bias) if conv.bias is not None else torch.zeros_like(mix[0])
            bias = mix @ bias
            if quant_conv.bias is not None:
                bias = bias + _wide(quant_conv.bias)
            dtype = conv.weight.dtype
            return channels_last(weight.to(dtype)), bias.to(dtype)

        return self._get(conv, "with quant_conv", fold)

    def shared_attention(self, attention: Layer) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Return (M, c, W, b) of the shared form softmax((x M + c) x^T) x W^T + b of q, k, v and to_out.

        A constant along a row cancels in the softmax, so M = Wq^T Wk and c = bq Wk; after it W = Wo Wv and
        b = Wo bv + bo. Folded in fp32 and rounded once; b stays fp32.
        """

        def fold() -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
            (query, query_bias), (key, _), (value, value_bias) = weights_of(attention)
            out = attention.to_out[0]
            inward = _wide(query).mT @ _wide(key)
            added = None if query_bias is None else _wide(query_bias) @ _wide(key)
            outward = _wide(out.weight) @ _wide(value)
            bias = None if out.bias is None else _wide(out.bias)
            if value_bias is not None:
                through = _wide(out.weight) @ _wide(value_bias)
                bias = through if bias is None else bias + through
            dtype = query.dtype
            return inward.to(dtype), None if added is None else added.to(dtype), outward.to(dtype), bias

        return self._get(attention, "shared", fold)

    def uses_shared_attention(self, attention: Layer) -> bool:
        """Return True if the shared form is at least as accurate: decided once for frozen weights, until ``clear``.

        Always False for weights that may change: after a change its error has no bound (W_q^T W_k overflows where W_q
        and W_k do not), and deciding costs more time than the shared form saves.
        """
        return self.frozen and _decide_shared_form(self, attention)


def weights_of(attention: Layer) -> list[tuple[Tensor, Tensor | None]]:
    """Return [(weight, bias)] of query, key and value."""
    layers = list(fallback_reasons.projections_of(attention))
    if len(layers) == 3:
        return [(layer.weight, layer.bias) for layer in layers]
    biases = (None,) * 3 if layers[0].bias is None else layers[0].bias.chunk(3)
    return list(zip(layers[0].weight.chunk(3), biases, strict=True))


# torch.compile decides it once too, on the real weights, while it traces.
@assume_constant_result
def _decide_shared_form(packed: PackedWeights, attention: Layer) -> bool:
    weight = attention.to_out[0].weight
    decided = packed.shared.get((attention, weight.dtype))  # one look-up: another thread may clear the dictionary
    if decided is None:
        if is_fake(weight):  # no values to decide on: trace the shared form
            return True
        decided = packed.shared[attention, weight.dtype] = shared_is_as_accurate(attention, packed)
    return decided


@torch.no_grad()
def shared_is_as_accurate(attention: Layer, packed: PackedWeights, tokens: int = 1024) -> bool:
    """Return True if the shared form's rms error against float64 is at most the plain form's, in the weights' dtype.

    Measured on seeded normal tokens with the affine of the layer's GroupNorm, the layer's real input distribution.
    """
    norm, dtype = attention.group_norm, attention.to_out[0].weight.dtype
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, norm.num_channels, generator=generator, dtype=torch.float32, device="cpu")
    x = (x.to(norm.weight.device) * norm.weight.float() + norm.bias.float()).to(dtype)

    scale = weights_of(attention)[0][0].shape[0] ** -0.5

    def plain(kind: torch.dtype) -> Tensor:
        given = [(w.to(kind), None if b is None else b.to(kind)) for w, b in weights_of(attention)]
        query, key, value = (nn.functional.linear(x.to(kind), *pair)[None] for pair in given)
        out = attention.to_out[0]
        mixed = reference(query, key, value, scale)[0]
        return nn.functional.linear(mixed, out.weight.to(kind), None if out.bias is None else out.bias.to(kind))

    def shared() -> Tensor:
        inward, added, outward, bias = packed.shared_attention(attention)
        query = x @ inward if added is None else torch.addmm(added, x, inward)
        out = reference(query[None], x[None], x[None], scale)[0] @ outward.mT
        return out if bias is None else out + bias.to(dtype)

    truth = plain(torch.float64)
    errors = [(values.double() - truth).square().mean().sqrt().item() for values in (shared(), plain(dtype))]
    return errors[0] <= errors[1]  # False if the shared form is not finite


def is_small(conv: Layer, shape: torch.Size) -> bool:
    """Return True for one image of so few values in fp32 that torch computes the convolution itself."""
    return shape[0] == 1 and shape.numel() <= FEW_VALUES and conv.weight.dtype == torch.float32


def takes_onednn(weight: Tensor) -> bool:
    """Return True if oneDNN runs convolutions with this weight on this machine."""
    if weight.device.type != "cpu" or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    half = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return weight.dtype == torch.float32 or (weight.dtype in half and half[weight.dtype]())


def _bytes_of(entry: Any) -> int:
    return sum(value.nbytes for value in (entry if isinstance(entry, tuple) else (entry,)) if value is not None)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def channels_last(values: Tensor) -> Tensor:
    """Return [N, C, H, W] in channels_last, itself if it has that layout. Uses clone, which traces without a GPU."""
    is_so = values.is_contiguous(memory_format=torch.channels_last)
    return values if is_so else values.clone(memory_format=torch.channels_last)


def is_channels_last(x: Tensor) -> bool:
    """Return True if x [N, C, H, W] is channels_last and not contiguous too, as sizes of 1 can be."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def images_of(x: Tensor) -> list[Tensor]:
    """Return the images of x [B, ...], each [1, ...] and in memory that begins as torch's own does.

    MKL's last bits depend on where a product's operands begin, to 16 bytes: those of a view would depend on the batch.
    """
    rows = x.split(1)
    return [row if row.storage_offset() * row.element_size() % ALIGNMENT == 0 else row.clone() for row in rows]
