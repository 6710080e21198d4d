"""Small models of every structure that the fast path supports, in fastvae's and in diffusers' classes."""

import diffusers
import torch
from torch import nn

import fastvae

TWO = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
CONFIGS = {
    "SD": ("AutoencoderKL", {**TWO, "block_out_channels": (32, 64), "norm_num_groups": 4}),
    "FLUX: no quant_conv": (
        "AutoencoderKL",
        {
            **TWO,
            "block_out_channels": (32, 48),
            "norm_num_groups": 4,
            "latent_channels": 16,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    ),
    "CogView: no attention, two residual blocks": (
        "AutoencoderKL",
        {
            **TWO,
            "block_out_channels": (32, 96),
            "norm_num_groups": 8,
            "layers_per_block": 2,
            "mid_block_add_attention": False,
        },
    ),
    "FLUX.2": (
        "AutoencoderKLFlux2",
        {**TWO, "block_out_channels": (32, 64), "norm_num_groups": 4, "latent_channels": 32, "layers_per_block": 1},
    ),
    "attention in every block, one colour": (
        "AutoencoderKL",
        {
            "down_block_types": ("AttnDownEncoderBlock2D",) * 2,
            "up_block_types": ("AttnUpDecoderBlock2D",) * 2,
            "block_out_channels": (16, 32),
            "norm_num_groups": 4,
            "in_channels": 1,
            "out_channels": 1,
        },
    ),
    "128 channels": ("AutoencoderKL", {**TWO, "block_out_channels": (64, 128), "norm_num_groups": 8}),
}
SMALLEST = {**TWO, "block_out_channels": (8, 16), "norm_num_groups": 1, "layers_per_block": 1}
# The fewest layers that still have attention, for what torch traces or repeats many times.
ONE_BLOCK = {
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (8,),
}
# ONE_BLOCK and a middle without attention, for what does not depend on the layers.
FEWEST = {**ONE_BLOCK, "mid_block_add_attention": False}
LIBRARIES = {"fastvae": fastvae, "diffusers": diffusers}


def small_model(shape: str = "SD", library: str = "fastvae", seed: int = 0) -> nn.Module:
    """Return a frozen model in eval mode with random weights, including norms and biases."""
    name, config = CONFIGS[shape]
    torch.manual_seed(seed)
    vae = getattr(LIBRARIES[library], name)(**config)
    for weight in vae.parameters():
        if weight.ndim == 1:
            nn.init.normal_(weight, mean=1.0 if weight.mean() > 0.9 else 0.0, std=0.2)
    return vae.eval().requires_grad_(False)


def smallest_model(library: str = "fastvae", seed: int = 0, **config) -> nn.Module:
    """Return a frozen AutoencoderKL in eval mode with a block of every kind and a few thousand random weights."""
    torch.manual_seed(seed)
    return LIBRARIES[library].AutoencoderKL(**{**SMALLEST, **config}).eval().requires_grad_(False)


def without_middles(vae: nn.Module, *parts: str) -> nn.Module:
    """Remove the middle blocks of these parts, by default of both; an accelerated part needs none."""
    for part in parts or ("encoder", "decoder"):
        getattr(vae, part).mid_block = None
    return vae


def pixels(vae: nn.Module, batch: int = 2, height: int = 20, width: int = 12) -> torch.Tensor:
    """Return random floats in [-1, 1], in the model's dtype."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(batch, vae.config.in_channels, height, width, generator=generator) * 2 - 1
    return x.to(next(vae.parameters()).dtype)


def latents(vae: nn.Module, batch: int = 2, height: int = 5, width: int = 6) -> torch.Tensor:
    """Return random latents in the model's dtype."""
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(batch, vae.config.latent_channels, height, width, generator=generator)
    return z.to(next(vae.parameters()).dtype)
