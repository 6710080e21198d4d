"""The stride-2 convolution between encoder blocks (diffusers.models.downsampling)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Downsample2D(nn.Module):
    """Halve height and width by a 3x3 convolution of stride 2; with padding=0 one row and column of zeros come after.

    Shapes: [B, channels, H, W] -> [B, out_channels, H // 2, W // 2].
    Source: diffusers.models.downsampling.Downsample2D with use_conv=True.
    """

    def __init__(self, channels: int, out_channels: int | None = None, padding: int = 1):
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.padding = padding
        self.conv = nn.Conv2d(channels, self.out_channels, 3, stride=2, padding=padding)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.padding == 0:
            hidden_states = F.pad(hidden_states, (0, 1, 0, 1))
        return self.conv(hidden_states)
