"""Matrices of Winograd's 3x3 convolutions: tiles of m x m results from windows of (m + 2) x (m + 2) pixels.

Y = A^T [(G g G^T) * (B^T d B)] A, for a window d, a 3x3 filter g and products element by element. F4 takes the points
0, ±3/4, ±3/2 and infinity, F2 takes 0, ±1 and infinity. Row i of F4's B^T is divided by a power of two near its norm
and row i of G multiplied by it, so that the values of a transformed window are as large as those of the window.
Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015; tests/ops/test_winograd_matrices.py
checks the identity in exact fractions.
"""

from __future__ import annotations

from typing import NamedTuple

Matrix = tuple[tuple[float, ...], ...]


class Winograd(NamedTuple):
    """The matrices of one F(m x m, 3x3): ``input`` B^T [m+2, m+2], ``weight`` G [m+2, 3], ``output`` A^T [m, m+2]."""

    input: Matrix
    weight: Matrix
    output: Matrix

    @property
    def tile(self) -> int:
        """Results along a side, m."""
        return len(self.output)

    @property
    def window(self) -> int:
        """Pixels along a side, m + 2."""
        return len(self.input)


F2 = Winograd(
    input=(
        (-1.0, 0.0, 1.0, 0.0),
        (0.0, 1.0, 1.0, 0.0),
        (0.0, -1.0, 1.0, 0.0),
        (0.0, -1.0, 0.0, 1.0),
    ),
    weight=(
        (-1.0, 0.0, 0.0),
        (1 / 2, 1 / 2, 1 / 2),
        (1 / 2, -1 / 2, 1 / 2),
        (0.0, 0.0, 1.0),
    ),
    output=(
        (1.0, 1.0, 1.0, 0.0),
        (0.0, 1.0, -1.0, 1.0),
    ),
)

F4 = Winograd(
    input=(
        (81 / 256, 0.0, -45 / 64, 0.0, 1 / 4, 0.0),
        (0.0, -27 / 64, -9 / 16, 3 / 16, 1 / 4, 0.0),
        (0.0, 27 / 64, -9 / 16, -3 / 16, 1 / 4, 0.0),
        (0.0, -27 / 64, -9 / 32, 3 / 4, 1 / 2, 0.0),
        (0.0, 27 / 64, -9 / 32, -3 / 4, 1 / 2, 0.0),
        (0.0, 81 / 256, 0.0, -45 / 64, 0.0, 1 / 4),
    ),
    weight=(
        (256 / 81, 0.0, 0.0),
        (-512 / 243, -128 / 81, -32 / 27),
        (-512 / 243, 128 / 81, -32 / 27),
        (64 / 243, 32 / 81, 16 / 27),
        (64 / 243, -32 / 81, 16 / 27),
        (0.0, 0.0, 4.0),
    ),
    output=(
        (1.0, 1.0, 1.0, 1.0, 1.0, 0.0),
        (0.0, 3 / 4, -3 / 4, 3 / 2, -3 / 2, 0.0),
        (0.0, 9 / 16, 9 / 16, 9 / 4, 9 / 4, 0.0),
        (0.0, 27 / 64, -27 / 64, 27 / 8, -27 / 8, 1.0),
    ),
)

FORMS = {"winograd2": F2, "winograd4": F4}
