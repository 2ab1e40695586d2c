"""Video-LaVIT's motion tokenizer: 24 motion maps of 20 x 36 become 135 codes and back (https://arxiv.org/abs/2402.03161).

A spatio-temporal VQ-VAE of transformers whose stages are joined by strided 3-d convolutions. Activations stay
channels-last, (batch, frames, height, width, channels), which is what both kinds of layer want. Module names are those
of the released file.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from ...video.motion import resize_motion
from .configuration_video_lavit import VideoLavitMotionTokenizerConfig
from .layers_video_lavit import FusedQKV, SpaceTimeBlock, VectorQuantizer, task_layer


@dataclass
class VideoLavitMotionTokenizerOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, returned by `forward`):
            `reconstruction_loss + codebook_loss + commitment_weight * commitment_loss`.
        reconstruction_loss, codebook_loss, commitment_loss (`torch.FloatTensor`):
            Mean squared errors: of the maps; of the codes against the (detached) normalised features; of the features
            against the (detached) codes.
        reconstruction (`torch.Tensor` of shape `(batch, 2, num_frames, height, width)`):
            Decoded motion maps, scaled by ten as the input.
        indices (`torch.LongTensor` of shape `(batch, num_latent_frames, latent_height, latent_width)`):
            Codes.
        quantized (`torch.Tensor` of shape `(batch, codebook_dim, num_latent_frames, latent_height, latent_width)`):
            Codebook rows of `indices`.
        pre_quant (`torch.Tensor`, same shape):
            Vectors before normalisation and quantization.
        last_hidden_state (`torch.Tensor` of shape `(batch, latent frames, latent height, latent width, hidden_size)`):
            Output of the encoder.
    """

    loss: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    codebook_loss: torch.FloatTensor | None = None
    commitment_loss: torch.FloatTensor | None = None
    reconstruction: torch.Tensor | None = None
    indices: torch.LongTensor | None = None
    quantized: torch.Tensor | None = None
    pre_quant: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None


class MotionDownsample(nn.Module):
    """Strided convolution; steps of 2 are padded at the far side only, steps of 1 at both sides."""

    def __init__(self, dim, stride):
        super().__init__()
        # Order of F.pad for (batch, channels, time, height, width): width, height, time.
        self.padding = [side for step in reversed(stride) for side in ((0, 1) if step == 2 else (1, 1))]
        self.conv = nn.Conv3d(dim, dim, 3, stride=tuple(stride))

    def forward(self, hidden_states):
        """(batch, frames, height, width, dim), channels last on both sides."""
        padded = F.pad(hidden_states, [0, 0, *self.padding])
        return self.conv(padded.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)


class MotionUpsample(nn.Module):
    """Nearest-neighbour enlargement followed by a convolution."""

    def __init__(self, dim, stride):
        super().__init__()
        self.stride = tuple(stride)
        self.conv = nn.Conv3d(dim, dim, 3, padding=1)

    def forward(self, hidden_states):
        """(batch, frames, height, width, dim), channels last on both sides."""
        for axis, step in enumerate(self.stride, start=1):
            if step > 1:
                hidden_states = hidden_states.repeat_interleave(step, dim=axis)
        return self.conv(hidden_states.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)


def _run_blocks(blocks, hidden_states):
    """Runs space-time blocks on (batch, frames, height, width, dim)."""
    shape = hidden_states.shape
    hidden_states = hidden_states.flatten(2, 3)
    for block in blocks:
        hidden_states = block(hidden_states)
    return hidden_states.reshape(shape)


def _blocks(config):
    return nn.ModuleList(
        [
            SpaceTimeBlock(config.hidden_size, config.num_attention_heads, config.mlp_ratio, config.layer_norm_eps)
            for _ in range(config.layers_per_stage * len(config.strides))
        ]
    )


class MotionEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers_per_stage = config.layers_per_stage
        self.in_proj = nn.Linear(config.num_channels, config.hidden_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.height * config.width, config.hidden_size))
        self.temp_pos = nn.Parameter(torch.zeros(1, config.num_frames, config.hidden_size))
        self.blocks = _blocks(config)
        self.down_sample_layers = nn.ModuleList([MotionDownsample(config.hidden_size, s) for s in config.strides])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, motion_values):
        """(batch, channels, frames, height, width) -> channels-last features of the latent grid."""
        hidden_states = self.in_proj(motion_values.permute(0, 2, 3, 4, 1))
        positions = self.pos_embed.unflatten(1, hidden_states.shape[2:4])
        hidden_states = hidden_states + positions[:, None] + self.temp_pos[:, :, None, None]
        for stage, down_sample in enumerate(self.down_sample_layers):
            first = stage * self.layers_per_stage
            hidden_states = _run_blocks(self.blocks[first : first + self.layers_per_stage], hidden_states)
            hidden_states = down_sample(hidden_states)
        return self.norm(hidden_states)


class MotionDecoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers_per_stage = config.layers_per_stage
        self.in_proj = nn.Linear(config.codebook_dim, config.hidden_size)
        self.blocks = _blocks(config)
        self.up_sample_layers = nn.ModuleList(
            [MotionUpsample(config.hidden_size, stride) for stride in reversed(config.strides)]
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, codes):
        """Channels-last codes -> (batch, frames, height, width, hidden_size)."""
        hidden_states = self.in_proj(codes)
        for stage, up_sample in enumerate(self.up_sample_layers):
            first = stage * self.layers_per_stage
            hidden_states = up_sample(hidden_states)
            hidden_states = _run_blocks(self.blocks[first : first + self.layers_per_stage], hidden_states)
        return self.norm(hidden_states)


