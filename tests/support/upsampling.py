"""A random upsampling convolution, and torch's own."""

import torch
import torch.nn.functional as F


def random_input(shape, channels, dtype):
    """Return x of this shape [N, C, H, W] and a 3x3 weight to ``channels`` channels."""
    weight = torch.randn(channels, shape[1], 3, 3) / (3 * shape[1] ** 0.5)
    return torch.randn(shape).to(dtype), weight.to(dtype)


def eager(x, weight, bias=None):
    """Return the convolution of x enlarged by nearest 2x."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
