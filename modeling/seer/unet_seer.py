"""The video U-Net of Seer (https://arxiv.org/abs/2303.14897): Stable Diffusion 1.x inflated by temporal attention.

Notable:
- Convolutions stay two-dimensional and run on every frame, so all tensors of an image U-Net keep name and shape;
  only what is called `temporal_attentions` is new.
- Group norms pool over frames, height and width. Frames therefore influence each other in both directions, and the
  result depends on the number of frames; with one frame and fresh temporal layers the image U-Net is reproduced.
- One timestep serves the whole clip, reference frames included.
- Clips are (batch, channels, num_frames, height, width) with channels last in memory: convolutions, token-wise layers
  and group norms then all read the same memory without copies.
- On a CPU transformers run in slabs of independent frames or window rows, whose activations stay in the caches.
"""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn

from ..cpu_layers import activate_and_convolve, add, add_in_slabs, can_upsample_by_phases, conv2d, upsample_conv2d
from ..outputs import VideoUNetOutput
from .attention_seer import (
    SeerTemporalTransformerBlock,
    SeerTextTransformerBlock,
    SeerWindowAttention,
    window_shape,
)


class InflatedConv2d(nn.Conv2d):
    """A 2-D convolution that runs on every frame: (batch, channels, num_frames, height, width) -> the same layout."""

    def forward(self, hidden_states):
        return _per_frame(hidden_states, conv2d, self.weight, self.bias, self.stride, self.padding)


def _per_frame(hidden_states, function, *args):
    """`function(frames, *args)` with the frames of all clips as the batch."""
    batch_size, _, num_frames = hidden_states.shape[:3]
    frames = function(hidden_states.transpose(1, 2).flatten(0, 1), *args)
    return frames.unflatten(0, (batch_size, num_frames)).transpose(1, 2)


def group_norm_float32(norm, hidden_states):
    """`norm` evaluated in float32 and cast back: the statistics pool too many values for half precision."""
    if hidden_states.dtype == torch.float32:
        return norm(hidden_states)
    weight, bias = norm.weight.float(), norm.bias.float()
    return F.group_norm(hidden_states.float(), norm.num_groups, weight, bias, norm.eps).to(hidden_states.dtype)


class SeerResnetBlock(nn.Module):
    """Residual block with group norms over whole clips.

    Args:
        in_channels, out_channels: widths; a 1x1 shortcut convolution is added where they differ.
        temb_channels: width of the timestep embedding.
        groups, eps: of the group norms.
    """

    def __init__(self, in_channels, out_channels, temb_channels, groups=32, eps=1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = InflatedConv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = InflatedConv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = InflatedConv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, hidden_states, temb):
        """`hidden_states`: (batch, in_channels, num_frames, height, width); `temb`: (batch, temb_channels)."""
        residual = hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states)
        hidden_states = activate_and_convolve(self.conv1, group_norm_float32(self.norm1, hidden_states), dim=2)
        shifted = hidden_states + self.time_emb_proj(F.silu(temb))[:, :, None, None, None]
        hidden_states = activate_and_convolve(self.conv2, group_norm_float32(self.norm2, shifted), dim=2)
        return add(hidden_states, residual, memory=shifted)


