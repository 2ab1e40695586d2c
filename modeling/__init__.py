"""Configurations, models and processors: one folder per system."""
