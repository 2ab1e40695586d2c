"""Outputs that several models share."""

from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput


@dataclass
class VideoUNetOutput(BaseOutput):
    """
    Args:
        sample (`torch.Tensor` of shape `(batch, channels, num_frames, height, width)`): the network's prediction.
    """

    # diffusers' `UNet3DConditionOutput` is the same, but its module imports a hundred megabytes of other libraries.
    sample: torch.Tensor


__all__ = ["VideoUNetOutput"]
