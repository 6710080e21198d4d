"""How far two pictures are apart."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


def psnr(picture: ArrayLike, other: ArrayLike) -> float:
    """Peak signal-to-noise ratio in dB between two uint8 arrays or tensors of one shape; infinite where equal.

    Raises ValueError where the shapes differ.
    """
    a, b = np.asarray(picture, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"pictures must have one shape, got {a.shape} and {b.shape}")
    error = np.mean((a - b) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255.0**2 / error)
