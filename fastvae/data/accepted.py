"""Which models a store can be made with: those that give a mean and a log-variance for each latent, by known code."""

from __future__ import annotations

from typing import Any

import torch

BUILT_IN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0")
BUILT_IN_MODULES = ("fastvae.models.attention_processor", "diffusers.models.attention_processor")


def check_model(vae: Any) -> None:
    """Raises ValueError, naming the class, for a model whose latents a store cannot hold or its identity not tell."""
    kind = type(vae).__name__
    if not hasattr(vae, "config") or getattr(vae, "encoder", None) is None:
        raise ValueError(f"vae must have a config and an encoder, got {kind}")
    lacking = [
        name for name in ("in_channels", "latent_channels", "block_out_channels") if not hasattr(vae.config, name)
    ]
    if lacking:
        raise ValueError(f"vae must have {lacking[0]} in its config, as AutoencoderKL has, got {kind}")
    if vae.config.in_channels != 3:
        raise ValueError(f"vae must take RGB images, got {kind}, which takes {vae.config.in_channels}-channel images")
    wanted = 2 * vae.config.latent_channels
    given = _moment_channels(vae)
    if given != wanted:
        found = "has no convolution at the end of its encoder" if given is None else f"gives {given}"
        raise ValueError(
            f"vae must give mean and log-variance, {wanted} channels for its {vae.config.latent_channels} latent "
            f"channels, got {kind}, which {found}"
        )
    _check_processors(vae.encoder, kind)


def _moment_channels(vae: Any) -> int | None:
    last = getattr(vae, "quant_conv", None) or getattr(vae.encoder, "conv_out", None)
    weight = getattr(last, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, torch.Tensor) and weight.ndim == 4 else None


def _check_processors(encoder: torch.nn.Module, kind: str) -> None:
    for name, module in encoder.named_modules():
        processor = getattr(module, "processor", None)
        found = type(processor)  # the class itself: what a subclass computes is not known
        if processor is None:
            continue
        if found.__name__ not in BUILT_IN_PROCESSORS or found.__module__ not in BUILT_IN_MODULES:
            raise ValueError(
                f"vae must compute attention by a built-in processor ({', '.join(BUILT_IN_PROCESSORS)}), got {kind} "
                f"with {found.__name__} at encoder.{name}: the store's identity could not tell its latents apart"
            )
