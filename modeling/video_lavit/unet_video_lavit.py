"""Video-LaVIT's video U-Net: Stable Video Diffusion's, with cross attention to motion instead of to an image embedding.

Residual blocks, resampling and names are diffusers' `UNetSpatioTemporalConditionModel`; only its transformers differ.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models import UNetSpatioTemporalConditionModel
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionOutput
from torch import nn

from ..cpu_layers import use_cpu_layers


class MotionTransformerSpatioTemporalModel(TransformerSpatioTemporalModel):
    """Spatio-temporal transformer whose condition is a grid of tokens per frame.

    - Spatial cross attention of frame t reads all tokens of frame t (Stable Video Diffusion repeats one embedding).
    - Temporal cross attention of a location reads the tokens of all frames at that location of the grid, enlarged or
      reduced to the feature map by nearest neighbour.
    """

    def forward(self, hidden_states, encoder_hidden_states, image_only_indicator, return_dict=True):
        """
        Args:
            hidden_states: (batch * num_frames, channels, height, width).
            encoder_hidden_states: (batch * num_frames, grid * grid, cross_attention_dim).
            image_only_indicator: (batch, num_frames), zeros.
            return_dict: kept for the calls of diffusers' blocks, which pass False; a tuple is returned.
        """
        batch_frames, _, height, width = hidden_states.shape
        num_frames = image_only_indicator.shape[-1]
        location = _nearest_locations(encoder_hidden_states, height, width)

        residual = hidden_states
        hidden_states = self.norm(hidden_states).permute(0, 2, 3, 1).reshape(batch_frames, height * width, -1)
        hidden_states = self.proj_in(hidden_states)

        frame_indices = torch.arange(num_frames, device=hidden_states.device).repeat(batch_frames // num_frames)
        frame_embeds = self.time_pos_embed(self.time_proj(frame_indices).to(hidden_states.dtype))[:, None]

        for block, temporal_block in zip(self.transformer_blocks, self.temporal_transformer_blocks):
            arguments = (block, temporal_block, hidden_states, encoder_hidden_states, frame_embeds, location)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(self._layer, *arguments, image_only_indicator)
            else:
                hidden_states = self._layer(*arguments, image_only_indicator)

        hidden_states = self.proj_out(hidden_states).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return (hidden_states + residual,)

    def _layer(self, block, temporal_block, hidden_states, condition, frame_embeds, location, image_only_indicator):
        hidden_states = block(hidden_states, encoder_hidden_states=condition)
        mixed = _temporal_block(
            temporal_block, hidden_states + frame_embeds, image_only_indicator.shape[-1], condition, location
        )
        return self.time_mixer(x_spatial=hidden_states, x_temporal=mixed, image_only_indicator=image_only_indicator)


def _nearest_locations(condition, height, width):
    """The cell of the condition's grid that each location of a feature map reads: (height * width,); None if equal."""
    side = round(condition.shape[1] ** 0.5)
    if side * side != condition.shape[1]:
        raise ValueError(f"the motion condition is a square grid of tokens, got {condition.shape[1]} per frame")
    if (height, width) == (side, side):
        return None
    cells = torch.arange(side * side, dtype=torch.float32, device=condition.device).reshape(1, 1, side, side)
    # The original interpolates by factors, which decides ties of the rounding.
    return F.interpolate(cells, scale_factor=(height / side, width / side), mode="nearest").flatten().long()


def _temporal_block(block, hidden_states, num_frames, condition, location):
    """`TemporalBasicTransformerBlock` with a condition per location.

    Keys and values are projected on the condition's own grid and then picked per location: the same numbers as
    projecting the enlarged condition at a fraction of the work.
    """
    batch_frames, locations, channels = hidden_states.shape
    # (batch, frames, locations, channels) -> (batch * locations, frames, channels)
    hidden_states = hidden_states.unflatten(0, (-1, num_frames)).transpose(1, 2).reshape(-1, num_frames, channels)

    hidden_states = block.ff_in(block.norm_in(hidden_states)) + hidden_states
    hidden_states = block.attn1(block.norm1(hidden_states)) + hidden_states
    hidden_states = (
        _condition_attention(block.attn2, block.norm2(hidden_states), condition, num_frames, location, locations)
        + hidden_states
    )
    hidden_states = block.ff(block.norm3(hidden_states)) + hidden_states

    hidden_states = hidden_states.unflatten(0, (-1, locations)).transpose(1, 2)
    return hidden_states.reshape(batch_frames, locations, channels)


def _condition_attention(attention, hidden_states, condition, num_frames, location, locations):
    def split(projected):
        return projected.unflatten(-1, (attention.heads, -1)).transpose(-3, -2)

    def at_locations(projected):
        # (batch * frames, grid, inner) -> (batch * locations, frames, inner)
        projected = projected.unflatten(0, (-1, num_frames)).transpose(1, 2)
        if location is not None:
            projected = projected.index_select(1, location)
        return projected.reshape(-1, num_frames, projected.shape[-1])

    query = split(attention.to_q(hidden_states))
    key = split(at_locations(attention.to_k(condition)))
    value = split(at_locations(attention.to_v(condition)))
    attended = F.scaled_dot_product_attention(query, key, value)
    attended = attended.transpose(1, 2).reshape(len(query), num_frames, -1)
    return attention.to_out[1](attention.to_out[0](attended))


