"""The Divot video tokenizer: five frames of a clip -> 64 continuous features (arXiv:2412.04432, section 3.1).

Notable:
- frozen CLIP ViT-H/14, output of the last block without its final norm and projection
- a small transformer over time for every patch, 5x5 pooling, a transformer over all 125 tokens, a perceiver resampler
- the layer norms of the temporal encoder and of the joint blocks have eps 1e-6, all others 1e-5, and only the temporal
  encoder uses the sigmoid approximation of GELU: the released weights were trained so
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from ..cpu_layers import use_cpu_layers
from .configuration_divot import DivotTokenizerConfig
from .resampler_divot import DivotPerceiverResampler


@dataclass
class DivotTokenizerOutput(ModelOutput):
    """What `DivotTokenizerModel` returns.

    Attributes:
        features: (batch, num_features, feature_dim), what the de-tokenizer and the language model work with.
    """

    features: torch.FloatTensor | None = None


def _blur_kernel(factor, device, dtype):
    """Taps of the Gaussian that is applied along one axis before shrinking it by `factor` (sigma as scikit-image)."""
    sigma = max((factor - 1) / 2, 0.001)
    length = int(max(4 * sigma, 3))
    length += 1 - length % 2
    distance = torch.arange(length, device=device, dtype=dtype) - length // 2
    taps = torch.exp(-(distance**2) / (2 * sigma**2))
    return taps / taps.sum()


def resize_for_clip(pixels, size):
    """Resizes images (batch, 3, height, width) to (size, size), ignoring the aspect ratio.

    Bicubic with aligned corners, without clamping. When an axis shrinks both are blurred first (with a numerical delta
    along an axis that does not shrink). Images that already have the size are returned as they are.
    """
    height, width = pixels.shape[-2:]
    if (height, width) == (size, size):
        return pixels
    if max(height, width) > size:
        if min(height, width) < 2:
            raise ValueError(f"frames of {height} x {width} pixels cannot be resized; they must be at least 2 x 2")
        vertical = _blur_kernel(height / size, pixels.device, pixels.dtype)
        horizontal = _blur_kernel(width / size, pixels.device, pixels.dtype)
        channels, pad_v, pad_h = pixels.shape[1], len(vertical) // 2, len(horizontal) // 2
        pixels = F.pad(pixels, (pad_h, pad_h, pad_v, pad_v), mode="reflect")
        pixels = F.conv2d(pixels, vertical.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)
        pixels = F.conv2d(pixels, horizontal.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
    return F.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=True)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class DivotTokenizerAttention(nn.Module):
    """Self attention with one fused projection for queries, keys and values."""

    def __init__(self, config, dim, num_heads):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, hidden_states):
        query, key, value = (
            part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for part in self.qkv_proj(hidden_states).chunk(3, dim=-1)
        )
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, _ = attend(self, query, key, value, None, scaling=self.scaling, dropout=0.0)
        return self.out_proj(attended.flatten(2))


class DivotTokenizerMLP(nn.Module):
    def __init__(self, dim, activation):
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, hidden_states):
        return self.fc2(self.activation(self.fc1(hidden_states)))


def _sigmoid_gelu(x):
    return x * torch.sigmoid(1.702 * x)


class DivotTokenizerLayer(GradientCheckpointingLayer):
    """A pre-norm transformer layer."""

    def __init__(self, config, dim, num_heads, activation):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = DivotTokenizerAttention(config, dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = DivotTokenizerMLP(dim, activation)

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.attention(self.norm1(hidden_states))
        return hidden_states + self.mlp(self.norm2(hidden_states))


class DivotTemporalEncoder(nn.Module):
    """Transformer over time, (batch * num_patches, num_frames, image width) -> (..., hidden_size)."""

    def __init__(self, config):
        super().__init__()
        dim = config.temporal_hidden_size
        self.proj_in = nn.Linear(config.vision_config.hidden_size, dim)
        self.position_embedding = nn.Parameter(torch.zeros(config.num_frames, dim))
        self.layers = nn.ModuleList(
            DivotTokenizerLayer(config, dim, config.temporal_num_heads, _sigmoid_gelu)
            for _ in range(config.temporal_num_layers)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.proj_out = nn.Linear(dim, config.hidden_size)

    def forward(self, hidden_states):
        hidden_states = self.proj_in(hidden_states) + self.position_embedding
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.proj_out(self.norm(hidden_states))


class DivotJointEncoder(nn.Module):
    """Transformer over all pooled tokens of a clip: (batch, num_frames * pool_size**2, hidden_size), frame by frame."""

    def __init__(self, config):
        super().__init__()
        dim = config.hidden_size
        self.spatial_position_embedding = nn.Parameter(torch.zeros(config.pool_size**2, dim))
        self.temporal_position_embedding = nn.Parameter(torch.zeros(config.num_frames, dim))
        self.layers = nn.ModuleList(
            DivotTokenizerLayer(config, dim, config.num_attention_heads, F.gelu)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, hidden_states):
        positions = self.temporal_position_embedding[:, None] + self.spatial_position_embedding
        hidden_states = hidden_states + positions.flatten(0, 1)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.norm(hidden_states)


class DivotTokenizerPreTrainedModel(PreTrainedModel):
    config: DivotTokenizerConfig
    base_model_prefix = "tokenizer"
    main_input_name = "pixel_values_videos"
    input_modalities = "video"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CLIPEncoderLayer", "DivotTokenizerLayer", "DivotPerceiverLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, DivotTemporalEncoder):
            init.normal_(module.position_embedding, std=0.02)
        elif isinstance(module, DivotJointEncoder):
            init.normal_(module.spatial_position_embedding, std=0.02)
            init.normal_(module.temporal_position_embedding, std=0.02)
        elif isinstance(module, DivotPerceiverResampler):
            init.normal_(module.latents, std=module.latents.shape[-1] ** -0.5)


class DivotTokenizerModel(DivotTokenizerPreTrainedModel):
    """Video tokenizer of Divot.

    One clip is 2 seconds, of which the frames 0, 4, 8, 12 and 15 of 16 (at 8 fps) are looked at; a still image is one
    frame repeated. `DivotVideoProcessor` chooses and prepares them. Features go back to frames with the Divot
    pipelines.
    """

    def __init__(self, config: DivotTokenizerConfig):
        super().__init__(config)
        self.vision_model = CLIPVisionModel._from_config(config.vision_config)
        self.temporal_encoder = DivotTemporalEncoder(config)
        self.pooled_norm = nn.LayerNorm(config.hidden_size, eps=1e-6) if config.normalize_pooled else None
        self.joint_encoder = DivotJointEncoder(config)
        self.resampler = DivotPerceiverResampler(
            config.hidden_size,
            config.hidden_size,
            config.feature_dim,
            config.num_features,
            config.resampler_num_layers,
            config.resampler_num_heads,
            config.resampler_head_dim,
        )
        use_cpu_layers(self)
        self.post_init()

    def preprocess_pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Frames (num_images, 3, height, width) in [-1, 1], any size -> what the image encoder reads.

        Part of the model because the resize runs on tensors (bicubic, aligned corners), unlike the 256-pixel transform
        of the processor that comes before it.
        """
        pixels = resize_for_clip(pixel_values, self.config.vision_config.image_size)
        mean, std = (
            torch.tensor(values, device=pixels.device, dtype=pixels.dtype).view(1, -1, 1, 1)
            for values in (self.config.image_mean, self.config.image_std)
        )
        return ((pixels + 1) / 2 - mean) / std

    def pool(self, hidden_states: torch.Tensor, batch: int) -> torch.Tensor:
        """Patch tokens (batch * num_patches, num_frames, hidden_size) -> (batch * num_frames, hidden_size, pool_size,
        pool_size). Bins are uneven when the patches do not divide by `pool_size`."""
        side = int((hidden_states.shape[0] // batch) ** 0.5)
        maps = hidden_states.unflatten(0, (batch, side, side)).permute(0, 3, 4, 1, 2).flatten(0, 1)
        return F.adaptive_avg_pool2d(maps, self.config.pool_size)

    def encode(self, pixel_values_videos: torch.Tensor, return_dict: bool | None = None) -> DivotTokenizerOutput:
        """Encodes clips.

        Args:
            pixel_values_videos: (batch, num_frames, 3, height, width) in [-1, 1]; height and width are usually 256 (any
                size is resized to the image encoder's).

        Returns:
            `DivotTokenizerOutput` with `features` (batch, num_features, feature_dim).

        Raises:
            TypeError: pixels that are not floating point.
            ValueError: another number of frames or channels, no clips at all, NaN or infinite values.
        """
        return_dict = return_dict if return_dict is not None else self.config.return_dict
        frames = self.config.num_frames
        if pixel_values_videos.ndim != 5 or tuple(pixel_values_videos.shape[1:3]) != (frames, 3):
            raise ValueError(
                f"pixel_values_videos has shape {tuple(pixel_values_videos.shape)}; expected (batch, {frames}, 3, "
                f"height, width). Clips have exactly {frames} frames: `DivotVideoProcessor` chooses them and repeats a "
                "still image"
            )
        if 0 in pixel_values_videos.shape:
            raise ValueError(
                f"pixel_values_videos has shape {tuple(pixel_values_videos.shape)}: there is no pixel in it"
            )
        if not pixel_values_videos.is_floating_point():
            raise TypeError(
                f"pixel_values_videos is {pixel_values_videos.dtype}; expected floats in [-1, 1], as "
                "`DivotVideoProcessor` makes them of bytes"
            )
        known = not pixel_values_videos.is_meta and not torch.compiler.is_compiling()
        if known and not bool(torch.isfinite(pixel_values_videos).all()):
            raise ValueError("pixel_values_videos holds NaN or infinite values")
        batch = pixel_values_videos.shape[0]
        pixels = self.preprocess_pixels(pixel_values_videos.flatten(0, 1))
        tokens = self.vision_model(pixel_values=pixels).last_hidden_state[:, 1:]
        # (batch * frames, patches, width) -> (batch * patches, frames, width)
        tokens = tokens.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1)
        pooled = self.pool(self.temporal_encoder(tokens), batch)
        # Token order is frame, row, column.
        hidden_states = pooled.unflatten(0, (batch, frames)).permute(0, 1, 3, 4, 2).flatten(1, 3)
        if self.pooled_norm is not None:
            hidden_states = self.pooled_norm(hidden_states)
        features = self.resampler(self.joint_encoder(hidden_states))
        return DivotTokenizerOutput(features=features) if return_dict else (features,)

    def forward(self, pixel_values_videos: torch.Tensor, return_dict: bool | None = None) -> DivotTokenizerOutput:
        """The same as `encode`."""
        return self.encode(pixel_values_videos, return_dict=return_dict)

    @torch.no_grad()
    def unconditional_features(self, size: int = 256) -> torch.Tensor:
        """Features (1, num_features, feature_dim) of a mid-gray clip of `size` x `size` pixels: the de-tokenizer's
        unconditional condition. They are constant for given weights."""
        parameter = self.pooled_norm if self.pooled_norm is not None else self.joint_encoder.norm
        clip = torch.zeros(1, self.config.num_frames, 3, size, size, device=self.device, dtype=parameter.weight.dtype)
        return self(clip).features


__all__ = ["DivotTokenizerModel", "DivotTokenizerOutput", "DivotTokenizerPreTrainedModel", "resize_for_clip"]
