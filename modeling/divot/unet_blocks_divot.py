"""Building blocks of the Divot U-Net.

Notable:
- Feature maps travel as (batch * num_frames, channels, height, width) tensors in channels-last memory, so that the
  token view (batch * num_frames, height * width, channels) of the transformers and the (batch, channels, num_frames,
  height * width) view of the temporal convolutions cost no copy.
- Keys and values of the cross attentions depend on the condition only. They are computed by `project_context` once per
  sampling run and passed in.
- On a CPU transformers and residual blocks run in slabs of frames or pixels (see `cpu_layers`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..cpu_layers import (
    FeatureMapConv2d,
    Linear,
    activate_and_convolve,
    add,
    add_in_slabs,
    are_plain,
    gated_feed_forward,
    is_cpu_inference,
)


class ContextKeyValues(NamedTuple):
    """Keys and values of one cross attention, each (batch, num_heads, num_tokens, head_dim).

    The image entries are None when the condition has no image tokens, and (batch * num_frames, ...) when the condition
    holds image tokens of their own for every frame.
    """

    text_key: torch.Tensor
    text_value: torch.Tensor
    image_key: torch.Tensor | None
    image_value: torch.Tensor | None

    def of_frames(self, frames, num_frames):
        """What `frames`, a slice of the `num_frames` frames of every sample, need."""
        if self.image_key is None or self.image_key.shape[0] == self.text_key.shape[0]:
            return self
        image = (x.unflatten(0, (-1, num_frames))[:, frames].flatten(0, 1) for x in (self.image_key, self.image_value))
        return ContextKeyValues(self.text_key, self.text_value, *image)


def _to_frame_axis(hidden_states, num_frames):
    """(batch * num_frames, channels, height, width) -> (batch, channels, num_frames, height * width)."""
    tokens = hidden_states.permute(0, 2, 3, 1)
    tokens = tokens.reshape(-1, num_frames, tokens.shape[1] * tokens.shape[2], tokens.shape[3])
    return tokens.permute(0, 3, 1, 2)


def _from_frame_axis(hidden_states, height, width):
    """The inverse of `_to_frame_axis`."""
    tokens = hidden_states.permute(0, 2, 3, 1)
    return tokens.reshape(-1, height, width, tokens.shape[3]).permute(0, 3, 1, 2)


class DivotTemporalConv(nn.Module):
    """Four times group norm, SiLU and a convolution over three neighbouring frames, added to the input."""

    def __init__(self, channels, dropout, norm_num_groups):
        super().__init__()
        for i in range(1, 5):
            setattr(self, f"norm{i}", nn.GroupNorm(norm_num_groups, channels, eps=1e-5))
            setattr(self, f"conv{i}", FeatureMapConv2d(channels, channels, (3, 1), padding=(1, 0)))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states, num_frames):
        height, width = hidden_states.shape[-2:]
        residual = _to_frame_axis(hidden_states, num_frames)
        x = activate_and_convolve(self.conv1, self.norm1(residual), dim=3)
        x = activate_and_convolve(self.conv2, self.norm2(x), dim=3, dropout=self.dropout)
        x = activate_and_convolve(self.conv3, self.norm3(x), dim=3, dropout=self.dropout)
        x = activate_and_convolve(self.conv4, self.norm4(x), dim=3, dropout=self.dropout)
        return _from_frame_axis(residual + x, height, width)


class DivotResnetBlock(nn.Module):
    """Two 3x3 convolutions with a time shift between them, followed by `DivotTemporalConv`."""

    def __init__(self, in_channels, out_channels, time_embed_dim, dropout, norm_num_groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_num_groups, in_channels, eps=1e-5)
        self.conv1 = FeatureMapConv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_embed_dim, out_channels)
        self.norm2 = nn.GroupNorm(norm_num_groups, out_channels, eps=1e-5)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = FeatureMapConv2d(out_channels, out_channels, 3, padding=1)
        # A 1x1 convolution, written as a linear layer on the channel axis.
        self.conv_shortcut = Linear(in_channels, out_channels) if in_channels != out_channels else None
        self.temporal_conv = DivotTemporalConv(out_channels, dropout, norm_num_groups)

    def forward(self, hidden_states, activated_time_embedding, num_frames):
        """`hidden_states` (batch * num_frames, in_channels, height, width); `activated_time_embedding` is SiLU of the
        conditioning (batch, time_embed_dim)."""
        shift = self.time_emb_proj(activated_time_embedding).repeat_interleave(num_frames, dim=0)[:, :, None, None]
        x = activate_and_convolve(self.conv1, self.norm1(hidden_states))
        shifted = x + shift
        x = activate_and_convolve(self.conv2, self.norm2(shifted), dropout=self.dropout)
        if self.conv_shortcut is not None:
            hidden_states = self.conv_shortcut(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.temporal_conv(add(hidden_states, x, memory=shifted), num_frames)


class DivotSelfAttention(nn.Module):
    """Multi-head self attention without biases on query, key and value."""

    def __init__(self, dim, num_heads, head_dim):
        super().__init__()
        self.num_heads = num_heads
        inner_dim = num_heads * head_dim
        self.to_q = Linear(dim, inner_dim, bias=False)
        self.to_k = Linear(dim, inner_dim, bias=False)
        self.to_v = Linear(dim, inner_dim, bias=False)
        self.to_out = Linear(inner_dim, dim)

    def forward(self, hidden_states):
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.to_q, self.to_k, self.to_v)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(attended.transpose(1, 2).flatten(2))


class DivotCrossAttention(nn.Module):
    """Attention from every pixel of every frame to the condition.

    The first `num_text_context_tokens` tokens use one pair of key/value projections and all further ("image") tokens
    another, each with a softmax of its own: result = text + (tanh(alpha) + 1) * image. The split at 77 comes from the
    text-to-video model that the de-tokenizer was initialised from, and the released weights depend on it.
    """

    def __init__(self, dim, num_heads, head_dim, cross_attention_dim, num_text_context_tokens, num_image_frame_tokens):
        super().__init__()
        self.num_heads = num_heads
        self.num_text_context_tokens = num_text_context_tokens
        self.num_image_frame_tokens = num_image_frame_tokens
        inner_dim = num_heads * head_dim
        self.to_q = Linear(dim, inner_dim, bias=False)
        self.to_k = Linear(cross_attention_dim, inner_dim, bias=False)
        self.to_v = Linear(cross_attention_dim, inner_dim, bias=False)
        self.to_k_image = Linear(cross_attention_dim, inner_dim, bias=False)
        self.to_v_image = Linear(cross_attention_dim, inner_dim, bias=False)
        self.alpha = nn.Parameter(torch.zeros(()))
        self.to_out = Linear(inner_dim, dim)

    def project_context(self, encoder_hidden_states, num_frames):
        """Keys and values for `encoder_hidden_states` (batch, num_tokens, cross_attention_dim)."""

        def heads(tokens):
            return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        text = encoder_hidden_states[:, : self.num_text_context_tokens]
        image = encoder_hidden_states[:, self.num_text_context_tokens :]
        if image.shape[1] == 0:
            return ContextKeyValues(heads(self.to_k(text)), heads(self.to_v(text)), None, None)
        if image.shape[1] == self.num_image_frame_tokens * num_frames:
            image = image.reshape(-1, self.num_image_frame_tokens, image.shape[2])
        return ContextKeyValues(
            heads(self.to_k(text)), heads(self.to_v(text)), heads(self.to_k_image(image)), heads(self.to_v_image(image))
        )

    def forward(self, hidden_states, context):
        """`hidden_states` (batch * num_frames, num_pixels, dim), `context` from `project_context`."""
        frames, pixels, _ = hidden_states.shape
        query = self.to_q(hidden_states)

        def attend(key, value):
            # All frames of a sample look at the same tokens, so they form one long row of queries.
            grouped = query.view(key.shape[0], -1, self.num_heads, key.shape[-1]).transpose(1, 2)
            attended = F.scaled_dot_product_attention(grouped, key, value)
            return attended.transpose(1, 2).reshape(frames, pixels, -1)

        attended = attend(context.text_key, context.text_value)
        if context.image_key is not None:
            image = attend(context.image_key, context.image_value)
            attended = torch.addcmul(attended, image, torch.tanh(self.alpha) + 1)
        return self.to_out(attended)


class DivotFeedForward(nn.Module):
    """GEGLU: out(value(x) * gelu(gate(x))), four times wider inside. Without dropout, as in the original."""

    def __init__(self, dim):
        super().__init__()
        self.value = nn.Linear(dim, 4 * dim)
        self.gate = nn.Linear(dim, 4 * dim)
        self.out = nn.Linear(4 * dim, dim)

    def forward(self, hidden_states):
        layers = (self.value, self.gate, self.out)
        if is_cpu_inference(hidden_states) and are_plain(layers, hidden_states.dtype):
            return gated_feed_forward(hidden_states, *((layer.weight, layer.bias) for layer in layers))
        return self.out(self.value(hidden_states) * F.gelu(self.gate(hidden_states)))


class DivotSpatialTransformerLayer(nn.Module):
    """Self attention within a frame, cross attention to the condition, feed forward; each pre-norm with a residual."""

    def __init__(self, dim, num_heads, head_dim, **context):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = DivotSelfAttention(dim, num_heads, head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = DivotCrossAttention(dim, num_heads, head_dim, **context)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = DivotFeedForward(dim)

    def forward(self, hidden_states, context):
        hidden_states = hidden_states + self.attn1(self.norm1(hidden_states))
        hidden_states = add(hidden_states, self.attn2(self.norm2(hidden_states), context), memory=hidden_states)
        return add(hidden_states, self.ff(self.norm3(hidden_states)), memory=hidden_states)


class DivotTemporalTransformerLayer(nn.Module):
    """Two self attentions over the frames of one pixel and a feed forward. No position is marked along time."""

    def __init__(self, dim, num_heads, head_dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = DivotSelfAttention(dim, num_heads, head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = DivotSelfAttention(dim, num_heads, head_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = DivotFeedForward(dim)

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.attn1(self.norm1(hidden_states))
        hidden_states = add(hidden_states, self.attn2(self.norm2(hidden_states)), memory=hidden_states)
        return add(hidden_states, self.ff(self.norm3(hidden_states)), memory=hidden_states)


class DivotSpatialTransformer(nn.Module):
    """Transformer over the pixels of each frame."""

    def __init__(self, channels, num_heads, head_dim, num_layers, norm_num_groups, **context):
        super().__init__()
        inner_dim = num_heads * head_dim
        self.norm = nn.GroupNorm(norm_num_groups, channels, eps=1e-6)
        self.proj_in = Linear(channels, inner_dim)
        self.layers = nn.ModuleList(
            DivotSpatialTransformerLayer(inner_dim, num_heads, head_dim, **context) for _ in range(num_layers)
        )
        self.proj_out = Linear(inner_dim, channels)

    def project_context(self, encoder_hidden_states, num_frames):
        """One `ContextKeyValues` per layer."""
        return tuple(layer.attn2.project_context(encoder_hidden_states, num_frames) for layer in self.layers)

    def forward(self, hidden_states, contexts):
        batch = contexts[0].text_key.shape[0]
        clips = hidden_states.unflatten(0, (batch, -1)).transpose(1, 2)  # batch, channels, num_frames, height, width
        num_frames = clips.shape[2]

        def transform(part, start):
            frames = part.transpose(1, 2).flatten(0, 1)
            tokens = self.norm(frames).permute(0, 2, 3, 1).flatten(1, 2)
            tokens = self.proj_in(tokens)
            for layer, context in zip(self.layers, contexts, strict=True):
                tokens = layer(tokens, context.of_frames(slice(start, start + part.shape[2]), num_frames))
            return self.proj_out(tokens).view(batch, -1, *part.shape[3:], part.shape[1]).permute(0, 4, 1, 2, 3)

        return add_in_slabs(transform, clips, clips, dim=2).transpose(1, 2).flatten(0, 1)


class DivotTemporalTransformer(nn.Module):
    """Transformer over the frames of each pixel; its group norm sees all frames of a sample at once."""

    def __init__(self, channels, num_heads, head_dim, num_layers, norm_num_groups):
        super().__init__()
        inner_dim = num_heads * head_dim
        self.norm = nn.GroupNorm(norm_num_groups, channels, eps=1e-6)
        self.proj_in = Linear(channels, inner_dim)
        self.layers = nn.ModuleList(
            DivotTemporalTransformerLayer(inner_dim, num_heads, head_dim) for _ in range(num_layers)
        )
        self.proj_out = Linear(inner_dim, channels)

    def forward(self, hidden_states, num_frames):
        height, width = hidden_states.shape[-2:]
        residual = _to_frame_axis(hidden_states, num_frames)  # batch, channels, num_frames, pixels

        def transform(part, start):
            batch, channels, _, pixels = part.shape
            tokens = part.permute(0, 3, 2, 1).reshape(batch * pixels, num_frames, channels)
            tokens = self.proj_in(tokens)
            for layer in self.layers:
                tokens = layer(tokens)
            return self.proj_out(tokens).view(batch, pixels, num_frames, channels).permute(0, 3, 2, 1)

        return _from_frame_axis(add_in_slabs(transform, self.norm(residual), residual, dim=3), height, width)
