"""Training of the bundled shapes model: a VAE, then a text encoder and transformer by flow matching."""
