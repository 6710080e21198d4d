"""Images to scaled latents for training, and back, for any VAE with the interface of diffusers' AutoencoderKL.

autoencoder   the protocol of a VAE, its device and dtype
pixels        any image to NCHW in [-1, 1], and back
scaling       scale_latents, unscale_latents, and the numbers they use
logvar_range  the range that a log-variance is clamped to
interpreter   Triton's interpreter on a CPU, which only the tests run
sampling      sample_posterior: draws by seed or by generator
cpu_sampling  the same draws by seed on a CPU, in NumPy
wrappers      the VAE inside torch.compile, PEFT and the like
convert       encode_latents and decode_latents
"""
