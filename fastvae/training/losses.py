"""Losses of a VAE: reconstruction, edges, and the divergence of its latents from a standard normal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from fastvae.models import DiagonalGaussianDistribution


def vae_loss(
    image: Tensor,
    reconstruction: Tensor,
    posterior: DiagonalGaussianDistribution,
    kl_weight: float = 1e-6,
    edge_weight: float = 0.0,
) -> Tensor:
    """Return squared error + edge_weight * edge_loss + kl_weight * KL divergence, per image element: a scalar, fp32.

    image and reconstruction: [B, C, H, W] in [-1, 1]. Dividing the KL divergence by the image's elements gives
    kl_weight the meaning it has in latent diffusion (Rombach et al., arXiv:2112.10752, where both terms are sums).
    Raises ValueError if the shapes differ.
    """
    if image.shape != reconstruction.shape:
        raise ValueError(
            f"image and reconstruction must have one shape, got {tuple(image.shape)} and {tuple(reconstruction.shape)}"
        )
    image, reconstruction = image.float(), reconstruction.float()
    loss = F.mse_loss(reconstruction, image)
    if edge_weight:
        loss = loss + edge_weight * edge_loss(image, reconstruction)
    return loss + kl_weight * posterior.kl().float().sum() / image.numel()


def edge_loss(image: Tensor, reconstruction: Tensor, scales: int = 3) -> Tensor:
    """Return the mean absolute error of the differences between neighbouring pixels, at ``scales`` scales: a scalar.

    Squared error alone accepts blur; this loss counts blurred and misplaced edges. Each scale is half the one before.
    image, reconstruction: [B, C, H, W].
    """
    error = reconstruction - image
    total = error.new_zeros(())
    for scale in range(scales):
        if scale:
            error = F.avg_pool2d(error, 2)
        total = total + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return total / scales
