"""The layers that are fast on CPUs give what the plain ones give."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cinetok.modeling import cpu_layers
from cinetok.modeling.cpu_layers import (
    FeatureMapConv2d,
    Linear,
    activate_and_convolve,
    add,
    can_upsample_by_phases,
    conv2d,
    gated_feed_forward,
    linear,
    upsample_conv2d,
    use_cpu_layers,
)


def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


@pytest.fixture(params=["whole", "parts"])
def sizes(request, monkeypatch):
    """Thresholds that make the tensors here small or large."""
    if request.param == "parts":
        for name in ("_MATRIX_PIXELS", "_PATCH_BYTES", "_WEIGHT_BYTES", "_SLAB_ELEMENTS", "_FEED_FORWARD_ELEMENTS"):
            monkeypatch.setattr(cpu_layers, name, 1000)
    return request.param


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [(3, 3), (3, 1), (1, 1), (2, 2)])
@pytest.mark.parametrize("stride, padding", [(1, 1), (2, (1, 0)), (1, 0)])
def test_convolution(sizes, kernel, stride, padding, bias):
    maps, weight = channels_last(3, 12, 16, 22), torch.randn(8, 12, *kernel)
    shift = torch.randn(8) if bias else None
    expected = F.conv2d(maps, weight, shift, stride, padding)
    with torch.no_grad():
        result = conv2d(maps, weight, shift, stride, padding)
    assert torch.allclose(result, expected, atol=1e-4)
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_large_weights_in_parts(sizes):
    maps, weight, bias = channels_last(2, 12, 40, 30), torch.randn(150, 12, 3, 3), torch.randn(150)
    expected = F.conv2d(maps, weight, bias, padding=1)
    with torch.no_grad():
        result = conv2d(maps, weight, bias, padding=1)
        assert torch.allclose(conv2d(maps, weight, padding=1), expected - bias[:, None, None], atol=1e-4)
    assert torch.allclose(result, expected, atol=1e-4)
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_convolution_gradients(sizes):
    conv, maps = FeatureMapConv2d(12, 8, 3, stride=2, padding=1), channels_last(2, 12, 16, 22).requires_grad_()
    expected = F.conv2d(maps, conv.weight, conv.bias, 2, 1)
    weights = torch.randn_like(expected)
    ours, theirs = (
        torch.autograd.grad((result * weights).sum(), [maps, conv.weight, conv.bias])
        for result in (conv(maps), expected)
    )
    for one, other in zip(ours, theirs):
        assert torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_convolution_in_half_precision(dtype):
    maps, weight = channels_last(1, 16, 4, 2), torch.randn(8, 16, 3, 3) / 12
    expected = F.conv2d(maps, weight, None, 2, 1)
    with torch.no_grad():
        result = conv2d(maps.to(dtype), weight.to(dtype), None, 2, 1)
    assert result.dtype == dtype and torch.allclose(result.float(), expected, atol=0.03)


def test_upsampling(sizes):
    maps, weight, bias = channels_last(3, 12, 14, 22), torch.randn(8, 12, 3, 3), torch.randn(8)
    expected = F.conv2d(F.interpolate(maps, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    with torch.no_grad():
        assert can_upsample_by_phases(maps)
        result = upsample_conv2d(maps, weight, bias)
    assert torch.allclose(result, expected, atol=1e-4)
    assert not can_upsample_by_phases(maps)  # gradients are recorded here


@pytest.mark.parametrize("shape", [(200, 24), (3, 50, 24), (2, 24), (0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape, bias):
    layer, states = Linear(24, 40, bias=bias), torch.randn(shape)
    expected = F.linear(states, layer.weight, layer.bias)
    with torch.no_grad():
        assert torch.allclose(layer(states), expected, atol=1e-5)
    assert torch.allclose(layer(states), expected, atol=1e-5)  # recording gradients


def test_linear_takes_parts_of_a_matrix_and_views():
    weight, bias = torch.randn(40, 24), torch.randn(40)
    states = torch.randn(24, 3, 50).permute(1, 2, 0)
    with torch.no_grad():
        for rows in (slice(0, 20), slice(20, 40)):
            expected = F.linear(states, weight[rows], bias[rows])
            assert torch.allclose(linear(states, weight[rows], bias[rows]), expected, atol=1e-5)


@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD"])
def test_linear_on_either_processor(monkeypatch, vendor):
    """Both ways of multiplying are taken, whatever machine runs the tests."""
    cpu_layers._onednn_linear.cache_clear()
    monkeypatch.setattr(cpu_layers.Path, "read_text", lambda self: vendor)
    layer, states = Linear(24, 40), torch.randn(200, 24)
    with torch.no_grad():
        available = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
        assert (cpu_layers._onednn_linear() is not None) == (available and vendor != "GenuineIntel")
        assert torch.allclose(layer(states), F.linear(states, layer.weight, layer.bias), atol=1e-5)
    cpu_layers._onednn_linear.cache_clear()


def test_feed_forward(sizes):
    states = torch.randn(2, 700, 16)
    value, gate, out = ((torch.randn(o, i), torch.randn(o)) for o, i in ((64, 16), (64, 16), (16, 64)))
    expected = F.linear(F.linear(states, *value) * F.gelu(F.linear(states, *gate)), *out)
    with torch.no_grad():
        assert torch.allclose(gated_feed_forward(states, value, gate, out), expected, atol=1e-2, rtol=1e-4)
        assert gated_feed_forward(states[:, :0], value, gate, out).shape == (2, 0, 16)


def test_activation_and_convolution_in_slabs(sizes):
    conv, normed = FeatureMapConv2d(4, 8, 3, padding=1), channels_last(5, 4, 14, 22)
    expected = conv(F.silu(normed))
    before = normed.clone()
    with torch.no_grad():
        assert torch.allclose(activate_and_convolve(conv, normed), expected, atol=1e-5)
    assert torch.equal(normed, before)


def test_sums_reuse_only_what_they_may():
    first, second, memory = torch.randn(4), torch.randn(4), torch.empty(4)
    expected = first + second
    with torch.no_grad():
        assert add(first, second, memory=memory) is memory and torch.equal(memory, expected)
        half = torch.empty(4, dtype=torch.bfloat16)
        assert add(first, second, memory=half).dtype == torch.float32
    assert add(first, second, memory=memory) is not memory  # recording gradients


def test_autocast_takes_the_plain_way():
    layer, conv = Linear(24, 40), FeatureMapConv2d(24, 8, 3, padding=1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(200, 24)).dtype == torch.bfloat16
        assert conv(channels_last(1, 24, 8, 8)).dtype == torch.bfloat16


def test_products_are_counted():
    layer, states = Linear(24, 40), torch.randn(200, 24)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(states)
    assert counter.get_total_flops() == 2 * 200 * 24 * 40


def test_layers_of_a_library_exchanged():
    plain = nn.ModuleDict(
        {
            "linear": nn.Linear(16, 16),
            "conv": nn.Conv2d(16, 16, 3, padding=1),
            "grouped": nn.Conv2d(16, 16, 3, groups=2),
            "temporal": nn.Conv3d(16, 16, (3, 1, 1), padding=(1, 0, 0)),
            "volume": nn.Conv3d(16, 16, 3),
            "feed_forward": FeedForward(16, activation_fn="geglu"),
            "gelu": FeedForward(16, activation_fn="gelu"),
        }
    )
    ours = copy.deepcopy(plain)
    use_cpu_layers(ours)
    assert list(ours.state_dict()) == list(plain.state_dict())
    changed = {name for name in plain if type(ours[name]) is not type(plain[name])}
    assert changed == {"linear", "conv", "temporal", "feed_forward"}
    clip = torch.randn(2, 16, 5, 6, 7).contiguous(memory_format=torch.channels_last_3d)
    inputs = {
        "linear": torch.randn(100, 16),
        "conv": clip[:, :, 0],
        "temporal": clip,
        "feed_forward": torch.randn(2, 100, 16),
    }
    for name, value in inputs.items():
        expected = plain[name](value)
        assert torch.allclose(ours[name](value), expected, atol=1e-5)
        with torch.no_grad():
            assert torch.allclose(ours[name](value), expected, atol=1e-5)
