"""The denoising U-Net of Divot's de-tokenizer (Divot: Diffusion Powers Video Tokenizer, arXiv:2412.04432, section 3.2).

Notable: the architecture is the image-to-video U-Net of DynamiCrafter without concatenated image latents. The only
condition is the resampled Divot feature (125 tokens), plus the time step and a frame stride ("fs").
"""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ..cpu_layers import FeatureMapConv2d, can_upsample_by_phases, upsample_conv2d
from ..outputs import VideoUNetOutput
from .unet_blocks_divot import (
    ContextKeyValues,
    DivotResnetBlock,
    DivotSpatialTransformer,
    DivotTemporalTransformer,
)


class DivotUNetBlock(nn.Module):
    """One resolution of the way down or up: residual blocks, each followed by a spatial and a temporal transformer
    where the level has attention, then (except at the last level) a change of resolution."""

    def __init__(self, resnet_channels, out_channels, attention, resample, time_embed_dim, dropout, norm_num_groups):
        super().__init__()
        self.resnets = nn.ModuleList(
            DivotResnetBlock(channels, out_channels, time_embed_dim, dropout, norm_num_groups)
            for channels in resnet_channels
        )
        self.attentions = nn.ModuleList()
        self.temporal_attentions = nn.ModuleList()
        if attention is not None:
            for _ in resnet_channels:
                spatial, temporal = attention(out_channels)
                self.attentions.append(spatial)
                self.temporal_attentions.append(temporal)
        self.downsample = FeatureMapConv2d(out_channels, out_channels, 3, 2, 1) if resample == "down" else None
        self.upsample = FeatureMapConv2d(out_channels, out_channels, 3, padding=1) if resample == "up" else None


