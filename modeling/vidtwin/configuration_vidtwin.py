"""Configuration of VidTwin (arXiv 2412.17726)."""

import math
from typing import NamedTuple

from transformers import PreTrainedConfig

from ..configuration import strict_config


class VidTwinLatentShapes(NamedTuple):
    """Shapes, without the batch axis, of the three latents of one window of `num_frames` frames."""

    structure: tuple[int, ...]
    dynamics_x: tuple[int, ...]
    dynamics_y: tuple[int, ...]


@strict_config
class VidTwinConfig(PreTrainedConfig):
    r"""
    Configuration of [`VidTwinModel`]. The defaults are the released `vidtwin_structure_7_7_8_dynamics_7_8`.

    The input size is part of the architecture: position tables, the mapping from query tokens to frames and the
    dynamics' upsampling are built for it.

    Args:
        num_frames (`int`, defaults to 16): frames of one window.
        height (`int`, defaults to 224): frame height in pixels, a multiple of the patch height.
        width (`int`, defaults to 224): frame width in pixels, a multiple of the patch width.
        num_channels (`int`, defaults to 3): colour channels of input and output.
        patch_size (`int` or `[height, width]`, defaults to 16): patch size in pixels. A patch never spans frames.
        hidden_size (`int`, defaults to 768): width of encoder and decoder, a multiple of 4 and of the head counts.
        num_encoder_layers, num_decoder_layers (`int`, default to 16): blocks of the two trunks.
        num_encoder_attention_heads, num_decoder_attention_heads (`int`, default to 12): their attention heads.
        mlp_ratio (`float`, defaults to 4.0): width of the feed-forward layers relative to `hidden_size`.
        temporal_causal (`bool`, defaults to `True`): whether a frame attends only to itself and earlier frames.
        num_query_tokens (`int`, defaults to 16): queries of the temporal Q-Former, the time axis of the structure.
        query_hidden_size (`int`, defaults to 64): width of the temporal Q-Former, a multiple of its head count.
        num_query_layers (`int`, defaults to 6): its layers; every second one, from the first, has cross-attention.
        num_query_attention_heads (`int`, defaults to 8): its attention heads.
        query_intermediate_size (`int`, defaults to 768): width of its feed-forward layers.
        query_dropout (`float`, defaults to 0.1): its dropout of hidden states and attention probabilities in training.
        structure_channels (`int`, defaults to 8): channels of the structure latents.
        structure_base_channels (`int`, defaults to 128): width of the structure branch before its first block.
        cont_num_blocks (`int`, defaults to 1): times the structure grid is halved (rounding up).
        dynamics_channels (`int`, defaults to 8): channels of the dynamics latents.
        downsample_motion (`bool`, defaults to `True`): whether the dynamics' space axes are shortened. One linear layer
            serves both, so the token grid must be square then.
        motion_num_blocks (`int`, defaults to 1): times they are halved (rounding up) if `downsample_motion`; with 0 the
            dynamics keep their length but still pass the layers that would restore it.
        kl_loss_weight (`float`, defaults to 0.001): weight of the KL term in the loss.

    Raises:
        ValueError: the values contradict each other.
    """

    model_type = "vidtwin"

    num_frames: int = 16
    height: int = 224
    width: int = 224
    num_channels: int = 3
    patch_size: int | list[int] | tuple[int, int] = 16
    hidden_size: int = 768
    num_encoder_layers: int = 16
    num_decoder_layers: int = 16
    num_encoder_attention_heads: int = 12
    num_decoder_attention_heads: int = 12
    mlp_ratio: float | int = 4.0
    temporal_causal: bool = True
    num_query_tokens: int = 16
    query_hidden_size: int = 64
    num_query_layers: int = 6
    num_query_attention_heads: int = 8
    query_intermediate_size: int = 768
    query_dropout: float | int = 0.1
    structure_channels: int = 8
    structure_base_channels: int = 128
    cont_num_blocks: int = 1
    dynamics_channels: int = 8
    downsample_motion: bool = True
    motion_num_blocks: int = 1
    kl_loss_weight: float | int = 0.001

    @property
    def patch_height_and_width(self):
        """(height, width) of a patch in pixels."""
        return (self.patch_size, self.patch_size) if isinstance(self.patch_size, int) else tuple(self.patch_size)

    @property
    def grid_size(self):
        """(rows, columns) of the token grid of a frame."""
        patch_height, patch_width = self.patch_height_and_width
        return self.height // patch_height, self.width // patch_width

    @property
    def structure_grid_size(self):
        """(rows, columns) of the structure latents."""
        return tuple(_halve(size, self.cont_num_blocks) for size in self.grid_size)

    @property
    def dynamics_grid_size(self):
        """(length of dynamics_y's space axis, length of dynamics_x's space axis)."""
        blocks = self.motion_num_blocks if self.downsample_motion else 0
        return tuple(_halve(size, blocks) for size in self.grid_size)

    @property
    def latent_shapes(self):
        """`VidTwinLatentShapes`: structure (num_query_tokens, rows, columns, channels), dynamics_x (channels,
        num_frames, columns), dynamics_y (channels, num_frames, rows)."""
        rows, columns = self.dynamics_grid_size
        return VidTwinLatentShapes(
            structure=(self.num_query_tokens, *self.structure_grid_size, self.structure_channels),
            dynamics_x=(self.dynamics_channels, self.num_frames, columns),
            dynamics_y=(self.dynamics_channels, self.num_frames, rows),
        )

    def compression(self):
        """How many numbers a window of video and its latents are, counted from this configuration.

        Returns:
            dict: `input_values` (num_frames * num_channels * height * width), `latent_values` (all three latents),
            `structure_values`, `dynamics_values` (x and y), `latent_fraction` (latent / input) and `ratio` (input /
            latent).
        """
        structure, dynamics_x, dynamics_y = (math.prod(shape) for shape in self.latent_shapes)
        input_values = self.num_frames * self.num_channels * self.height * self.width
        latent_values = structure + dynamics_x + dynamics_y
        return {
            "input_values": input_values,
            "latent_values": latent_values,
            "structure_values": structure,
            "dynamics_values": dynamics_x + dynamics_y,
            "latent_fraction": latent_values / input_values,
            "ratio": input_values / latent_values,
        }

    def validate_architecture(self):
        # One validator, because the later checks rely on the earlier ones.
        self._check_counts()
        self._check_patches()
        self._check_widths()
        self._check_grids()

    def _check_counts(self):
        positive = (
            "num_frames height width num_channels hidden_size num_encoder_layers num_decoder_layers mlp_ratio "
            "num_encoder_attention_heads num_decoder_attention_heads num_query_tokens query_hidden_size "
            "num_query_layers num_query_attention_heads query_intermediate_size structure_channels "
            "structure_base_channels dynamics_channels"
        )
        for name in positive.split():
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.cont_num_blocks < 0:
            raise ValueError(f"cont_num_blocks must not be negative, got {self.cont_num_blocks}")
        if self.downsample_motion and self.motion_num_blocks < 0:
            raise ValueError(f"motion_num_blocks must not be negative, got {self.motion_num_blocks}")
        if self.kl_loss_weight < 0:
            raise ValueError(f"kl_loss_weight must not be negative, got {self.kl_loss_weight}")

    def _check_patches(self):
        if not isinstance(self.patch_size, int) and len(self.patch_size) != 2:
            raise ValueError(f"patch_size must be a number or [height, width], got {self.patch_size}")
        for name, size, patch in zip(("height", "width"), (self.height, self.width), self.patch_height_and_width):
            if patch <= 0 or size % patch:
                raise ValueError(f"{name} {size} is not a multiple of the patch size {patch}")

    def _check_widths(self):
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size must be a multiple of 4 for the position tables, got {self.hidden_size}")
        for heads, width in (
            ("num_encoder_attention_heads", "hidden_size"),
            ("num_decoder_attention_heads", "hidden_size"),
            ("num_query_attention_heads", "query_hidden_size"),
        ):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(f"{width} {getattr(self, width)} is not a multiple of {heads} {getattr(self, heads)}")
        if not 0 <= self.query_dropout < 1:
            raise ValueError(f"query_dropout must be in [0, 1), got {self.query_dropout}")

    def _check_grids(self):
        rows, columns = self.grid_size
        if self.downsample_motion and rows != columns:
            raise ValueError(
                f"downsample_motion needs a square token grid, because one linear layer serves both axes; got "
                f"{rows}x{columns}. Set downsample_motion=False or a square input."
            )
        # The decoder crops the doubled structure grid with the vertical border on both axes (see VidTwinModel).
        up_rows, up_columns = (size * 2**self.cont_num_blocks for size in self.structure_grid_size)
        if (up_rows - rows) // 2 + columns > up_columns:
            raise ValueError(
                f"a token grid of {rows}x{columns} cannot be cropped from the upsampled structure grid of "
                f"{up_rows}x{up_columns} with the border of the rows; choose another size or cont_num_blocks"
            )


def _halve(size, times):
    for _ in range(times):
        size = (size + 1) // 2  # a 3x3 convolution with stride 2 and padding 1
    return size


__all__ = ["VidTwinConfig", "VidTwinLatentShapes"]
