"""Linear layers, convolutions and sums that are fast on CPUs in float32, shared by the models.

Everything here gives what the plain layers give, to float rounding, and takes ordinary contiguous weights, so a model
runs from the memory its checkpoint file is mapped to. On other devices, in other dtypes and while gradients are
recorded the plain operations run (on a GPU `model.to(memory_format=torch.channels_last)` saves a copy of convolution
weights per call). What is different on a CPU:

- MKL, which stands behind `F.linear`, uses slower kernels on processors that are not Intel's; there oneDNN multiplies.
- Convolution kernels first rearrange the weights. With few pixels and wide channels that takes longer than the
  arithmetic, which then runs as matrix products on patches instead.
- Nearest-neighbour upsampling followed by a 3x3 convolution is four 2x2 convolutions of the small map: exact algebra
  with 16 instead of 36 products per input pixel.
- Sums reuse memory that nobody else holds. Activations of tens of megabytes are otherwise mapped and zeroed anew by the
  operating system every time.

Layers keep calling their sub-modules, so that hooks and adapters see them; where a module's weights are used directly
(`gated_feed_forward`, `upsample_conv2d`) the caller makes sure that it is plain.
"""

import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from torch import nn
from torch.utils.flop_counter import register_flop_formula

# Up to this many output pixels of all maps together a convolution runs as matrix products.
_MATRIX_PIXELS = 2048
# Bytes of patches that exist at a time: they stay in the caches.
_PATCH_BYTES = 8 * 2**20
# After upsampling, which taps of a kernel of three fall on the first and on the second input pixel that even (0) and odd
# (1) output pixels see.
_FALLING = ((slice(0, 1), slice(1, 3)), (slice(0, 2), slice(2, 3)))
# Weights of a convolution up to this size are handed to the kernels as a whole.
_WEIGHT_BYTES = 16 * 2**20
# Positions of feature maps that run together through layers that treat them independently.
_SLAB_TOKENS = 3072
# Elements of activations that are handled together where they can be split.
_SLAB_ELEMENTS = 2**21
# Elements of a feed-forward's wide activations that exist at a time.
_FEED_FORWARD_ELEMENTS = 5 * 2**18
# Below this many rows a linear layer is bound by reading its weights, whoever multiplies.
_MIN_ROWS = 64


def is_cpu_inference(hidden_states):
    """Whether the ways meant for float32 on a CPU without gradients apply. Compilers see the plain operations."""
    if hidden_states.device.type != "cpu" or hidden_states.dtype != torch.float32:
        return False
    return not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())


@cache
def _onednn_linear():
    """oneDNN's linear operation (the one compiled models use), or None where `F.linear` is as fast or it is missing."""
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:
        processor = platform.processor()  # names the vendor on Windows
    if "GenuineIntel" in processor or not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _linear_flops(input_shape, weight_shape, *args, out_shape=None, **kwargs):
        """Lets PyTorch's counter see these products like all others."""
        rows = 1
        for size in input_shape[:-1]:
            rows *= size
        return 2 * rows * weight_shape[0] * weight_shape[1]


def linear(hidden_states, weight, bias=None):
    """`F.linear`: (..., in_features) -> (..., out_features)."""
    operation = _onednn_linear() if is_cpu_inference(hidden_states) and weight.dtype == torch.float32 else None
    if operation is None or hidden_states.shape[:-1].numel() < _MIN_ROWS:
        return F.linear(hidden_states, weight, bias)
    return operation(hidden_states.contiguous(), weight, bias, "none", [], "")


class Linear(nn.Linear):
    """An nn.Linear that runs through `linear` of this module."""

    def forward(self, hidden_states):
        return linear(hidden_states, self.weight, self.bias)


