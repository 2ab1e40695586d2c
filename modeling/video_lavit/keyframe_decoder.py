"""Video-LaVIT's keyframe-token decoder: visual codes become the conditioning of an SDXL-shaped U-Net."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.normalization import FP32LayerNorm
from diffusers.utils import BaseOutput
from torch import nn

from ..cpu_layers import Linear
from .layers_video_lavit import Mlp, task_layer

_NORM_EPS = 1e-5
_MASKED = -1e4


@dataclass
class VideoLavitKeyframeDecoderOutput(BaseOutput):
    """
    Args:
        prompt_embeds: (batch, num_queries, prompt_dim + pooled_dim), the U-Net's `encoder_hidden_states`.
        pooled_prompt_embeds: (batch, pooled_dim), its `text_embeds`.
        decoded_features: (batch, num_queries, feature_dim), the reconstructed features of the image encoder.
    """

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    decoded_features: torch.Tensor


def _heads(hidden_states, num_heads):
    return hidden_states.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


class QuerySelfAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, hidden_states):
        query, key, value = (_heads(part, self.num_heads) for part in self.qkv(hidden_states).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).reshape(hidden_states.shape))


class TokenCrossAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.query = Linear(dim, dim)
        self.key = Linear(dim, dim)
        self.value = Linear(dim, dim)
        self.proj = Linear(dim, dim)

    def forward(self, hidden_states, tokens, bias):
        query = _heads(self.query(hidden_states), self.num_heads)
        key, value = _heads(self.key(tokens), self.num_heads), _heads(self.value(tokens), self.num_heads)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        return self.proj(attended.transpose(1, 2).reshape(hidden_states.shape))


class KeyframeDecoderBlock(nn.Module):
    def __init__(self, dim, num_heads, intermediate_size):
        super().__init__()
        self.norm0 = FP32LayerNorm(dim, eps=_NORM_EPS)
        self.self_attn = QuerySelfAttention(dim, num_heads)
        self.norm1 = FP32LayerNorm(dim, eps=_NORM_EPS)
        self.cross_attn = TokenCrossAttention(dim, num_heads)
        self.norm2 = FP32LayerNorm(dim, eps=_NORM_EPS)
        self.mlp = Mlp(dim, intermediate_size)

    def forward(self, hidden_states, tokens, bias):
        hidden_states = hidden_states + self.self_attn(self.norm0(hidden_states))
        hidden_states = hidden_states + self.cross_attn(self.norm1(hidden_states), tokens, bias)
        return hidden_states + self.mlp(self.norm2(hidden_states))


class AttentionPool(nn.Module):
    """CLIP's attention pool: the mean token asks all positions (none is masked) and itself."""

    def __init__(self, num_positions, dim, num_heads, out_dim):
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(num_positions + 1, dim) * dim**-0.5)
        self.k_proj = Linear(dim, dim)
        self.q_proj = Linear(dim, dim)
        self.v_proj = Linear(dim, dim)
        self.c_proj = Linear(dim, out_dim)

    def forward(self, features):
        features = torch.cat([features.mean(dim=1, keepdim=True), features], dim=1) + self.positional_embedding
        # Only the first output is used, so only the mean token asks.
        query = _heads(self.q_proj(features[:, :1]), self.num_heads)
        key, value = _heads(self.k_proj(features), self.num_heads), _heads(self.v_proj(features), self.num_heads)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.c_proj(attended.transpose(1, 2).flatten(1))