class SeerTransformer3DModel(nn.Module):
    """Group norm, 1x1 convolution, transformer blocks on tokens, 1x1 convolution, residual.

    Args:
        in_channels: width of input and output.
        heads, dim_head: attention heads and their channels; their product is the inner width.
        cross_attention_dim: width of the text. None makes it a temporal transformer, whose output convolution starts
            at zero so that a freshly inflated U-Net adds nothing in time.
        num_layers: number of blocks.
        window_rule: arguments of `window_shape` by which a temporal transformer chooses windows.
        attention_kwargs: rotary settings of a temporal transformer (see `SeerCausalAttention`).
    """

    def __init__(
        self,
        in_channels,
        heads,
        dim_head,
        cross_attention_dim=None,
        num_layers=1,
        window_rule=None,
        **attention_kwargs,
    ):
        super().__init__()
        self.window_rule = window_rule or {}
        dim = heads * dim_head
        self.is_temporal = cross_attention_dim is None
        self.norm = nn.GroupNorm(32, in_channels, eps=1e-6)
        self.proj_in = InflatedConv2d(in_channels, dim, 1)
        if self.is_temporal:
            blocks = [
                SeerTemporalTransformerBlock(dim, heads, dim_head, SeerWindowAttention, **attention_kwargs)
                for _ in range(num_layers)
            ]
        else:
            blocks = [SeerTextTransformerBlock(dim, heads, dim_head, cross_attention_dim) for _ in range(num_layers)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = InflatedConv2d(dim, in_channels, 1)
        if self.is_temporal:
            nn.init.zeros_(self.proj_out.weight)
            nn.init.zeros_(self.proj_out.bias)

    def forward(self, hidden_states, encoder_hidden_states=None, num_cond_frames=0):
        """`hidden_states`: (batch, in_channels, num_frames, height, width). Text transformers take
        `encoder_hidden_states` (batch, num_frames, text tokens, width), temporal ones `num_cond_frames`."""
        height, width = hidden_states.shape[3:]
        normed = self.norm(hidden_states)
        if not self.is_temporal:

            def transform(part, start):
                part = self.proj_in(part).permute(0, 2, 3, 4, 1)
                tokens = part.flatten(2, 3).flatten(0, 1)
                context = encoder_hidden_states[:, start : start + part.shape[1]].flatten(0, 1)
                for block in self.transformer_blocks:
                    tokens = block(tokens, context)
                return self.proj_out(tokens.view(part.shape).permute(0, 4, 1, 2, 3))

            return add_in_slabs(transform, normed, hidden_states, dim=2)

        window = window_shape(height, width, **self.window_rule)
        positions = torch.arange(hidden_states.shape[2:].numel(), device=hidden_states.device)
        positions = positions.view(hidden_states.shape[2:])

        def transform_in_time(part, start):
            tokens = self.proj_in(part).permute(0, 2, 3, 4, 1)
            for block in self.transformer_blocks:
                tokens = block(tokens, num_cond_frames, positions[:, start : start + tokens.shape[2]], window)
            return self.proj_out(tokens.permute(0, 4, 1, 2, 3))

        return add_in_slabs(transform_in_time, normed, hidden_states, dim=3, step=window[0])


class SeerDownsample(nn.Module):
    """Strided 3x3 convolution: halves height and width of every frame."""

    def __init__(self, channels):
        super().__init__()
        self.conv = InflatedConv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, hidden_states):
        return self.conv(hidden_states)


