"""Divot (arXiv 2412.04432): diffusion-powered video tokenizer and de-tokenizer, and Divot-LLM."""
