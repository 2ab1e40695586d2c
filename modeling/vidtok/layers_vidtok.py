"""Building blocks of VidTok (arXiv 2412.13061, section 3), shared by the causal and the non-causal models.

What is notable here:
- Features are kept as (num_frames, batch, height, width, channels), contiguous. Frames are then the batch of a
  channels-last 2-d convolution, and pixels the width of a (3, 1) convolution over time, without rearranging copies.
- Parameters sit in ordinary convolution modules under the original names; the arithmetic is done here on their weights.
- Without gradients, blocks work in place and in slices of a few frames, so temporary buffers stay small.
- Upsampling followed by a convolution is done at the low resolution: exact algebra, 2.25 times fewer operations in
  space (`SpatialUpsample`), 2 times fewer in time (`TemporalUpsample`).
- Everything causal takes a `VidTokStream`, which carries the temporal context in from the previous chunk and out to
  the next one. Nothing is stored on modules.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NORM_EPS = 1e-6
NUM_NORM_GROUPS = 32
# Elements of a slice's widest feature map without gradients. Buffers of this size (16 MB in float32) are recycled by
# the allocator instead of being mapped anew, which costs more than the norms and activations that fill them.
SLICE_ELEMENTS = 4 * 2**20


class VidTokStream:
    """Temporal context of one pass: read from the previous chunk (`previous`), written for the next one (`following`).

    Attributes:
        is_last: nothing follows, so held-back frames are emitted.
        lookahead: frames at the end of the input that the next chunk will bring again (official overlapping decode); they
            are kept out of the context. Doubles with every temporal upsampling.
        official: reproduce the authors' interpolation across chunk borders instead of the exact one.
    """

    def __init__(self, previous=None, is_last=True, lookahead=0, official=False):
        self.previous = previous or {}
        self.following = {}
        self.is_last = is_last
        self.lookahead = lookahead
        self.official = official

    def get(self, key):
        return self.previous.get(key)

    def put(self, key, value):
        if not self.is_last or self.official:
            self.following[key] = value

    def tail(self, padded, length):
        """The last `length` frames of `padded` that the next chunk does not bring again (a copy: the rest is freed)."""
        end = padded.shape[0] - self.lookahead
        return padded[end - length : end].clone()


def frame_slices(num_frames, elements_per_frame):
    """Slices over the time axis: one for everything while gradients are recorded, else a few frames each."""
    if torch.is_grad_enabled():
        return [slice(0, num_frames)]
    step = max(1, SLICE_ELEMENTS // max(1, elements_per_frame))
    return [slice(start, min(start + step, num_frames)) for start in range(0, num_frames, step)]


def run_in_slices(run, hidden_states, channels, stream):
    """Calls `run(part, inner_stream)` for slices of the time axis, each as if it were a chunk of a stream of its own."""
    num_frames = hidden_states.shape[0]
    previous, lookahead = (stream.previous, stream.lookahead) if stream is not None else ({}, 0)
    inner = None
    for part in frame_slices(num_frames, _elements(hidden_states, channels)):
        if part.stop > num_frames - lookahead:
            part = slice(part.start, num_frames)  # the frames to be forgotten stay in one slice
        inner = VidTokStream(previous, is_last=False, lookahead=lookahead if part.stop == num_frames else 0)
        run(part, inner)
        previous = inner.following
        if part.stop == num_frames:
            break
    if stream is not None and inner is not None:
        for key, value in inner.following.items():
            stream.put(key, value)


def _elements(hidden_states, channels=0):
    return hidden_states[0, ..., 0].numel() * max(hidden_states.shape[-1], channels)


def conv_frames(hidden_states, weight, bias=None, stride=1, padding=0):
    """2-d convolution of every frame: (T, B, H, W, C) -> (T, B, H', W', C')."""
    frames = hidden_states.flatten(0, 1).permute(0, 3, 1, 2)
    weight = weight.contiguous(memory_format=torch.channels_last)
    frames = F.conv2d(frames, weight, bias, stride=stride, padding=padding)
    return frames.permute(0, 2, 3, 1).contiguous().unflatten(0, hidden_states.shape[:2])


def conv_time(padded, conv):
    """Kernel-3 convolution over time of every pixel, without padding: (T + 2, B, H, W, C) -> (T, B, H, W, C')."""
    pixels = padded.flatten(1, 3).permute(2, 0, 1).unsqueeze(0)  # one image: rows are frames, columns are pixels
    weight = conv.weight.unsqueeze(-1).contiguous(memory_format=torch.channels_last)
    pixels = F.conv2d(pixels, weight, conv.bias)
    return pixels.squeeze(0).permute(1, 2, 0).contiguous().unflatten(1, padded.shape[1:4])


def conv_volume(padded, conv, stride=1):
    """3x3x3 convolution, padded by zeros in space and not in time: (T + 2, B, H, W, C) -> (T', B, H, W, C')."""
    in_channels, out_channels = conv.in_channels, conv.out_channels
    num_frames = (padded.shape[0] - 3) // stride + 1
    if stride == 1 and out_channels * 8 <= in_channels:
        # Few outputs: the three temporal taps become output channels of one 2-d convolution, summed afterwards.
        weight = conv.weight.permute(2, 0, 1, 3, 4).flatten(0, 1)
        taps = conv_frames(padded, weight, padding=1).split(out_channels, dim=-1)
        return taps[0][:num_frames] + taps[1][1 : num_frames + 1] + taps[2][2:] + conv.bias
    if stride == 1 and in_channels * 8 <= out_channels:
        # Few inputs: the three frames become input channels of one 2-d convolution.
        weight = conv.weight.permute(0, 2, 1, 3, 4).flatten(1, 2)
        frames = torch.cat([padded[:num_frames], padded[1 : num_frames + 1], padded[2 : num_frames + 2]], dim=-1)
        return conv_frames(frames, weight, conv.bias, padding=1)
    volume = padded.permute(1, 4, 0, 2, 3)
    weight = conv.weight.contiguous(memory_format=torch.channels_last_3d)
    volume = F.conv3d(volume, weight, conv.bias, stride=(stride, 1, 1), padding=(0, 1, 1))
    return volume.permute(2, 0, 3, 4, 1).contiguous()


class VidTokNorm(nn.Module):
    """Norm over channels, LayerNorm at every position or GroupNorm.

    Args:
        statistics: over which positions GroupNorm takes its statistics: "position" (none but the group's channels),
            "frame", "pixel" (all frames of a pixel) or "clip". The causal models never look across frames.
    """

    def __init__(self, config, num_channels, statistics):
        super().__init__()
        self.statistics = statistics
        self.is_layernorm = config.norm_type == "layernorm"
        if self.is_layernorm:
            self.norm = nn.LayerNorm(num_channels, eps=NORM_EPS)
        else:
            self.weight = nn.Parameter(torch.ones(num_channels))
            self.bias = nn.Parameter(torch.zeros(num_channels))

    @property
    def needs_clip(self):
        return not self.is_layernorm and self.statistics in ("pixel", "clip")

    def forward(self, hidden_states):
        if self.is_layernorm:
            return self.norm(hidden_states)
        # (samples, channels, ...) as group_norm wants it, with everything that shares statistics in one sample
        order = {
            "position": (0, 1, 2, 3, 4),
            "frame": (0, 1, 4, 2, 3),
            "pixel": (1, 2, 3, 4, 0),
            "clip": (1, 4, 0, 2, 3),
        }
        order = order[self.statistics]
        samples = hidden_states.permute(order)
        normed = F.group_norm(
            samples.flatten(0, order.index(4) - 1), NUM_NORM_GROUPS, self.weight, self.bias, NORM_EPS
        ).view(samples.shape)
        return normed.permute([order.index(axis) for axis in range(5)]).contiguous()


def norm_act(norm, hidden_states):
    """Norm, then x * sigmoid(x); in place on the norm's result where no gradient needs it."""
    return F.silu(norm(hidden_states), inplace=not torch.is_grad_enabled())


class VidTokConv(nn.Module):
    """Holds a 1-d or 3-d convolution. The causal models wrap theirs, so their tensors are called `*.conv.weight`."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, *args, **kwargs):
        return self.conv(*args, **kwargs)


def _conv(config, conv):
    return VidTokConv(conv) if config.is_causal else conv


def _unwrap(conv):
    return conv.conv if isinstance(conv, VidTokConv) else conv


class TemporalPadding(nn.Module):
    """Puts two frames of context around the input of a kernel-3 convolution over time.

    v1.0 starts a stream with zeros, v1.1 with copies of the first frame; both then continue with the previous chunk's last
    frames. The non-causal models have one zero frame on each side.
    """

    def __init__(self, config, key=""):
        super().__init__()
        self.is_causal = config.is_causal
        self.repeats_first_frame = config.version == "1.1"
        self.key = key  # name of this convolution's context in a stream; the model makes it unique

    def forward(self, hidden_states, stream=None):
        if not self.is_causal:
            return F.pad(hidden_states, (0, 0, 0, 0, 0, 0, 0, 0, 1, 1))
        context = stream.get(self.key) if stream is not None else None
        if context is None:
            context = self.first_context(hidden_states, 2)
        padded = torch.cat([context, hidden_states])
        if stream is not None:
            stream.put(self.key, stream.tail(padded, 2))
        return padded

    def first_context(self, hidden_states, num_frames):
        first = hidden_states[:1].expand(num_frames, *hidden_states.shape[1:])
        return first if self.repeats_first_frame else torch.zeros_like(first)


class SpatialResnetBlock(GradientCheckpointingLayer):
    """2-d residual block, applied to every frame."""

    def __init__(self, config, in_channels, out_channels):
        super().__init__()
        self.dropout = config.dropout
        self.norm1 = VidTokNorm(config, in_channels, "frame")
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = VidTokNorm(config, out_channels, "frame")
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.has_shortcut = in_channels != out_channels

    def forward(self, hidden_states):
        """(T, B, H, W, C) -> (T, B, H, W, C'); without gradients the input may be overwritten."""
        if torch.is_grad_enabled() or self.training:  # reentrant checkpointing trains with gradients off
            return self._shortcut(hidden_states) + self._branch(hidden_states)
        output = hidden_states
        if self.has_shortcut:
            output = hidden_states.new_empty(*hidden_states.shape[:-1], self.conv1.out_channels)
        for part in frame_slices(hidden_states.shape[0], _elements(hidden_states, self.conv1.out_channels)):
            branch = self._branch(hidden_states[part])
            if self.has_shortcut:
                torch.add(branch, self._shortcut(hidden_states[part]), out=output[part])
            else:
                output[part] += branch
        return output

    def _shortcut(self, hidden_states):
        if not self.has_shortcut:
            return hidden_states
        return F.linear(hidden_states, self.nin_shortcut.weight.flatten(1), self.nin_shortcut.bias)

    def _branch(self, hidden_states):
        hidden_states = norm_act(self.norm1, hidden_states)
        hidden_states = conv_frames(hidden_states, self.conv1.weight, self.conv1.bias, padding=1)
        hidden_states = norm_act(self.norm2, hidden_states)
        hidden_states = F.dropout(hidden_states, self.dropout, self.training)
        return conv_frames(hidden_states, self.conv2.weight, self.conv2.bias, padding=1)


class _TimeMixingResnetBlock(GradientCheckpointingLayer):
    """Residual block whose convolutions look along time (1-d), or along time and space (3-d)."""

    def __init__(self, config, channels, make_conv, convolve, statistics):
        super().__init__()
        self.dropout = config.dropout
        self.convolve = convolve
        self.norm1 = VidTokNorm(config, channels, statistics)
        self.conv1 = _conv(config, make_conv(channels))
        self.norm2 = VidTokNorm(config, channels, statistics)
        self.conv2 = _conv(config, make_conv(channels))
        self.pad1 = TemporalPadding(config, "pad1")
        self.pad2 = TemporalPadding(config, "pad2")
        self.is_causal = config.is_causal

    def forward(self, hidden_states, stream=None):
        """(T, B, H, W, C) -> (T, B, H, W, C); without gradients the input is overwritten."""
        if torch.is_grad_enabled() or self.training:
            return hidden_states + self._branch(hidden_states, stream)
        if not self.is_causal:
            hidden_states += self._branch(hidden_states, None)
            return hidden_states

        def run(part, inner):
            hidden_states[part] += self._branch(hidden_states[part], inner)

        run_in_slices(run, hidden_states, hidden_states.shape[-1], stream)
        return hidden_states

    def _branch(self, hidden_states, stream):
        hidden_states = self.pad1(norm_act(self.norm1, hidden_states), stream)
        hidden_states = self.convolve(hidden_states, _unwrap(self.conv1))
        hidden_states = norm_act(self.norm2, hidden_states)
        hidden_states = self.pad2(F.dropout(hidden_states, self.dropout, self.training), stream)
        return self.convolve(hidden_states, _unwrap(self.conv2))


class TemporalResnetBlock(_TimeMixingResnetBlock):
    """1-d residual block over every pixel's time series."""

    def __init__(self, config, channels):
        statistics = "position" if config.is_causal else "pixel"
        super().__init__(config, channels, lambda c: nn.Conv1d(c, c, 3), conv_time, statistics)


class VolumeResnetBlock(_TimeMixingResnetBlock):
    """3-d residual block (only in the middle of the encoder and the decoder)."""

    def __init__(self, config, channels):
        statistics = "frame" if config.is_causal else "clip"
        super().__init__(config, channels, lambda c: nn.Conv3d(c, c, 3), conv_volume, statistics)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(q k^T * scaling) v, for inputs of shape (batch, heads, length, channels)."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class FrameAttention(GradientCheckpointingLayer):
    """Single-head attention over the positions of each frame; frames do not see each other."""

    def __init__(self, config, channels):
        super().__init__()
        self.config = config
        self.is_causal = False  # within a frame every position sees every other one
        self.num_key_value_groups = 1
        self.scaling = channels**-0.5
        self.norm = VidTokNorm(config, channels, "frame" if config.is_causal else "clip")
        self.q = _conv(config, nn.Conv3d(channels, channels, 1))
        self.k = _conv(config, nn.Conv3d(channels, channels, 1))
        self.v = _conv(config, nn.Conv3d(channels, channels, 1))
        self.proj_out = _conv(config, nn.Conv3d(channels, channels, 1))

    def forward(self, hidden_states):
        """(T, B, H, W, C) -> (T, B, H, W, C)."""
        normed = self.norm(hidden_states)
        outputs = [self._attend(normed[part]) for part in frame_slices(normed.shape[0], 4 * _elements(normed))]
        return hidden_states + torch.cat(outputs)

    def _attend(self, normed):
        positions = normed.flatten(2, 3).flatten(0, 1).unsqueeze(1)  # (frames, one head, positions, channels)
        query, key, value = (self._project(conv, positions) for conv in (self.q, self.k, self.v))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, _ = attend(self, query, key, value, None, scaling=self.scaling, dropout=0.0)
        return self._project(self.proj_out, attended.squeeze(2)).view(normed.shape)

    @staticmethod
    def _project(conv, positions):
        conv = _unwrap(conv)
        return F.linear(positions, conv.weight.flatten(1), conv.bias)


class VolumeConv(nn.Conv3d):
    """The 3x3x3 convolutions at the ends of the encoder and the decoder."""

    def __init__(self, config, in_channels, out_channels):
        super().__init__(in_channels, out_channels, 3)
        self.pad = TemporalPadding(config)

    def forward(self, hidden_states, stream=None, before=None):
        """(T, B, H, W, C) -> (T, B, H, W, C'). `before` (norm and activation) is applied to each slice of the input."""
        if torch.is_grad_enabled() or not self.pad.is_causal:
            return conv_volume(self.pad(before(hidden_states) if before else hidden_states, stream), self)
        output = hidden_states.new_empty(*hidden_states.shape[:-1], self.out_channels)

        def run(part, inner):
            inputs = before(hidden_states[part]) if before else hidden_states[part]
            output[part] = conv_volume(self.pad(inputs, inner), self)

        run_in_slices(run, hidden_states, self.out_channels, stream)
        return output


class SpatialDownsample(nn.Module):
    """Halves height and width: a zero column on the right, a zero row at the bottom, then a 3x3 convolution, stride 2."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, hidden_states):
        """(T, B, H, W, C) -> (T, B, H / 2, W / 2, C)."""
        parts = [
            conv_frames(F.pad(hidden_states[part], (0, 0, 0, 1, 0, 1)), self.conv.weight, self.conv.bias, stride=2)
            for part in frame_slices(hidden_states.shape[0], _elements(hidden_states))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class SpatialUpsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution.

    Every output pixel sees only 2x2 different input pixels, and which of them depends on its parity: four 2x2
    convolutions of the input with summed weights give the same result with 16 instead of 36 products per input pixel.
    """

    # For even and odd output rows: which taps of the 3x3 kernel fall on the first and on the second input row seen.
    _TAPS = (((0,), (1, 2)), ((0, 1), (2,)))

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def _phase_weight(self, row_parity, column_parity):
        rows = [self.conv.weight[:, :, list(taps)].sum(dim=2) for taps in self._TAPS[row_parity]]
        rows = torch.stack(rows, dim=2)
        columns = [rows[..., list(taps)].sum(dim=3) for taps in self._TAPS[column_parity]]
        return torch.stack(columns, dim=3)

    def forward(self, hidden_states):
        """(T, B, H, W, C) -> (T, B, 2 H, 2 W, C)."""
        num_frames, batch_size, height, width, channels = hidden_states.shape
        weights = [[self._phase_weight(row, column) for column in (0, 1)] for row in (0, 1)]
        parts = []
        output = None
        if not torch.is_grad_enabled():
            output = hidden_states.new_empty(num_frames, batch_size, height, 2, width, 2, channels)
        for part in frame_slices(num_frames, 2 * _elements(hidden_states)):
            padded = F.pad(hidden_states[part], (0, 0, 1, 1, 1, 1))
            phases = []
            for row in (0, 1):
                for column in (0, 1):
                    window = padded[:, :, row : row + height + 1, column : column + width + 1].contiguous()
                    phase = conv_frames(window, weights[row][column], self.conv.bias)
                    if output is not None:
                        output[part][:, :, :, row, :, column] = phase
                    else:
                        phases.append(phase)
            if output is None:
                rows = [torch.stack(phases[2 * row : 2 * row + 2], dim=4) for row in (0, 1)]
                parts.append(torch.stack(rows, dim=3))  # (T, B, H, 2, W, 2, C)
        if output is None:
            output = parts[0]
        return output.reshape(num_frames, batch_size, 2 * height, 2 * width, channels)


class TemporalDownsample(nn.Module):
    """Halves the number of frames: a learned blend of average pooling and a strided convolution, each over 3 frames.

    Causal models see one frame before the input (zeros in v1.0, where they count in the mean; a copy of the first frame
    in v1.1; the previous chunk's last frame in a stream), non-causal ones a zero frame after it.
    """

    def __init__(self, config, channels):
        super().__init__()
        self.is_causal = config.is_causal
        self.padding = TemporalPadding(config)
        self.conv = _conv(config, nn.Conv3d(channels, channels, 3, stride=(2, 1, 1)))
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))

    def forward(self, hidden_states, stream=None):
        """(T, B, H, W, C) -> (T / 2, B, H, W, C); an odd last frame is not used by the non-causal models."""
        if self.is_causal:
            context = stream.get(self.padding.key) if stream is not None else None
            if context is None:
                context = self.padding.first_context(hidden_states, 1)
            padded = torch.cat([context, hidden_states])
            if stream is not None:
                stream.put(self.padding.key, stream.tail(padded, 1))
        else:
            padded = F.pad(hidden_states, (0, 0, 0, 0, 0, 0, 0, 0, 0, 1))
        num_frames = (padded.shape[0] - 3) // 2 + 1
        blend = torch.sigmoid(self.mix_factor)
        outputs = []
        for part in frame_slices(num_frames, 2 * _elements(padded)):
            window = padded[2 * part.start : 2 * part.stop + 1]
            pooled = (window[0:-2:2] + window[1:-1:2] + window[2::2]) / 3
            outputs.append(
                torch.lerp(conv_volume(window, _unwrap(self.conv), stride=2), pooled, blend.to(pooled.dtype))
            )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class TemporalUpsample(nn.Module):
    """Doubles the number of frames: a learned blend of interpolated frames and a 3x3x3 convolution of them.

    Interpolation in time commutes with convolution in space, so each temporal tap convolves the frames that are there,
    and the interpolated, shifted taps are summed by one small matrix over time: half the products of convolving the
    interpolated frames. The blend is part of the weights: the identity, added to the tap that sees the frame itself.

    v1.0 and non-causal models repeat frames. v1.1 interpolates linearly (half-pixel centres, edges clamped), and the
    frames of a clip's first latent on their own: they are never mixed with what follows.
    """

    def __init__(self, config, channels, frames_per_latent):
        super().__init__()
        self.is_causal = config.is_causal
        self.repeats_first_frame = config.version == "1.1"
        self.is_linear = config.version == "1.1" and config.temporal_interpolation == "linear"
        self.frames_per_latent = frames_per_latent
        self.padding = TemporalPadding(config)  # holds the stream's key
        self.conv = _conv(config, nn.Conv3d(channels, channels, 3))
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))

    def forward(self, hidden_states, stream=None):
        """(T, B, H, W, C) -> (2 T, B, H, W, C); in a linear stream one frame is held back until the next chunk."""
        if stream is not None and stream.official:
            return self._forward_official(hidden_states, stream)
        # The context of a stream: the last two frames of every tap, and how many frames came before this chunk.
        context, num_seen = (stream.get(self.padding.key) if stream is not None else None) or (None, 0)
        taps = self._taps()
        num_new = hidden_states.shape[0]
        is_last = stream is None or stream.is_last
        if not torch.is_grad_enabled() and self.is_causal:
            first, stop = self._emitted(num_seen, num_new, is_last)
            output = hidden_states.new_empty(stop - first, *hidden_states.shape[1:])
            position = 0
            for part in frame_slices(num_new, 2 * _elements(hidden_states)):
                ends = is_last and part.stop == num_new
                frames, context = self._upsample(taps, hidden_states[part], context, num_seen + part.start, ends)
                output[position : position + frames.shape[0]] = frames
                position += frames.shape[0]
        else:
            output, context = self._upsample(taps, hidden_states, context, num_seen, is_last)
        if stream is not None:
            stream.put(self.padding.key, (context, num_seen + num_new))
        return output

    def _taps(self):
        """The three temporal taps of the blended convolution: [(weight (C', C, 3, 3), bias or None)]."""
        conv = _unwrap(self.conv)
        blend = torch.sigmoid(self.mix_factor)
        weight = conv.weight * (1 - blend)
        own = 2 if self.is_causal else 1  # the tap that sees the output's own frame
        identity = torch.zeros_like(conv.weight[:, :, 0])
        identity[:, :, 1, 1] = torch.eye(identity.shape[0], dtype=weight.dtype, device=weight.device)
        taps = [weight[:, :, k] + blend * identity if k == own else weight[:, :, k] for k in range(3)]
        return [(taps[k], conv.bias * (1 - blend) if k == own else None) for k in range(3)]

    def _emitted(self, num_seen, num_new, is_last):
        """Range of output frames (counted from the start of the stream) that this chunk completes."""

        def complete(num_frames, ended):
            holds_back = self.is_linear and not ended and num_frames > 0 and num_frames != self.frames_per_latent
            return 2 * num_frames - holds_back

        return complete(num_seen, False), complete(num_seen + num_new, is_last)

    def _interpolation(self, position, num_frames):
        """The input frames and weights that make interpolated frame `position`; `num_frames` frames are there."""
        frame = position // 2
        if not self.is_linear:
            return ((frame, 1.0),)
        neighbour = frame - 1 if position % 2 == 0 else frame + 1
        crosses = (neighbour < self.frames_per_latent) != (frame < self.frames_per_latent)
        if neighbour < 0 or neighbour >= num_frames or crosses:
            return ((frame, 1.0),)
        return ((frame, 0.75), (neighbour, 0.25))

    def _upsample(self, taps, hidden_states, context, num_seen, is_last):
        num_new, num_context = hidden_states.shape[0], min(2, num_seen)
        first, stop = self._emitted(num_seen, num_new, is_last)
        output, following = None, []
        for k, (weight, bias) in enumerate(taps):
            tap = conv_frames(hidden_states, weight, bias, padding=1)
            if num_context:
                tap = torch.cat([context[k], tap])
            # Row i: which frames of the tap (the context first) make output frame first + i.
            matrix = [[0.0] * tap.shape[0] for _ in range(stop - first)]
            for row, position in zip(matrix, range(first, stop)):
                source = position + k - (2 if self.is_causal else 1)
                if source < 0 and self.repeats_first_frame:
                    source = 0
                if not 0 <= source < 2 * (num_seen + num_new):
                    continue  # zero padding
                for frame, weight_in_time in self._interpolation(source, num_seen + num_new):
                    row[frame - num_seen + num_context] += weight_in_time
            matrix = torch.tensor(matrix, dtype=tap.dtype, device=tap.device).view(stop - first, tap.shape[0])
            flat = tap.flatten(1)
            if output is None:
                output = torch.mm(matrix, flat)
            elif torch.is_grad_enabled():
                output = torch.addmm(output, matrix, flat)
            else:
                output.addmm_(matrix, flat)
            following.append(tap[-2:].clone() if tap.shape[0] >= 2 else tap)
        return output.view(stop - first, *hidden_states.shape[1:]), following

    def _forward_official(self, hidden_states, stream):
        """The authors' chunked upsampling, border effects included (v1.1's `use_tiling` code).

        A chunk is interpolated together with `frames_per_latent` cached frames, whose outputs are dropped again. The frames
        cached for the next chunk are the last but one latent's, which is the right one only if the last latent was
        look-ahead; after the first chunk the last latent's are cached, look-ahead or not.
        """
        n = self.frames_per_latent
        state = stream.get(self.padding.key)
        taps = [conv_frames(hidden_states, weight, bias, padding=1) for weight, bias in self._taps()]
        if state is None:
            cached = [tap[-n:].clone() for tap in taps]
            dense = [torch.cat([self._interpolate(tap[:n]), self._interpolate(tap[n:])]) for tap in taps]
            tails = [dense[0][:1].expand(2, *dense[0].shape[1:]), dense[1][:1]]
        else:
            extended = [torch.cat([old, tap]) for old, tap in zip(state["frames"], taps)]
            cached = [tap[-2 * n : -n].clone() for tap in extended]
            dense = [self._interpolate(tap)[2 * n :] for tap in extended]
            tails = state["tails"]
        lookahead = 2 * stream.lookahead
        first, second = torch.cat([tails[0], dense[0]]), torch.cat([tails[1], dense[1]])
        num_frames = dense[2].shape[0]
        end = first.shape[0] - lookahead
        kept = [
            first[end - 2 : end].clone(),
            second[second.shape[0] - lookahead - 1 : second.shape[0] - lookahead].clone(),
        ]
        stream.put(self.padding.key, {"frames": cached, "tails": kept})
        return first[:num_frames] + second[:num_frames] + dense[2]

    def _interpolate(self, frames):
        """(T, ...) -> (2 T, ...), the whole sequence on its own."""
        if not self.is_linear or frames.shape[0] == 0:
            return frames.repeat_interleave(2, dim=0)
        before = torch.cat([frames[:1], frames[:-1]])
        after = torch.cat([frames[1:], frames[-1:]])
        return torch.stack([torch.lerp(frames, before, 0.25), torch.lerp(frames, after, 0.25)], dim=1).flatten(0, 1)


@torch.no_grad()
def init_vidtok_weights(module):
    """Initial weights of training from scratch: PyTorch's defaults, mix factors at 2, temporal blocks as identities."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        init.kaiming_uniform_(module.weight, a=5**0.5)
        if module.bias is not None:
            bound = (module.in_channels * module.weight[0, 0].numel()) ** -0.5
            init.uniform_(module.bias, -bound, bound)
    elif isinstance(module, nn.LayerNorm) or isinstance(module, VidTokNorm) and not module.is_layernorm:
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, (TemporalDownsample, TemporalUpsample)):
        init.constant_(module.mix_factor, 2.0)
    elif isinstance(module, TemporalResnetBlock):
        second = _unwrap(module.conv2)
        init.zeros_(second.weight)
        init.zeros_(second.bias)
