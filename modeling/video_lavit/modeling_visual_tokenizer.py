"""LaVIT's dynamic visual tokenizer: an image becomes a variable number of codes.

EVA-CLIP ViT-g features -> a token selector keeps about a third of the 256 positions -> a causal transformer merges what
was dropped into what is kept -> vector quantization (16,384 codes), or continuous features for understanding.
Video-LaVIT: https://arxiv.org/abs/2402.03161, LaVIT: https://arxiv.org/abs/2309.04669. Module names are those of the
released files.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from ..cpu_layers import Linear
from .configuration_video_lavit import VideoLavitVisualTokenizerConfig
from .layers_video_lavit import FusedQKV, Mlp, VectorQuantizer, task_layer

_MERGER_NORM_EPS = 1e-5
_SMOOTHING = 1e-6


@dataclass
class VideoLavitVisualTokenizerOutput(ModelOutput):
    """
    Args:
        indices (`torch.LongTensor` of shape `(batch, num_positions)`):
            Codes of the kept positions in raster order, then -1. `None` where codes were not asked for.
        quantized (`torch.Tensor` of shape `(batch, num_positions, codebook_dim)`):
            Codebook rows of `indices`, zero past the last.
        num_tokens (`torch.LongTensor` of shape `(batch,)`):
            Kept positions per image.
        keep_mask (`torch.BoolTensor` of shape `(batch, num_positions)`):
            Which positions of the raster were kept.
        keep_log_probs (`torch.FloatTensor` of shape `(batch, num_positions, 2)`):
            Log-probabilities of keeping (0) and dropping (1).
        merged_features (`torch.Tensor` of shape `(batch, num_positions, hidden_size)`):
            Output of the token merger at every position.
        pre_quant (`torch.Tensor` of shape `(kept positions of all images, codebook_dim)`):
            Vectors before normalisation and quantization.
        last_hidden_state (`torch.Tensor` of shape `(batch, num_positions, hidden_size)`):
            Features of the encoder, before its final normalisation.
    """

    indices: torch.LongTensor | None = None
    quantized: torch.Tensor | None = None
    num_tokens: torch.LongTensor | None = None
    keep_mask: torch.BoolTensor | None = None
    keep_log_probs: torch.FloatTensor | None = None
    merged_features: torch.Tensor | None = None
    pre_quant: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None


@dataclass
class VideoLavitVisualDecoderOutput(ModelOutput):
    """
    Args:
        features (`torch.Tensor` of shape `(batch, num_tokens, codebook_dim)`):
            Codebook rows, zero where there is no code: the input of `VideoLavitKeyframeDecoder`.
        num_tokens (`torch.LongTensor` of shape `(batch,)`):
            Codes per image.
    """

    features: torch.Tensor | None = None
    num_tokens: torch.LongTensor | None = None


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class EvaAttention(FusedQKV):
    is_causal = False

    def __init__(self, config):
        super().__init__(config.hidden_size, config.num_attention_heads)
        self.config = config
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5

    def forward(self, hidden_states):
        query, key, value = self.project(hidden_states).permute(2, 0, 3, 1, 4)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, _ = attention(self, query, key, value, None, scaling=self.scaling, dropout=0.0)
        return self.proj(attended.reshape(hidden_states.shape))


class EvaBlock(GradientCheckpointingLayer):
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = EvaAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states))
        return hidden_states + self.mlp(self.norm2(hidden_states))


class EvaPatchEmbed(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, pixel_values):
        return self.proj(pixel_values).flatten(2).transpose(1, 2)


class EvaVisionEncoder(nn.Module):
    """EVA-CLIP's ViT: no layer scale, no relative positions, no rotary embedding.

    `norm` and `head` make the CLIP embedding; Video-LaVIT takes the features before them.
    """

    def __init__(self, config):
        super().__init__()
        self.patch_embed = EvaPatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_positions + 1, config.hidden_size))
        self.blocks = nn.ModuleList([EvaBlock(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = Linear(config.hidden_size, config.clip_embedding_size)

    def forward(self, pixel_values):
        """Pixels (batch, channels, side, side) -> (batch, 1 + num_positions, hidden_size), class token first."""
        patches = self.patch_embed(pixel_values)
        hidden_states = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states

    def clip_embedding(self, pixel_values):
        """(batch, clip_embedding_size), not normalised."""
        return self.head(self.norm(self(pixel_values)[:, 0]))


class TokenSelector(nn.Module):
    """Log-probabilities of keeping and dropping each position, from its features and their mean over the image."""

    def __init__(self, dim):
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim, eps=_MERGER_NORM_EPS), Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            Linear(dim, dim // 2), nn.GELU(), Linear(dim // 2, dim // 4), nn.GELU(), Linear(dim // 4, 2)
        )

    def forward(self, features):
        local, pooled = self.in_conv(features).chunk(2, dim=-1)
        pooled = pooled.mean(dim=1, keepdim=True).expand_as(local)
        logits = self.out_conv(torch.cat([local, pooled], dim=-1))
        return F.log_softmax(logits.float(), dim=-1)


def smoothed_softmax(scores, mask):
    """The merger's softmax over keys (last axis), in float32.

    The maximum is taken over all keys, also masked ones, and a masked key keeps a weight of about eps/N: with nothing
    left to attend to the result is the plain mean. Trained weights rely on it.
    """
    scores = scores.float()
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True)) * mask
    return (weights + _SMOOTHING / scores.shape[-1]) / (weights.sum(dim=-1, keepdim=True) + _SMOOTHING)


class MergerSelfAttention(nn.Module):
    """Causal self-attention to kept positions and to oneself."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, hidden_states, mask):
        query, key, value = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(_attend(query, key, value, mask).reshape(hidden_states.shape))


