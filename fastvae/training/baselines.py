"""Baselines for an autoencoder's reconstructions: a thumbnail and the best linear map of blocks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def square(image: np.ndarray, side: int) -> Tensor:
    """Return the centred square of an image [H, W, 3], scaled to ``side`` pixels: uint8 [3, side, side]."""
    short = min(image.shape[:2])
    top, left = (image.shape[0] - short) // 2, (image.shape[1] - short) // 2
    cropped = Image.fromarray(image[top : top + short, left : left + short])
    scaled = np.asarray(cropped.resize((side, side), Image.Resampling.LANCZOS))
    return torch.from_numpy(scaled.copy()).permute(2, 0, 1)


def thumbnail_baseline(image: Tensor, factor: int = 8) -> Tensor:
    """Return ``image``, uint8 [3, H, W], reduced by ``factor`` and enlarged again, both bicubic."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    small = picture.resize((picture.width // factor, picture.height // factor), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(small.resize(picture.size, Image.Resampling.BICUBIC)).copy()).permute(2, 0, 1)


class LinearBaseline:
    """Best linear map of 8x8 blocks to ``numbers`` numbers and back: a principal component analysis of blocks.

    images: uint8 [B, 3, H, W] batches, from which the map is computed.
    """

    def __init__(self, images: Iterable[Tensor], numbers: int = 4, block: int = 8):
        self.block = block
        blocks = torch.cat([self._blocks(batch) for batch in images])
        self.mean = blocks.mean(dim=0)
        covariance = torch.cov((blocks - self.mean).T)
        self.basis = torch.linalg.eigh(covariance).eigenvectors[:, -numbers:]

    def __call__(self, image: Tensor) -> Tensor:
        """Return the reconstruction of ``image``, uint8 [3, H, W], whose sides are multiples of the block."""
        blocks = self._blocks(image[None]) - self.mean
        restored = blocks @ self.basis @ self.basis.T + self.mean
        columns = restored.view(1, -1, restored.shape[1]).transpose(1, 2)
        folded = F.fold(columns, image.shape[1:], self.block, stride=self.block)
        return folded[0].round().clamp(0, 255).to(torch.uint8)

    def _blocks(self, images: Tensor) -> Tensor:
        columns = F.unfold(images.double(), self.block, stride=self.block)
        return columns.transpose(1, 2).flatten(0, 1)
