"""Winograd's matrices in exact fractions: the identity, and the size of a transformed window."""

from fractions import Fraction

import pytest
from fastvae_kernels.shared.winograd_matrices import FORMS


def exact(matrix):
    """Return the rows as fractions; the denominators are at most 256."""
    return [[Fraction(value).limit_denominator(256) for value in row] for row in matrix]


@pytest.mark.parametrize("form", FORMS)
def test_the_transforms_are_a_correlation_along_a_line(form):
    """For each pixel k and weight r of a line, y[i] = 1 where k = i + r and 0 elsewhere."""
    winograd = FORMS[form]
    before, weight, after = (exact(matrix) for matrix in (winograd.input, winograd.weight, winograd.output))
    for k in range(winograd.window):
        for r in range(3):
            products = [before[n][k] * weight[n][r] for n in range(winograd.window)]
            results = [sum(a * b for a, b in zip(row, products, strict=True)) for row in after]
            assert results == [int(k == i + r) for i in range(winograd.tile)]


@pytest.mark.parametrize("form", FORMS)
def test_a_transformed_window_is_as_large_as_the_window(form):
    """The norm of each row of B^T is at most the square root of two and at least half of it."""
    for row in FORMS[form].input:
        assert 0.5 <= sum(value * value for value in row) <= 2.0
