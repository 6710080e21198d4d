"""Blocks of encoder and decoder (diffusers.models.unets).

unet_2d_blocks  residual blocks, attention between them, one change of size at the end
"""
