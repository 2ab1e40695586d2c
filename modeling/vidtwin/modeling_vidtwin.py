"""VidTwin (arXiv 2412.17726, CVPR 2025): a video VAE with separate latents for structure and dynamics.

Notable about the model:
- encoder and decoder are the same space-time transformer; temporal attention is causal, un-normalised, and reuses the
  gate of the spatial attention; modulation comes from a learned table per block, not from a condition
- structure: a Q-Former reads every spatial position's token sequence, then convolutions shrink the grid
- dynamics: tokens averaged over the rows and over the columns, compressed by one shared head
- the decoder sees the sum of what both branches give, so one branch alone, or branches of two videos, decode too
- the input size is part of the architecture; longer clips are cut into windows

Differences from the published code, on purpose: it runs without CUDA and flash attention, temporal attention is causal
on every backend (the published fallback without flash attention is not), and no precision is forced.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
from transformers.utils import ModelOutput

from ...errors import CheckpointError
from ..cpu_layers import Linear
from .configuration_vidtwin import VidTwinConfig

_NORM_EPS = 1e-6
_CPU_CHUNK_TOKENS = 1100  # tokens of a trunk that run together at inference; three parts at the released size
_BRANCHES = ("all", "structure", "dynamics")


class VidTwinPosteriors(NamedTuple):
    """Diagonal Gaussians of the three latents, with the channels on axis 1.

    `mean`, `std` and `logvar` (clamped to [-30, 20]) of structure are (batch, channels, num_query_tokens, rows,
    columns), of dynamics_x (batch, channels, num_frames, columns), of dynamics_y (batch, channels, num_frames, rows).
    """

    structure: DiagonalGaussianDistribution
    dynamics_x: DiagonalGaussianDistribution
    dynamics_y: DiagonalGaussianDistribution

    def kl(self):
        """KL divergence from the standard normal: summed over all latents, averaged over the batch. Scalar, float32."""
        total = 0.0
        for posterior in self:
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            total = total + 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum() / mean.shape[0]
        return total


@dataclass
class VidTwinEncoderOutput(ModelOutput):
    """
    Output of [`VidTwinModel.encode`].

    Args:
        structure (`torch.Tensor` of shape `(batch, num_query_tokens, rows, columns, structure_channels)`):
            Structure latents: the posterior mean, or a sample.
        dynamics_x (`torch.Tensor` of shape `(batch, dynamics_channels, num_frames, columns)`):
            Dynamics latents along the width (averaged over the rows).
        dynamics_y (`torch.Tensor` of shape `(batch, dynamics_channels, num_frames, rows)`):
            Dynamics latents along the height (averaged over the columns).
        posteriors ([`VidTwinPosteriors`]): the three Gaussians.
        kl_loss (`torch.Tensor` of shape `()`):
            Their KL divergence from the standard normal, summed over everything and divided by the batch size.
    """

    structure: torch.FloatTensor | None = None
    dynamics_x: torch.FloatTensor | None = None
    dynamics_y: torch.FloatTensor | None = None
    posteriors: VidTwinPosteriors | None = None
    kl_loss: torch.FloatTensor | None = None


@dataclass
class VidTwinDecoderOutput(ModelOutput):
    """
    Output of [`VidTwinModel.decode`] and [`VidTwinModel.reenact`].

    Args:
        reconstruction (`torch.Tensor` of shape `(batch, num_frames, channels, height, width)`):
            Frames, nominally in [-1, 1]; not clamped.
    """

    reconstruction: torch.FloatTensor | None = None


@dataclass
class VidTwinOutput(ModelOutput):
    """
    Output of [`VidTwinModel`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned with `return_loss=True`):
            `reconstruction_loss + kl_loss_weight * kl_loss`.
        reconstruction (`torch.Tensor` of the input's shape): frames, nominally in [-1, 1]; not clamped.
        reconstruction_loss (`torch.Tensor` of shape `()`, *optional*, returned with `return_loss=True`):
            Absolute error summed over a frame, averaged over frames and batch.
        kl_loss (`torch.Tensor` of shape `()`, *optional*, returned with `return_loss=True`):
            KL divergence of all three latents of a window, averaged over windows and batch.
        structure, dynamics_x, dynamics_y (`torch.Tensor`):
            Latents of the windows as in [`VidTwinEncoderOutput`]; the windows of a sample are consecutive entries of
            the batch axis (see [`VidTwinModel.split_windows`]).
    """

    loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    kl_loss: torch.FloatTensor | None = None
    structure: torch.FloatTensor | None = None
    dynamics_x: torch.FloatTensor | None = None
    dynamics_y: torch.FloatTensor | None = None


def sinusoidal_table(length, width):
    """Position table (length, width), float64: sines, then cosines, of position / 10000^(i / (width / 2))."""
    # Explicitly on the CPU: models are built on the meta device when they are loaded. Multiplied by the inverse, as the
    # published tables are, to the last bit.
    rates = 1 / 10000.0 ** (torch.arange(width // 2, dtype=torch.float64, device="cpu") / (width / 2))
    angles = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def spatial_position_table(rows, columns, width):
    """Position table (1, rows * columns, width), float64, row-major: the column's table, then the row's."""
    by_column = sinusoidal_table(columns, width // 2).expand(rows, -1, -1)
    by_row = sinusoidal_table(rows, width // 2)[:, None].expand(-1, columns, -1)
    return torch.cat([by_column, by_row], dim=-1).reshape(1, rows * columns, width)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out; causal where `module.is_causal`. (batch, heads, length, width) in, heads on axis 2 out."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    elif module.is_causal:
        later = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).triu(1)
        weights = weights.masked_fill(later, torch.finfo(weights.dtype).min)
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class VidTwinLinear(Linear):
    """A linear layer of the trunk, told apart from others by its initialisation: Xavier, or zero, and no bias."""

    def __init__(self, in_features, out_features, starts_at_zero=False):
        self.starts_at_zero = starts_at_zero
        super().__init__(in_features, out_features)


class VidTwinAttention(nn.Module):
    """Self-attention over axis 1 of (sequences, length, hidden_size)."""

    def __init__(self, config, num_heads, is_causal, starts_at_zero=False):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = is_causal
        self.qkv = VidTwinLinear(config.hidden_size, 3 * config.hidden_size)
        self.proj = VidTwinLinear(config.hidden_size, config.hidden_size, starts_at_zero)

    def forward(self, hidden_states):
        qkv = self.qkv(hidden_states).unflatten(-1, (3, -1, self.head_dim))
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, _ = attend(self, query, key, value, None, dropout=0.0, scaling=self.scaling)
        return self.proj(attended.flatten(2))


class VidTwinMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = VidTwinLinear(config.hidden_size, int(config.hidden_size * config.mlp_ratio))
        self.fc2 = VidTwinLinear(int(config.hidden_size * config.mlp_ratio), config.hidden_size)

    def forward(self, hidden_states):
        hidden_states = self.fc1(hidden_states)
        if torch.is_grad_enabled():
            hidden_states = F.gelu(hidden_states, approximate="tanh")
        else:
            # In place: with a second activation of this width the allocator returns memory to the system every time.
            hidden_states = torch.ops.aten.gelu_(hidden_states, approximate="tanh")
        return self.fc2(hidden_states)


def modulated_norm(hidden_states, shift, scale):
    """LN(x) * (1 + scale) + shift: a layer norm whose affine part comes from a table."""
    return F.layer_norm(hidden_states, hidden_states.shape[-1:], 1 + scale, shift, _NORM_EPS)


def gated_update(hidden_states, gate, update, dim):
    """`hidden_states + gate * update(hidden_states)`, where `update` treats the entries of axis `dim` independently."""
    if torch.is_grad_enabled() or hidden_states.device.type != "cpu":
        return torch.addcmul(hidden_states, gate, update(hidden_states))
    # On a CPU activations of tens of megabytes fall out of the caches and are mapped and unmapped by every layer.
    tokens = hidden_states.shape[:-1].numel()
    count = min(-(-tokens // _CPU_CHUNK_TOKENS), hidden_states.shape[dim])
    size = -(-hidden_states.shape[dim] // count)
    result = torch.empty_like(hidden_states)
    for part, target in zip(hidden_states.split(size, dim), result.split(size, dim)):
        torch.addcmul(part, gate, update(part), out=target)
    return result


class VidTwinBlock(GradientCheckpointingLayer):
    """Spatial attention, temporal attention and feed-forward on tokens (batch, num_frames, positions, hidden_size)."""

    def __init__(self, config, num_heads):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(6, config.hidden_size))
        self.attn = VidTwinAttention(config, num_heads, is_causal=False)
        self.attn_temp = VidTwinAttention(config, num_heads, is_causal=config.temporal_causal, starts_at_zero=True)
        self.mlp = VidTwinMLP(config)

    def forward(self, hidden_states, temporal_positions=None):
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.scale_shift_table.unbind(0)

        def attend_in_frames(tokens):
            attended = self.attn(modulated_norm(tokens, shift_1, scale_1).flatten(0, 1))
            return attended.unflatten(0, tokens.shape[:2])

        def attend_in_time(tokens):
            # Neither a norm nor a modulation, and the first gate again. Positions are not added to the residual.
            series = tokens.transpose(1, 2)
            if temporal_positions is not None:
                series = series + temporal_positions
            return self.attn_temp(series.flatten(0, 1)).unflatten(0, series.shape[:2]).transpose(1, 2)

        def feed_forward(tokens):
            return self.mlp(modulated_norm(tokens, shift_2, scale_2))

        hidden_states = gated_update(hidden_states, gate_1, attend_in_frames, dim=1)
        hidden_states = gated_update(hidden_states, gate_1, attend_in_time, dim=2)
        return gated_update(hidden_states, gate_2, feed_forward, dim=1)


class VidTwinPatchEmbed(nn.Module):
    """(batch, num_frames, channels, height, width) -> tokens (batch, num_frames * positions, hidden_size)."""

    def __init__(self, config):
        super().__init__()
        patch = (1, *config.patch_height_and_width)
        self.proj = nn.Conv3d(config.num_channels, config.hidden_size, kernel_size=patch, stride=patch)

    def forward(self, pixel_values_videos):
        return self.proj(pixel_values_videos.transpose(1, 2)).flatten(2).transpose(1, 2)


class VidTwinFinalLayer(nn.Module):
    """Tokens (..., hidden_size) -> pixels of their patch (..., patch_height * patch_width * channels)."""

    def __init__(self, config):
        super().__init__()
        patch_height, patch_width = config.patch_height_and_width
        self.scale_shift_table = nn.Parameter(torch.empty(2, config.hidden_size))
        self.linear = nn.Linear(config.hidden_size, patch_height * patch_width * config.num_channels)

    def forward(self, hidden_states):
        shift, scale = self.scale_shift_table.unbind(0)
        return self.linear(modulated_norm(hidden_states, shift, scale))


class VidTwinTransformer(nn.Module):
    """The trunk encoder and decoder share: patch embedding, position tables, blocks and the layer back to pixels.

    Each side uses one of the two outer layers only. The other is in the released checkpoint, so it is kept; it never
    gets a gradient (distributed training needs `find_unused_parameters=True`).
    """

    def __init__(self, config, num_layers, num_heads):
        super().__init__()
        self.config = config
        self.x_embedder = VidTwinPatchEmbed(config)
        self.blocks = nn.ModuleList([VidTwinBlock(config, num_heads) for _ in range(num_layers)])
        self.final_layer = VidTwinFinalLayer(config)
        rows, columns = config.grid_size
        self.register_buffer("pos_embed", torch.empty(1, rows * columns, config.hidden_size), persistent=False)
        self.register_buffer(
            "pos_embed_temporal", torch.empty(1, config.num_frames, config.hidden_size), persistent=False
        )

    def position_tables(self):
        """The two tables of the configuration, float64 on the CPU: (1, positions, width) and (1, num_frames, width)."""
        rows, columns = self.config.grid_size
        width = self.config.hidden_size
        return spatial_position_table(rows, columns, width), sinusoidal_table(self.config.num_frames, width)[None]

    def run_blocks(self, hidden_states):
        """Tokens (batch, num_frames, positions, hidden_size) through all blocks."""
        # Patches and features come with the channels outermost in memory, and every block would keep it that way.
        hidden_states = (hidden_states + self.pos_embed).contiguous()
        for index, block in enumerate(self.blocks):
            hidden_states = block(hidden_states, self.pos_embed_temporal if index == 0 else None)
        return hidden_states


class VidTwinEncoder(VidTwinTransformer):
    """(batch, num_frames, channels, height, width) -> (batch, hidden_size, num_frames, rows, columns)."""

    def __init__(self, config):
        super().__init__(config, config.num_encoder_layers, config.num_encoder_attention_heads)

    def forward(self, pixel_values_videos):
        tokens = self.x_embedder(pixel_values_videos).unflatten(1, (pixel_values_videos.shape[1], -1))
        return self.run_blocks(tokens).unflatten(2, self.config.grid_size).permute(0, 4, 1, 2, 3)


class VidTwinDecoder(VidTwinTransformer):
    """(batch, hidden_size, num_frames, rows, columns) -> (batch, num_frames, channels, height, width)."""

    def __init__(self, config):
        super().__init__(config, config.num_decoder_layers, config.num_decoder_attention_heads)

    def forward(self, hidden_states):
        tokens = hidden_states.permute(0, 2, 3, 4, 1).flatten(2, 3)
        patches = self.final_layer(self.run_blocks(tokens))
        rows, columns = self.config.grid_size
        patch_height, patch_width = self.config.patch_height_and_width
        patches = patches.view(*patches.shape[:2], rows, columns, patch_height, patch_width, -1)
        return patches.permute(0, 1, 6, 2, 4, 3, 5).flatten(3, 4).flatten(4, 5)


class VidTwinQFormerModel(Blip2QFormerModel):
    # Switched off in the base class, where the Q-Former stays in float32 beside a half-precision model; not so here.
    _supports_flash_attn = True


class VidTwinTemporalQFormer(nn.Module):
    """Reads token series (series, num_frames, hidden_size) with learned queries; no positions, no mask.

    Returns (series, num_query_tokens, query_hidden_size).
    """

    def __init__(self, config):
        super().__init__()
        self.query_embeds = nn.Parameter(torch.empty(config.num_query_tokens, config.query_hidden_size))
        qformer_config = Blip2QFormerConfig(
            hidden_size=config.query_hidden_size,
            num_hidden_layers=config.num_query_layers,
            num_attention_heads=config.num_query_attention_heads,
            intermediate_size=config.query_intermediate_size,
            encoder_hidden_size=config.hidden_size,
            hidden_dropout_prob=config.query_dropout,
            attention_probs_dropout_prob=config.query_dropout,
        )
        qformer_config._attn_implementation = config._attn_implementation
        self.qformer = VidTwinQFormerModel(qformer_config)

    def forward(self, hidden_states):
        queries = self.query_embeds.expand(hidden_states.shape[0], -1, -1)
        return self.qformer(query_embeds=queries, encoder_hidden_states=hidden_states).last_hidden_state


class VidTwinPreTrainedModel(PreTrainedModel):
    config: VidTwinConfig
    base_model_prefix = "vidtwin"
    main_input_name = "pixel_values_videos"
    input_modalities = "video"
    supports_gradient_checkpointing = True
    _no_split_modules = ["VidTwinBlock", "Blip2QFormerLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As of transformers' `PreTrainedModel`.

        Raises:
            CheckpointError: weights are NaN or infinite; they are named.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        present = (item for item in model.named_parameters() if item[1].device.type != "meta")
        bad = [name for name, value in present if not value.isfinite().all()]
        if bad:
            raise CheckpointError(f"{len(bad)} tensors hold NaN or infinite values: {', '.join(bad[:5])}")
        return loaded

    @torch.no_grad()
    def _init_weights(self, module):
        # Only what a module itself owns may be set here: modules whose own tensors are all loaded are not visited.
        if isinstance(module, VidTwinLinear):
            if module.starts_at_zero:
                init.zeros_(module.weight)
            else:
                init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv3d):
            # Xavier's bound of the weight seen as a matrix
            bound = (6.0 / (module.out_channels + module.weight[0].numel())) ** 0.5
            init.uniform_(module.weight, -bound, bound)
            init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            module.reset_parameters()
        elif isinstance(module, (VidTwinBlock, VidTwinFinalLayer)):
            init.normal_(module.scale_shift_table, std=module.scale_shift_table.shape[1] ** -0.5)
        elif isinstance(module, VidTwinTransformer):
            spatial, temporal = module.position_tables()
            init.copy_(module.pos_embed, spatial)
            init.copy_(module.pos_embed_temporal, temporal)
        elif isinstance(module, VidTwinTemporalQFormer):
            init.normal_(module.query_embeds)


class VidTwinModel(VidTwinPreTrainedModel):
    r"""
    The VidTwin autoencoder (arXiv 2412.17726).

    Videos are (batch, num_frames, channels, height, width), floating point in [-1, 1], of exactly the configuration's
    height and width. `encode` and `decode` take one window of `config.num_frames` frames per batch entry; calling the
    model, and `reenact`, take clips of any length and cut them into windows.

    ```python
    >>> model = VidTwinModel.from_pretrained(path)
    >>> latents = model.encode(video)  # (1, 16, 3, 224, 224) -> 8064 numbers
    >>> frames = model.decode(latents.structure, latents.dynamics_x, latents.dynamics_y).reconstruction
    >>> still = model.decode(structure=latents.structure, branch="structure").reconstruction
    >>> acted = model.reenact(structure_from=video, dynamics_from=other_video).reconstruction
    ```
    """

    def __init__(self, config: VidTwinConfig):
        super().__init__(config)
        hidden_size, width = config.hidden_size, config.structure_base_channels
        self.encoder = VidTwinEncoder(config)
        self.decoder = VidTwinDecoder(config)

        self.temporal_qformer = VidTwinTemporalQFormer(config)
        self.conv_in = nn.Conv2d(config.query_hidden_size, width, kernel_size=3, padding=1)
        blocks = []
        for _ in range(config.cont_num_blocks):
            blocks += [nn.Conv2d(width, 2 * width, kernel_size=3, stride=2, padding=1), nn.ReLU()]
            width *= 2
        self.content_downsample_blocks = nn.Sequential(*blocks)
        self.bottle_down = nn.Conv2d(width, 2 * config.structure_channels, kernel_size=3, padding=1)
        self.bottle_up = nn.Sequential(nn.Conv2d(config.structure_channels, width, kernel_size=3, padding=1), nn.ReLU())
        blocks = []
        for _ in range(config.cont_num_blocks):
            blocks += [
                nn.Conv2d(width, width // 2, kernel_size=3, padding=1),
                nn.ReLU(),
                nn.Upsample(scale_factor=2, mode="nearest"),
            ]
            width //= 2
        self.content_upsample_blocks = nn.Sequential(*blocks)
        self.conv_out = nn.Conv2d(width, config.query_hidden_size, kernel_size=3, padding=1)
        self.cont_emb = nn.Sequential(
            nn.Linear(config.query_hidden_size, hidden_size),
            nn.ReLU(),
            nn.Conv1d(config.num_query_tokens, config.num_frames, kernel_size=1),
            nn.ReLU(),
        )

        blocks = []
        for _ in range(config.motion_num_blocks if config.downsample_motion else 0):
            blocks += [nn.Conv2d(hidden_size, hidden_size, kernel_size=3, stride=2, padding=1), nn.ReLU()]
        self.downsample_motion_module = nn.Sequential(*blocks)
        self.motion_head = nn.Conv2d(hidden_size, 2 * config.dynamics_channels, kernel_size=3, padding=1)
        self.motion_emb = nn.Sequential(
            nn.Linear(config.dynamics_channels, hidden_size), nn.ReLU(), nn.Linear(hidden_size, hidden_size), nn.ReLU()
        )
        blocks = []
        if config.downsample_motion:
            rows = config.grid_size[0]
            blocks = [nn.Linear(config.dynamics_grid_size[0], rows), nn.ReLU(), nn.Linear(rows, rows), nn.ReLU()]
        self.up_motion = nn.Sequential(*blocks)

        self.post_init()

    def compression(self):
        """Sizes of a window and of its latents; see [`VidTwinConfig.compression`]."""
        return self.config.compression()

    # ------------------------------------------------------------------ branches

    def _structure_posterior(self, hidden_states):
        """(batch, hidden_size, num_frames, rows, columns) -> Gaussian of the structure latents."""
        batch_size = hidden_states.shape[0]
        series = hidden_states.permute(0, 3, 4, 2, 1).flatten(0, 2)
        queries = self.temporal_qformer(series).unflatten(0, (batch_size, *self.config.grid_size))
        maps = queries.permute(0, 3, 4, 1, 2).flatten(0, 1)
        maps = self.content_downsample_blocks(self.conv_in(maps))
        moments = self.bottle_down(maps).unflatten(0, (batch_size, -1)).transpose(1, 2)
        return DiagonalGaussianDistribution(moments)

    def _dynamics_posteriors(self, hidden_states):
        """(batch, hidden_size, num_frames, rows, columns) -> Gaussians of dynamics_x and dynamics_y."""
        batch_size = hidden_states.shape[0]
        maps = self.downsample_motion_module(hidden_states.transpose(1, 2).flatten(0, 1))
        maps = maps.unflatten(0, (batch_size, -1)).transpose(1, 2)
        moments_x = self.motion_head(maps.mean(dim=3))
        moments_y = self.motion_head(maps.mean(dim=4))
        return DiagonalGaussianDistribution(moments_x), DiagonalGaussianDistribution(moments_y)

    def _structure_features(self, structure):
        """Structure latents -> (batch, hidden_size, num_frames, rows, columns)."""
        batch_size = structure.shape[0]
        rows, columns = self.config.grid_size
        maps = self.bottle_up(structure.permute(0, 1, 4, 2, 3).flatten(0, 1))
        maps = self.conv_out(self.content_upsample_blocks(maps))
        # The border is computed from the rows and used on both axes, as the released weights were trained.
        border = (maps.shape[-2] - rows) // 2
        maps = maps[..., border : border + rows, border : border + columns]
        series = maps.unflatten(0, (batch_size, -1)).permute(0, 3, 4, 1, 2).flatten(0, 2)
        features = self.cont_emb(series).unflatten(0, (batch_size, rows, columns))
        return features.permute(0, 4, 3, 1, 2)

    def _dynamics_features(self, dynamics):
        """(batch, channels, num_frames, length) -> (batch, hidden_size, num_frames, rows or columns)."""
        return self.up_motion(self.motion_emb(dynamics.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    # ------------------------------------------------------------------ encode and decode

    def encode(self, pixel_values_videos, sample_posterior=False, generator=None, noise=None):
        """Encodes windows of `config.num_frames` frames.

        Args:
            pixel_values_videos: float tensor (batch, config.num_frames, channels, height, width) in [-1, 1].
            sample_posterior: return a sample of each posterior instead of its mean. The published scripts sample.
            generator: `torch.Generator`, or one per batch entry, for the sample. Normal numbers are drawn in float32,
                on the generator's device or else the CPU, in the order structure, dynamics_x, dynamics_y.
            noise: three tensors of standard-normal numbers to use instead, shaped like the posteriors' means; implies
                `sample_posterior`.

        Returns:
            [`VidTwinEncoderOutput`].

        Raises:
            ValueError: another size or number of frames than the configuration's; use `split_windows` for longer clips.
            TypeError: not a floating-point tensor.
        """
        self._check_video(pixel_values_videos, "pixel_values_videos", exact=True)
        if sample_posterior and noise is None:
            noise = self._draw_noise(pixel_values_videos.shape[0], generator)
        hidden_states = self.encoder(pixel_values_videos)
        posteriors = VidTwinPosteriors(
            self._structure_posterior(hidden_states), *self._dynamics_posteriors(hidden_states)
        )
        structure, dynamics_x, dynamics_y = (
            _pick(posterior, None if noise is None else noise[index]) for index, posterior in enumerate(posteriors)
        )
        return VidTwinEncoderOutput(
            structure=structure.permute(0, 2, 3, 4, 1),
            dynamics_x=dynamics_x,
            dynamics_y=dynamics_y,
            posteriors=posteriors,
            kl_loss=posteriors.kl(),
        )

    def decode(self, structure=None, dynamics_x=None, dynamics_y=None, branch="all"):
        """Decodes windows.

        Args:
            structure: (batch, num_query_tokens, rows, columns, structure_channels). Needed unless `branch="dynamics"`.
            dynamics_x: (batch, dynamics_channels, num_frames, columns). Needed unless `branch="structure"`.
            dynamics_y: (batch, dynamics_channels, num_frames, rows). Needed unless `branch="structure"`.
            branch: "all", or only what "structure" or "dynamics" contribute (latents of the other are not looked at).

        Returns:
            [`VidTwinDecoderOutput`] with `reconstruction` (batch, config.num_frames, channels, height, width).

        Raises:
            ValueError: unknown branch, missing latents, latents of another shape than the configuration's, or of
                different batch sizes.
        """
        if branch not in _BRANCHES:
            raise ValueError(f"branch must be one of {', '.join(_BRANCHES)}, got {branch!r}")
        latents = {"structure": structure, "dynamics_x": dynamics_x, "dynamics_y": dynamics_y}
        needed = [name for name in latents if branch == "all" or name.startswith(branch)]
        self._check_latents({name: latents[name] for name in needed}, branch)
        features = 0
        if branch != "dynamics":
            features = self._structure_features(structure)
        if branch != "structure":
            along_width = self._dynamics_features(dynamics_x)[:, :, :, None, :]
            along_height = self._dynamics_features(dynamics_y)[:, :, :, :, None]
            features = features + along_width + along_height
        return VidTwinDecoderOutput(reconstruction=self.decoder(features))

    def forward(
        self,
        pixel_values_videos,
        sample_posterior: bool | None = None,
        generator=None,
        branch: str = "all",
        window_batch_size: int = 4,
        return_loss: bool = True,
        return_dict: bool = True,
    ):
        """Encodes and decodes clips of any length.

        A clip is cut into consecutive windows of `config.num_frames` frames; the last is completed by repeating its
        last frame, and what that adds is cut off again. Windows do not depend on each other.

        Args:
            pixel_values_videos: float tensor (batch, num_frames, channels, height, width) in [-1, 1].
            sample_posterior: decode a sample instead of the posterior mean; default: only in training mode.
            generator: as for `encode`. The result does not depend on `window_batch_size`.
            branch: as for `decode`.
            window_batch_size: windows that run together. More need more memory.
            return_loss: also compute the loss and its parts.
            return_dict: return a [`VidTwinOutput`] instead of a tuple.

        Raises:
            ValueError: wrong size, rank, channels or branch; no frames. TypeError: not a floating-point tensor.
        """
        self._check_video(pixel_values_videos, "pixel_values_videos")
        if sample_posterior is None:
            sample_posterior = self.training
        num_frames = pixel_values_videos.shape[1]
        windows = self.split_windows(pixel_values_videos)
        noise = None
        if sample_posterior:
            (noise,) = self._draw_window_noise(pixel_values_videos.shape[0], windows.shape[0], generator, videos=1)
        encoded, decoded, kl_total = [], [], 0.0
        for part in _window_slices(windows.shape[0], window_batch_size):
            latents = self.encode(windows[part], noise=None if noise is None else [values[part] for values in noise])
            encoded.append((latents.structure, latents.dynamics_x, latents.dynamics_y))
            decoded.append(self.decode(*encoded[-1], branch=branch).reconstruction)
            kl_total = kl_total + latents.kl_loss * len(decoded[-1])
        reconstruction = self.merge_windows(_cat(decoded), num_frames)
        structure, dynamics_x, dynamics_y = (_cat(parts) for parts in zip(*encoded))
        loss = reconstruction_loss = kl_loss = None
        if return_loss:
            # As in the authors' loss with its variance at 1, without the perceptual and adversarial terms.
            error = F.l1_loss(reconstruction.float(), pixel_values_videos.float(), reduction="sum")
            reconstruction_loss = error / (pixel_values_videos.shape[0] * num_frames)
            kl_loss = kl_total / windows.shape[0]
            loss = reconstruction_loss + self.config.kl_loss_weight * kl_loss
        output = VidTwinOutput(
            loss=loss,
            reconstruction=reconstruction,
            reconstruction_loss=reconstruction_loss,
            kl_loss=kl_loss,
            structure=structure,
            dynamics_x=dynamics_x,
            dynamics_y=dynamics_y,
        )
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def reenact(
        self, structure_from, dynamics_from, sample_posterior=False, generator=None, window_batch_size: int = 4
    ):
        """Decodes the structure of one video with the dynamics of another, window by window.

        Args:
            structure_from, dynamics_from: float tensors (batch, num_frames, channels, height, width) in [-1, 1], of
                equal shape, any number of frames.
            sample_posterior: sample the latents instead of taking the means, as the published script does. Numbers are
                drawn per window, first for `structure_from`, then for `dynamics_from`, three latents each.
            generator: as for `encode`. The result does not depend on `window_batch_size`.
            window_batch_size: windows that run together.

        Returns:
            [`VidTwinDecoderOutput`] with `reconstruction` of the inputs' shape.

        Raises:
            ValueError: the videos differ in shape, or do not fit the configuration. TypeError: not floating point.
        """
        self._check_video(structure_from, "structure_from")
        self._check_video(dynamics_from, "dynamics_from")
        if structure_from.shape != dynamics_from.shape:
            raise ValueError(
                "structure_from and dynamics_from must have the same batch size, number of frames and size, got "
                f"{tuple(structure_from.shape)} and {tuple(dynamics_from.shape)}; trim the longer one"
            )
        batch_size, num_frames = structure_from.shape[:2]
        structure_from, dynamics_from = self.split_windows(structure_from), self.split_windows(dynamics_from)
        num_windows = structure_from.shape[0]
        structure_noise = dynamics_noise = None
        if sample_posterior:
            structure_noise, dynamics_noise = self._draw_window_noise(batch_size, num_windows, generator, videos=2)
        decoded = []
        for part in _window_slices(num_windows, window_batch_size):
            posterior = self._structure_posterior(self.encoder(structure_from[part]))
            structure = _pick(posterior, None if structure_noise is None else structure_noise[0][part])
            posteriors = self._dynamics_posteriors(self.encoder(dynamics_from[part]))
            dynamics_x, dynamics_y = (
                _pick(posterior, None if dynamics_noise is None else dynamics_noise[index][part])
                for index, posterior in enumerate(posteriors, start=1)
            )
            decoded.append(self.decode(structure.permute(0, 2, 3, 4, 1), dynamics_x, dynamics_y).reconstruction)
        return VidTwinDecoderOutput(reconstruction=self.merge_windows(_cat(decoded), num_frames))

    # ------------------------------------------------------------------ windows, noise and checks

    def split_windows(self, pixel_values_videos):
        """Cuts clips (batch, num_frames, ...) into windows (batch * num_windows, config.num_frames, ...), the windows
        of a clip following each other. The last window is completed by repeating the last frame."""
        missing = -pixel_values_videos.shape[1] % self.config.num_frames
        if missing:
            repeated = pixel_values_videos[:, -1:].expand(-1, missing, -1, -1, -1)
            pixel_values_videos = torch.cat([pixel_values_videos, repeated], dim=1)
        return pixel_values_videos.unflatten(1, (-1, self.config.num_frames)).flatten(0, 1)

    def merge_windows(self, windows, num_frames):
        """Inverse of `split_windows` for clips of `num_frames` frames."""
        num_windows = -(-num_frames // self.config.num_frames)
        return windows.unflatten(0, (-1, num_windows)).flatten(1, 2)[:, :num_frames]

    def _draw_noise(self, batch_size, generator):
        """Standard-normal numbers for the three latents, channels on axis 1, float32."""
        several = isinstance(generator, (list, tuple))
        if several and len(generator) != batch_size:
            raise ValueError(f"got {len(generator)} generators for a batch of {batch_size}; pass one, or one for each")
        first = generator[0] if several else generator
        device = torch.device("cpu") if first is None else first.device
        structure, dynamics_x, dynamics_y = self.config.latent_shapes
        shapes = [(structure[-1], *structure[:-1]), dynamics_x, dynamics_y]
        generator = list(generator) if several else generator
        return [randn_tensor((batch_size, *shape), generator, device, torch.float32) for shape in shapes]

    def _draw_window_noise(self, batch_size, num_windows, generator, videos):
        """Noise for all windows of a batch of clips, drawn window by window: for each of `videos`, three tensors."""
        draws = [
            [self._draw_noise(batch_size, generator) for _ in range(videos)] for _ in range(num_windows // batch_size)
        ]
        return [
            [torch.stack([window[video][latent] for window in draws], dim=1).flatten(0, 1) for latent in range(3)]
            for video in range(videos)
        ]

    def _check_video(self, video, name, exact=False):
        if not isinstance(video, torch.Tensor) or not video.is_floating_point():
            kind = video.dtype if isinstance(video, torch.Tensor) else type(video).__name__
            raise TypeError(f"{name} must be a floating-point tensor in [-1, 1], got {kind}; use VidTwinVideoProcessor")
        config = self.config
        expected = (config.num_channels, config.height, config.width)
        if video.ndim != 5 or tuple(video.shape[2:]) != expected:
            raise ValueError(
                f"{name} must have shape (batch, num_frames, {', '.join(map(str, expected))}), got "
                f"{tuple(video.shape)}; VidTwinVideoProcessor resizes and crops to the size of this model"
            )
        if 0 in video.shape:
            raise ValueError(f"{name} is empty, its shape is {tuple(video.shape)}")
        if exact and video.shape[1] != config.num_frames:
            raise ValueError(
                f"{name} must have {config.num_frames} frames, got {video.shape[1]}; cut longer clips with "
                "`split_windows`, or call the model itself, which takes any number"
            )

    def _check_latents(self, latents, branch):
        for name, value in latents.items():
            expected = getattr(self.config.latent_shapes, name)
            if value is None:
                raise ValueError(f'branch="{branch}" needs {name}, of shape (batch, {", ".join(map(str, expected))})')
            if tuple(value.shape[1:]) != expected:
                raise ValueError(
                    f"{name} must have shape (batch, {', '.join(map(str, expected))}), got {tuple(value.shape)}"
                )
        sizes = {name: value.shape[0] for name, value in latents.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"latents must have the same batch size, got {sizes}")


def _pick(posterior, noise):
    """The posterior's mean, or the sample that `noise` gives."""
    if noise is None:
        return posterior.mean
    if noise.shape != posterior.mean.shape:
        raise ValueError(f"noise must have shape {tuple(posterior.mean.shape)}, got {tuple(noise.shape)}")
    return torch.addcmul(posterior.mean, posterior.std, noise.to(posterior.mean))


def _window_slices(num_windows, window_batch_size):
    if window_batch_size < 1:
        raise ValueError(f"window_batch_size must be at least 1, got {window_batch_size}")
    return [slice(start, start + window_batch_size) for start in range(0, num_windows, window_batch_size)]


def _cat(parts):
    return parts[0] if len(parts) == 1 else torch.cat(parts)


__all__ = ["VidTwinModel", "VidTwinPreTrainedModel"]
