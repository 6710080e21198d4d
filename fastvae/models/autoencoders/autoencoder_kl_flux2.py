"""Autoencoder of FLUX.2: AutoencoderKL with latents normalised by the running statistics of a batch norm.

Source: diffusers.models.autoencoders.autoencoder_kl_flux2.AutoencoderKLFlux2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from fastvae.models.autoencoders.autoencoder_kl import AutoencoderKLBase
from fastvae.models.autoencoders.vae import Decoder, Encoder
from fastvae.models.configuration_utils import register_to_config


class AutoencoderKLFlux2(AutoencoderKLBase):
    """The autoencoder of FLUX.2; arguments as in diffusers.

    ``bn`` has the mean and variance of the latents, gathered in patches of ``patch_size``; scale_latents and
    unscale_latents apply them. decoder_block_out_channels: for a decoder smaller than the encoder.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",) * 4,
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",) * 4,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        decoder_block_out_channels: Sequence[int] | None = None,
        layers_per_block: int = 2,
        act_fn: str = "silu",
        latent_channels: int = 32,
        norm_num_groups: int = 32,
        sample_size: int | tuple[int, int] = 1024,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        batch_norm_eps: float = 1e-4,
        batch_norm_momentum: float = 0.1,
        patch_size: tuple[int, int] = (2, 2),
    ):
        super().__init__()
        shared: dict[str, Any] = {
            "layers_per_block": layers_per_block,
            "act_fn": act_fn,
            "norm_num_groups": norm_num_groups,
            "mid_block_add_attention": mid_block_add_attention,
        }
        self.encoder = Encoder(
            in_channels, latent_channels, tuple(down_block_types), tuple(block_out_channels), **shared
        )
        self.decoder = Decoder(
            latent_channels,
            out_channels,
            tuple(up_block_types),
            tuple(decoder_block_out_channels or block_out_channels),
            **shared,
        )
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        self.bn = nn.BatchNorm2d(
            math.prod(patch_size) * latent_channels, eps=batch_norm_eps, momentum=batch_norm_momentum, affine=False
        )
        self._set_tile_sizes()
