"""Scaling of latents: scaling factor, shift, per-channel statistics and FLUX.2's batch norm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.latents.autoencoder import Autoencoder, check_autoencoder
from fastvae.latents.pixels import described


def scaling_of(model: Any) -> dict[str, Any]:
    """Return the config values by which a model's latents are scaled, as store.json has them."""
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    return {**{name: getattr(model.config, name, None) for name in names}, "batch_norm": hasattr(model, "bn")}


def scale_latents(vae: Autoencoder, z: Tensor) -> Tensor:
    """Scale raw latents to those that a diffusion model is trained on, in z's dtype.

    (z - shift_factor) * scaling_factor; or by latents_mean and latents_std if the config has them; or, for FLUX.2,
    gathered in 2x2 patches ([B, L, h, w] -> [B, 4L, h / 2, w / 2]) and normalised by its batch norm. Raises ValueError
    for another shape or dtype.
    Source: the pipelines of Stable Diffusion, SD3, FLUX, SDXL (Playground v2.5) and FLUX.2 in diffusers.
    """
    check_autoencoder(vae)
    check_latents(z, vae.config.latent_channels, multiple=patch_size(vae))
    if _batch_norm(vae) is not None:
        mean, std = _batch_norm_statistics(vae, z)
        return (_patchify(z, patch_size(vae)) - mean) / std
    statistics = _channel_statistics(vae, z)
    if statistics is not None:
        mean, std = statistics
        return (z - mean) * vae.config.scaling_factor / std
    return (z - _shift(vae)) * vae.config.scaling_factor


def unscale_latents(vae: Autoencoder, z: Tensor) -> Tensor:
    """Invert scale_latents: return the raw latents [B, L, h, w] that decode takes, in z's dtype.

    Raises ValueError for another shape or dtype.
    """
    check_autoencoder(vae)
    check_latents(z, vae.config.latent_channels * patch_size(vae) ** 2)
    if _batch_norm(vae) is not None:
        mean, std = _batch_norm_statistics(vae, z)
        return _unpatchify(z * std + mean, patch_size(vae))
    statistics = _channel_statistics(vae, z)
    if statistics is not None:
        mean, std = statistics
        return z * std / vae.config.scaling_factor + mean
    return z / vae.config.scaling_factor + _shift(vae)


def downsample_factor(vae: Autoencoder) -> int:
    """Return the number of pixels that one raw latent spans in each direction."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def pixel_multiple(vae: Autoencoder) -> int:
    """Return the number that divides the sides of every image: the downsample factor, times the patch for FLUX.2."""
    return downsample_factor(vae) * patch_size(vae)


def denoiser_multiple(vae: Autoencoder) -> int:
    """Return the number that divides the sides of every image whose latents the family's denoiser takes.

    Transformers of models with 16 latent channels or more (SD3, FLUX, CogView4) gather 2x2 patches of raw latents.
    Source: patch_size of SD3Transformer2DModel and FluxTransformer2DModel in diffusers.
    """
    patches = 2 if vae.config.latent_channels >= 16 else 1
    return max(pixel_multiple(vae), patches * downsample_factor(vae))


def check_latents(z: Any, channels: int, multiple: int = 1) -> None:
    """Check that z is a floating-point tensor [B, channels, h, w], h and w divisible by ``multiple``.

    Raises ValueError if it is not.
    """
    if not isinstance(z, Tensor) or z.ndim != 4 or z.shape[1] != channels:
        raise ValueError(f"z must be a tensor [B, {channels}, h, w], got {described(z)}")
    if not z.is_floating_point():
        raise ValueError(f"z must be floating point, got {z.dtype}")
    if z.shape[2] % multiple or z.shape[3] % multiple:
        raise ValueError(f"z must have height and width that are multiples of {multiple}, got {described(z)}")


def _batch_norm(vae: Autoencoder) -> torch.nn.BatchNorm2d | None:
    return getattr(vae, "bn", None)


def patch_size(vae: Autoencoder) -> int:
    """Return the side of the patches that scale_latents gathers: 1 but for FLUX.2."""
    return vae.config.patch_size[0] if _batch_norm(vae) is not None else 1


def _shift(vae: Autoencoder) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0  # AsymmetricAutoencoderKL's config has none


def _batch_norm_statistics(vae: Autoencoder, z: Tensor) -> tuple[Tensor, Tensor]:
    bn = vae.bn  # type: ignore[attr-defined]
    mean = bn.running_mean.view(1, -1, 1, 1).to(z)
    std = torch.sqrt(bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(z)
    return mean, std


def _channel_statistics(vae: Autoencoder, z: Tensor) -> tuple[Tensor, Tensor] | None:
    mean, std = (getattr(vae.config, key, None) for key in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return None
    # A few numbers: non_blocking, so that no stream is waited for.
    wide = (torch.tensor(values, dtype=torch.float32, device="cpu").view(1, -1, 1, 1) for values in (mean, std))
    mean, std = (values.to(z, non_blocking=True) for values in wide)
    return mean, std


def _patchify(z: Tensor, patch: int) -> Tensor:
    return F.pixel_unshuffle(z, patch)


def _unpatchify(z: Tensor, patch: int) -> Tensor:
    return F.pixel_shuffle(z, patch)
