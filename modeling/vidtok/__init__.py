"""VidTok (arXiv 2412.13061): causal / non-causal, KL / FSQ video autoencoders."""
