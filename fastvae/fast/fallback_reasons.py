"""Decides whether a module runs on the fused kernels, from its structure and state; a fallback has a named reason.

Weights and hooks may change between calls: survey.py keeps the decisions until a layer, a hook or the place of a weight
has changed. layer_checks.py answers for one layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import StrEnum

import torch
from torch import Tensor, nn

from fastvae.fast import layer_checks
from fastvae.fast.layer_checks import Layer
from fastvae.latents.interpreter import KERNEL_DEVICES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_COLOURS, MAX_HEAD_CHANNELS = 8, 512
# Attention processors that compute softmax(q k^T / sqrt(d)) v and nothing else.
BUILT_IN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0")

# The files of diffusers' and fastvae's models whose forwards are known.
VAE, BLOCKS = "autoencoders.vae", "unets.unet_2d_blocks"
RESNET, ATTENTION, DOWN, UP = "resnet", "attention_processor", "downsampling", "upsampling"
MODELS = ("autoencoders.autoencoder_kl", "autoencoders.autoencoder_kl_flux2")

PART_LAYERS = {"conv_in", "mid_block", "conv_norm_out", "conv_act", "conv_out"}
BLOCK_LAYERS = {"resnets", "attentions", "downsamplers", "upsamplers"}
RESNET_LAYERS = {"norm1", "conv1", "norm2", "dropout", "conv2", "nonlinearity", "conv_shortcut"}
ATTENTION_LAYERS = {"group_norm", "to_q", "to_k", "to_v", "to_out", "to_qkv", "processor"}


class Reason(StrEnum):
    """Reasons why a module runs unfused; the value is the text that a user reads."""

    EXACT = "precision='exact' was asked for"
    CPU = "no fused kernel runs on this device"
    GRADIENT = "a gradient is needed that no fused kernel gives: in forward mode, in torch.func, or of what a hook adds"
    AUTOCAST = "autocast chooses the dtype of each layer"
    DTYPE = "the weights are in a dtype that no kernel takes"
    MIXED_DTYPES = "input and weights differ in dtype or device"
    META = "the weights are on the meta device"
    QUANTISED = "a weight is no plain tensor"
    HOOKS = "a hook is registered on it or a layer of it"
    REPLACED_FORWARD = "its forward was replaced"
    LATE = "it came after accelerate, or as a shallow copy of what was accelerated"
    FOREIGN_FORWARD = "its class has a forward of its own"
    PEFT = "it has adapter layers"
    PARAMETRISED = "a weight is parametrised"
    PROCESSOR = "its attention processor is not a built-in one"
    DROPOUT = "dropout is active"
    UNSUPPORTED_LAYER = "a layer is of a kind or size that no kernel takes"


def why_not_shape(part: Layer) -> Reason | None:
    """Return why a module has not the structure of an encoder or decoder, whatever its state."""
    blocks = getattr(part, "down_blocks", None) is not None, getattr(part, "up_blocks", None) is not None
    names = {name for name, _ in part.named_children()} - {"down_blocks", "up_blocks"}
    if sum(blocks) != 1 or not names <= PART_LAYERS or not PART_LAYERS - {"mid_block"} <= names:
        return Reason.UNSUPPORTED_LAYER
    return None if layer_checks.known_forward(type(part), VAE) else Reason.FOREIGN_FORWARD


def why_not_part(part: Layer) -> Reason | None:
    """Return why an encoder or decoder runs as a whole module now; its blocks are decided one by one below."""
    if shape := why_not_shape(part):
        return shape
    if layer_checks.has_global_hooks():
        return Reason.HOOKS
    own = (part.conv_in, part.conv_norm_out, part.conv_act, part.conv_out)
    return (
        _why_not_convolution(part.conv_in, 3, 1, 1)
        or _why_not_norm(part.conv_norm_out)
        or _why_not_silu(part.conv_act)
        or _why_not_convolution(part.conv_out, 3, 1, 1)
        or _why_not_state(own, part.conv_in.weight)
    )


def why_not_block(block: Layer) -> Reason | None:
    """Return why a down, mid or up block runs as a module instead of layer by layer."""
    if not {name for name, _ in block.named_children()} <= BLOCK_LAYERS:
        return Reason.UNSUPPORTED_LAYER
    if not layer_checks.known_forward(type(block), BLOCKS):
        return Reason.FOREIGN_FORWARD
    lists = [layer for layer in block.children() if isinstance(layer, nn.ModuleList)]
    if len(lists) != len(list(block.children())):
        return Reason.UNSUPPORTED_LAYER
    return why_not_hooks([block, *lists])


def why_not_resnet(block: Layer, like: Tensor) -> Reason | None:
    """Return why a residual block cannot be fused; ``like`` is its input."""
    if not {name for name, _ in block.named_children()} <= RESNET_LAYERS:
        return Reason.UNSUPPORTED_LAYER
    if not layer_checks.known_forward(type(block), RESNET):
        return Reason.FOREIGN_FORWARD
    if (
        getattr(block, "output_scale_factor", 1.0) != 1.0
        or getattr(block, "upsample", None) is not None
        or getattr(block, "downsample", None) is not None
        or getattr(block, "time_emb_proj", None) is not None
        or getattr(block, "time_embedding_norm", "default") not in ("default", "group")
    ):
        return Reason.UNSUPPORTED_LAYER
    shortcut = block.conv_shortcut
    return (
        _why_not_silu(block.nonlinearity)
        or _why_not_norm(block.norm1)
        or _why_not_convolution(block.conv1, 3, 1, 1)
        or _why_not_norm(block.norm2)
        or _why_not_convolution(block.conv2, 3, 1, 1)
        or (None if shortcut is None else _why_not_convolution(shortcut, 1, 1, 0))
        or _why_not_dropout(block.dropout)
        or _why_not_state([block, *block.children()], like)
    )


def why_not_attention(attention: Layer, like: Tensor) -> Reason | None:
    """Return why an attention layer cannot be fused; ``like`` is its input."""
    kind = type(getattr(attention, "processor", None))
    if kind.__name__ not in BUILT_IN_PROCESSORS or not layer_checks.known_forward(kind, ATTENTION, "__call__"):
        return Reason.PROCESSOR
    if not {name for name, _ in attention.named_children()} <= ATTENTION_LAYERS:
        return Reason.UNSUPPORTED_LAYER
    if not layer_checks.known_forward(type(attention), ATTENTION):
        return Reason.FOREIGN_FORWARD
    out = attention.to_out
    if (
        attention.heads != 1
        or getattr(attention, "group_norm", None) is None
        or not getattr(attention, "residual_connection", True)
        or getattr(attention, "rescale_output_factor", 1.0) != 1.0
        or not isinstance(out, nn.ModuleList)
        or len(out) != 2
    ):
        return Reason.UNSUPPORTED_LAYER
    projections = list(projections_of(attention))
    linear = [*projections, out[0]]
    if any(type(layer) is not nn.Linear for layer in linear):
        return _unknown_layer(linear)
    head = projections[0].weight.shape[0] // (3 if len(projections) == 1 else 1)
    if head > MAX_HEAD_CHANNELS or head % 8:
        return Reason.UNSUPPORTED_LAYER
    return (
        _why_not_norm(attention.group_norm)
        or _why_not_dropout(out[1])
        or _why_not_state([attention, attention.group_norm, *linear, out, out[1]], like)
    )


def why_not_downsample(sampler: Layer, like: Tensor) -> Reason | None:
    """Return why a downsampler cannot be fused: it must pad right and bottom by one, then convolve 3x3, stride 2."""
    names = {name for name, _ in sampler.named_children()}
    if not names <= {"conv", "norm"} or getattr(sampler, "norm", None) is not None:
        return Reason.UNSUPPORTED_LAYER
    if not layer_checks.known_forward(type(sampler), DOWN):
        return Reason.FOREIGN_FORWARD
    return _why_not_convolution(sampler.conv, 3, 2, 0) or _why_not_state([sampler, sampler.conv], like)


def why_not_upsample(sampler: Layer, like: Tensor) -> Reason | None:
    """Return why an upsampler cannot be fused: it must be nearest 2x, then a 3x3 convolution."""
    names = {name for name, _ in sampler.named_children()}
    plain = getattr(sampler, "norm", None) is None and not getattr(sampler, "use_conv_transpose", False)
    if not names <= {"conv", "norm"} or not plain or not getattr(sampler, "interpolate", True):
        return Reason.UNSUPPORTED_LAYER
    if not layer_checks.known_forward(type(sampler), UP):
        return Reason.FOREIGN_FORWARD
    return _why_not_convolution(sampler.conv, 3, 1, 1) or _why_not_state([sampler, sampler.conv], like)


def why_not_quant_conv(vae: Layer) -> Reason | None:
    """Return why quant_conv cannot be folded into the encoder's conv_out, which skips ``vae.encode``."""
    conv, names = getattr(vae, "quant_conv", None), ("encode", "_encode")
    if any(name in vars(vae) for name in names):
        return Reason.REPLACED_FORWARD
    if not all(any(layer_checks.known_forward(type(vae), file, name) for file in MODELS) for name in names):
        return Reason.FOREIGN_FORWARD
    if "_hf_hook" in vars(vae):
        return Reason.HOOKS
    found = why_not_hooks([vae.encoder])
    if found or conv is None:
        return found
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in conv.parameters()):
        return Reason.GRADIENT
    return _why_not_convolution(conv, 1, 1, 0) or _why_not_state([conv], vae.encoder.conv_in.weight)


