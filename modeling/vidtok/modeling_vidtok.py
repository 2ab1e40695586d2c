"""VidTok (arXiv 2412.13061): one class for the causal (v1.0, v1.1) and non-causal, KL and FSQ video autoencoders.

What is notable here:
- Any number of frames and any size: inputs are padded as the version wants it, `decode(num_frames=, height=, width=)`
  trims back to the original.
- Causal models stream: `encode`/`decode` take a cache and return one; chunks add up to exactly the whole clip. Without
  gradients whole clips run through the same code in chunks, which bounds memory.
- v1.1's decoder interpolates in time and so lags by up to one latent; the last call flushes it.
- v1.1's official chunked mode, with its border effects, is `streaming="official"`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging

from ..tiling import check_tiles, run_tiled
from .configuration_vidtok import VidTokConfig
from .layers_vidtok import (
    FrameAttention,
    SpatialDownsample,
    SpatialResnetBlock,
    SpatialUpsample,
    TemporalDownsample,
    TemporalPadding,
    TemporalResnetBlock,
    TemporalUpsample,
    VidTokConv,
    VidTokNorm,
    VidTokStream,
    VolumeConv,
    VolumeResnetBlock,
    init_vidtok_weights,
    norm_act,
)
from .regularizers_vidtok import FiniteScalarQuantizer
from .streaming_vidtok import VidTokFilesMixin

logger = logging.get_logger(__name__)

# Without gradients a clip runs in chunks of about this many elements of a full-resolution feature map (128 MB in float32).
_CHUNK_ELEMENTS = 2**25
# Inputs beyond this magnitude are not slightly overshooting pixels but another range, for example 0..255.
_MAX_MAGNITUDE = 8.0


@dataclass
class VidTokCache:
    """Streaming state of one `encode` or `decode` stream. Opaque: pass it to the next call of the same stream.

    Attributes:
        direction: "encode" or "decode".
        shape: (batch, height, width) every chunk must have.
        num_frames: frames (or latent frames) seen so far.
        states: temporal context of every layer (per tile when tiling).
        pending: frames that wait for enough company to make a latent, (batch, channels, frames, height, width).
    """

    direction: str
    shape: tuple
    num_frames: int = 0
    states: list | None = None
    pending: torch.Tensor | None = None


@dataclass
class VidTokEncoderOutput(ModelOutput):
    """
    Args:
        latents: (batch, latent_channels, num_latent_frames, latent_height, latent_width). KL: the posterior's mean, or a
            sample where asked for; FSQ: the codes.
        indices: (batch, num_latent_frames, latent_height, latent_width), int64 (FSQ only).
        posterior: diffusers' `DiagonalGaussianDistribution` over the latents (KL only).
        kl_loss: KL divergence from the standard normal, summed over everything and divided by the batch size (KL only).
        aux_loss: entropy and commitment loss (FSQ only, when training or asked for).
        num_frames, height, width: what `decode` needs to trim its result to the input's size.
        cache: state for the next chunk (with `use_cache=True`).
    """

    latents: torch.FloatTensor | None = None
    indices: torch.LongTensor | None = None
    posterior: DiagonalGaussianDistribution | None = None
    kl_loss: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    cache: VidTokCache | None = None


@dataclass
class VidTokDecoderOutput(ModelOutput):
    """
    Args:
        reconstruction: (batch, num_frames, channels, height, width), nominally in [-1, 1] and not clamped.
        cache: state for the next chunk (with `use_cache=True`).
    """

    reconstruction: torch.FloatTensor | None = None
    cache: VidTokCache | None = None


@dataclass
class VidTokOutput(ModelOutput):
    """
    Args:
        loss: reconstruction_loss + kl_loss_weight * kl_loss (KL) or + aux_loss_weight * aux_loss (FSQ).
        reconstruction_loss: absolute error summed over pixels, per frame (section 3.4 without its perceptual term).
        kl_loss, aux_loss: see `VidTokEncoderOutput`.
        reconstruction: (batch, num_frames, channels, height, width), the same frames as the input.
        latents, indices: see `VidTokEncoderOutput`.
    """

    loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    kl_loss: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None
    latents: torch.FloatTensor | None = None
    indices: torch.LongTensor | None = None


class _Level(nn.Module):
    """The residual blocks of one resolution and what resamples it (the tensors' names ask for this shape)."""

    def __init__(self, blocks, **resampler):
        super().__init__()
        self.block = nn.ModuleList(blocks)
        for name, module in resampler.items():
            setattr(self, name, module)


class _Middle(nn.Module):
    def __init__(self, config, channels):
        super().__init__()
        self.block_1 = VolumeResnetBlock(config, channels)
        self.attn_1 = FrameAttention(config, channels)
        self.block_2 = VolumeResnetBlock(config, channels)

    def forward(self, hidden_states, stream=None):
        hidden_states = self.block_1(hidden_states, stream)
        hidden_states = self.attn_1(hidden_states)
        return self.block_2(hidden_states, stream)


def _end_conv(config, in_channels, out_channels):
    conv = VolumeConv(config, in_channels, out_channels)
    return VidTokConv(conv) if config.is_causal else conv


class VidTokEncoder(nn.Module):
    """Frames -> moments (KL: mean and log-variance) or raw latents (FSQ)."""

    def __init__(self, config):
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = _end_conv(config, config.in_channels, config.base_channels)
        self.down, self.down_temporal = nn.ModuleList(), nn.ModuleList()
        channels = config.base_channels
        for level, width in enumerate(widths):
            spatial = [
                SpatialResnetBlock(config, channels if j == 0 else width, width) for j in range(config.num_res_blocks)
            ]
            temporal = [TemporalResnetBlock(config, width) for _ in range(config.num_res_blocks)]
            space, time = {}, {}
            if level in config.spatial_downsample_levels:
                space["downsample"] = SpatialDownsample(width)
                if level in config.temporal_downsample_levels:
                    time["downsample"] = TemporalDownsample(config, width)
            self.down.append(_Level(spatial, **space))
            self.down_temporal.append(_Level(temporal, **time))
            channels = width
        self.mid = _Middle(config, channels)
        self.norm_out = VidTokNorm(config, channels, "frame" if config.is_causal else "clip")
        latent_channels = config.latent_channels * (2 if config.regularizer == "kl" else 1)
        self.conv_out = _end_conv(config, channels, latent_channels)

    def forward(self, hidden_states, stream=None):
        """(T, B, H, W, channels) -> (T', B, h, w, moments)."""
        hidden_states = self.conv_in(hidden_states, stream)
        for space, time in zip(self.down, self.down_temporal):
            for spatial_block, temporal_block in zip(space.block, time.block):
                hidden_states = spatial_block(hidden_states)
                hidden_states = temporal_block(hidden_states, stream)
            if hasattr(space, "downsample"):
                hidden_states = space.downsample(hidden_states)
            if hasattr(time, "downsample"):
                hidden_states = time.downsample(hidden_states, stream)
        hidden_states = self.mid(hidden_states, stream)
        return self.conv_out(hidden_states, stream, before=lambda part: norm_act(self.norm_out, part))


class VidTokDecoder(nn.Module):
    """Latents -> frames."""

    def __init__(self, config):
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
        channels = widths[-1]
        self.conv_in = _end_conv(config, config.latent_channels, channels)
        self.mid = _Middle(config, channels)
        levels, frames_per_latent = {}, 1
        for level in reversed(range(len(widths))):
            width = widths[level]
            spatial = [
                SpatialResnetBlock(config, channels if j == 0 else width, width)
                for j in range(config.num_res_blocks + 1)
            ]
            temporal = [TemporalResnetBlock(config, width) for _ in range(config.num_res_blocks + 1)]
            space, time = {}, {}
            if level in config.spatial_upsample_levels:
                space["upsample"] = SpatialUpsample(width)
                if level in config.temporal_upsample_levels:
                    time["upsample"] = TemporalUpsample(config, width, frames_per_latent)
                    frames_per_latent *= 2
            levels[level] = _Level(spatial, **space), _Level(temporal, **time)
            channels = width
        self.up = nn.ModuleList(levels[level][0] for level in range(len(widths)))
        self.up_temporal = nn.ModuleList(levels[level][1] for level in range(len(widths)))
        self.norm_out = VidTokNorm(config, channels, "frame" if config.is_causal else "clip")
        self.conv_out = _end_conv(config, channels, config.out_channels)

    def forward(self, hidden_states, stream=None):
        """(T', B, h, w, latent_channels) -> (T, B, H, W, channels)."""
        hidden_states = self.conv_in(hidden_states, stream)
        hidden_states = self.mid(hidden_states, stream)
        for space, time in zip(reversed(self.up), reversed(self.up_temporal)):
            for spatial_block, temporal_block in zip(space.block, time.block):
                hidden_states = spatial_block(hidden_states)
                hidden_states = temporal_block(hidden_states, stream)
            if hasattr(space, "upsample"):
                hidden_states = space.upsample(hidden_states)
            if hasattr(time, "upsample"):
                hidden_states = time.upsample(hidden_states, stream)
                if stream is not None:
                    stream.lookahead *= 2
        return self.conv_out(hidden_states, stream, before=lambda part: norm_act(self.norm_out, part))


class VidTokPreTrainedModel(PreTrainedModel):
    config: VidTokConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values_videos"
    input_modalities = "video"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["SpatialResnetBlock", "TemporalResnetBlock", "VolumeResnetBlock", "FrameAttention"]

    @torch.no_grad()
    def _init_weights(self, module):
        init_vidtok_weights(module)


class VidTokModel(VidTokPreTrainedModel, VidTokFilesMixin):
    """VidTok video tokenizer.

    Videos are (batch, num_frames, channels, height, width) in [-1, 1], latents (batch, latent_channels,
    num_latent_frames, latent_height, latent_width), indices (batch, num_latent_frames, latent_height, latent_width).
    """

    def __init__(self, config: VidTokConfig):
        super().__init__(config)
        self.encoder = VidTokEncoder(config)
        self.decoder = VidTokDecoder(config)
        if config.regularizer == "fsq":
            self.quantizer = FiniteScalarQuantizer(
                config.fsq_levels,
                config.entropy_loss_weight,
                config.entropy_loss_annealing_steps,
                config.entropy_loss_annealing_factor,
                config.commitment_loss_weight,
            )
        for name, module in self.named_modules():
            if isinstance(module, TemporalPadding):
                module.key = name
        self.post_init()

    # ------------------------------------------------------------------------------------------------- encode

    def encode(
        self,
        pixel_values_videos,
        sample_posterior=False,
        generator=None,
        cache=None,
        use_cache=False,
        is_last=True,
        num_frames=None,
        streaming=None,
        chunk_frames=16,
        official_padding=False,
        tile_size=None,
        tile_overlap=None,
        compute_aux_loss=False,
        num_steps=None,
        return_dict=True,
    ):
        """Encodes a video, or the next chunk of one.

        Args:
            pixel_values_videos: (batch, num_frames, channels, height, width), float, in [-1, 1]. Height and width that are
                not multiples of the compression are padded at the bottom and on the right by repeating the edge.
            sample_posterior: sample the latents instead of taking the mean (KL only).
            generator: `torch.Generator` (or a list, one per sample) for the sample.
            cache, use_cache, is_last: streaming (causal models). With `use_cache=True` the output has a `cache` for the
                call with the next chunk; `is_last=False` says that more follows, so frames that do not make a latent
                yet wait in the cache.
            num_frames: length of the whole video, for the first chunk of a v1.1 stream: v1.1 pads in front of the first
                frame, by as much as the total length asks for. Without it the first chunk is taken to have the same
                remainder modulo the temporal compression as the whole video.
            streaming: None, or "official" for the authors' chunked mode of v1.1 (a 1-frame chunk, then `chunk_frames`
                frames each).
            chunk_frames: frames per chunk of `streaming="official"`, a multiple of the temporal compression.
            official_padding: pad in time as the authors' code does, which loses frames of v1.0 and non-causal inputs of
                odd lengths, instead of completing them by repeating the last frame.
            tile_size, tile_overlap: encode in square tiles of this many pixels that overlap and are blended (default
                overlap: a quarter), for frames too large for the memory at hand.
            compute_aux_loss: also compute FSQ's auxiliary loss.
            num_steps: training batches so far, for the annealing of FSQ's entropy loss.

        Returns:
            `VidTokEncoderOutput`.

        Raises:
            ValueError: rank, range, size, NaN, or a combination of options that does not exist.
            TypeError: not a floating-point tensor.
        """
        self._check_video(pixel_values_videos)
        height, width = pixel_values_videos.shape[-2:]
        total = pixel_values_videos.shape[1] + (cache.num_frames if cache is not None else 0)
        video = self._pad_space(pixel_values_videos).transpose(1, 2)  # (B, C, T, H, W)
        if streaming not in (None, "official"):
            raise ValueError(f"streaming must be None or 'official', got {streaming!r}")
        if streaming == "official":
            self._check_official(cache, use_cache, chunk_frames)
            moments, cache = self._encode_official(video, chunk_frames), None
        else:
            ratio = self.config.spatial_compression_ratio
            run = lambda tile, state: self._encode_chunk(tile, state, is_last, num_frames, official_padding)  # noqa: E731
            moments, cache = self._run(
                run, video, cache, use_cache, is_last, "encode", tile_size, tile_overlap, ratio, (1, ratio)
            )
        if moments is None:  # all frames of this chunk wait for the next one
            shape = (video.shape[0], self.config.latent_channels, 0, *(size // ratio for size in video.shape[-2:]))
            output = VidTokEncoderOutput(latents=video.new_zeros(shape))
            if self.config.regularizer == "fsq":
                output.indices = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64, device=video.device)
        else:
            output = self._regularize(moments, sample_posterior, generator, compute_aux_loss, num_steps)
        output.num_frames, output.height, output.width = total, height, width
        output.cache = cache
        return output if return_dict else output.to_tuple()

    def _regularize(self, moments, sample_posterior, generator, compute_aux_loss, num_steps):
        if self.config.regularizer == "kl":
            posterior = DiagonalGaussianDistribution(moments)
            latents = posterior.sample(generator) if sample_posterior else posterior.mode()
            # Not posterior.kl(), which leaves the width of video latents unsummed.
            kl_loss = 0.5 * (posterior.mean**2 + posterior.var - 1.0 - posterior.logvar).sum() / moments.shape[0]
            return VidTokEncoderOutput(latents=latents, posterior=posterior, kl_loss=kl_loss)
        latents, indices = self.quantizer(moments)
        aux_loss = self.quantizer.aux_loss(moments, latents, num_steps) if compute_aux_loss else None
        return VidTokEncoderOutput(latents=latents, indices=indices, aux_loss=aux_loss)

    def _encode_chunk(self, video, cache, is_last, total_frames, official_padding):
        """(B, C, T, H, W) -> moments (B, M, T', h, w) or None, and the cache of this tile."""
        factor = self.config.temporal_compression_ratio
        version = self.config.version
        states = cache.states if cache is not None else None
        num_seen = cache.num_frames if cache is not None else 0
        new_frames = video.shape[2]
        if num_seen == 0 and self.config.is_causal:
            remainder = (total_frames or new_frames) % factor
            if version == "1.1":
                front = (factor - remainder) % factor
            else:
                front = 0 if official_padding and remainder == 0 else factor - 1
            video = torch.cat([video[:, :, :1].expand(-1, -1, front, -1, -1), video], dim=2)
        if cache is not None and cache.pending is not None:
            video = torch.cat([cache.pending, video], dim=2)
        left_over = video.shape[2] % factor
        pending = None
        if left_over and not is_last:
            pending, video = video[:, :, -left_over:].clone(), video[:, :, :-left_over]
        elif left_over and version == "1.1":
            raise ValueError(
                f"{num_seen + new_frames} frames were streamed, but the first chunk was padded for another length: pass "
                f"num_frames={num_seen + new_frames} with the first chunk (or make the first chunk as long as the whole "
                f"video modulo {factor})"
            )
        elif left_over and not official_padding:
            video = torch.cat([video, video[:, :, -1:].expand(-1, -1, factor - left_over, -1, -1)], dim=2)
        moments = []
        for chunk, ends in self._chunks(video, factor, 1, whole=official_padding and left_over > 0):
            stream = VidTokStream(states, is_last=ends and is_last) if self.config.is_causal else None
            moments.append(_to_video(self.encoder(_to_frames(chunk), stream)))
            states = stream.following if stream is not None else None
        following = VidTokCache("encode", (), num_seen + new_frames, states, pending)
        return (torch.cat(moments, dim=2) if moments else None), following

    def _chunks(self, video, frames_per_latent, pixels_per_position, whole=False):
        """Splits (B, C, T, H, W) into pairs (chunk, is it the last one).

        `frames_per_latent` frames of the input make one latent frame and stay together (1 for latents), and a position of
        the input stands for `pixels_per_position` pixels. One chunk where gradients are recorded or the model is not causal.
        """
        num_frames = video.shape[2]
        if num_frames == 0:
            return []
        if torch.is_grad_enabled() or not self.config.is_causal or whole:
            return [(video, True)]
        pixels = video.shape[0] * video.shape[3] * video.shape[4] * pixels_per_position
        per_latent_frame = pixels * self.config.temporal_compression_ratio * self.config.base_channels
        step = max(1, _CHUNK_ELEMENTS // per_latent_frame) * frames_per_latent
        return [(video[:, :, i : i + step], i + step >= num_frames) for i in range(0, num_frames, step)]

    def _encode_official(self, video, chunk_frames):
        factor = self.config.temporal_compression_ratio
        borders = [0, *range(1, video.shape[2], chunk_frames), video.shape[2]]
        states, moments = None, []
        for start, stop in zip(borders, borders[1:]):
            chunk = video[:, :, start:stop]
            front = -chunk.shape[2] % factor  # in the middle of the stream too: a quirk of the authors' code
            chunk = torch.cat([chunk[:, :, :1].expand(-1, -1, front, -1, -1), chunk], dim=2)
            stream = VidTokStream(states, is_last=stop == video.shape[2])
            moments.append(_to_video(self.encoder(_to_frames(chunk), stream)))
            states = stream.following
        return torch.cat(moments, dim=2)

    # ------------------------------------------------------------------------------------------------- decode

    def decode(
        self,
        latents=None,
        indices=None,
        num_frames=None,
        height=None,
        width=None,
        cache=None,
        use_cache=False,
        is_last=True,
        streaming=None,
        chunk_frames=16,
        overlap=True,
        tile_size=None,
        tile_overlap=None,
        return_dict=True,
    ):
        """Decodes latents or indices, or the next chunk of them.

        Args:
            latents: (batch, latent_channels, num_latent_frames, latent_height, latent_width).
            indices: (batch, num_latent_frames, latent_height, latent_width), integers (FSQ only), instead of latents.
            num_frames, height, width: trim the result to the size of the encoded video (see `VidTokEncoderOutput`). v1.1
                keeps the last frames (it pads in front), the others the first. In a stream, trim time afterwards.
            cache, use_cache, is_last: streaming (causal models); v1.1 lags by up to one latent and flushes with
                `is_last=True`. The frames of all calls together are those of the whole clip.
            streaming: None, or "official" for the authors' chunked decoding of v1.1, which differs slightly from whole-clip
                decoding at chunk borders.
            chunk_frames: frames per chunk of `streaming="official"`.
            overlap: whether "official" chunks see the next latent (the authors' long-video setting).
            tile_size, tile_overlap: decode in square tiles of this many pixels that overlap and are blended.

        Returns:
            `VidTokDecoderOutput`.

        Raises:
            ValueError: both or none of latents and indices, wrong shape, indices out of range, NaN, too few frames.
        """
        latents = self._check_latents(latents, indices)
        if streaming not in (None, "official"):
            raise ValueError(f"streaming must be None or 'official', got {streaming!r}")
        if num_frames is not None and (use_cache or cache is not None):
            raise ValueError("num_frames trims a whole clip; in a stream, trim the concatenated frames instead")
        if streaming == "official":
            self._check_official(cache, use_cache, chunk_frames)
            video, cache = self._decode_official(latents, chunk_frames, overlap), None
        else:
            ratio = self.config.spatial_compression_ratio
            run = lambda tile, state: self._decode_chunk(tile, state, is_last)  # noqa: E731
            video, cache = self._run(
                run, latents, cache, use_cache, is_last, "decode", tile_size, tile_overlap, 1, (ratio, 1)
            )
        video = self._trim(video.transpose(1, 2), num_frames, height, width)
        output = VidTokDecoderOutput(reconstruction=video, cache=cache)
        return output if return_dict else output.to_tuple()

    def _decode_chunk(self, latents, cache, is_last):
        """(B, Z, T', h, w) -> video (B, C, T, H, W) and the cache of this tile."""
        states = cache.states if cache is not None else None
        num_seen = cache.num_frames if cache is not None else 0
        video = []
        for chunk, ends in self._chunks(latents, 1, self.config.spatial_compression_ratio**2):
            stream = VidTokStream(states, is_last=ends and is_last) if self.config.is_causal else None
            video.append(_to_video(self.decoder(_to_frames(chunk), stream)))
            states = stream.following if stream is not None else None
        video = torch.cat(video, dim=2)
        if num_seen == 0 and self.config.version == "1.0":
            video = video[:, :, self.config.temporal_compression_ratio - 1 :]  # what the encoder's padding became
        return video, VidTokCache("decode", (), num_seen + latents.shape[2], states)

    def _decode_official(self, latents, chunk_frames, overlap):
        factor = self.config.temporal_compression_ratio
        num_latent_frames = latents.shape[2]
        borders = [0, *range(1, num_latent_frames, chunk_frames // factor), num_latent_frames]
        states, video = None, []
        for start, stop in zip(borders, borders[1:]):
            lookahead = int(overlap and stop < num_latent_frames)
            stream = VidTokStream(states, is_last=False, lookahead=lookahead, official=True)
            frames = _to_video(self.decoder(_to_frames(latents[:, :, start : stop + lookahead]), stream))
            video.append(frames[:, :, : frames.shape[2] - lookahead * factor])
            states = stream.following
        return torch.cat(video, dim=2)

    # ------------------------------------------------------------------------------------------------ forward

    def forward(
        self,
        pixel_values_videos,
        sample_posterior=None,
        generator=None,
        return_loss=True,
        compute_aux_loss=None,
        num_steps=None,
        return_dict=True,
    ):
        """Encodes and decodes a video.

        Args:
            pixel_values_videos: (batch, num_frames, channels, height, width), float, in [-1, 1].
            sample_posterior: sample the latents (KL only); defaults to the configuration's `sample_posterior`, and to True
                while training.
            generator: for the sample.
            return_loss: also compute the losses.
            compute_aux_loss: whether to compute FSQ's auxiliary loss; by default only while training.
            num_steps: training batches so far, for the annealing of FSQ's entropy loss.

        Returns:
            `VidTokOutput`; its `reconstruction` has the same frames, height and width as the input.
        """
        if sample_posterior is None:
            sample_posterior = self.training or self.config.sample_posterior
        if compute_aux_loss is None:
            compute_aux_loss = self.training and return_loss
        encoded = self.encode(
            pixel_values_videos,
            sample_posterior=sample_posterior,
            generator=generator,
            compute_aux_loss=compute_aux_loss,
            num_steps=num_steps,
        )
        decoded = self.decode(
            encoded.latents, num_frames=encoded.num_frames, height=encoded.height, width=encoded.width
        )
        output = VidTokOutput(
            reconstruction=decoded.reconstruction,
            latents=encoded.latents,
            indices=encoded.indices,
            kl_loss=encoded.kl_loss,
            aux_loss=encoded.aux_loss,
        )
        if return_loss:
            num_images = pixel_values_videos.shape[0] * pixel_values_videos.shape[1]
            output.reconstruction_loss = (pixel_values_videos - decoded.reconstruction).abs().sum() / num_images
            output.loss = output.reconstruction_loss
            if encoded.kl_loss is not None:
                output.loss = output.loss + self.config.kl_loss_weight * encoded.kl_loss
            if encoded.aux_loss is not None:
                output.loss = output.loss + self.config.aux_loss_weight * encoded.aux_loss
        return output if return_dict else output.to_tuple()

    def reconstruct_in_chunks(
        self, pixel_values_videos, chunk_frames=16, pad_gen_frames=False, sample_posterior=False, generator=None
    ):
        """Reconstructs a video in consecutive, independent chunks, as the authors' v1.0 scripts do.

        Chunks have `chunk_frames + 1` frames (causal) or `chunk_frames` (non-causal); the last one is completed by repeating
        its last frame and cropped back.

        Args:
            pixel_values_videos: (batch, num_frames, channels, height, width) in [-1, 1].
            pad_gen_frames: from the second chunk on, put the last reconstructed frames (temporal compression - 1 of them,
                clamped) in front of the chunk, which hides the borders (causal models only).

        Returns:
            `VidTokDecoderOutput` with the same frames as the input.
        """
        self._check_video(pixel_values_videos)
        factor = self.config.temporal_compression_ratio
        if pad_gen_frames and not self.config.is_causal:
            raise ValueError("pad_gen_frames continues causal models; non-causal chunks start afresh")
        if chunk_frames < factor or chunk_frames % factor:
            raise ValueError(f"chunk_frames must be a multiple of {factor}, got {chunk_frames}")
        num_frames, height, width = (pixel_values_videos.shape[i] for i in (1, 3, 4))
        step = chunk_frames + 1 if self.config.is_causal else chunk_frames
        results = []
        for start in range(0, num_frames, step):
            chunk = pixel_values_videos[:, start : start + step]
            missing = step - chunk.shape[1]
            chunk = torch.cat([chunk, chunk[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
            if pad_gen_frames and results:
                chunk = torch.cat([results[-1][:, -(factor - 1) :].clamp(-1, 1), chunk], dim=1)
            encoded = self.encode(chunk, sample_posterior, generator, official_padding=True)
            frames = self.decode(encoded.latents, height=height, width=width).reconstruction
            results.append(frames[:, -step:])
        return VidTokDecoderOutput(reconstruction=torch.cat(results, dim=1)[:, :num_frames])

    # ------------------------------------------------------------------------------------------------- checks

    def _run(self, run, inputs, cache, use_cache, is_last, direction, tile_size, tile_overlap, ratio_in, scale):
        """Runs `run(inputs, tile cache)`, tiled or not, and wraps the tiles' caches into one."""
        shape = (inputs.shape[0], *inputs.shape[-2:])
        if (use_cache or cache is not None or not is_last) and not self.config.is_causal:
            raise ValueError(
                "non-causal models see a whole clip at once and cannot stream; use reconstruct_in_chunks or encode_video"
            )
        if not is_last and not use_cache:
            raise ValueError("is_last=False without use_cache=True would lose the held-back frames")
        if cache is not None and (cache.direction != direction or cache.shape != shape):
            raise ValueError(
                f"the cache belongs to a stream that {cache.direction}s (batch, height, width) = {cache.shape}, this call "
                f"{direction}s {shape}"
            )
        states = cache.states if cache is not None else None
        num_frames = inputs.shape[2] + (cache.num_frames if cache is not None else 0)
        if tile_size is None:
            result, state = run(inputs, states[0] if states is not None else None)
            following = [state]
        else:
            ratio = self.config.spatial_compression_ratio
            tile_overlap = tile_size // 4 // ratio * ratio if tile_overlap is None else tile_overlap
            check_tiles(tile_size, tile_overlap, ratio)
            unit = ratio // ratio_in  # pixels per position of `inputs`
            result, following = run_tiled(run, inputs, tile_size // unit, tile_overlap // unit, scale, states)
        return result, VidTokCache(direction, shape, num_frames, following) if use_cache else None

    def _check_video(self, video):
        if not isinstance(video, torch.Tensor) or not video.is_floating_point():
            kind = video.dtype if isinstance(video, torch.Tensor) else type(video).__name__
            raise TypeError(
                f"pixel_values_videos must be a floating-point tensor in [-1, 1], got {kind}; use VidTokVideoProcessor"
            )
        if video.ndim != 5 or video.shape[2] != self.config.in_channels:
            raise ValueError(
                "pixel_values_videos must be (batch, num_frames, channels, height, width) with "
                f"{self.config.in_channels} channels, got {tuple(video.shape)}"
            )
        if 0 in video.shape:
            raise ValueError(f"pixel_values_videos is empty: {tuple(video.shape)}")
        if not video.is_meta and not torch.compiler.is_compiling():
            low, high = (value.item() for value in torch.aminmax(video.detach()))
            if not (low >= -_MAX_MAGNITUDE and high <= _MAX_MAGNITUDE):
                raise ValueError(
                    f"pixel_values_videos must be in [-1, 1] and finite, got values from {low} to {high}; use "
                    "VidTokVideoProcessor"
                )

    def _check_latents(self, latents, indices):
        if (latents is None) == (indices is None):
            raise ValueError("give exactly one of latents and indices")
        if indices is not None:
            if self.config.regularizer != "fsq":
                raise ValueError("this is a KL model: it decodes latents, not indices")
            if indices.ndim != 4 or indices.is_floating_point() or indices.dtype == torch.bool:
                raise ValueError(
                    "indices must be integers of shape (batch, num_latent_frames, latent_height, latent_width), got "
                    f"{indices.dtype} {tuple(indices.shape)}"
                )
            return self.quantizer.indices_to_codes(indices, self.dtype).movedim(-1, 1)
        if latents.ndim != 5 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                "latents must be (batch, latent_channels, num_latent_frames, latent_height, latent_width) with "
                f"{self.config.latent_channels} channels, got {tuple(latents.shape)}"
            )
        if 0 in latents.shape:
            raise ValueError(f"latents are empty: {tuple(latents.shape)}")
        if (
            not latents.is_meta
            and not torch.compiler.is_compiling()
            and not bool(torch.isfinite(latents.detach()).all())
        ):
            raise ValueError("latents hold NaN or infinite values")
        return latents

    def _check_official(self, cache, use_cache, chunk_frames):
        factor = self.config.temporal_compression_ratio
        if self.config.version != "1.1":
            raise ValueError("streaming='official' is v1.1's mode; v1.0 and non-causal models: reconstruct_in_chunks")
        if cache is not None or use_cache:
            raise ValueError("streaming='official' takes the whole clip and makes its own chunks; it has no cache")
        if chunk_frames < factor or chunk_frames % factor:
            raise ValueError(f"chunk_frames must be a multiple of {factor}, got {chunk_frames}")

    def _pad_space(self, video):
        ratio = self.config.spatial_compression_ratio
        bottom, right = -video.shape[-2] % ratio, -video.shape[-1] % ratio
        if not bottom and not right:
            return video
        padded = F.pad(video.flatten(0, 1), (0, right, 0, bottom), mode="replicate")
        return padded.unflatten(0, video.shape[:2])

    def _trim(self, video, num_frames, height, width):
        for name, wanted, available in (
            ("num_frames", num_frames, video.shape[1]),
            ("height", height, video.shape[3]),
            ("width", width, video.shape[4]),
        ):
            if wanted is not None and not 1 <= wanted <= available:
                raise ValueError(f"{name}={wanted} is not within the {available} that these latents decode to")
        if num_frames is not None:
            video = video[:, -num_frames:] if self.config.version == "1.1" else video[:, :num_frames]
        return video[..., : height or video.shape[3], : width or video.shape[4]]

    # ---------------------------------------------------------------------------------------------- diffusers

    @classmethod
    def from_diffusers(cls, model, version="1.1", **kwargs):
        """Builds a `VidTokModel` from diffusers' `AutoencoderVidTok` (an instance, or a folder or Hub id of one).

        Args:
            version: which maths the weights of a causal model belong to. diffusers computes v1.1 only; weights of a v1.0
                checkpoint that were loaded into it must be declared "1.0" here.
            kwargs: passed to `AutoencoderVidTok.from_pretrained`.
        """
        from diffusers import AutoencoderVidTok

        from ...conversion.checkpoints import load_strict
        from ...conversion.vidtok_diffusers import config_from_diffusers

        if not isinstance(model, AutoencoderVidTok):
            model = AutoencoderVidTok.from_pretrained(model, **kwargs)
        config = config_from_diffusers(model.config, version=version)
        with torch.device("meta"):
            converted = cls(config)
        tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
        return load_strict(converted, tensors, "the diffusers model").eval()

    def to_diffusers(self):
        """Returns diffusers' `AutoencoderVidTok` with the same weights.

        Raises:
            ValueError: a v1.0 causal model, whose maths that class does not have.
        """
        from diffusers import AutoencoderVidTok

        from ...conversion.checkpoints import load_strict
        from ...conversion.vidtok_diffusers import config_to_diffusers

        model = AutoencoderVidTok(**config_to_diffusers(self.config))
        tensors = {name: value.detach().clone() for name, value in self.state_dict().items()}
        return load_strict(model, tensors, "this model").eval()


def _to_frames(video):
    """(B, C, T, H, W) -> (T, B, H, W, C), contiguous."""
    return video.permute(2, 0, 3, 4, 1).contiguous()


def _to_video(frames):
    """(T, B, H, W, C) -> (B, C, T, H, W), contiguous."""
    return frames.permute(1, 4, 0, 2, 3).contiguous()


__all__ = [
    "VidTokCache",
    "VidTokDecoderOutput",
    "VidTokEncoderOutput",
    "VidTokModel",
    "VidTokOutput",
    "VidTokPreTrainedModel",
]