def conv2d(hidden_states, weight, bias=None, stride=1, padding=0):
    """`F.conv2d` on maps (batch, channels, height, width) whose result is channels-last in memory.

    Args:
        hidden_states: maps; channels-last memory is read without a copy.
        weight: (out_channels, channels, kernel_height, kernel_width).
        bias: (out_channels,) or None.
        stride, padding: one number, or one for the height and one for the width.
    """
    stride = (stride, stride) if isinstance(stride, int) else tuple(stride)
    padding = (padding, padding) if isinstance(padding, int) else tuple(padding)
    kernel = tuple(weight.shape[2:])
    if kernel == (1, 1) and stride == (1, 1) and padding == (0, 0):
        return linear(hidden_states.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    height, width = (
        (size + 2 * pad - extent) // step + 1
        for size, pad, extent, step in zip(hidden_states.shape[2:], padding, kernel, stride)
    )
    # In half precision some CPU kernels are wrong on tiny maps (4x2 with stride 2, torch 2.13), so those come here too.
    pixels = hidden_states.shape[0] * height * width
    if hidden_states.device.type == "cpu" and pixels <= _MATRIX_PIXELS:
        return _conv2d_as_matrix_products(hidden_states, weight, bias, stride, padding, (height, width))
    hidden_states = hidden_states.contiguous(memory_format=torch.channels_last)
    # Large weights go in parts, since the kernels make two copies of what they get.
    channels = max(64, _WEIGHT_BYTES // max(1, weight[0].numel() * weight.element_size()) // 64 * 64)
    if channels >= len(weight) or not is_cpu_inference(hidden_states):
        return F.conv2d(hidden_states, weight, bias, stride, padding)
    biases = [None] * len(weight) if bias is None else bias.split(channels)
    parts = zip(weight.split(channels), biases)
    return torch.cat([F.conv2d(hidden_states, part, shift, stride, padding) for part, shift in parts], dim=1)


def _conv2d_as_matrix_products(hidden_states, weight, bias, stride, padding, size):
    """One matrix product per group of input channels, summed: the patches of a group are small."""
    batch, channels = hidden_states.shape[:2]
    (kernel_height, kernel_width), (pad_height, pad_width) = weight.shape[2:], padding
    padded = F.pad(hidden_states.transpose(0, 1), (pad_width, pad_width, pad_height, pad_height))
    patches = padded.unfold(2, kernel_height, stride[0]).unfold(3, kernel_width, stride[1])
    patches = patches.permute(0, 4, 5, 1, 2, 3)  # channels, kernel height, kernel width, batch, height, width
    pixels, taps = batch * size[0] * size[1], kernel_height * kernel_width
    group = max(1, _PATCH_BYTES // (pixels * taps * hidden_states.element_size()))
    matrix = weight.flatten(1)
    for start in range(0, channels, group):
        columns = patches[start : start + group].reshape(-1, pixels).t()
        rows = matrix[:, start * taps : (start + group) * taps].t()
        if start == 0:
            result = columns @ rows if bias is None else torch.addmm(bias, columns, rows)
        else:
            result = torch.addmm(result, columns, rows)
    return result.view(batch, *size, -1).permute(0, 3, 1, 2)


def can_upsample_by_phases(hidden_states):
    """Whether `upsample_conv2d` pays for maps (batch, channels, height, width)."""
    pixels = 4 * hidden_states.shape[0] * hidden_states.shape[2] * hidden_states.shape[3]
    return is_cpu_inference(hidden_states) and pixels > _MATRIX_PIXELS


def upsample_conv2d(hidden_states, weight, bias=None):
    """Doubles height and width of maps (batch, channels, height, width) by nearest neighbour, then convolves 3x3."""
    batch, _, height, width = hidden_states.shape
    padded = F.pad(hidden_states.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    result = hidden_states.new_empty(batch, height, 2, width, 2, weight.shape[0])
    taps = weight.permute(2, 3, 0, 1)
    for row in (0, 1):
        for column in (0, 1):
            # A position of the 2x2 kernel is the sum of the taps that fall on the same input pixel.
            kernel = weight.new_empty(*weight.shape[:2], 2, 2)
            for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
                torch.sum(taps[_FALLING[row][i], _FALLING[column][j]], (0, 1), out=kernel[:, :, i, j])
            window = padded[:, row : row + height + 1, column : column + width + 1]
            phase = conv2d(window.permute(0, 3, 1, 2), kernel, bias)
            result[:, :, row, :, column] = phase.permute(0, 2, 3, 1)
    return result.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def activate_and_convolve(conv, normed, dim=0, dropout=None):
    """`conv(dropout(F.silu(normed)))` for the result `normed` of a norm. Large ones go in slabs along axis `dim`, whose
    entries `conv` treats independently: activations then stay in the caches and need no memory of `normed`'s size."""

    def run(part):
        activated = F.silu(part)
        return conv(activated if dropout is None else dropout(activated))

    size = normed.shape[dim]
    step = max(1, _SLAB_ELEMENTS * size // max(1, normed.numel()))
    # Kernels rearrange the weights in every call. Random numbers are drawn as they are while gradients are recorded.
    is_random = dropout is not None and dropout.training
    if step >= size or is_random or conv.weight.numel() > 2 * _SLAB_ELEMENTS or not is_cpu_inference(normed):
        return run(normed)
    return torch.cat([run(part) for part in normed.split(step, dim)], dim)


class FeatureMapConv2d(nn.Conv2d):
    """A Conv2d that runs through `conv2d` of this module."""

    def forward(self, hidden_states):
        """(batch, channels, height, width) -> the same with channels-last memory."""
        return conv2d(hidden_states, self.weight, self.bias, self.stride, self.padding)


def add(first, second, memory=None):
    """`first + second`. Where no gradient is recorded the sum is written to `memory`, a tensor of its shape that only
    the caller holds and does not need any more; outputs of modules do not qualify, since forward hooks may keep them.
    """
    if memory is None or torch.is_grad_enabled() or memory.dtype != torch.result_type(first, second):
        return first + second
    return torch.add(first, second, out=memory)


def add_in_slabs(function, hidden_states, residual, dim, step=1):
    """`residual + function(hidden_states, 0)`, in slabs whose activations stay in the caches of a CPU.

    Args:
        function: takes a slab and where it starts on axis `dim`; the result has the slab's shape, up to the channels.
        hidden_states, residual: (batch, channels, ...).
        dim: axis of which `function` treats every `step` neighbours independently of the others.
    """
    size = hidden_states.shape[dim]
    if is_cpu_inference(hidden_states):
        tokens = max(1, hidden_states.numel() // hidden_states.shape[1])
        step = min(size, step * max(1, _SLAB_TOKENS * size // (step * tokens)))
    else:
        step = size
    if step == size:
        return residual + function(hidden_states, 0)
    result = torch.empty_like(residual)
    for start in range(0, size, step):
        length = min(step, size - start)
        slab = function(hidden_states.narrow(dim, start, length), start)
        torch.add(residual.narrow(dim, start, length), slab, out=result.narrow(dim, start, length))
    return result


def are_plain(layers, dtype):
    """Whether linear layers can be replaced by their weights: adapters (LoRA) put layers in their place that have to be
    called, and layerwise casting gives the weights another dtype."""
    return all(type(layer) in (nn.Linear, Linear) and layer.weight.dtype == dtype for layer in layers)


def gated_feed_forward(hidden_states, value, gate, out):
    """GEGLU, `out(value(x) * gelu(gate(x)))`, a few rows at a time: the wide activations in between stay in the caches.

    Args:
        hidden_states: (..., channels), no gradient recorded.
        value, gate, out: pairs of weight and bias.
    """
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    result = tokens.new_empty(len(tokens), len(out[0]))
    rows = max(256, _FEED_FORWARD_ELEMENTS // len(value[0]))
    for part, target in zip(tokens.split(rows), result.split(rows)):
        inner = torch.ops.aten.gelu_(linear(part, *gate)).mul_(linear(part, *value))
        target.copy_(linear(inner, *out))
    return result.view(*hidden_states.shape[:-1], len(out[0]))


class GatedFeedForward(FeedForward):
    """diffusers' GEGLU feed-forward that runs through `gated_feed_forward` where it can."""

    def __init__(self, dim):
        super().__init__(dim, activation_fn="geglu")

    def forward(self, hidden_states):
        inner, outer = self.net[0].proj, self.net[2]
        if not is_cpu_inference(hidden_states) or not are_plain((inner, outer), hidden_states.dtype):
            return super().forward(hidden_states)
        value, gate = zip(inner.weight.chunk(2), inner.bias.chunk(2))
        return gated_feed_forward(hidden_states, value, gate, (outer.weight, outer.bias))


class TemporalConv3d(nn.Conv3d):
    """A Conv3d with a kernel of one pixel, run as a 2-d convolution whose rows are frames and whose columns pixels."""

    def forward(self, hidden_states):
        """(batch, channels, num_frames, height, width) -> the same with channels-last memory."""
        maps = conv2d(
            hidden_states.flatten(3), self.weight[..., 0], self.bias, (self.stride[0], 1), (self.padding[0], 0)
        )
        return maps.unflatten(3, hidden_states.shape[3:])


def use_cpu_layers(module):
    """Exchanges the classes of plain layers in a network from a library for those of this module. Tensors and names stay
    what they are."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear
        elif (
            type(layer) is nn.Conv2d
            and layer.groups == 1
            and layer.dilation == (1, 1)
            and layer.padding_mode == "zeros"
        ):
            layer.__class__ = FeatureMapConv2d
        elif type(layer) is nn.Conv3d and layer.kernel_size[1:] == (1, 1) and layer.groups == 1:
            layer.__class__ = TemporalConv3d
        elif type(layer) is FeedForward and type(layer.net[0]) is GEGLU and layer.net[0].proj.bias is not None:
            layer.__class__ = GatedFeedForward
