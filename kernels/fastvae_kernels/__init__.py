"""Kernels for the autoencoder of latent diffusion, on torch and triton alone: one op a file, all in one order.

resize           resize_lanczos: pictures to the pixels of a bucket, with Pillow's bytes
pixels           pixels_conv_in: pixels to the first convolution's output
group_norm       statistics, affine and scale_shift_silu: GroupNorm in pieces
group_norm_silu  GroupNorm with SiLU as one differentiable op
residual         residual_add: the end of a residual block, and the next norm's statistics
attention        attention of one head over the positions of an image
upsample         nearest 2x and a 3x3 convolution as one
interleave       upsample_interleave: the phases of such a convolution as one image, and the next norm's statistics
winograd         winograd_conv: the apply half of a GroupNorm and a 3x3 convolution, by Winograd's transforms
posterior        sample_posterior: moments to latents
divergence       kl_divergence of a row's posterior
cpu              kernels for a CPU in C
parts            parts of these ops; no ops themselves
shared           device code and launch helpers that every op may use
"""