class SeerUpsample(nn.Module):
    """Nearest-neighbour doubling of height and width of every frame, then a 3x3 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = InflatedConv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states):
        return _per_frame(hidden_states, self._upsample)

    def _upsample(self, frames):
        # Adapters (LoRA) replace the convolution by a layer that has to be called.
        if type(self.conv) is InflatedConv2d and can_upsample_by_phases(frames):
            return upsample_conv2d(frames, self.conv.weight, self.conv.bias)
        frames = F.interpolate(frames, scale_factor=2.0, mode="nearest")
        return self.conv(frames.unsqueeze(2)).squeeze(2)


class _SeerBlock(nn.Module):
    """What down, middle and up blocks share: residual, text and temporal layers, and gradient checkpointing.

    Args:
        channels: (in, out) widths of the residual blocks.
        temb_channels, groups, eps: of the residual blocks.
        attentions: arguments of the transformers (see `SeerTransformer3DModel`), or None for blocks without.
        num_attentions: how many pairs of transformers there are, where not one per residual block.
    """

    def __init__(self, channels, temb_channels, groups, eps, attentions=None, num_attentions=None):
        super().__init__()
        self.resnets = nn.ModuleList([SeerResnetBlock(i, o, temb_channels, groups, eps) for i, o in channels])
        self.has_attention = attentions is not None
        if self.has_attention:
            count = len(channels) if num_attentions is None else num_attentions
            width, heads = channels[0][1], attentions["heads"]
            head = {"in_channels": width, "heads": heads, "dim_head": width // heads}
            text_dim, temporal = attentions["cross_attention_dim"], attentions["temporal"]
            self.attentions = nn.ModuleList(
                [SeerTransformer3DModel(**head, cross_attention_dim=text_dim) for _ in range(count)]
            )
            self.temporal_attentions = nn.ModuleList([SeerTransformer3DModel(**head, **temporal) for _ in range(count)])
        self.gradient_checkpointing = False

    def _run(self, layer, *inputs):
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(layer, *inputs)
        return layer(*inputs)

    def _layer(self, index, hidden_states, temb, encoder_hidden_states, num_cond_frames):
        hidden_states = self._run(self.resnets[index], hidden_states, temb)
        if self.has_attention:
            hidden_states = self._run(self.attentions[index], hidden_states, encoder_hidden_states)
            hidden_states = self._run(self.temporal_attentions[index], hidden_states, None, num_cond_frames)
        return hidden_states


class SeerDownBlock(_SeerBlock):
    """Layers of residual block, text and temporal transformer; then optionally a strided convolution."""

    def __init__(self, channels, temb_channels, groups, eps, attentions, downsample):
        super().__init__(channels, temb_channels, groups, eps, attentions)
        self.downsamplers = nn.ModuleList([SeerDownsample(channels[-1][1])]) if downsample else None

    def forward(self, hidden_states, temb, encoder_hidden_states, num_cond_frames=0):
        """Returns the hidden states and the list of what the up blocks need of them."""
        skips = []
        for index in range(len(self.resnets)):
            hidden_states = self._layer(index, hidden_states, temb, encoder_hidden_states, num_cond_frames)
            skips.append(hidden_states)
        if self.downsamplers is not None:
            hidden_states = self.downsamplers[0](hidden_states)
            skips.append(hidden_states)
        return hidden_states, skips


class SeerMidBlock(_SeerBlock):
    """Residual block, text and temporal transformer, residual block."""

    def __init__(self, channels, temb_channels, groups, eps, attentions):
        super().__init__([(channels, channels)] * 2, temb_channels, groups, eps, attentions, num_attentions=1)

    def forward(self, hidden_states, temb, encoder_hidden_states, num_cond_frames=0):
        hidden_states = self._layer(0, hidden_states, temb, encoder_hidden_states, num_cond_frames)
        return self._run(self.resnets[1], hidden_states, temb)


class SeerUpBlock(_SeerBlock):
    """Layers that take a skip each; then optionally doubling of height and width."""

    def __init__(self, channels, temb_channels, groups, eps, attentions, upsample):
        super().__init__(channels, temb_channels, groups, eps, attentions)
        self.upsamplers = nn.ModuleList([SeerUpsample(channels[-1][1])]) if upsample else None

    def forward(self, hidden_states, skips, temb, encoder_hidden_states, num_cond_frames=0):
        """Takes its skips from the end of the list `skips`."""
        for index in range(len(self.resnets)):
            hidden_states = torch.cat((hidden_states, skips.pop()), dim=1)
            hidden_states = self._layer(index, hidden_states, temb, encoder_hidden_states, num_cond_frames)
        return hidden_states if self.upsamplers is None else self.upsamplers[0](hidden_states)


class SeerUNet3DConditionModel(ModelMixin, AttentionMixin, ConfigMixin):
    """Predicts the noise of a clip of latents from the clip, a timestep and one text sequence per frame.

    Every level but the last has text and temporal transformers, as in Stable Diffusion 1.x.

    Args:
        sample_size: height and width of the latents the image model was trained with (not used by the model).
        in_channels, out_channels: latent channels.
        block_out_channels: width of each level.
        layers_per_block: residual blocks of a down block (up blocks have one more).
        num_attention_heads: number of heads at every level.
        cross_attention_dim: width of the text embeddings.
        norm_num_groups: groups of the norms of the middle residual blocks and of the output; all others have 32.
        norm_eps: epsilon of the norms of residual blocks and output.
        flip_sin_to_cos, freq_shift: of the sinusoidal timestep embedding.
        rotary_dim: rotated channels of each head of the temporal attention (at most the head's).
        rotary_angle_dtype: "float32", or "float16" for the rounded angles that the published weights were trained and
            sampled with (see `SeerRotaryEmbedding`).
        window_size, small_window_size, full_window_height, min_windows: how windows are chosen (see
            `SeerWindowAttention`).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SeerResnetBlock", "SeerTransformer3DModel"]
    _repeated_blocks = ["SeerTextTransformerBlock", "SeerTemporalTransformerBlock"]
    _skip_layerwise_casting_patterns = ["norm", "rotary_emb"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 4,
        out_channels: int = 4,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        num_attention_heads: int = 8,
        cross_attention_dim: int = 768,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        rotary_dim: int = 32,
        rotary_angle_dtype: str = "float32",
        window_size: int = 8,
        small_window_size: int = 4,
        full_window_height: int = 4,
        min_windows: int = 4,
    ):
        super().__init__()
        if len(block_out_channels) < 2:
            raise ValueError(f"at least two levels are needed, got block_out_channels={block_out_channels}")
        wrong = [c for c in block_out_channels if c % num_attention_heads or c % 32]
        if wrong:
            raise ValueError(
                f"the widths {wrong} of block_out_channels must be multiples of 32 (norm groups) and of "
                f"num_attention_heads={num_attention_heads}"
            )
        self.window_rule = {
            "window_size": window_size,
            "small_window_size": small_window_size,
            "full_window_height": full_window_height,
            "min_windows": min_windows,
        }
        attentions = {
            "heads": num_attention_heads,
            "cross_attention_dim": cross_attention_dim,
            "temporal": {
                "rotary_dim": rotary_dim,
                "rotary_angle_dtype": rotary_angle_dtype,
                "window_rule": self.window_rule,
            },
        }
        widths, last = list(block_out_channels), len(block_out_channels) - 1
        temb_channels = 4 * widths[0]

        self.conv_in = InflatedConv2d(in_channels, widths[0], 3, padding=1)
        self.time_proj = Timesteps(widths[0], flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(widths[0], temb_channels)

        self.down_blocks = nn.ModuleList()
        skip_widths, width = [widths[0]], widths[0]
        for level, out in enumerate(widths):
            channels = [(width, out)] + [(out, out)] * (layers_per_block - 1)
            block_attentions = attentions if level < last else None
            self.down_blocks.append(
                SeerDownBlock(channels, temb_channels, 32, norm_eps, block_attentions, downsample=level < last)
            )
            skip_widths += [out] * (layers_per_block + (level < last))
            width = out

        self.mid_block = SeerMidBlock(width, temb_channels, norm_num_groups, norm_eps, attentions)

        self.up_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            channels = []
            for _ in range(layers_per_block + 1):
                channels.append((width + skip_widths.pop(), out))
                width = out
            block_attentions = attentions if level < last else None
            self.up_blocks.append(
                SeerUpBlock(channels, temb_channels, 32, norm_eps, block_attentions, upsample=level > 0)
            )

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths[0], norm_eps)
        self.conv_out = InflatedConv2d(widths[0], out_channels, 3, padding=1)

    @classmethod
    def from_unet2d(cls, unet, **kwargs):
        """Inflates an image U-Net of Stable Diffusion 1.x: takes all its tensors over and adds fresh temporal layers
        whose output is zero.

        Args:
            unet: `diffusers.UNet2DConditionModel`.
            kwargs: settings an image U-Net does not have (`rotary_angle_dtype`, `window_size`, ...).

        Raises:
            ValueError: the U-Net has parts that Stable Diffusion 1.x has not; they are named.
        """
        config = unet_config_from_2d(unet.config)
        video_unet = cls(**{**config, **kwargs}).to(unet.device)
        if video_unet.dtype != unet.dtype:
            video_unet = video_unet.to(unet.dtype)
        missing, unexpected = video_unet.load_state_dict(unet.state_dict(), strict=False)
        missing = [name for name in missing if ".temporal_attentions." not in name]
        if missing or unexpected:
            raise ValueError(
                "only U-Nets of Stable Diffusion 1.x can be inflated; tensors that do not fit: "
                f"{sorted([*missing, *unexpected])[:8]}"
            )
        return video_unet.train(unet.training)

    def check_latent_size(self, height, width):
        """Checks that latents of `height` x `width` halve at every level and that attention windows tile every level.

        Raises:
            ValueError: they do not; the message names the level and the next sizes that work.
        """
        problem = self._latent_size_problem(height, width)
        if problem:
            candidates = [s for s in range(1, 257) if self._latent_size_problem(s, s) is None]
            lower = [s for s in candidates if s < max(height, width)][-1:]
            upper = [s for s in candidates if s > max(height, width)][:1]
            near = " or ".join(f"{s}x{s}" for s in lower + upper)
            raise ValueError(f"latents of {height}x{width} do not fit the U-Net: {problem}; square sizes near: {near}")

    def _latent_size_problem(self, height, width):
        levels = len(self.config.block_out_channels)
        factor = 2 ** (levels - 1)
        if height < 1 or width < 1 or height % factor or width % factor:
            return f"height and width must be positive multiples of {factor}"
        for level in range(levels):
            try:
                window_shape(height >> level, width >> level, **self.window_rule)
            except ValueError as error:
                return str(error).split(";")[0]
        return None

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        num_cond_frames: int = 0,
        return_dict: bool = True,
    ) -> VideoUNetOutput | tuple:
        """
        Args:
            sample: clips of latents, reference frames first: (batch, in_channels, num_frames, height, width).
            timestep: one for all, or (batch,).
            encoder_hidden_states: (batch, num_frames, text tokens, cross_attention_dim).
            num_cond_frames: how many reference frames skip the feed-forward of the temporal transformers. The authors
                train with their number and sample with 0.
            return_dict: False returns a tuple.

        Returns:
            `VideoUNetOutput` with `sample`: (batch, out_channels, num_frames, height, width).

        Raises:
            ValueError: shapes that do not fit each other or the model.
        """
        self._check_inputs(sample, encoder_hidden_states, num_cond_frames)
        batch_size = sample.shape[0]

        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(batch_size)
        temb = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))

        hidden_states = self.conv_in(sample)
        skips = [hidden_states]
        for block in self.down_blocks:
            hidden_states, block_skips = block(hidden_states, temb, encoder_hidden_states, num_cond_frames)
            skips += block_skips
        hidden_states = self.mid_block(hidden_states, temb, encoder_hidden_states, num_cond_frames)
        for block in self.up_blocks:
            hidden_states = block(hidden_states, skips, temb, encoder_hidden_states, num_cond_frames)

        hidden_states = F.silu(group_norm_float32(self.conv_norm_out, hidden_states))
        hidden_states = self.conv_out(hidden_states)
        return VideoUNetOutput(sample=hidden_states) if return_dict else (hidden_states,)

    def _check_inputs(self, sample, encoder_hidden_states, num_cond_frames):
        if sample.ndim != 5 or sample.shape[1] != self.config.in_channels:
            raise ValueError(
                f"`sample` must be (batch, {self.config.in_channels}, num_frames, height, width), got "
                f"{tuple(sample.shape)}"
            )
        batch_size, _, num_frames, height, width = sample.shape
        expected = (batch_size, num_frames, self.config.cross_attention_dim)
        if (
            encoder_hidden_states.ndim != 4
            or (
                encoder_hidden_states.shape[0],
                encoder_hidden_states.shape[1],
                encoder_hidden_states.shape[3],
            )
            != expected
        ):
            raise ValueError(
                "`encoder_hidden_states` must hold one text sequence per frame, (batch, num_frames, tokens, width) = "
                f"({expected[0]}, {expected[1]}, tokens, {expected[2]}), got {tuple(encoder_hidden_states.shape)}"
            )
        if not 0 <= num_cond_frames <= num_frames:
            raise ValueError(f"`num_cond_frames` must lie between 0 and {num_frames} frames, got {num_cond_frames}")
        self.check_latent_size(height, width)


