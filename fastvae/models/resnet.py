"""Residual block (diffusers.models.resnet), without time embedding, which a VAE does not have."""

from __future__ import annotations

from torch import Tensor, nn

from fastvae.models.activations import get_activation


class ResnetBlock2D(nn.Module):
    """x + conv2(act(norm2(conv1(act(norm1(x)))))), with a 1x1 convolution on x if the number of channels changes.

    Shapes: [B, in_channels, H, W] -> [B, out_channels, H, W].
    Source: diffusers.models.resnet.ResnetBlock2D with temb_channels=None and output_scale_factor=1.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        dropout: float = 0.0,
        groups: int = 32,
        eps: float = 1e-6,
        non_linearity: str = "swish",
    ):
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.in_channels = in_channels
        self.out_channels = out_channels

        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity = get_activation(non_linearity)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, input_tensor: Tensor) -> Tensor:
        hidden_states = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        hidden_states = self.conv2(self.dropout(self.nonlinearity(self.norm2(hidden_states))))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return input_tensor + hidden_states