def why_not_input(part: Layer, x: Tensor) -> Reason | None:
    """Return why no fused kernel takes this input: its dtype, device or an enclosing transform."""
    weight = part.conv_in.weight
    if weight.device.type == "meta":
        return Reason.META
    if layer_checks.transformed():
        return Reason.GRADIENT
    if torch.is_autocast_enabled(x.device.type):
        return Reason.AUTOCAST
    if weight.dtype not in DTYPES:
        return Reason.DTYPE
    if x.device != weight.device or (x.dtype != weight.dtype and x.dtype != torch.uint8):
        return Reason.MIXED_DTYPES
    return None if x.device.type in KERNEL_DEVICES else Reason.CPU


def needs_gradient(part: Layer, x: Tensor) -> bool:
    """Return True if grad mode is on and the input or a parameter requires a gradient.

    Grad mode alone does not decide: training scripts leave it on while they encode with frozen parameters.
    """
    if not torch.is_grad_enabled() or x.requires_grad:
        return torch.is_grad_enabled()
    # part.parameters() finds names and drops doubles: 0.18 ms for Stable Diffusion's encoder, this 0.04.
    pending = [part]
    while pending:
        module = pending.pop()
        for weight in module._parameters.values():
            if weight is not None and weight.requires_grad:
                return True
        pending += [child for child in module._modules.values() if child is not None]
    return False


