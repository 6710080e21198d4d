"""Triton kernels for the autoencoder of latent diffusion; stands on torch and triton alone."""