class MergerCrossAttention(nn.Module):
    """Attention to the encoder's features at dropped positions, without causality."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.query = Linear(dim, dim)
        self.key = Linear(dim, dim)
        self.value = Linear(dim, dim)
        self.proj = Linear(dim, dim)

    def forward(self, hidden_states, features, mask):
        query, key, value = (
            linear(inputs).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear, inputs in ((self.query, hidden_states), (self.key, features), (self.value, features))
        )
        return self.proj(_attend(query, key, value, mask).reshape(hidden_states.shape))


def _attend(query, key, value, mask):
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(2, 3))
    return torch.matmul(smoothed_softmax(scores, mask).to(value.dtype), value).transpose(1, 2)


class MergerBlock(GradientCheckpointingLayer):
    def __init__(self, config):
        super().__init__()
        dim, heads = config.hidden_size, config.merger_num_attention_heads
        self.norm0 = nn.LayerNorm(dim, eps=_MERGER_NORM_EPS)
        self.token_causal_attn = MergerSelfAttention(dim, heads)
        self.norm1 = nn.LayerNorm(dim, eps=_MERGER_NORM_EPS)
        self.token_cross_attn = MergerCrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=_MERGER_NORM_EPS)
        self.mlp = Mlp(dim, config.merger_intermediate_size or config.intermediate_size)

    def forward(self, hidden_states, features, self_mask, cross_mask):
        hidden_states = hidden_states + self.token_causal_attn(self.norm0(hidden_states), self_mask)
        hidden_states = hidden_states + self.token_cross_attn(self.norm1(hidden_states), features, cross_mask)
        return hidden_states + self.mlp(self.norm2(hidden_states))


class TokenMerger(nn.Module):
    """Writes what was dropped into what is kept. Every position is computed; the kept ones are used."""

    def __init__(self, config):
        super().__init__()
        self.ln_vision = nn.LayerNorm(config.hidden_size, eps=_MERGER_NORM_EPS)
        self.blocks = nn.ModuleList([MergerBlock(config) for _ in range(config.merger_num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=_MERGER_NORM_EPS)

    def forward(self, features, keep_mask):
        keys = self.ln_vision(features)
        positions = torch.arange(features.shape[1], device=features.device)
        causal = positions[None, :] <= positions[:, None]
        itself = positions[None, :] == positions[:, None]
        self_mask = ((keep_mask[:, None, :] | itself) & causal)[:, None].float()
        cross_mask = (~keep_mask)[:, None, None, :].float()
        hidden_states = features
        for block in self.blocks:
            hidden_states = block(hidden_states, keys, self_mask, cross_mask)
        return self.norm(hidden_states)


class VideoLavitVisualTokenizer(PreTrainedModel):
    r"""Images to a variable number of codes, and codes to the features that the keyframe decoder takes.

    Tokenization is random by construction: which positions are kept is drawn with Gumbel noise, also at inference. Pass
    `generator` (or the noise itself) to repeat it.

    Args:
        config ([`VideoLavitVisualTokenizerConfig`]): sizes; `projection_dim` adds the projection for understanding.
    """

    config: VideoLavitVisualTokenizerConfig
    base_model_prefix = "visual_tokenizer"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EvaBlock", "MergerBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config):
        super().__init__(config)
        self.encoder = EvaVisionEncoder(config)
        self.token_predictor = TokenSelector(config.hidden_size)
        self.causal_encoder = TokenMerger(config)
        self.quantize = VectorQuantizer(config.codebook_size, config.codebook_dim)
        self.encode_task_layer = task_layer(config.hidden_size, config.codebook_dim)
        self.vit_proj = None
        if config.projection_dim is not None:
            self.vit_proj = Linear(config.hidden_size, config.projection_dim)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
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
        elif isinstance(module, EvaVisionEncoder):
            init.normal_(module.cls_token, std=std)
            init.normal_(module.pos_embed, std=std)

    def _merge(self, pixel_values, gumbel_noise, generator):
        size = self.config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (self.config.num_channels, size, size):
            raise ValueError(
                f"pixel_values must be (batch, {self.config.num_channels}, {size}, {size}), got "
                f"{tuple(pixel_values.shape)}; VideoLavitImageProcessor makes them from images"
            )
        features = self.encoder(pixel_values)[:, 1:]
        log_probs = self.token_predictor(features)
        if gumbel_noise is None:
            gumbel_noise = sample_gumbel(log_probs, generator)
        elif gumbel_noise.shape != log_probs.shape:
            raise ValueError(f"gumbel_noise must be {tuple(log_probs.shape)}, got {tuple(gumbel_noise.shape)}")
        # The hard straight-through Gumbel-softmax at temperature 1 is this comparison; a tie keeps.
        scores = log_probs + gumbel_noise.to(log_probs)
        keep_mask = scores[..., 0] >= scores[..., 1]
        return features, log_probs, keep_mask, self.causal_encoder(features, keep_mask)

    @apply_forward_hook
    def encode(self, pixel_values, *, gumbel_noise=None, generator=None):
        r"""Images to codes.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, image_size, image_size)`):
                Output of `VideoLavitImageProcessor`.
            gumbel_noise (`torch.Tensor` of shape `(batch, num_positions, 2)`, *optional*):
                Standard Gumbel noise of the keep decision, instead of drawing it.
            generator (`torch.Generator` or a list of them, one per image, *optional*):
                Source of the noise.

        Returns:
            [`VideoLavitVisualTokenizerOutput`].

        Raises:
            ValueError: pixels or noise of another shape.
        """
        features, log_probs, keep_mask, merged = self._merge(pixel_values, gumbel_noise, generator)
        num_tokens = keep_mask.sum(dim=1)
        pre_quant = self.encode_task_layer(merged[keep_mask])
        codes, kept_indices, _ = self.quantize(pre_quant)
        filled = torch.arange(keep_mask.shape[1], device=keep_mask.device) < num_tokens[:, None]
        indices = kept_indices.new_full(keep_mask.shape, -1).masked_scatter(filled, kept_indices)
        quantized = codes.new_zeros(*keep_mask.shape, codes.shape[-1]).masked_scatter(filled[..., None], codes)
        return VideoLavitVisualTokenizerOutput(
            indices=indices,
            quantized=quantized,
            num_tokens=num_tokens,
            keep_mask=keep_mask,
            keep_log_probs=log_probs,
            merged_features=merged,
            pre_quant=pre_quant,
            last_hidden_state=features,
        )

    def forward(self, pixel_values, gumbel_noise=None, generator=None):
        """The same as `encode`."""
        return self.encode(pixel_values, gumbel_noise=gumbel_noise, generator=generator)

    @apply_forward_hook
    def get_image_features(self, pixel_values, *, gumbel_noise=None, generator=None):
        """Continuous features for the language model (understanding).

        Args: as for `encode`.

        Returns:
            tuple with one tensor (kept positions, projection_dim) per image.

        Raises:
            ValueError: the tokenizer has no projection.
        """
        if self.vit_proj is None:
            raise ValueError("this tokenizer has no projection to a language model (config.projection_dim is None)")
        _, _, keep_mask, merged = self._merge(pixel_values, gumbel_noise, generator)
        return self.vit_proj(merged[keep_mask]).split(keep_mask.sum(dim=1).tolist())

    @apply_forward_hook
    def decode(self, indices):
        """Codes to features for `VideoLavitKeyframeDecoder`.

        Args:
            indices (`torch.LongTensor` of shape `(batch, num_tokens)`, or a list of 1-d tensors):
                Codes; -1 after the last where images have different numbers.

        Returns:
            [`VideoLavitVisualDecoderOutput`].

        Raises:
            TypeError: codes that are no whole numbers.
            ValueError: a code lies outside the codebook, stands behind a -1, or an image has none or too many.
        """
        for row in [indices] if isinstance(indices, torch.Tensor) else indices:
            if isinstance(row, torch.Tensor) and (row.is_floating_point() or row.dtype == torch.bool):
                raise TypeError(f"indices are whole numbers, got a tensor of {row.dtype}")
        if isinstance(indices, (list, tuple)):
            tensors = [torch.as_tensor(row, dtype=torch.long, device=self.device) for row in indices]
            indices = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=-1)
        if indices.ndim != 2:
            raise ValueError(f"indices must be (batch, num_tokens), got {tuple(indices.shape)}")
        present = indices != -1
        num_tokens = present.sum(dim=1)
        limit = self.config.num_positions
        if num_tokens.numel() and not 1 <= int(num_tokens.min()) <= int(num_tokens.max()) <= limit:
            raise ValueError(f"an image has 1 to {limit} visual codes, got {num_tokens.tolist()}")
        if not torch.equal(present, torch.arange(indices.shape[1], device=indices.device) < num_tokens[:, None]):
            raise ValueError("-1 may only follow an image's last code")
        features = self.quantize.lookup(indices.masked_fill(~present, 0)) * present[..., None]
        return VideoLavitVisualDecoderOutput(features=features, num_tokens=num_tokens)


def check_generator(generator, count, of):
    """Raises unless `generator` is None, a `torch.Generator`, or a list with `count` of them (`of` names these).

    Raises:
        TypeError: something else, such as a seed.
        ValueError: another number of generators.
    """
    several = isinstance(generator, (list, tuple))
    if several and len(generator) != count:
        raise ValueError(f"got {len(generator)} generators for {of}; give one, or one for each")
    for one in generator if several else [generator]:
        if one is not None and not isinstance(one, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator or a list of them, not {type(one).__name__}; "
                "torch.Generator().manual_seed(seed) makes one of a seed"
            )


def sample_gumbel(like, generator=None):
    """Standard Gumbel noise with the shape and device of `like`; `generator` may be a list with one per row."""
    check_generator(generator, len(like), f"a batch of {len(like)}")
    if isinstance(generator, (list, tuple)):
        return torch.cat([sample_gumbel(like[i : i + 1], g) for i, g in enumerate(generator)])
    device = like.device if generator is None else generator.device
    noise = torch.empty(like.shape, dtype=torch.float32, device=device).exponential_(generator=generator)
    return -noise.log().to(like.device)


__all__ = [
    "VideoLavitVisualDecoderOutput",
    "VideoLavitVisualTokenizer",
    "VideoLavitVisualTokenizerOutput",
    "check_generator",
    "sample_gumbel",
]