class VideoLavitMotionTokenizer(PreTrainedModel):
    r"""Motion maps to 135 codes per clip and back.

    The training loss follows the paper's VQ-VAE. The authors update the codebook by an exponential moving average
    (decay 0.995); here it learns from the codebook term of the loss, whose optimum that average tracks.

    Args:
        config ([`VideoLavitMotionTokenizerConfig`]): sizes.
    """

    config: VideoLavitMotionTokenizerConfig
    base_model_prefix = "motion_tokenizer"
    main_input_name = "motion_values"
    input_modalities = "video"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SpaceTimeBlock"]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.encoder = MotionEncoder(config)
        self.encode_task_layer = task_layer(config.hidden_size, config.codebook_dim)
        self.quantize = VectorQuantizer(config.codebook_size, config.codebook_dim)
        self.decoder = MotionDecoder(config)
        self.decode_task_layer = task_layer(config.hidden_size, config.num_channels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
            init.copy_(module.weight, F.normalize(module.weight, dim=-1))
        elif isinstance(module, FusedQKV):
            init.zeros_(module.q_bias)
            init.zeros_(module.v_bias)
        elif isinstance(module, MotionEncoder):
            init.normal_(module.pos_embed, std=std)
            init.normal_(module.temp_pos, std=std)

    def _encode(self, motion_values):
        config = self.config
        expected = (config.num_channels, config.num_frames, config.height, config.width)
        if motion_values.ndim != 5 or tuple(motion_values.shape[1:]) != expected:
            raise ValueError(
                f"motion_values must be (batch, {', '.join(map(str, expected))}), got {tuple(motion_values.shape)}; "
                "VideoLavitMotionProcessor makes them from videos"
            )
        hidden_states = self.encoder(motion_values)
        pre_quant = self.encode_task_layer(hidden_states)
        return hidden_states, pre_quant, *self.quantize(pre_quant)

    @apply_forward_hook
    def encode(self, motion_values):
        r"""Motion maps to codes.

        Args:
            motion_values (`torch.Tensor` of shape `(batch, 2, num_frames, height, width)`):
                Maps scaled by ten, channel 0 is x; see `VideoLavitMotionProcessor`.

        Returns:
            [`VideoLavitMotionTokenizerOutput`] with `indices`, `quantized`, `pre_quant`, `last_hidden_state`. Codes
            flattened in (time, height, width) order are the sequence the language model uses.

        Raises:
            ValueError: maps of another shape.
        """
        hidden_states, pre_quant, codes, indices, _ = self._encode(motion_values)
        return VideoLavitMotionTokenizerOutput(
            indices=indices,
            quantized=codes.permute(0, 4, 1, 2, 3),
            pre_quant=pre_quant.permute(0, 4, 1, 2, 3),
            last_hidden_state=hidden_states,
        )

    @apply_forward_hook
    def decode(self, indices=None, *, quantized=None):
        r"""Codes to motion maps.

        Args:
            indices (`torch.LongTensor` of shape `(batch, num_latent_frames, latent_height, latent_width)`):
                Codes, also flat as `(batch, num_tokens)`, without the offset of the language model's vocabulary.
            quantized (`torch.Tensor` of shape `(batch, codebook_dim, num_latent_frames, latent_height, latent_width)`):
                Instead of `indices`: codebook rows.

        Returns:
            [`VideoLavitMotionTokenizerOutput`] with `reconstruction`, scaled by ten as the input of `encode`;
            `to_raw_motion` makes what the video de-tokenizer takes.

        Raises:
            TypeError: indices that are no whole numbers.
            ValueError: neither or both are given, another number of codes, or codes outside the codebook.
        """
        if (indices is None) == (quantized is None):
            raise ValueError("give exactly one of indices and quantized")
        grid = self.config.latent_shape
        if indices is not None:
            if indices.is_floating_point() or indices.dtype == torch.bool:
                raise TypeError(f"indices are whole numbers, got a tensor of {indices.dtype}")
            if indices.ndim < 2 or tuple(indices.shape[1:]) not in (grid, (self.config.num_tokens,)):
                raise ValueError(
                    f"a clip has {self.config.num_tokens} motion codes, (batch, {self.config.num_tokens}) or (batch, "
                    f"{', '.join(map(str, grid))}); got {tuple(indices.shape)}"
                )
            codes = self.quantize.lookup(indices.unflatten(1, grid) if indices.ndim == 2 else indices)
        else:
            if quantized.ndim != 5 or tuple(quantized.shape[1:]) != (self.config.codebook_dim, *grid):
                raise ValueError(
                    f"quantized must be (batch, {self.config.codebook_dim}, {', '.join(map(str, grid))}), got "
                    f"{tuple(quantized.shape)}"
                )
            codes = quantized.permute(0, 2, 3, 4, 1)
        return VideoLavitMotionTokenizerOutput(reconstruction=self._decode(codes))

    def _decode(self, codes):
        return self.decode_task_layer(self.decoder(codes)).permute(0, 4, 1, 2, 3)

    def to_raw_motion(self, reconstruction, height, width):
        """Decoded maps resized to the video de-tokenizer's latent size and freed of the tokenizer's factor of ten.

        Args:
            reconstruction: (batch, 2, num_frames, h, w).
            height, width: latent size, an eighth of the picture's.

        Returns:
            float32 tensor (batch, 2, num_frames, height, width).
        """
        return resize_motion(reconstruction.float(), height, width) / self.config.output_scale

    def forward(self, motion_values):
        """Encodes and decodes `motion_values` (batch, 2, num_frames, height, width), with the training losses."""
        hidden_states, pre_quant, codes, indices, normalised = self._encode(motion_values)
        # Straight-through gradients (van den Oord et al., 2017); the value stays the code's.
        passed = normalised + (codes - normalised).detach() if self.training else codes
        reconstruction = self._decode(passed)
        reconstruction_loss = F.mse_loss(reconstruction, motion_values)
        codebook_loss = F.mse_loss(codes, normalised.detach())
        commitment_loss = F.mse_loss(normalised, codes.detach())
        return VideoLavitMotionTokenizerOutput(
            loss=reconstruction_loss + codebook_loss + self.config.commitment_weight * commitment_loss,
            reconstruction_loss=reconstruction_loss,
            codebook_loss=codebook_loss,
            commitment_loss=commitment_loss,
            reconstruction=reconstruction,
            indices=indices,
            quantized=codes.permute(0, 4, 1, 2, 3),
            pre_quant=pre_quant.permute(0, 4, 1, 2, 3),
            last_hidden_state=hidden_states,
        )


__all__ = ["VideoLavitMotionTokenizer", "VideoLavitMotionTokenizerOutput"]
