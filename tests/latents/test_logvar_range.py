"""The range of a log-variance has one value in Python and in the kernels."""

from fastvae_kernels.parts import moments

from fastvae.latents.logvar_range import LOGVAR_RANGE


def test_the_kernels_clamp_to_the_same_range():
    assert (moments.LOWEST, moments.HIGHEST) == LOGVAR_RANGE
