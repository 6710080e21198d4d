"""What a user learns of the own machine: which VAE is how fast here, what is in order, and a page that shows it."""
