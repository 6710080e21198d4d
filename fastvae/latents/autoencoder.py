"""The protocol of a VAE that latents are made with, and its device and dtype."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

# Where an accelerated VAE keeps its fast path, a fastvae.fast.fast_path.FastPath: looked for, and never imported, here.
ACCELERATED = "_fastvae"


class Autoencoder(Protocol):
    """What these functions ask of a VAE: diffusers' AutoencoderKL and ours have it."""

    config: Any

    def encode(self, x: Tensor) -> Any:
        """The posterior of pixels [B, C, H, W] in [-1, 1], as ``.latent_dist`` with ``.parameters`` [B, 2L, h, w]."""
        ...

    def decode(self, z: Tensor) -> Any:
        """The images of raw latents [B, L, h, w], as ``.sample`` [B, C, H, W]."""
        ...


def check_finite(name: str, values: Tensor, how: str) -> None:
    """Wait for values [B, ...]. Raises ValueError, which names the first rows, unless all are finite."""
    rows = values.flatten(1).isfinite().all(dim=1) if values.numel() else values.new_ones(0, dtype=torch.bool)
    if not rows.all():
        bad = (~rows).nonzero().flatten().tolist()
        raise ValueError(f"{name} must be finite, got NaN or infinity in rows {bad[:8]} of {len(rows)}, {how}")


def _weight(vae: Any) -> Tensor:
    # Weights of one byte are stored so and computed in another dtype, that of the norms (diffusers' layerwise casting).
    weights = [weight for weight in vae.parameters() if weight.is_floating_point()]
    return next((weight for weight in weights if weight.itemsize > 1), weights[0])


def like_weights(vae: Any, values: Tensor) -> Tensor:
    """Values [B, C, H, W] where a module's weights are, and in the dtype that it computes in."""
    return _beside_weights(vae, values).to(dtype=_weight(vae).dtype)


def _beside_weights(vae: Any, values: Tensor) -> Tensor:
    # Offloaded weights have no place of their own: hooks take the values to wherever they will be.
    device = _weight(vae).device
    return values if device.type == "meta" else values.to(device)