def projections_of(attention: Layer) -> Iterator[Layer]:
    """Yield to_qkv if the projections are fused, else to_q, to_k and to_v."""
    if type(attention.processor).__name__ == "FusedAttnProcessor2_0":
        yield attention.to_qkv
    else:
        yield from (attention.to_q, attention.to_k, attention.to_v)


def who_replaced_forward(module: Layer) -> Reason:
    """Return HOOKS if accelerate or diffusers wrapped the module's forward for a hook, else REPLACED_FORWARD."""
    return Reason.HOOKS if layer_checks.is_wrapped_by_hook(module) else Reason.REPLACED_FORWARD


def why_not_hooks(modules: Iterable[Layer]) -> Reason | None:
    """Return why a fused kernel would skip code of a user: a hook on one of the modules, or a replaced forward."""
    for module in modules:
        if layer_checks.has_hooks(module):
            return Reason.HOOKS
        if layer_checks.has_replaced_forward(module):
            return who_replaced_forward(module)
    return None


def _why_not_state(modules: Iterable[Layer], like: Tensor) -> Reason | None:
    """Return why hooks or weights forbid fusion: weights must be plain tensors of the dtype and device of ``like``."""
    modules = list(modules)
    if found := why_not_hooks(modules):
        return found
    for module in modules:
        for weight in module._parameters.values():
            if weight is None:
                continue
            if not layer_checks.is_plain(weight):
                return Reason.QUANTISED
            if weight.device.type == "meta":
                return Reason.META
            if weight.dtype != like.dtype or weight.device != like.device:
                return Reason.MIXED_DTYPES
    return None


def _why_not_convolution(layer: Layer, size: int, stride: int, padding: int) -> Reason | None:
    return None if layer_checks.is_convolution(layer, size, stride, padding) else _unknown_layer([layer])


def _why_not_norm(layer: Layer) -> Reason | None:
    return None if layer_checks.is_group_norm(layer) else _unknown_layer([layer])


def _why_not_silu(layer: Layer) -> Reason | None:
    return None if type(layer) is nn.SiLU else _unknown_layer([layer])


def _why_not_dropout(layer: Layer) -> Reason | None:
    if type(layer) not in (nn.Dropout, nn.Identity):
        return _unknown_layer([layer])
    return Reason.DROPOUT if layer.training and getattr(layer, "p", 0.0) else None


def _unknown_layer(layers: Iterable[Layer]) -> Reason:
    """Return the reason that the first adapter or parametrised layer gives, else UNSUPPORTED_LAYER."""
    for layer in layers:
        if layer_checks.has_adapter(layer):
            return Reason.PEFT
        if hasattr(layer, "parametrizations"):
            return Reason.PARAMETRISED
    return Reason.UNSUPPORTED_LAYER