class VideoLavitUNetSpatioTemporalConditionModel(UNetSpatioTemporalConditionModel):
    r"""3-d U-Net that denoises a clip given its keyframe and motion ([Video-LaVIT](https://arxiv.org/abs/2402.03161)).

    Arguments and state-dict names are those of [`~diffusers.UNetSpatioTemporalConditionModel`]. Input channels are
    noisy latents (4), image latents (4) and motion (2); `encoder_hidden_states` holds a grid of tokens per frame.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | None = None,
        in_channels: int = 10,
        out_channels: int = 4,
        down_block_types: tuple[str, ...] = (
            "CrossAttnDownBlockSpatioTemporal",
            "CrossAttnDownBlockSpatioTemporal",
            "CrossAttnDownBlockSpatioTemporal",
            "DownBlockSpatioTemporal",
        ),
        up_block_types: tuple[str, ...] = (
            "UpBlockSpatioTemporal",
            "CrossAttnUpBlockSpatioTemporal",
            "CrossAttnUpBlockSpatioTemporal",
            "CrossAttnUpBlockSpatioTemporal",
        ),
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        addition_time_embed_dim: int = 256,
        projection_class_embeddings_input_dim: int = 768,
        layers_per_block: int | tuple[int, ...] = 2,
        cross_attention_dim: int | tuple[int, ...] = 1024,
        transformer_layers_per_block: int | tuple[int, ...] = 1,
        num_attention_heads: int | tuple[int, ...] = (5, 10, 20, 20),
        num_frames: int = 24,
    ):
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            addition_time_embed_dim=addition_time_embed_dim,
            projection_class_embeddings_input_dim=projection_class_embeddings_input_dim,
            layers_per_block=layers_per_block,
            cross_attention_dim=cross_attention_dim,
            transformer_layers_per_block=transformer_layers_per_block,
            num_attention_heads=num_attention_heads,
            num_frames=num_frames,
        )
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            if hasattr(block, "attentions"):
                block.attentions = nn.ModuleList([_with_motion(attention) for attention in block.attentions])
        use_cpu_layers(self)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        added_time_ids: torch.Tensor,
        return_dict: bool = True,
    ) -> UNetSpatioTemporalConditionOutput | tuple:
        r"""
        Args:
            sample (`torch.Tensor` of shape `(batch, num_frames, in_channels, height, width)`): noisy input.
            timestep: the scheduler's time, a number or one per sample.
            encoder_hidden_states (`torch.Tensor` of shape `(batch, num_frames, grid * grid, cross_attention_dim)`):
                output of [`VideoLavitMotionEncoder`].
            added_time_ids (`torch.Tensor` of shape `(batch, 3)`): frames per second, motion bucket, noise strength.
            return_dict: return an output object instead of a tuple.

        Raises:
            ValueError: the condition has another number of frames than the sample, or a size the depth does not divide.
        """
        batch_size, num_frames, _, height, width = sample.shape
        if encoder_hidden_states.ndim != 4 or tuple(encoder_hidden_states.shape[:2]) != (batch_size, num_frames):
            raise ValueError(
                f"encoder_hidden_states must be ({batch_size}, {num_frames}, tokens, channels) like the sample, got "
                f"{tuple(encoder_hidden_states.shape)}"
            )
        factor = 2**self.num_upsamplers
        if height % factor or width % factor:
            raise ValueError(f"latent height and width must be multiples of {factor}, got {height} x {width}")

        # 1. time
        timesteps = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).expand(batch_size)
        time_embeds = self.add_time_proj(added_time_ids.flatten()).reshape(batch_size, -1)
        embeds = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))
        embeds = embeds + self.add_embedding(time_embeds.to(sample.dtype))
        embeds = embeds.repeat_interleave(num_frames, dim=0)

        # 2. pre-process: frames join the batch
        hidden_states = self.conv_in(sample.flatten(0, 1))
        condition = encoder_hidden_states.flatten(0, 1)
        image_only_indicator = torch.zeros(batch_size, num_frames, dtype=sample.dtype, device=sample.device)

        # 3. down
        residuals = (hidden_states,)
        for block in self.down_blocks:
            inputs = {"encoder_hidden_states": condition} if getattr(block, "has_cross_attention", False) else {}
            hidden_states, added = block(hidden_states, embeds, image_only_indicator=image_only_indicator, **inputs)
            residuals += added

        # 4. mid
        hidden_states = self.mid_block(hidden_states, embeds, condition, image_only_indicator)

        # 5. up
        for block in self.up_blocks:
            inputs = {"encoder_hidden_states": condition} if getattr(block, "has_cross_attention", False) else {}
            count = len(block.resnets)
            hidden_states = block(
                hidden_states,
                residuals[-count:],
                temb=embeds,
                image_only_indicator=image_only_indicator,
                **inputs,
            )
            residuals = residuals[:-count]

        # 6. post-process
        hidden_states = self.conv_out(self.conv_act(self.conv_norm_out(hidden_states)))
        hidden_states = hidden_states.unflatten(0, (batch_size, num_frames))
        if not return_dict:
            return (hidden_states,)
        return UNetSpatioTemporalConditionOutput(sample=hidden_states)


def _with_motion(stock):
    """diffusers' transformer with our forward: the same submodules and names, nothing is initialised twice."""
    with torch.device("meta"):
        ours = MotionTransformerSpatioTemporalModel(
            stock.num_attention_heads,
            stock.attention_head_dim,
            in_channels=stock.in_channels,
            num_layers=len(stock.transformer_blocks),
            cross_attention_dim=stock.transformer_blocks[0].attn2.cross_attention_dim,
        )
    for name, module in stock.named_children():
        setattr(ours, name, module)
    return ours


__all__ = ["MotionTransformerSpatioTemporalModel", "VideoLavitUNetSpatioTemporalConditionModel"]
