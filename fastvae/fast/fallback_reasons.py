"""Why a module is run as it stands and not by the fused kernels: one named reason each, found by structure and state.

It is asked at every call, since weights and hooks change under us; layers.py answers for the single layers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fastvae_kernels.shared.runtime import KERNEL_DEVICES
from torch import Tensor, nn

from fastvae.fast import layer_checks as layers
from fastvae.fast.layer_checks import Layer as Layer
from fastvae.fast.layer_checks import Reason as Reason

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_COLOURS, MOST_HEAD_CHANNELS = 8, 512
# Attention processors that compute softmax(q k^T / sqrt(d)) v and nothing beside it.
BUILT_IN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0")

# The files of diffusers' and fastvae's models whose forwards are known.
VAE, BLOCKS = "autoencoders.vae", "unets.unet_2d_blocks"
RESNET, ATTENTION, DOWN, UP = "resnet", "attention_processor", "downsampling", "upsampling"
MODELS = ("autoencoders.autoencoder_kl", "autoencoders.autoencoder_kl_flux2")

PART_LAYERS = {"conv_in", "mid_block", "conv_norm_out", "conv_act", "conv_out"}
BLOCK_LAYERS = {"resnets", "attentions", "downsamplers", "upsamplers"}
RESNET_LAYERS = {"norm1", "conv1", "norm2", "dropout", "conv2", "nonlinearity", "conv_shortcut"}
ATTENTION_LAYERS = {"group_norm", "to_q", "to_k", "to_v", "to_out", "to_qkv", "processor"}


def why_not_shape(part: Layer) -> Reason | None:
    """Why a module is no encoder or decoder of this shape at all, whatever its state."""
    blocks = getattr(part, "down_blocks", None) is not None, getattr(part, "up_blocks", None) is not None
    names = {name for name, _ in part.named_children()} - {"down_blocks", "up_blocks"}
    if sum(blocks) != 1 or not names <= PART_LAYERS or not PART_LAYERS - {"mid_block"} <= names:
        return Reason.UNSUPPORTED_LAYER
    return None if layers.known_forward(type(part), VAE) else Reason.FOREIGN_FORWARD


def why_not_part(part: Layer) -> Reason | None:
    """Why an encoder or a decoder as a whole cannot be walked now; block by block it is asked again below."""
    if shape := why_not_shape(part):
        return shape
    if layers.hooked_everywhere():
        return Reason.HOOKS
    own = (part.conv_in, part.conv_norm_out, part.conv_act, part.conv_out)
    return (
        layers.convolution(part.conv_in, 3, 1, 1)
        or layers.norm(part.conv_norm_out)
        or layers.activation(part.conv_act)
        or layers.convolution(part.conv_out, 3, 1, 1)
        or layers.state(own, part.conv_in.weight)
    )


def why_not_block(block: Layer) -> Reason | None:
    """Why a down, mid or up block cannot be taken apart."""
    if not {name for name, _ in block.named_children()} <= BLOCK_LAYERS:
        return Reason.UNSUPPORTED_LAYER
    if not layers.known_forward(type(block), BLOCKS):
        return Reason.FOREIGN_FORWARD
    lists = [layer for layer in block.children() if isinstance(layer, nn.ModuleList)]
    if len(lists) != len(list(block.children())):
        return Reason.UNSUPPORTED_LAYER
    return layers.hooked([block, *lists])


def why_not_resnet(block: Layer, like: Tensor) -> Reason | None:
    """Why a residual block cannot be fused; ``like`` is the activation that it is handed."""
    if not {name for name, _ in block.named_children()} <= RESNET_LAYERS:
        return Reason.UNSUPPORTED_LAYER
    if not layers.known_forward(type(block), RESNET):
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
        layers.activation(block.nonlinearity)
        or layers.norm(block.norm1)
        or layers.convolution(block.conv1, 3, 1, 1)
        or layers.norm(block.norm2)
        or layers.convolution(block.conv2, 3, 1, 1)
        or (None if shortcut is None else layers.convolution(shortcut, 1, 1, 0))
        or layers.dropout(block.dropout)
        or layers.state([block, *block.children()], like)
    )


def why_not_attention(attention: Layer, like: Tensor) -> Reason | None:
    """Why an attention layer cannot be fused."""
    processor = getattr(attention, "processor", None)
    if type(processor).__name__ not in BUILT_IN_PROCESSORS or not layers.known_forward(
        type(processor), ATTENTION, "__call__"
    ):
        return Reason.PROCESSOR
    if not {name for name, _ in attention.named_children()} <= ATTENTION_LAYERS:
        return Reason.UNSUPPORTED_LAYER
    if not layers.known_forward(type(attention), ATTENTION):
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
        return layers.foreign_layer(linear)
    head = projections[0].weight.shape[0] // (3 if len(projections) == 1 else 1)
    if head > MOST_HEAD_CHANNELS or head % 8:
        return Reason.UNSUPPORTED_LAYER
    return (
        layers.norm(attention.group_norm)
        or layers.dropout(out[1])
        or layers.state([attention, attention.group_norm, *linear, out, out[1]], like)
    )


def why_not_downsample(sampler: Layer, like: Tensor) -> Reason | None:
    """Why a downsampler cannot be fused: it must pad by one at the far ends, then convolve by 3x3 and stride 2."""
    names = {name for name, _ in sampler.named_children()}
    if not names <= {"conv", "norm"} or getattr(sampler, "norm", None) is not None:
        return Reason.UNSUPPORTED_LAYER
    if not layers.known_forward(type(sampler), DOWN):
        return Reason.FOREIGN_FORWARD
    return layers.convolution(sampler.conv, 3, 2, 0) or layers.state([sampler, sampler.conv], like)


def why_not_upsample(sampler: Layer, like: Tensor) -> Reason | None:
    """Why an upsampler cannot be fused: it must repeat pixels, then convolve by 3x3."""
    names = {name for name, _ in sampler.named_children()}
    plain = getattr(sampler, "norm", None) is None and not getattr(sampler, "use_conv_transpose", False)
    if not names <= {"conv", "norm"} or not plain or not getattr(sampler, "interpolate", True):
        return Reason.UNSUPPORTED_LAYER
    if not layers.known_forward(type(sampler), UP):
        return Reason.FOREIGN_FORWARD
    return layers.convolution(sampler.conv, 3, 1, 1) or layers.state([sampler, sampler.conv], like)


def why_not_quant_conv(vae: Layer) -> Reason | None:
    """Why the encoder and the 1x1 convolution behind it cannot be called as one, past ``vae.encode``."""
    conv, names = getattr(vae, "quant_conv", None), ("encode", "_encode")
    if any(name in vars(vae) for name in names):
        return Reason.REPLACED_FORWARD
    if not all(any(layers.known_forward(type(vae), file, name) for file in MODELS) for name in names):
        return Reason.FOREIGN_FORWARD
    if "_hf_hook" in vars(vae):
        return Reason.HOOKS
    found = layers.hooked([vae.encoder])
    if found or conv is None:
        return found
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in conv.parameters()):
        return Reason.GRADIENT
    return layers.convolution(conv, 1, 1, 0) or layers.state([conv], vae.encoder.conv_in.weight)


def why_not_input(part: Layer, x: Tensor) -> Reason | None:
    """Why a call cannot take the fused kernels at all."""
    weight = part.conv_in.weight
    if weight.device.type == "meta":
        return Reason.META
    if layers.transformed():
        return Reason.GRADIENT
    if torch.is_autocast_enabled(x.device.type):
        return Reason.AUTOCAST
    if weight.dtype not in DTYPES:
        return Reason.DTYPE
    if x.device != weight.device or (x.dtype != weight.dtype and x.dtype != torch.uint8):
        return Reason.MIXED_DTYPES
    return None if x.device.type in KERNEL_DEVICES else Reason.CPU


def needs_gradient(part: Layer, x: Tensor) -> bool:
    """Whether somebody will ask for a gradient of this call: an input or a parameter requires one, and grad mode is on.

    Grad mode alone says nothing: training scripts encode with it on and every parameter frozen.
    """
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in part.parameters()))


def projections_of(attention: Layer) -> Iterator[Layer]:
    """to_qkv where the projections are fused, else to_q, to_k and to_v."""
    if type(attention.processor).__name__ == "FusedAttnProcessor2_0":
        yield attention.to_qkv
    else:
        yield from (attention.to_q, attention.to_k, attention.to_v)
