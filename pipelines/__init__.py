"""Diffusers pipelines: one module per task, one folder per system where there are several."""
