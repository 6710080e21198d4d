"""Range of a log-variance: every use of one clamps it, as diffusers' DiagonalGaussianDistribution does.

This module imports nothing, since a store's files are read without torch. The kernels have the same two numbers in
fastvae_kernels/parts/moments.py: they import nothing of this package, and a test compares the two.
"""

LOGVAR_RANGE = (-30.0, 20.0)
