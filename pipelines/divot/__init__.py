"""Pipelines of divot."""
