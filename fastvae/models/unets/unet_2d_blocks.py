"""Blocks of encoder and decoder: residual blocks, attention between them, one change of size at the end.

Source: diffusers.models.unets.unet_2d_blocks, without time embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvae.checkpoints import DOWN_BLOCK_TYPES, UP_BLOCK_TYPES
from fastvae.models.attention_processor import Attention
from fastvae.models.downsampling import Downsample2D
from fastvae.models.resnet import ResnetBlock2D
from fastvae.models.upsampling import Upsample2D


class _Block(nn.Module):
    """``num_layers`` residual blocks, each followed by attention unless ``attention_head_dim`` is None."""

    attentions: nn.ModuleList | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dropout: float = 0.0,
        num_layers: int = 1,
        resnet_eps: float = 1e-6,
        resnet_act_fn: str = "swish",
        resnet_groups: int = 32,
        attention_head_dim: int | None = None,
    ):
        super().__init__()
        # attentions before resnets, as in diffusers: optimisers number parameters in this order.
        self.attentions = None
        if attention_head_dim is not None:
            self.attentions = _attentions(out_channels, num_layers, attention_head_dim, resnet_eps, resnet_groups)
        self.resnets = nn.ModuleList(
            ResnetBlock2D(
                in_channels=in_channels if i == 0 else out_channels,
                out_channels=out_channels,
                dropout=dropout,
                eps=resnet_eps,
                non_linearity=resnet_act_fn,
                groups=resnet_groups,
            )
            for i in range(num_layers)
        )

    def _run_layers(self, hidden_states: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            hidden_states = resnet(hidden_states)
            if self.attentions is not None:
                hidden_states = self.attentions[i](hidden_states)
        return hidden_states


def _attentions(channels: int, num_layers: int, head_dim: int, eps: float, groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        Attention(channels, heads=channels // head_dim, dim_head=head_dim, bias=True, eps=eps, norm_num_groups=groups)
        for _ in range(num_layers)
    )


class DownEncoderBlock2D(_Block):
    """Residual blocks, then a stride-2 convolution: [B, in, H, W] -> [B, out, H // 2, W // 2].

    ``options`` are those of every block: dropout, num_layers, resnet_eps, resnet_act_fn, resnet_groups.
    Source: diffusers' class of this name.
    """

    def __init__(self, in_channels: int, out_channels: int, *, add_downsample: bool = True, **options: Any):
        super().__init__(in_channels, out_channels, **options)
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels)]) if add_downsample else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self._run_layers(hidden_states)
        for downsampler in self.downsamplers or ():
            hidden_states = downsampler(hidden_states)
        return hidden_states


class AttnDownEncoderBlock2D(DownEncoderBlock2D):
    """A DownEncoderBlock2D with attention after every residual block (diffusers' class of this name)."""

    def __init__(self, in_channels: int, out_channels: int, *, attention_head_dim: int = 1, **options: Any):
        super().__init__(in_channels, out_channels, attention_head_dim=attention_head_dim, **options)


class UpDecoderBlock2D(_Block):
    """Residual blocks, then a doubling: [B, in, H, W] -> [B, out, 2H, 2W].

    ``options`` are those of every block: dropout, num_layers, resnet_eps, resnet_act_fn, resnet_groups.
    Source: diffusers' class of this name.
    """

    def __init__(self, in_channels: int, out_channels: int, *, add_upsample: bool = True, **options: Any):
        super().__init__(in_channels, out_channels, **options)
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)]) if add_upsample else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self._run_layers(hidden_states)
        for upsampler in self.upsamplers or ():
            hidden_states = upsampler(hidden_states)
        return hidden_states


class AttnUpDecoderBlock2D(UpDecoderBlock2D):
    """An UpDecoderBlock2D with attention after every residual block (diffusers' class of this name)."""

    def __init__(self, in_channels: int, out_channels: int, *, attention_head_dim: int = 1, **options: Any):
        super().__init__(in_channels, out_channels, attention_head_dim=attention_head_dim, **options)


class UNetMidBlock2D(nn.Module):
    """A residual block, then ``num_layers`` times attention (or none) and a residual block; the shape stays.

    Source: diffusers' class of this name.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        dropout: float = 0.0,
        num_layers: int = 1,
        resnet_eps: float = 1e-6,
        resnet_act_fn: str = "swish",
        resnet_groups: int = 32,
        add_attention: bool = True,
        attention_head_dim: int = 1,
    ):
        super().__init__()
        if add_attention:
            self.attentions = _attentions(in_channels, num_layers, attention_head_dim, resnet_eps, resnet_groups)
        else:
            self.attentions = nn.ModuleList([None] * num_layers)  # type: ignore[list-item]
        self.resnets = nn.ModuleList(
            ResnetBlock2D(
                in_channels=in_channels,
                dropout=dropout,
                eps=resnet_eps,
                non_linearity=resnet_act_fn,
                groups=resnet_groups,
            )
            for _ in range(num_layers + 1)
        )
        self.gradient_checkpointing = False

    _gradient_checkpointing_func: Callable[..., Tensor]

    def forward(self, hidden_states: Tensor) -> Tensor:
        first, *others = self.resnets
        hidden_states = first(hidden_states)
        for attention, resnet in zip(self.attentions, others, strict=True):
            if attention is not None:
                hidden_states = attention(hidden_states)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(resnet, hidden_states)
            else:
                hidden_states = resnet(hidden_states)
        return hidden_states


DOWN_BLOCKS = dict(zip(DOWN_BLOCK_TYPES, (DownEncoderBlock2D, AttnDownEncoderBlock2D), strict=True))
UP_BLOCKS = dict(zip(UP_BLOCK_TYPES, (UpDecoderBlock2D, AttnUpDecoderBlock2D), strict=True))


def get_down_block(down_block_type: str, *, attention_head_dim: int, **kwargs) -> DownEncoderBlock2D:
    """Return the encoder block of that name. Raises ValueError for a name that no AutoencoderKL has."""
    return _get_block(DOWN_BLOCKS, "down_block_types", down_block_type, attention_head_dim, kwargs)


def get_up_block(up_block_type: str, *, attention_head_dim: int, **kwargs) -> UpDecoderBlock2D:
    """Return the decoder block of that name. Raises ValueError for a name that no AutoencoderKL has."""
    return _get_block(UP_BLOCKS, "up_block_types", up_block_type, attention_head_dim, kwargs)


def _get_block(blocks: dict, argument: str, name: str, attention_head_dim: int, kwargs: dict):
    block = blocks.get(name)
    if block is None:
        raise ValueError(f"{argument} must name {' or '.join(blocks)}, got {name!r}")
    if name.startswith("Attn"):
        kwargs["attention_head_dim"] = attention_head_dim
    return block(**kwargs)
