"""Trainers: one module per training stage."""
