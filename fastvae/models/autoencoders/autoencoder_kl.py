"""Autoencoder of latent diffusion: pixels to a Gaussian over latents, and latents to pixels.

Source: diffusers.models.autoencoders.autoencoder_kl.AutoencoderKL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fastvae.latents import convert as latents
from fastvae.models.attention_processor import AttentionMixin
from fastvae.models.autoencoders.vae import (
    AutoencoderMixin,
    Decoder,
    DecoderOutput,
    DiagonalGaussianDistribution,
    Encoder,
)
from fastvae.models.configuration_utils import register_to_config
from fastvae.models.in_pipelines import heeds_offload
from fastvae.models.modeling_outputs import AutoencoderKLOutput
from fastvae.models.modeling_utils import ModelMixin
from fastvae.tiling import TilePlan, apply_tiled, blend

if TYPE_CHECKING:
    from PIL import Image


class AutoencoderKLBase(ModelMixin, AttentionMixin, AutoencoderMixin):
    """Base of AutoencoderKL and AutoencoderKLFlux2: encode, decode, tiling, slicing, latents in one call."""

    encoder: Encoder | None
    decoder: Decoder | None
    quant_conv: nn.Conv2d | None
    post_quant_conv: nn.Conv2d | None

    @property
    def latent_channels(self) -> int:
        """L, the channels of raw latents."""
        return self.config.latent_channels

    def _set_tile_sizes(self) -> None:
        sample_size = self.config.sample_size
        # The height of a (height, width) pair, which diffusers takes for the latents.
        self.tile_sample_min_size = sample_size if isinstance(sample_size, int) else sample_size[0]
        self.tile_latent_min_size = int(self.tile_sample_min_size / self.downsample_factor)
        self.tile_overlap_factor = 0.25

    @property
    def downsample_factor(self) -> int:
        """Number of pixels that one latent spans in each direction: 8 for Stable Diffusion."""
        return latents.downsample_factor(self)

    @heeds_offload
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Return the posterior of ``x`` [B, in_channels, H, W], floats in [-1, 1], as ``.latent_dist``.

        Raises ValueError for another rank, number of channels or dtype, and RuntimeError for a model loaded without its
        encoder. Values are not checked; encode_latents checks them.
        """
        self._check_input("x", x, self.config.in_channels, self.encoder, "encoder")
        posterior = DiagonalGaussianDistribution(self._sliced(self._encode, x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def encode_moments(self, x: Tensor) -> Tensor:
        """Return mean and log-variance of the posterior of ``x``: [B, 2L, H / f, W / f]. Errors as in encode."""
        self._check_input("x", x, self.config.in_channels, self.encoder, "encoder")
        return latents.encode_moments(self, x)

    @heeds_offload
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Return images of raw latents ``z`` [B, L, h, w], about [-1, 1], as ``.sample`` [B, out_channels, f h, f w].

        ``generator`` is not used, as in diffusers. Raises as encode does.
        """
        self._check_input("z", z, self.config.latent_channels, self.decoder, "decoder")
        sample = self._sliced(self._decode, z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode ``sample`` [B, in_channels, H, W]: a draw from the posterior, or its mode."""
        posterior = self.encode(sample).latent_dist  # type: ignore[union-attr]
        # The mode is a view of the moments, as in diffusers: a convolution's last bits depend on the layout.
        z = posterior.sample(generator=generator) if sample_posterior else posterior.parameters.chunk(2, dim=1)[0]
        return self.decode(z, return_dict=return_dict)

    def _encode(self, x: Tensor) -> Tensor:
        if self.use_tiling and max(x.shape[-2:]) > self.tile_sample_min_size:
            return self._tiled_encode(x)
        return self._encode_whole(x)

    def _encode_whole(self, x: Tensor) -> Tensor:
        moments = self.encoder(x)  # type: ignore[misc]
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def _decode(self, z: Tensor) -> Tensor:
        if self.use_tiling and max(z.shape[-2:]) > self.tile_latent_min_size:
            return self._tiled_decode(z)
        return self._decode_whole(z)

    def _decode_whole(self, z: Tensor) -> Tensor:
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))  # type: ignore[misc]

    def _sliced(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.use_slicing and x.shape[0] > 1:
            return torch.cat([function(row) for row in x.split(1)])
        return function(x)

    def _tiled_encode(self, x: Tensor) -> Tensor:
        plan = TilePlan.of(
            self.tile_sample_min_size, self.tile_latent_min_size, self.tile_overlap_factor, self.tile_slivers
        )
        return apply_tiled(self._encode_whole, x, plan)

    def _tiled_decode(self, z: Tensor) -> Tensor:
        plan = TilePlan.of(
            self.tile_latent_min_size, self.tile_sample_min_size, self.tile_overlap_factor, self.tile_slivers
        )
        return apply_tiled(self._decode_whole, z, plan)

    def tiled_encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """Encode ``x`` [B, in_channels, H, W] in blended tiles, for any size and without enable_tiling; see encode."""
        self._check_input("x", x, self.config.in_channels, self.encoder, "encoder")
        posterior = DiagonalGaussianDistribution(self._tiled_encode(x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decode ``z`` [B, L, h, w] in blended tiles, for any size and without enable_tiling; see decode."""
        self._check_input("z", z, self.config.latent_channels, self.decoder, "decoder")
        sample = self._tiled_decode(z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def blend_v(self, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        """Return ``b`` [B, C, H, W] faded in below ``a`` over ``blend_extent`` rows, as a new tensor."""
        return blend(a, b, blend_extent, dim=2)

    def blend_h(self, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        """Return ``b`` [B, C, H, W] faded in to the right of ``a`` over ``blend_extent`` columns, as a new tensor."""
        return blend(a, b, blend_extent, dim=3)

    def _check_input(self, name: str, x: Tensor, channels: int, part: nn.Module | None, part_name: str) -> None:
        if part is None:
            raise RuntimeError(
                f"this model was loaded without its {part_name}: load it with parts=('encoder', 'decoder')"
            )
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != channels:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor [B, {channels}, H, W], got {got}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}: encode_latents takes uint8 images")
        # A wrapper around the part, such as DataParallel, has no conv_in: torch then raises its own error.
        weight: torch.dtype = getattr(getattr(part, "conv_in", None), "weight", x).dtype
        # Weights of one byte are stored in it and computed in another dtype (diffusers' layerwise casting).
        if x.dtype != weight and weight.itemsize > 1 and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"{name} must have the model's dtype {weight}, got {x.dtype}")

    # Latents in one call: fastvae.latents.convert has these functions for any VAE, with their arguments and errors.

    def encode_latents(
        self,
        images: Any,
        *,
        posterior: Literal["sample", "mode"] = "sample",
        seeds: Sequence[int] | Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        pad: Literal["error", "crop", "reflect"] = "error",
        layout: Literal["auto", "NCHW", "NHWC"] = "auto",
    ) -> Tensor:
        """Encode images to scaled latents [B, L, h, w]: fastvae.encode_latents(self, images, ...)."""
        return latents.encode_latents(
            self, images, posterior=posterior, seeds=seeds, generator=generator, pad=pad, layout=layout
        )

    def decode_latents(
        self,
        z: Tensor,
        *,
        output: Literal["uint8", "float", "pil"] = "uint8",
        size: tuple[int, int] | None = None,
    ) -> Tensor | list[Image.Image]:
        """Decode scaled latents [B, L, h, w] to images [B, C, H, W]: fastvae.decode_latents(self, z, ...)."""
        return latents.decode_latents(self, z, output=output, size=size)

    def scale_latents(self, z: Tensor) -> Tensor:
        """Scale raw latents [B, L, h, w] to those of a diffusion model: fastvae.scale_latents(self, z)."""
        return latents.scale_latents(self, z)

    def unscale_latents(self, z: Tensor) -> Tensor:
        """Invert scale_latents, to [B, L, h, w]: fastvae.unscale_latents(self, z)."""
        return latents.unscale_latents(self, z)


class AutoencoderKL(AutoencoderKLBase):
    """The autoencoder of Stable Diffusion, SDXL, SD3, FLUX.1, CogView and many more; arguments as in diffusers.

    in_channels, out_channels: of the images. block_out_channels: one entry for each block; each but the last halves the
    image. latent_channels: L. scaling_factor, shift_factor, latents_mean, latents_std: the scaling of latents in
    pipelines. sample_size: the image size in training, and of a tile. force_upcast: True if pipelines decode in fp32.
    Raises ValueError for an unknown block type or activation.
    Source: diffusers.models.autoencoders.autoencoder_kl.AutoencoderKL; Rombach et al., arXiv:2112.10752.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",),
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",),
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int | tuple[int, int] = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ):
        super().__init__()
        shared: dict[str, Any] = {
            "block_out_channels": tuple(block_out_channels),
            "layers_per_block": layers_per_block,
            "act_fn": act_fn,
            "norm_num_groups": norm_num_groups,
            "mid_block_add_attention": mid_block_add_attention,
        }
        self.encoder = Encoder(in_channels, latent_channels, tuple(down_block_types), **shared)
        self.decoder = Decoder(latent_channels, out_channels, tuple(up_block_types), **shared)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        self._set_tile_sizes()

    @property
    def scaling_factor(self) -> float:
        """Factor by which scale_latents multiplies, so that latents have about unit variance."""
        return self.config.scaling_factor

    @property
    def shift_factor(self) -> float | None:
        """Number that scale_latents subtracts first; None for most models."""
        return self.config.shift_factor

    @property
    def latents_mean(self) -> tuple[float, ...] | None:
        """Means of the channels of raw latents, [L], by which scale_latents normalises; None for most models."""
        return self.config.latents_mean

    @property
    def latents_std(self) -> tuple[float, ...] | None:
        """Deviations of the channels of raw latents, [L]; None for most models."""
        return self.config.latents_std