# What the U-Nets of Stable Diffusion 1.x have in common; another value is another architecture.
_SD1_SETTINGS = {
    "center_input_sample": (False,),
    "act_fn": ("silu", "swish"),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,),
    "dual_cross_attention": (False,),
    "use_linear_projection": (False,),
    "transformer_layers_per_block": (1,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type": (None,),
    "encoder_hid_dim": (None,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "norm_num_groups": (32,),
}


def unet_config_from_2d(config):
    """Configuration of an image U-Net (mapping, as in its config.json) -> keyword arguments of
    `SeerUNet3DConditionModel`. A configuration without block types is taken to be that of Stable Diffusion 1.x.

    Raises:
        ValueError: it is not that of a Stable Diffusion 1.x U-Net; the settings in the way are named.
    """
    config = dict(config)
    wrong = [
        f"{name}={config[name]!r}"
        for name, known in _SD1_SETTINGS.items()
        if name in config and config[name] not in known
    ]
    levels = len(config.get("block_out_channels", (320, 640, 1280, 1280)))
    down = ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"]
    up = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1)
    for name, expected in (("down_block_types", down), ("up_block_types", up)):
        if list(config.get(name, expected)) != expected:
            wrong.append(f"{name}={list(config[name])!r}")
    # `attention_head_dim` has always meant the number of heads in these configurations.
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    for name, value in (("attention_head_dim", heads), ("layers_per_block", config.get("layers_per_block", 2))):
        if not isinstance(value, int):
            wrong.append(f"{name}={value!r}")
    if wrong:
        raise ValueError(f"only U-Nets of Stable Diffusion 1.x can be inflated; in the way: {', '.join(wrong)}")
    names = (
        "sample_size",
        "in_channels",
        "out_channels",
        "block_out_channels",
        "layers_per_block",
        "cross_attention_dim",
        "norm_num_groups",
        "norm_eps",
        "flip_sin_to_cos",
        "freq_shift",
    )
    return {name: config[name] for name in names if name in config} | {"num_attention_heads": heads}
