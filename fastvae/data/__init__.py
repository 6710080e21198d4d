"""Images in, latents stored: sources, image rules, the latent store, its dataset, encode and decode runs."""
