"""The perceiver resampler Divot uses twice: as the last stage of the tokenizer (video tokens -> 64 features) and in
front of the de-tokenizer's U-Net (64 features -> 125 condition tokens)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn


class DivotPerceiverAttention(nn.Module):
    """Learned queries attend to the input tokens and to themselves."""

    def __init__(self, dim, num_heads, head_dim):
        super().__init__()
        self.num_heads = num_heads
        inner_dim = num_heads * head_dim
        self.norm_input = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, dim, bias=False)

    def forward(self, tokens, latents):
        latents = self.norm_latents(latents)
        key, value = self.to_kv(torch.cat([self.norm_input(tokens), latents], dim=1)).chunk(2, dim=-1)
        query, key, value = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (self.to_q(latents), key, value)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(attended.transpose(1, 2).flatten(2))


class DivotPerceiverFeedForward(nn.Module):
    def __init__(self, dim, ratio=4):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, int(dim * ratio), bias=False)
        self.fc2 = nn.Linear(int(dim * ratio), dim, bias=False)

    def forward(self, hidden_states):
        return self.fc2(F.gelu(self.fc1(self.norm(hidden_states))))


class DivotPerceiverLayer(nn.Module):
    def __init__(self, dim, num_heads, head_dim, feed_forward_ratio=4):
        super().__init__()
        self.attention = DivotPerceiverAttention(dim, num_heads, head_dim)
        self.feed_forward = DivotPerceiverFeedForward(dim, feed_forward_ratio)

    def forward(self, tokens, latents):
        latents = latents + self.attention(tokens, latents)
        return latents + self.feed_forward(latents)


class DivotPerceiverResampler(nn.Module):
    """(batch, num_tokens, input_dim) -> (batch, num_queries, output_dim), for any number of input tokens."""

    def __init__(
        self,
        input_dim,
        dim,
        output_dim,
        num_queries,
        num_layers,
        num_heads,
        head_dim,
        feed_forward_ratio=4,
        normalize_output=True,
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, num_queries, dim) / dim**0.5)
        self.proj_in = nn.Linear(input_dim, dim)
        self.layers = nn.ModuleList(
            DivotPerceiverLayer(dim, num_heads, head_dim, feed_forward_ratio) for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(dim, output_dim)
        self.norm_out = nn.LayerNorm(output_dim) if normalize_output else nn.Identity()
        self.gradient_checkpointing = False

    def forward(self, tokens):
        tokens = self.proj_in(tokens)
        latents = self.latents.expand(tokens.shape[0], -1, -1)
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                latents = self._gradient_checkpointing_func(layer, tokens, latents)
            else:
                latents = layer(tokens, latents)
        return self.norm_out(self.proj_out(latents))


@dataclass
class DivotFeatureResamplerOutput(BaseOutput):
    """What `DivotFeatureResampler` returns.

    Attributes:
        encoder_hidden_states: condition tokens (batch, num_queries, cross_attention_dim).
    """

    encoder_hidden_states: torch.Tensor


class DivotFeatureResampler(ModelMixin, ConfigMixin):
    """Turns Divot features into the condition of `DivotUNet3DConditionModel`.

    Args:
        feature_dim: width of the Divot features.
        num_features: features of one clip.
        dim: inner width.
        cross_attention_dim: width of the condition tokens.
        num_queries: number of condition tokens.
        num_layers: perceiver layers.
        num_heads, head_dim: attention heads and their width.
        feed_forward_ratio: width of the feed-forward layers, relative to `dim`.
        normalize_output: layer norm of the result.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DivotPerceiverLayer"]
    _repeated_blocks = ["DivotPerceiverLayer"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        feature_dim: int = 256,
        num_features: int = 64,
        dim: int = 1024,
        cross_attention_dim: int = 1024,
        num_queries: int = 125,
        num_layers: int = 6,
        num_heads: int = 16,
        head_dim: int = 64,
        feed_forward_ratio: float = 4,
        normalize_output: bool = True,
    ):
        super().__init__()
        self.perceiver = DivotPerceiverResampler(
            feature_dim,
            dim,
            cross_attention_dim,
            num_queries,
            num_layers,
            num_heads,
            head_dim,
            feed_forward_ratio,
            normalize_output,
        )

    def forward(
        self, features: torch.Tensor, return_dict: bool = True
    ) -> DivotFeatureResamplerOutput | tuple[torch.Tensor]:
        """
        Args:
            features: (batch, num_features, feature_dim).
            return_dict: return an output object instead of a tuple.

        Returns:
            `DivotFeatureResamplerOutput` with the condition tokens.

        Raises:
            ValueError: another number or width of features.
        """
        if features.ndim != 3 or tuple(features.shape[1:]) != (self.config.num_features, self.config.feature_dim):
            raise ValueError(
                f"features have shape {tuple(features.shape)}; expected (batch, {self.config.num_features}, "
                f"{self.config.feature_dim})"
            )
        tokens = self.perceiver(features)
        return DivotFeatureResamplerOutput(encoder_hidden_states=tokens) if return_dict else (tokens,)
