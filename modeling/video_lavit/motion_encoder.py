"""Video-LaVIT's motion condition encoder: motion maps become the tokens that the video U-Net attends to."""

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.normalization import FP32LayerNorm
from diffusers.utils import BaseOutput
from torch import nn

from ...video.motion import resize_motion
from ..cpu_layers import Linear
from .layers_video_lavit import SpaceTimeBlock

_NORM_EPS = 1e-5


@dataclass
class VideoLavitMotionEncoderOutput(BaseOutput):
    """
    Args:
        sample: (batch, num_frames, grid_size**2, out_channels), the U-Net's `encoder_hidden_states`.
    """

    sample: torch.Tensor


class VideoLavitMotionEncoder(ModelMixin, ConfigMixin):
    r"""Space-time transformer over motion maps at 16 x 16 cells ([Video-LaVIT](https://arxiv.org/abs/2402.03161)).

    Args:
        in_channels: components of a motion vector.
        grid_size: side of the square grid the maps are resized to.
        hidden_size, num_layers, num_attention_heads: of the transformer.
        out_channels: width of the condition, the U-Net's `cross_attention_dim`.
        num_frames: number of temporal positions, or None for none (as in the released weights).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SpaceTimeBlock"]
    _repeated_blocks = ["SpaceTimeBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 2,
        grid_size: int = 16,
        hidden_size: int = 512,
        num_layers: int = 12,
        num_attention_heads: int = 8,
        out_channels: int = 1024,
        num_frames: int | None = None,
    ):
        super().__init__()
        self.in_proj = Linear(in_channels, hidden_size)
        self.pos_embed = nn.Parameter(torch.randn(1, grid_size**2, hidden_size) * 0.02)
        self.temp_pos = None
        if num_frames is not None:
            self.temp_pos = nn.Parameter(torch.randn(1, num_frames, hidden_size) * 0.02)
        self.blocks = nn.ModuleList(
            [
                SpaceTimeBlock(hidden_size, num_attention_heads, eps=_NORM_EPS, norm_class=FP32LayerNorm)
                for _ in range(num_layers)
            ]
        )
        self.norm = FP32LayerNorm(hidden_size, eps=_NORM_EPS)
        self.out_proj = Linear(hidden_size, out_channels)
        self.gradient_checkpointing = False

    def forward(self, motion, return_dict: bool = True):
        r"""
        Args:
            motion (`torch.Tensor` of shape `(batch, 2, num_frames, height, width)`):
                Raw motion maps of any size; they are resized to the grid (bicubic, no antialiasing, in float32).
            return_dict: return a [`VideoLavitMotionEncoderOutput`] instead of a tuple.

        Raises:
            ValueError: another shape, or more frames than temporal positions.
        """
        config = self.config
        if motion.ndim != 5 or motion.shape[1] != config.in_channels:
            raise ValueError(
                f"motion must be (batch, {config.in_channels}, num_frames, height, width), got {tuple(motion.shape)}"
            )
        grid = resize_motion(motion.float(), config.grid_size, config.grid_size).to(motion.dtype)
        hidden_states = self.in_proj(grid.flatten(3).permute(0, 2, 3, 1)) + self.pos_embed[:, None]
        if self.temp_pos is not None:
            frames = hidden_states.shape[1]
            if frames > config.num_frames:
                raise ValueError(f"the encoder has positions for {config.num_frames} frames, got {frames}")
            hidden_states = hidden_states + self.temp_pos[:, :frames, None]
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
        sample = self.out_proj(self.norm(hidden_states))
        return VideoLavitMotionEncoderOutput(sample) if return_dict else (sample,)


__all__ = ["VideoLavitMotionEncoder", "VideoLavitMotionEncoderOutput"]
