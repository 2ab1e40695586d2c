"""Seer (arXiv 2303.14897): language-instructed video prediction with inflated latent diffusion."""
