"""Scaling of latents: scaling factor, shift, per-channel statistics and FLUX.2's batch norm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.latents.autoencoder import Autoencoder
from fastvae.latents.pixels import _described


def scaling_of(model: Any) -> dict[str, Any]:
    """A model's scaling facts, as store.json has them."""
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    return {**{name: getattr(model.config, name, None) for name in names}, "batch_norm": hasattr(model, "bn")}


def scale_latents(vae: Autoencoder, z: Tensor) -> Tensor:
    """Raw latents to those that a diffusion model is trained on, in z's dtype.

    (z - shift_factor) * scaling_factor; or by latents_mean and latents_std where the config has them; or, for FLUX.2,
    gathered in 2x2 patches ([B, L, h, w] -> [B, 4L, h / 2, w / 2]) and normalised by its batch norm. Raises ValueError
    for another shape or dtype.
    Source: the pipelines of Stable Diffusion, SD3, FLUX, SDXL (Playground v2.5) and FLUX.2 in diffusers.
    """
    _check_latents(z, vae.config.latent_channels, multiple=_patch(vae))
    if _batch_norm(vae) is not None:
        mean, std = _batch_norm_statistics(vae, z)
        return (_patchify(z, _patch(vae)) - mean) / std
    statistics = _channel_statistics(vae, z)
    if statistics is not None:
        mean, std = statistics
        return (z - mean) * vae.config.scaling_factor / std
    return (z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def unscale_latents(vae: Autoencoder, z: Tensor) -> Tensor:
    """The inverse of scale_latents: scaled latents to the raw [B, L, h, w] that decode takes, in z's dtype.

    Raises ValueError for another shape or dtype.
    """
    _check_latents(z, vae.config.latent_channels * _patch(vae) ** 2)
    if _batch_norm(vae) is not None:
        mean, std = _batch_norm_statistics(vae, z)
        return _unpatchify(z * std + mean, _patch(vae))
    statistics = _channel_statistics(vae, z)
    if statistics is not None:
        mean, std = statistics
        return z * std / vae.config.scaling_factor + mean
    return z / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)


def downsample_factor(vae: Autoencoder) -> int:
    """How many pixels one raw latent spans in each direction."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def pixel_multiple(vae: Autoencoder) -> int:
    """What an image's sides must be a multiple of: the downsample factor, times the patch for FLUX.2."""
    return downsample_factor(vae) * _patch(vae)


def _check_latents(z: Any, channels: int, multiple: int = 1) -> None:
    if not isinstance(z, Tensor) or z.ndim != 4 or z.shape[1] != channels:
        raise ValueError(f"z must be a tensor [B, {channels}, h, w], got {_described(z)}")
    if not z.is_floating_point():
        raise ValueError(f"z must be floating point, got {z.dtype}")
    if z.shape[2] % multiple or z.shape[3] % multiple:
        raise ValueError(f"z must have height and width that are multiples of {multiple}, got {_described(z)}")


def _batch_norm(vae: Autoencoder) -> torch.nn.BatchNorm2d | None:
    return getattr(vae, "bn", None)


def _patch(vae: Autoencoder) -> int:
    return vae.config.patch_size[0] if _batch_norm(vae) is not None else 1


def _batch_norm_statistics(vae: Autoencoder, z: Tensor) -> tuple[Tensor, Tensor]:
    bn = vae.bn  # type: ignore[attr-defined]
    mean = bn.running_mean.view(1, -1, 1, 1).to(z)
    std = torch.sqrt(bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(z)
    return mean, std


def _channel_statistics(vae: Autoencoder, z: Tensor) -> tuple[Tensor, Tensor] | None:
    mean, std = (getattr(vae.config, key, None) for key in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return None
    # A few numbers, for which no stream need be waited for.
    mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(z, non_blocking=True) for values in (mean, std))
    return mean, std


def _patchify(z: Tensor, patch: int) -> Tensor:
    return F.pixel_unshuffle(z, patch)


def _unpatchify(z: Tensor, patch: int) -> Tensor:
    return F.pixel_shuffle(z, patch)
