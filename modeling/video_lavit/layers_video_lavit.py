"""Layers that several of Video-LaVIT's networks share. Names follow the released files."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..cpu_layers import Linear, linear


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, hidden_states):
        return self.fc2(F.gelu(self.fc1(hidden_states)))


class FusedQKV(nn.Module):
    """One matrix for query, key and value; query and value have a bias, the key has none (BEiT, EVA)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = Linear(dim, dim)

    def project(self, hidden_states):
        """(..., dim) -> (..., 3, num_heads, head_dim)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        # Adapters (LoRA) replace the linear layer by one that has to be called.
        is_plain = type(self.qkv) is Linear
        projected = linear(hidden_states, self.qkv.weight, bias) if is_plain else self.qkv(hidden_states) + bias
        return projected.unflatten(-1, (3, self.num_heads, -1))


class SpatialAttention(FusedQKV):
    """Self-attention over the positions of each frame: (batch, num_frames, positions, dim)."""

    def forward(self, hidden_states):
        batch, frames, positions, dim = hidden_states.shape
        # (batch * frames, positions, 3, heads, head_dim) -> three of (batch * frames, heads, positions, head_dim)
        query, key, value = self.project(hidden_states).flatten(0, 1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).reshape(batch, frames, positions, dim))


class TemporalAttention(FusedQKV):
    """Self-attention over the frames at each position, without a mask: (batch, num_frames, positions, dim)."""

    def forward(self, hidden_states):
        # (batch, frames, positions, 3, heads, head_dim) -> three of (batch, positions, heads, frames, head_dim)
        query, key, value = self.project(hidden_states).permute(3, 0, 2, 4, 1, 5)
        attended = F.scaled_dot_product_attention(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1))
        attended = attended.unflatten(0, query.shape[:2]).permute(0, 3, 1, 2, 4)
        return self.proj(attended.reshape(hidden_states.shape))


class SpaceTimeBlock(GradientCheckpointingLayer):
    """Pre-norm block of spatial attention, temporal attention and MLP on (batch, num_frames, positions, dim)."""

    def __init__(self, dim, num_heads, mlp_ratio=4, eps=1e-5, norm_class=nn.LayerNorm):
        super().__init__()
        self.norm0 = norm_class(dim, eps=eps)
        self.spatial_attention = SpatialAttention(dim, num_heads)
        self.norm1 = norm_class(dim, eps=eps)
        self.temporal_attention = TemporalAttention(dim, num_heads)
        self.norm2 = norm_class(dim, eps=eps)
        self.mlp = Mlp(dim, dim * mlp_ratio)

    def forward(self, hidden_states):
        positions = hidden_states.shape[2]
        # Frames do not meet in the first and third step, positions do not in the second.
        hidden_states = _add_by_parts(
            hidden_states, lambda part: self.spatial_attention(self.norm0(part)), dim=1, rows=positions
        )
        hidden_states = _add_by_parts(
            hidden_states, lambda part: self.temporal_attention(self.norm1(part)), dim=2, rows=hidden_states.shape[1]
        )
        return _add_by_parts(hidden_states, lambda part: self.mlp(self.norm2(part)), dim=1, rows=positions)


# Tokens that pass through a layer together on the CPU: their widest activation then stays in the cache.
_CPU_TOKENS = 1024


def _add_by_parts(hidden_states, layer, dim, rows):
    """hidden_states + layer(hidden_states), for a layer that treats the slices of axis `dim` separately.

    On the CPU, without gradients, slices are taken a few at a time: the same numbers with a fraction of the memory
    traffic. `rows` is the number of tokens per slice.
    """
    size = max(1, _CPU_TOKENS // (rows * hidden_states.shape[0]))
    if torch.is_grad_enabled() or hidden_states.device.type != "cpu" or size >= hidden_states.shape[dim]:
        return hidden_states + layer(hidden_states)
    result = torch.empty_like(hidden_states)
    for part, target in zip(hidden_states.split(size, dim), result.split(size, dim)):
        torch.add(part, layer(part), out=target)
    return result


class VectorQuantizer(nn.Module):
    """Nearest code of an l2-normalised vector.

    The codebook's rows are used as they are stored: the original normalises them when they are initialised, not when
    they are looked up, so their norms matter.
    """

    def __init__(self, num_codes, dim):
        super().__init__()
        self.embedding = nn.Embedding(num_codes, dim)

    def forward(self, features):
        """Features (..., dim) -> (codes (..., dim), indices (...), normalised features (..., dim))."""
        normalised = F.normalize(features, dim=-1)
        codebook = self.embedding.weight
        # ||x - e||^2 without the term that is the same for every code; argmin takes the first of equals.
        distances = torch.addmm(
            codebook.square().sum(-1), normalised.reshape(-1, codebook.shape[-1]), codebook.t(), alpha=-2
        )
        indices = distances.argmin(-1).reshape(features.shape[:-1])
        return self.embedding(indices), indices, normalised

    def lookup(self, indices):
        """Codes (..., dim) of indices (...).

        Raises:
            ValueError: an index lies outside the codebook.
        """
        count = self.embedding.num_embeddings
        if indices.numel() and (indices.min() < 0 or indices.max() >= count):
            raise ValueError(
                f"code indices must lie in 0..{count - 1}, got {int(indices.min())}..{int(indices.max())}; "
                "ids of the language model are larger by their offset"
            )
        return self.embedding(indices)


def task_layer(dim, out_dim):
    """Linear, Tanh, Linear between a transformer and a code space; the middle has no weights, so names are 0 and 2."""
    return nn.Sequential(Linear(dim, dim), nn.Tanh(), Linear(dim, out_dim))
