"""Doubling of height and width between decoder blocks (diffusers.models.upsampling)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Upsample2D(nn.Module):
    """Double height and width by nearest neighbour, then a 3x3 convolution.

    Shapes: [B, channels, H, W] -> [B, channels, 2H, 2W].
    Source: diffusers.models.upsampling.Upsample2D with use_conv=True.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        # torch's channels_last upsampling counts elements in 32 bits (pytorch#141831) and has failed for batches of
        # 64 and more; the contiguous one has not. diffusers compares twice the number of input elements with the
        # limit, but the output has four times as many.
        if hidden_states.shape[0] >= 64 or 4 * hidden_states.numel() >= 2**31:
            hidden_states = hidden_states.contiguous()
        return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))
