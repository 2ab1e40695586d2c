"""Frame sequential text decomposer of Seer ("FSText", section 3.3 of https://arxiv.org/abs/2303.14897).

Turns the text embedding of one instruction into one sequence of text tokens per frame: learned queries, one per frame
and token, read the instruction through cross attention and pass on along time through causal attention.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.utils import BaseOutput
from torch import nn

from .attention_seer import SeerTemporalTransformerBlock, SeerTextTransformerBlock


@dataclass
class SeerTextDecomposerOutput(BaseOutput):
    """
    Attributes:
        hidden_states: (batch, num_frames, tokens, hidden_size), the text of every frame.
    """

    hidden_states: torch.Tensor


class SeerTextDecomposerLayer(nn.Module):
    """A text block (within frames, and to the instruction) and a temporal block (causal along frames)."""

    def __init__(self, hidden_size, heads, cross_attention_dim, rotary_dim, rotary_angle_dtype):
        super().__init__()
        dim_head = hidden_size // heads
        self.transformer_blocks = nn.ModuleList(
            [
                SeerTextTransformerBlock(hidden_size, heads, dim_head, cross_attention_dim),
                SeerTemporalTransformerBlock(
                    hidden_size, heads, dim_head, rotary_dim=rotary_dim, rotary_angle_dtype=rotary_angle_dtype
                ),
            ]
        )

    def forward(self, hidden_states, encoder_hidden_states):
        """(batch, num_frames, tokens, hidden_size) -> the same."""
        batch_size, num_frames, num_tokens, _ = hidden_states.shape
        hidden_states = self.transformer_blocks[0](hidden_states.flatten(0, 1), encoder_hidden_states)
        hidden_states = hidden_states.unflatten(0, (batch_size, num_frames)).transpose(1, 2).flatten(0, 1)
        hidden_states = self.transformer_blocks[1](hidden_states.contiguous())
        return hidden_states.unflatten(0, (batch_size, num_tokens)).transpose(1, 2).contiguous()


class SeerTextDecomposer(ModelMixin, AttentionMixin, ConfigMixin):
    """
    Args:
        num_frames: frames of the table of positions. Any other number of frames can be asked for; the table is then
            resampled by nearest neighbour.
        max_length: tokens of the table of positions, the longest text.
        hidden_size: width.
        num_attention_heads: number of heads.
        num_layers: number of layers.
        cross_attention_dim: width of the text embedding that is decomposed.
        rotary_dim: rotated channels of each head along time (at most the head's).
        rotary_angle_dtype: see `SeerRotaryEmbedding`; of no consequence at the few positions there are here.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SeerTextDecomposerLayer"]
    _repeated_blocks = ["SeerTextTransformerBlock", "SeerTemporalTransformerBlock"]
    _skip_layerwise_casting_patterns = ["norm", "rotary_emb"]

    @register_to_config
    def __init__(
        self,
        num_frames: int = 16,
        max_length: int = 1024,
        hidden_size: int = 768,
        num_attention_heads: int = 8,
        num_layers: int = 8,
        cross_attention_dim: int = 768,
        rotary_dim: int = 32,
        rotary_angle_dtype: str = "float32",
    ):
        super().__init__()
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size={hidden_size} must be a multiple of num_attention_heads={num_attention_heads}"
            )
        self.learnable_query = nn.Parameter(torch.zeros(1, 1, 1, hidden_size))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_frames, max_length, hidden_size))
        self.trf_blocks = nn.ModuleList(
            [
                SeerTextDecomposerLayer(
                    hidden_size, num_attention_heads, cross_attention_dim, rotary_dim, rotary_angle_dtype
                )
                for _ in range(num_layers)
            ]
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.gradient_checkpointing = False

    def forward(
        self, encoder_hidden_states: torch.Tensor, num_frames: int | None = None, return_dict: bool = True
    ) -> SeerTextDecomposerOutput | tuple:
        """
        Args:
            encoder_hidden_states: (batch, tokens, cross_attention_dim), the last hidden state of the text encoder.
            num_frames: how many frames to write texts for, reference frames included; by default those of the table.
            return_dict: False returns a tuple.

        Raises:
            ValueError: shapes or numbers that do not fit the configuration.
        """
        num_frames = self.config.num_frames if num_frames is None else num_frames
        self._check_inputs(encoder_hidden_states, num_frames)
        batch_size, num_tokens, _ = encoder_hidden_states.shape

        positions = self.pos_embed[:, :, :num_tokens]
        if num_frames != self.config.num_frames:
            # Through `interpolate` itself, because its rounding of source indices decides which frames are taken.
            table = torch.arange(self.config.num_frames, dtype=torch.float32, device=positions.device)
            positions = positions[:, F.interpolate(table[None, None], size=num_frames, mode="nearest")[0, 0].long()]
        hidden_states = (self.learnable_query + positions).expand(batch_size, -1, -1, -1)
        for layer in self.trf_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(layer, hidden_states, encoder_hidden_states)
            else:
                hidden_states = layer(hidden_states, encoder_hidden_states)
        hidden_states = self.norm(hidden_states)
        return SeerTextDecomposerOutput(hidden_states=hidden_states) if return_dict else (hidden_states,)

    def _check_inputs(self, encoder_hidden_states, num_frames):
        width, longest = self.config.cross_attention_dim, self.config.max_length
        if encoder_hidden_states.ndim != 3 or encoder_hidden_states.shape[2] != width:
            raise ValueError(
                f"`encoder_hidden_states` must be (batch, tokens, {width}), got {tuple(encoder_hidden_states.shape)}"
            )
        if encoder_hidden_states.shape[1] > longest:
            raise ValueError(f"texts of up to {longest} tokens are possible, got {encoder_hidden_states.shape[1]}")
        if num_frames < 1:
            raise ValueError(f"`num_frames` must be at least 1, got {num_frames}")
