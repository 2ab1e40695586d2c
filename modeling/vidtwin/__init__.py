"""VidTwin (arXiv 2412.17726): a video VAE with decoupled structure and dynamics latents."""
