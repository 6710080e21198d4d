"""PSNR: the error between two images of one shape."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


def psnr(image: ArrayLike, other: ArrayLike, peak: float = 255.0) -> float:
    """Return the peak signal-to-noise ratio in dB of two arrays or CPU tensors of one shape: infinite if equal.

    peak: the width of the range of values: 255 for uint8 images, 2 for images in [-1, 1]. Computed in float64. Raises
    ValueError if the shapes differ.
    """
    a, b = np.asarray(image, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"images must have one shape, got {a.shape} and {b.shape}")
    error = np.mean((a - b) ** 2)
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)
