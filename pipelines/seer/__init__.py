"""Pipelines of seer."""
