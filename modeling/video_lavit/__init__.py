"""Video-LaVIT (arXiv 2402.03161): keyframe and motion-vector tokens, one LLM, image and video de-tokenizers."""
