"""Stride-2 convolution between encoder blocks (diffusers.models.downsampling)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Downsample2D(nn.Module):
    """Halve height and width by a 3x3 convolution of stride 2, after one row and one column of zeros at the far ends.

    Shapes: [B, channels, H, W] -> [B, channels, H // 2, W // 2].
    Source: diffusers.models.downsampling.Downsample2D with use_conv=True and padding=0.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.conv(F.pad(hidden_states, (0, 1, 0, 1)))
