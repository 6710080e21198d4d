"""Autoencoders (diffusers.models.autoencoders).

vae                   encoder, decoder and posterior
autoencoder_kl        AutoencoderKL
autoencoder_kl_flux2  AutoencoderKLFlux2
"""
