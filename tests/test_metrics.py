"""PSNR, SSIM and their streaming average."""

import math

import pytest
import torch
import torch.nn.functional as F

from cinetok.metrics import VideoQuality, psnr, ssim


def pair(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    video = torch.rand(shape, generator=generator)
    return video, (video + 0.1 * torch.randn(shape, generator=generator)).clamp(0, 1)


def ssim_of_plane(x, y):
    """SSIM of two planes by the definition, window by window, in float64."""
    offsets = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11].double(), y[i : i + 11, j : j + 11].double()
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
            cov = (window * (a - ma) * (b - mb)).sum()
            values.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    return torch.stack(values).mean().item()


def test_psnr_by_hand():
    reference = torch.zeros(2, 3, 2, 4, 4)
    video = reference.clone()
    video[0, :, 0] = 0.1
    video[0, 0, 1] = 0.3  # one of three channels
    values = psnr(video, reference, reduction="none")
    assert values.shape == (2, 2)
    expected = [-10 * math.log10(0.01 + 1e-8), -10 * math.log10(0.03 + 1e-8), 80.0, 80.0]
    assert values.flatten().tolist() == pytest.approx(expected, abs=1e-4)
    assert psnr(video, reference).item() == pytest.approx(sum(expected) / 4, abs=1e-4)


def test_ssim_by_definition():
    video, reference = pair(2, 3, 2, 14, 13)
    values = ssim(video, reference, reduction="none")
    assert values.shape == (2, 2)
    for b in range(2):
        for t in range(2):
            planes = [ssim_of_plane(video[b, c, t], reference[b, c, t]) for c in range(3)]
            assert values[b, t].item() == pytest.approx(sum(planes) / 3, abs=2e-5)
    assert ssim(video, video).item() == pytest.approx(1, abs=1e-6)
    assert ssim(video, reference).item() == pytest.approx(values.mean().item(), abs=1e-6)
    assert ssim(video, reference).item() < 0.99


@pytest.mark.parametrize("height, pooling", [(383, 1), (385, 2), (639, 2), (641, 3)])
def test_ssim_pools_large_frames(height, pooling):
    video, reference = pair(1, 1, 1, height, 700)
    pooled = [F.avg_pool2d(v[:, :, 0], pooling)[:, :, None] for v in (video, reference)]
    # pooled frames are small enough not to be pooled again
    assert ssim(video, reference).item() == pytest.approx(ssim(*pooled).item(), abs=1e-6)


def test_frames_are_independent_and_order_does_not_matter():
    video, reference = pair(3, 3, 4, 20, 24)
    for metric in (psnr, ssim):
        whole = metric(video, reference, reduction="none")
        for b in range(3):
            for t in range(4):
                single = metric(video[b : b + 1, :, t : t + 1], reference[b : b + 1, :, t : t + 1])
                assert single.item() == pytest.approx(whole[b, t].item(), abs=1e-4)
        assert torch.allclose(metric(reference, video, reduction="none"), whole, atol=1e-5)


def test_large_video_in_pieces_equals_small(monkeypatch):
    import cinetok.metrics.frame_quality as module

    video, reference = pair(2, 3, 7, 16, 16)
    whole = ssim(video, reference, reduction="none")
    monkeypatch.setattr(module, "_PIXELS_AT_ONCE", 2 * 3 * 16 * 16 * 3)
    assert torch.allclose(ssim(video, reference, reduction="none"), whole, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_computed_in_float32(dtype):
    video, reference = (v.to(dtype) for v in pair(1, 3, 1, 16, 16))
    for metric in (psnr, ssim):
        value = metric(video, reference)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(metric(video.float(), reference.float()).item(), abs=1e-6)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_bad_input(metric):
    good = torch.rand(1, 3, 2, 16, 16)
    nan = good.clone()
    nan[0, 0, 0, 0, 0] = float("nan")
    for video, reference, error, message in (
        (good.numpy(), good, TypeError, "torch tensor"),
        ((good * 255).byte(), (good * 255).byte(), TypeError, "divide bytes by 255"),
        (good[0], good[0], ValueError, "shape"),
        (good, good[:, :, :1], ValueError, "differ in shape"),
        (good * 2 - 1, good, ValueError, r"\[0, 1\]"),
        (good, good * 255, ValueError, r"\[0, 1\]"),
        (nan, good, ValueError, r"\[0, 1\]"),
        (good[:, :, :0], good[:, :, :0], ValueError, "empty"),
        (good, good.to("meta"), ValueError, "devices"),
    ):
        with pytest.raises(error, match=message):
            metric(video, reference)
    with pytest.raises(ValueError, match="reduction"):
        metric(good, good, reduction="sum")


def test_ssim_needs_a_window():
    small = torch.rand(1, 3, 1, 10, 64)
    with pytest.raises(ValueError, match="11x11"):
        ssim(small, small)
    assert psnr(small, small).item() == pytest.approx(80)


def test_streaming_average_weights_frames():
    video, reference = pair(1, 3, 10, 16, 16)
    quality = VideoQuality()
    for piece in (slice(0, 7), slice(7, 10)):
        quality.update(video[:, :, piece], reference[:, :, piece])
    result = quality.compute()
    assert result["num_frames"] == 10 == quality.num_frames
    assert result["psnr"] == pytest.approx(psnr(video, reference).item(), abs=1e-4)
    assert result["ssim"] == pytest.approx(ssim(video, reference).item(), abs=1e-5)
    assert quality.per_frame["psnr"] == pytest.approx(psnr(video, reference, reduction="none")[0].tolist(), abs=1e-4)
    quality.reset()
    with pytest.raises(ValueError, match="no frames"):
        quality.compute()


def test_streaming_average_with_other_measures():
    video, reference = pair(2, 3, 4, 8, 8)
    quality = VideoQuality(metrics=("psnr",), extra={"l1": lambda x, y: (x - y).abs().mean((1, 3, 4))})
    quality.update(video, reference)
    assert quality.compute()["l1"] == pytest.approx((video - reference).abs().mean().item(), abs=1e-6)
    assert len(quality.per_frame["l1"]) == 8 and set(quality.per_frame) == {"psnr", "l1"}
    broken = VideoQuality(extra={"total": lambda x, y: (x - y).abs().mean()})
    with pytest.raises(ValueError, match="total returned shape"):
        broken.update(*pair(1, 3, 2, 16, 16))
    assert broken.num_frames == 0
    with pytest.raises(ValueError, match="unknown metrics"):
        VideoQuality(metrics=("fvd",))
    with pytest.raises(ValueError, match="no metric"):
        VideoQuality(metrics=())
