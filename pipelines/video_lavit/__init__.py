"""Pipelines of video_lavit."""