class DivotUNet3DConditionModel(ModelMixin, ConfigMixin):
    """Denoises video latents under Divot features.

    Args:
        sample_size: height and width of the latents the model was trained on.
        in_channels, out_channels: latent channels.
        block_out_channels: width of each level.
        layers_per_block: residual blocks per level on the way down (one more on the way up).
        attention_levels: which levels have spatial and temporal transformers (the middle always has).
        attention_head_dim: width of one attention head; the number of heads is channels // attention_head_dim.
        transformer_layers_per_block: layers of every transformer.
        transformer_in_num_heads: heads of the temporal transformer right after the first convolution.
        cross_attention_dim: width of the condition tokens.
        num_text_context_tokens: how many leading condition tokens use the "text" projections (see
            `DivotCrossAttention`).
        num_image_frame_tokens: a condition of exactly `num_text_context_tokens + num_image_frame_tokens * num_frames`
            tokens is read as image tokens per frame, as in the original. With the released 125 tokens that happens only
            for clips of 3 frames.
        fs_conditioning: add an embedding of the frame stride to the time embedding.
        default_fs: frame stride used when `forward` gets none.
        dropout: dropout inside residual blocks and temporal convolutions while training (transformers have none).
        norm_num_groups: groups of every group norm.

    Raises:
        ValueError: the lists describing the levels differ in length, or channels do not divide into heads or groups.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DivotResnetBlock", "DivotSpatialTransformer", "DivotTemporalTransformer"]
    _repeated_blocks = ["DivotResnetBlock", "DivotSpatialTransformerLayer", "DivotTemporalTransformerLayer"]
    _skip_layerwise_casting_patterns = ["norm", "time_embedding", "fs_embedding", "alpha"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 4,
        out_channels: int = 4,
        block_out_channels: list[int] = [320, 640, 1280, 1280],  # noqa: B006 (stored in the config, never changed)
        layers_per_block: int = 2,
        attention_levels: list[bool] = [True, True, True, False],  # noqa: B006
        attention_head_dim: int = 64,
        transformer_layers_per_block: int = 1,
        transformer_in_num_heads: int = 8,
        cross_attention_dim: int = 1024,
        num_text_context_tokens: int = 77,
        num_image_frame_tokens: int = 16,
        fs_conditioning: bool = True,
        default_fs: int = 3,
        dropout: float = 0.1,
        norm_num_groups: int = 32,
    ):
        super().__init__()
        self._check_config(block_out_channels, attention_levels, attention_head_dim, norm_num_groups)
        widths, base = list(block_out_channels), block_out_channels[0]
        time_embed_dim = 4 * base

        def attention(channels):
            sizes = {
                "num_heads": channels // attention_head_dim,
                "head_dim": attention_head_dim,
                "num_layers": transformer_layers_per_block,
                "norm_num_groups": norm_num_groups,
            }
            spatial = DivotSpatialTransformer(
                channels,
                cross_attention_dim=cross_attention_dim,
                num_text_context_tokens=num_text_context_tokens,
                num_image_frame_tokens=num_image_frame_tokens,
                **sizes,
            )
            return spatial, DivotTemporalTransformer(channels, **sizes)

        self.time_proj = Timesteps(base, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(base, time_embed_dim)
        self.fs_embedding = TimestepEmbedding(base, time_embed_dim) if fs_conditioning else None
        self.conv_in = FeatureMapConv2d(in_channels, base, 3, padding=1)
        self.transformer_in = DivotTemporalTransformer(
            base,
            num_heads=transformer_in_num_heads,
            head_dim=attention_head_dim,
            num_layers=transformer_layers_per_block,
            norm_num_groups=norm_num_groups,
        )

        common = (time_embed_dim, dropout, norm_num_groups)
        self.down_blocks = nn.ModuleList()
        skip_channels, channels = [base], base
        for level, width in enumerate(widths):
            ins = [channels] + [width] * (layers_per_block - 1)
            last = level == len(widths) - 1
            kind = attention if attention_levels[level] else None
            self.down_blocks.append(DivotUNetBlock(ins, width, kind, None if last else "down", *common))
            skip_channels += [width] * (layers_per_block + (not last))
            channels = width

        self.mid_resnet_1 = DivotResnetBlock(channels, channels, *common)
        self.mid_attention, self.mid_temporal_attention = attention(channels)
        self.mid_resnet_2 = DivotResnetBlock(channels, channels, *common)

        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            width, ins = widths[level], []
            for _ in range(layers_per_block + 1):
                ins.append(channels + skip_channels.pop())
                channels = width
            kind = attention if attention_levels[level] else None
            self.up_blocks.append(DivotUNetBlock(ins, width, kind, "up" if level else None, *common))

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, base, eps=1e-5)
        self.conv_out = FeatureMapConv2d(base, out_channels, 3, padding=1)
        self.gradient_checkpointing = False

    @staticmethod
    def _check_config(block_out_channels, attention_levels, attention_head_dim, norm_num_groups):
        if len(block_out_channels) != len(attention_levels):
            raise ValueError(
                f"attention_levels has {len(attention_levels)} entries for {len(block_out_channels)} levels of "
                "block_out_channels"
            )
        for channels, attention in zip(block_out_channels, attention_levels):
            if channels % norm_num_groups:
                raise ValueError(f"{channels} channels do not divide into norm_num_groups={norm_num_groups}")
            if (attention or channels == block_out_channels[-1]) and channels % attention_head_dim:
                raise ValueError(
                    f"{channels} channels do not divide into heads of attention_head_dim={attention_head_dim}"
                )

    @apply_forward_hook
    def project_context(
        self, encoder_hidden_states: torch.Tensor, num_frames: int
    ) -> tuple[tuple[ContextKeyValues, ...], ...]:
        """Keys and values of every cross attention for a condition.

        They depend on neither the latents nor the time step: compute them once per sampling run and pass them to
        `forward` as `context_key_values`.

        Args:
            encoder_hidden_states: (batch, num_tokens, cross_attention_dim).
            num_frames: frames of the latents they will be used with.

        Returns:
            One entry per spatial transformer in the order of execution, each with one `ContextKeyValues` per layer.
        """
        if encoder_hidden_states.ndim != 3 or encoder_hidden_states.shape[-1] != self.config.cross_attention_dim:
            raise ValueError(
                f"encoder_hidden_states has shape {tuple(encoder_hidden_states.shape)}; expected (batch, num_tokens, "
                f"{self.config.cross_attention_dim})"
            )
        down = [spatial for block in self.down_blocks for spatial in block.attentions]
        up = [spatial for block in self.up_blocks for spatial in block.attentions]
        return tuple(
            spatial.project_context(encoder_hidden_states, num_frames) for spatial in (*down, self.mid_attention, *up)
        )

    def _embed_conditions(self, sample, timestep, fs):
        batch = sample.shape[0]

        def expand(value):
            return torch.as_tensor(value, device=sample.device).reshape(-1).expand(batch)

        embedding = self.time_embedding(self.time_proj(expand(timestep)).to(sample.dtype))
        if self.fs_embedding is not None:
            fs = self.config.default_fs if fs is None else fs
            embedding = embedding + self.fs_embedding(self.time_proj(expand(fs)).to(sample.dtype))
        return F.silu(embedding)

    @staticmethod
    def _upsample(conv, hidden_states):
        # Adapters (LoRA) replace the convolution by a layer that has to be called.
        if type(conv) is FeatureMapConv2d and can_upsample_by_phases(hidden_states):
            return upsample_conv2d(hidden_states, conv.weight, conv.bias)
        return conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))

    def _call(self, module, *args):
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(module, *args)
        return module(*args)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor | None = None,
        fs: torch.Tensor | int | None = None,
        context_key_values: tuple[tuple[ContextKeyValues, ...], ...] | None = None,
        return_dict: bool = True,
    ) -> VideoUNetOutput | tuple[torch.Tensor]:
        """Predicts v for noisy latents.

        Args:
            sample: (batch, in_channels, num_frames, height, width); height and width divisible by 2 per level change.
            timestep: diffusion step, one for all or (batch,).
            encoder_hidden_states: condition (batch, num_tokens, cross_attention_dim). Not needed with
                `context_key_values`.
            fs: frame stride, an integer for all or (batch,). Default: `config.default_fs`.
            context_key_values: result of `project_context` for the same batch and number of frames.
            return_dict: return an output object instead of a tuple.

        Returns:
            `VideoUNetOutput` with `sample` (batch, out_channels, num_frames, height, width).

        Raises:
            ValueError: shapes that do not fit, or neither or both forms of the condition given.
        """
        if (encoder_hidden_states is None) == (context_key_values is None):
            raise ValueError("give exactly one of `encoder_hidden_states` and `context_key_values`")
        factor = 2 ** (len(self.config.block_out_channels) - 1)
        if sample.ndim != 5 or sample.shape[1] != self.config.in_channels or any(s % factor for s in sample.shape[3:]):
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}; expected (batch, {self.config.in_channels}, num_frames, "
                f"height, width) with height and width divisible by {factor}"
            )
        batch, _, num_frames, height, width = sample.shape
        if context_key_values is None:
            if encoder_hidden_states.shape[0] != batch:
                raise ValueError(f"{encoder_hidden_states.shape[0]} conditions for a batch of {batch} samples")
            context_key_values = self.project_context(encoder_hidden_states, num_frames)
        contexts = iter(context_key_values)
        embedding = self._embed_conditions(sample, timestep, fs)

        # (batch, channels, frames, height, width) -> (batch * frames, channels, height, width), channels last
        hidden_states = sample.permute(0, 2, 3, 4, 1).reshape(batch * num_frames, height, width, -1)
        hidden_states = self.conv_in(hidden_states.permute(0, 3, 1, 2))
        hidden_states = self._call(self.transformer_in, hidden_states, num_frames)

        skips = [hidden_states]
        for block in self.down_blocks:
            for i, resnet in enumerate(block.resnets):
                hidden_states = self._call(resnet, hidden_states, embedding, num_frames)
                if block.attentions:
                    hidden_states = self._call(block.attentions[i], hidden_states, next(contexts))
                    hidden_states = self._call(block.temporal_attentions[i], hidden_states, num_frames)
                skips.append(hidden_states)
            if block.downsample is not None:
                hidden_states = block.downsample(hidden_states)
                skips.append(hidden_states)

        hidden_states = self._call(self.mid_resnet_1, hidden_states, embedding, num_frames)
        hidden_states = self._call(self.mid_attention, hidden_states, next(contexts))
        hidden_states = self._call(self.mid_temporal_attention, hidden_states, num_frames)
        hidden_states = self._call(self.mid_resnet_2, hidden_states, embedding, num_frames)

        for block in self.up_blocks:
            for i, resnet in enumerate(block.resnets):
                hidden_states = torch.cat([hidden_states, skips.pop()], dim=1)
                hidden_states = self._call(resnet, hidden_states, embedding, num_frames)
                if block.attentions:
                    hidden_states = self._call(block.attentions[i], hidden_states, next(contexts))
                    hidden_states = self._call(block.temporal_attentions[i], hidden_states, num_frames)
            if block.upsample is not None:
                hidden_states = self._upsample(block.upsample, hidden_states)

        hidden_states = self.conv_out(F.silu(self.conv_norm_out(hidden_states)))
        hidden_states = hidden_states.unflatten(0, (batch, num_frames)).transpose(1, 2)
        if not return_dict:
            return (hidden_states,)
        return VideoUNetOutput(sample=hidden_states)