class VideoLavitKeyframeDecoder(ModelMixin, ConfigMixin):
    r"""Turns visual codes into prompt embeddings for the keyframe U-Net ([Video-LaVIT](https://arxiv.org/abs/2402.03161)).

    Learned queries, one per patch of the image encoder, read the codes of an image (however many there are), and become
    the encoder's features again; two projections and an attention pool of them replace SDXL's text embeddings.

    Args:
        in_channels: numbers per code.
        num_queries: positions of the image encoder; also the most codes an image can have.
        hidden_size, num_layers, num_attention_heads, intermediate_size: of the transformer.
        feature_dim: width of the reconstructed features.
        prompt_dim, pooled_dim: widths of the two projections; their sum is the U-Net's `cross_attention_dim`, the
            second is also the pooled embedding's width.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["KeyframeDecoderBlock"]
    _repeated_blocks = ["KeyframeDecoderBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 32,
        num_queries: int = 256,
        hidden_size: int = 1408,
        num_layers: int = 12,
        num_attention_heads: int = 16,
        intermediate_size: int = 6144,
        feature_dim: int = 1408,
        prompt_dim: int = 768,
        pooled_dim: int = 1280,
    ):
        super().__init__()
        self.in_proj = Linear(in_channels, hidden_size)
        self.pos_embed = nn.Parameter(torch.randn(1, num_queries, hidden_size) * 0.02)
        self.query_embed = nn.Parameter(torch.randn(1, num_queries, hidden_size) * 0.02)
        self.blocks = nn.ModuleList(
            [KeyframeDecoderBlock(hidden_size, num_attention_heads, intermediate_size) for _ in range(num_layers)]
        )
        self.norm = FP32LayerNorm(hidden_size, eps=_NORM_EPS)
        self.decode_task_layer = task_layer(hidden_size, feature_dim)
        self.unet_proj_1 = Linear(feature_dim, prompt_dim)
        self.unet_proj_2 = Linear(feature_dim, pooled_dim)
        self.unet_attnpool = AttentionPool(num_queries, feature_dim, num_attention_heads, pooled_dim)
        self.gradient_checkpointing = False

    def forward(self, hidden_states, num_tokens, return_dict: bool = True):
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, num_codes, in_channels)`):
                Codebook rows in the order of the kept positions, anything past an image's last
                (`VideoLavitVisualTokenizer.decode(indices).features`).
            num_tokens (`torch.LongTensor` of shape `(batch,)`):
                Codes per image.
            return_dict: return a [`VideoLavitKeyframeDecoderOutput`] instead of a tuple.

        Raises:
            ValueError: shapes that do not fit, or more codes than positions.
        """
        config = self.config
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != config.in_channels:
            raise ValueError(
                f"hidden_states must be (batch, num_codes, {config.in_channels}), got {tuple(hidden_states.shape)}"
            )
        batch, length, _ = hidden_states.shape
        if length > config.num_queries:
            raise ValueError(f"an image has at most {config.num_queries} codes, got {length}")
        if tuple(num_tokens.shape) != (batch,):
            raise ValueError(f"num_tokens must hold one number per image ({batch}), got {tuple(num_tokens.shape)}")

        # Padding is embedded as zeros and masked by a large negative score, as in the original.
        present = torch.arange(length, device=hidden_states.device) < num_tokens.to(hidden_states.device)[:, None]
        tokens = self.in_proj(hidden_states) * present[..., None]
        tokens = tokens + self.pos_embed[:, :length]
        bias = torch.zeros(batch, 1, 1, length, device=tokens.device).masked_fill(~present[:, None, None], _MASKED)

        queries = self.query_embed.expand(batch, -1, -1)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                queries = self._gradient_checkpointing_func(block, queries, tokens, bias)
            else:
                queries = block(queries, tokens, bias)
        features = self.decode_task_layer(self.norm(queries))

        prompt_embeds = torch.cat([self.unet_proj_1(features), self.unet_proj_2(features)], dim=-1)
        pooled_prompt_embeds = self.unet_attnpool(features)
        if not return_dict:
            return prompt_embeds, pooled_prompt_embeds, features
        return VideoLavitKeyframeDecoderOutput(prompt_embeds, pooled_prompt_embeds, features)


__all__ = ["VideoLavitKeyframeDecoder", "VideoLavitKeyframeDecoderOutput"]
