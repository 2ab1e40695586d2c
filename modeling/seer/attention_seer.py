"""Attention of Seer (https://arxiv.org/abs/2303.14897): rotary positions, window-causal attention, transformer blocks.

Notable:
- The temporal attention of the U-Net is causal over *tokens*, not over frames: inside a window (all frames x window x
  window positions, in frame, row, column order) a token sees the tokens of earlier frames and, within its own frame,
  only those before it in raster order.
- Rotary positions are indices in the whole flattened clip (frame * h * w + row * w + column), also inside windows.
- Text attention is per frame: every frame has a text sequence of its own.
"""

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

from ..cpu_layers import GatedFeedForward, Linear, add


class SeerRotaryEmbedding(nn.Module):
    """Rotary position embedding on interleaved channel pairs (https://arxiv.org/abs/2104.09864).

    Args:
        dim: number of rotated channels of each head; pair j = (2j, 2j + 1) turns by position * 10000^(-2j / dim). The
            last channel of an odd number stays as it is.
        angle_dtype: "float32", or "float16" to round the angles through half precision. The published weights were
            trained and sampled under float16 autocast, where the angles themselves were half precision numbers: above
            position 2048 (the third frame at 32x32 latents) fast channels saw angles rounded to multiples of 2, 4, 8.
    """

    def __init__(self, dim, angle_dtype="float32"):
        super().__init__()
        if angle_dtype not in ("float32", "float16"):
            raise ValueError(f"angle_dtype must be 'float32' or 'float16', got {angle_dtype!r}")
        self.dim = dim
        self.angle_dtype = getattr(torch, angle_dtype)
        # Released files hold the frequencies. The angles are nevertheless made of fresh ones, so that a model that is
        # (or once was) cast to half precision does not compute with rounded frequencies.
        self.register_buffer("freqs", self.frequencies())

    def frequencies(self, device=None):
        """float32 (dim // 2,): radians per position of every pair."""
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device=device)[: self.dim // 2] / self.dim
        return 1.0 / 10000**exponents

    def angles(self, positions):
        """Positions (...) -> float32 angles (..., dim // 2) in radians, rounded as `angle_dtype` says."""
        angles = positions.to(torch.float32)[..., None] * self.frequencies(positions.device)
        return angles.to(self.angle_dtype).to(torch.float32)

    def forward(self, positions, dtype=torch.float32):
        """Positions (...) -> (cos, sin), each (..., dim // 2) of `dtype`."""
        angles = self.angles(positions)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary_embedding(hidden_states, cos, sin):
    """Turns the first channel pairs of `hidden_states` (..., channels) by the angles whose `cos` and `sin`
    (..., pairs) are given; the channels behind them stay as they are."""
    dim = 2 * cos.shape[-1]
    if hidden_states.dtype != torch.float32 or hidden_states.shape[-1] % 2:
        even, odd = hidden_states[..., 0:dim:2], hidden_states[..., 1:dim:2]
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
        return torch.cat((turned, hidden_states[..., dim:]), dim=-1)
    # The same turn as a complex product, several times faster: pairs are neighbours in memory.
    rotation = torch.complex(cos, sin)
    if torch.is_grad_enabled():
        turned = torch.view_as_real(_complex_pairs(hidden_states, dim) * rotation).flatten(-2)
        return torch.cat((turned, hidden_states[..., dim:]), dim=-1)
    turned = hidden_states.clone()
    _complex_pairs(turned, dim).mul_(rotation)
    return turned


def _complex_pairs(hidden_states, dim):
    """View of the first `dim` channels as complex numbers."""
    return torch.view_as_complex(hidden_states[..., :dim].unflatten(-1, (-1, 2)))


class SeerAttnProcessor:
    """softmax(q k^T / sqrt(head_dim)) v through diffusers' attention backends."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, rotary=None, is_causal=False):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        key = attn.to_k(context).unflatten(-1, (attn.heads, -1))
        value = attn.to_v(context).unflatten(-1, (attn.heads, -1))
        if rotary is not None:
            query, key = apply_rotary_embedding(query, *rotary), apply_rotary_embedding(key, *rotary)
        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            is_causal=is_causal,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[0](hidden_states.flatten(-2).to(query.dtype))


class SeerAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention with biases on the output projection only.

    Args:
        query_dim: width of the input and of the output.
        heads: number of heads.
        dim_head: channels of each head.
        cross_attention_dim: width of the context; None for self attention.
    """

    _default_processor_cls = SeerAttnProcessor
    _available_processors = [SeerAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(self, query_dim, heads, dim_head, cross_attention_dim=None):
        super().__init__()
        context_dim = query_dim if cross_attention_dim is None else cross_attention_dim
        self.heads = heads
        self.to_q = Linear(query_dim, heads * dim_head, bias=False)
        self.to_k = Linear(context_dim, heads * dim_head, bias=False)
        self.to_v = Linear(context_dim, heads * dim_head, bias=False)
        self.to_out = nn.ModuleList([Linear(heads * dim_head, query_dim)])
        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states, encoder_hidden_states=None, rotary=None, is_causal=False):
        """(batch, tokens, query_dim) -> the same; `rotary` is (cos, sin), each broadcastable to
        (batch, tokens, heads, rotated channels / 2)."""
        return self.processor(self, hidden_states, encoder_hidden_states, rotary, is_causal)


class SeerCausalAttention(SeerAttention):
    """Causal self attention over one axis with rotary positions 0, 1, 2, ..., as in the text decomposer."""

    def __init__(self, query_dim, heads, dim_head, rotary_dim=32, rotary_angle_dtype="float32"):
        super().__init__(query_dim, heads, dim_head)
        self.rotary_emb = SeerRotaryEmbedding(min(rotary_dim, dim_head), rotary_angle_dtype)

    def forward(self, hidden_states):
        """(batch, positions, channels) -> the same."""
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        cos, sin = self.rotary_emb(positions, hidden_states.dtype)
        return super().forward(hidden_states, rotary=(cos[:, None], sin[:, None]), is_causal=True)


class SeerWindowAttention(SeerCausalAttention):
    """Scaled autoregressive window attention (section 3.2 of the paper) over clips of tokens, or a slab of them."""

    def forward(self, hidden_states, positions, window):
        """(batch, num_frames, height, width, channels) -> (batch, num_frames * height * width, channels).

        Args:
            hidden_states: tokens; height and width are multiples of the window's.
            positions: (num_frames, height, width), the tokens' indices in the whole clip.
            window: height and width of the windows (see `window_shape`).
        """
        positions = to_windows(positions[None, ..., None], window)  # windows, tokens, 1
        cos, sin = self.rotary_emb(positions, hidden_states.dtype)  # windows, tokens, 1 (all heads), rotated / 2
        if len(hidden_states) > 1:
            cos, sin = (x.repeat(len(hidden_states), 1, 1, 1) for x in (cos, sin))
        windows = to_windows(hidden_states, window)
        windows = SeerAttention.forward(self, windows, rotary=(cos, sin), is_causal=True)
        return from_windows(windows, window, hidden_states.shape[:-1]).flatten(1, 3)


def window_shape(height, width, window_size=8, small_window_size=4, full_window_height=4, min_windows=4):
    """Height and width of the attention windows of a feature map: all of it up to height `full_window_height`,
    `window_size` where at least `min_windows` of them fit the height, and `small_window_size` in between.

    Raises:
        ValueError: the windows do not tile the map.
    """
    if height <= full_window_height:
        return height, width
    window = window_size if height // window_size >= min_windows else small_window_size
    if height % window or width % window:
        raise ValueError(
            f"a feature map of {height}x{width} cannot be tiled by attention windows of {window}x{window}; "
            "choose another frame size (see `SeerUNet3DConditionModel.check_latent_size`)"
        )
    return window, window


def to_windows(tokens, window):
    """(batch, frames, height, width, channels) -> (batch * windows, frames * window tokens, channels), frame-major."""
    tokens = tokens.unflatten(3, (-1, window[1])).unflatten(2, (-1, window[0]))
    return tokens.permute(0, 2, 4, 1, 3, 5, 6).flatten(3, 5).flatten(0, 2)


def from_windows(windows, window, shape):
    """Inverse of `to_windows`; `shape` is (batch, frames, height, width)."""
    batch_size, num_frames, height, width = shape
    rows, columns = height // window[0], width // window[1]
    windows = windows.view(batch_size, rows, columns, num_frames, *window, -1)
    return windows.permute(0, 3, 1, 4, 2, 5, 6).reshape(*shape, -1)


class SeerTextTransformerBlock(nn.Module):
    """Self attention within each frame, attention to text, feed-forward."""

    def __init__(self, dim, heads, dim_head, cross_attention_dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = SeerAttention(dim, heads, dim_head)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = SeerAttention(dim, heads, dim_head, cross_attention_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = GatedFeedForward(dim)

    def forward(self, hidden_states, encoder_hidden_states):
        """`hidden_states`: (batch * num_frames, tokens, dim). `encoder_hidden_states`: (batch * num_frames, text
        tokens, width) for one text per frame, or (batch, text tokens, width) for a text all frames share."""
        hidden_states = hidden_states + self.attn1(self.norm1(hidden_states))
        query = self.norm2(hidden_states)
        # A query attends alone, so the frames of a sample that share a text are one long sequence of queries.
        grouped = query.reshape(encoder_hidden_states.shape[0], -1, query.shape[-1])
        attended = self.attn2(grouped, encoder_hidden_states).view_as(hidden_states)
        hidden_states = add(hidden_states, attended, memory=hidden_states)
        return add(hidden_states, self.ff(self.norm3(hidden_states)), memory=hidden_states)


class SeerTemporalTransformerBlock(nn.Module):
    """Causal attention through time, feed-forward. There is no text here, and no second norm.

    Args:
        dim, heads, dim_head: width, number of heads, channels of each head.
        attention: `SeerCausalAttention` (text decomposer) or `SeerWindowAttention` (U-Net).
        attention_kwargs: further arguments of `attention`.
    """

    def __init__(self, dim, heads, dim_head, attention=SeerCausalAttention, **attention_kwargs):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = attention(dim, heads, dim_head, **attention_kwargs)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = GatedFeedForward(dim)

    def forward(self, hidden_states, num_cond_frames=0, *attention_inputs):
        """`hidden_states`: (batch, num_frames, ..., dim). The first `num_cond_frames` frames take part in attention but
        skip the feed-forward, as in the authors' training. `attention_inputs` are those of the attention's forward."""
        attended = self.attn1(self.norm1(hidden_states), *attention_inputs)
        hidden_states = hidden_states + attended.view_as(hidden_states)
        if num_cond_frames == 0:
            return add(hidden_states, self.ff(self.norm3(hidden_states)), memory=hidden_states)
        reference, future = hidden_states[:, :num_cond_frames], hidden_states[:, num_cond_frames:]
        return torch.cat((reference, future + self.ff(self.norm3(future))), dim=1)
