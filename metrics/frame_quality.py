"""PSNR and SSIM of video in plain torch, frame by frame, exactly as VidTok's evaluation does (arXiv 2412.13061).

Both take two float tensors (batch, channels, num_frames, height, width) in [0, 1]. PSNR of a frame is
-10 log10(mse + 1e-8), so identical frames give 80 dB. SSIM (Wang et al. 2004) uses an 11x11 Gaussian window of
standard deviation 1.5 without padding, after average pooling by round(min(height, width) / 256) where that exceeds 1.
"""

import torch
import torch.nn.functional as F

_WINDOW_SIZE = 11
_WINDOW_SIGMA = 1.5
_C1, _C2 = 0.01**2, 0.03**2  # k1 and k2 of the paper for a data range of 1
_MSE_FLOOR = 1e-8
_RANGE_SLACK = 1e-4  # rounding of (x + 1) / 2 and the like
_PIXELS_AT_ONCE = 1 << 22  # bounds the memory of the five filtered maps


def _check(video, reference):
    for name, value in (("video", video), ("reference", reference)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch tensor, not {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor in [0, 1], not {value.dtype}; divide bytes by 255")
        if value.ndim != 5:
            raise ValueError(
                f"{name} must have shape (batch, channels, num_frames, height, width), got {tuple(value.shape)}"
            )
        if value.numel() == 0:
            raise ValueError(f"{name} is empty: shape {tuple(value.shape)}")
    if video.shape != reference.shape:
        raise ValueError(f"video and reference differ in shape: {tuple(video.shape)} and {tuple(reference.shape)}")
    if video.device != reference.device:
        raise ValueError(f"video and reference are on different devices: {video.device} and {reference.device}")
    for name, value in (("video", video), ("reference", reference)):
        low, high = (bound.item() for bound in torch.aminmax(value))
        if not (low >= -_RANGE_SLACK and high <= 1 + _RANGE_SLACK):  # NaN fails this too
            raise ValueError(
                f"{name} must hold values in [0, 1], found {low:g} to {high:g}; map [-1, 1] with (x + 1) / 2 and clamp"
            )


def _reduce(per_frame, reduction):
    if reduction == "mean":
        return per_frame.mean()
    if reduction == "none":
        return per_frame
    raise ValueError(f'reduction must be "mean" or "none", not {reduction!r}')


def psnr(video, reference, reduction="mean"):
    """Peak signal-to-noise ratio in dB.

    Args:
        video, reference: float tensors (batch, channels, num_frames, height, width) in [0, 1].
        reduction: "mean" over all frames, or "none" for one value per frame.

    Returns:
        A float32 scalar, or (batch, num_frames) with `reduction="none"`.

    Raises:
        TypeError: not floating-point tensors. ValueError: other rank, shapes or range, NaN, unknown reduction.
    """
    _check(video, reference)
    return _reduce(_psnr(video, reference), reduction)


def _psnr(video, reference):
    error = (video.float() - reference.float()).square().mean(dim=(1, 3, 4))
    return -10 * torch.log10(error + _MSE_FLOOR)


def ssim(video, reference, reduction="mean"):
    """Structural similarity (Wang et al., "Image quality assessment: from error visibility to structural similarity").

    Args:
        video, reference: float tensors (batch, channels, num_frames, height, width) in [0, 1]; after pooling by
            round(min(height, width) / 256) the frames must be at least 11x11.
        reduction: "mean" over all frames, or "none" for one value per frame.

    Returns:
        A float32 scalar, or (batch, num_frames) with `reduction="none"`.

    Raises:
        TypeError: not floating-point tensors. ValueError: other rank, shapes or range, NaN, frames below 11x11,
            unknown reduction.
    """
    _check(video, reference)
    return _reduce(_ssim(video, reference), reduction)


def _ssim(video, reference):
    batch, channels, num_frames, height, width = video.shape
    pooling = max(1, round(min(height, width) / 256))
    if min(height, width) // pooling < _WINDOW_SIZE:
        raise ValueError(f"SSIM needs frames of at least {_WINDOW_SIZE}x{_WINDOW_SIZE} pixels, got {height}x{width}")
    per_frame = video.new_empty(batch, num_frames, dtype=torch.float32)
    frames_at_once = max(1, _PIXELS_AT_ONCE // (batch * channels * height * width))
    for start in range(0, num_frames, frames_at_once):
        window = slice(start, start + frames_at_once)
        x, y = (v[:, :, window].float().transpose(1, 2).reshape(-1, 1, height, width) for v in (video, reference))
        similarity = _ssim_of_planes(x, y, pooling)
        per_frame[:, window] = similarity.reshape(batch, -1, channels).mean(dim=2)
    return per_frame


def _ssim_of_planes(x, y, pooling):
    """Mean SSIM of every plane: (num_planes, 1, height, width) twice -> (num_planes,)."""
    if pooling > 1:
        x, y = F.avg_pool2d(x, pooling), F.avg_pool2d(y, pooling)
    offset = torch.arange(_WINDOW_SIZE, dtype=torch.float32, device=x.device) - _WINDOW_SIZE // 2
    window = torch.exp(-offset.square() / (2 * _WINDOW_SIGMA**2))
    window = window / window.sum()

    def blur(planes):  # the Gaussian window is separable
        return F.conv2d(F.conv2d(planes, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    mean_x, mean_y = blur(x), blur(y)
    mean_xx, mean_yy, mean_xy = mean_x.square(), mean_y.square(), mean_x * mean_y
    var_x, var_y, covariance = blur(x * x) - mean_xx, blur(y * y) - mean_yy, blur(x * y) - mean_xy
    contrast_structure = (2 * covariance + _C2) / (var_x + var_y + _C2)
    luminance = (2 * mean_xy + _C1) / (mean_xx + mean_yy + _C1)
    return (luminance * contrast_structure).mean(dim=(1, 2, 3))


class VideoQuality:
    """Averages quality over videos that arrive in pieces; every frame counts the same.

    ```python
    quality = VideoQuality()
    for reconstruction, original in pieces:  # (B, C, T, H, W) in [0, 1]
        quality.update(reconstruction, original)
    quality.compute()  # {"psnr": 31.2, "ssim": 0.91, "num_frames": 480}
    ```

    Args:
        metrics: names out of "psnr" and "ssim".
        extra: further measures, name -> function(video, reference) that returns one value per frame (B, T).

    Attributes:
        per_frame: name -> list of floats in the order of the frames (of a batch: video after video).
    """

    def __init__(self, metrics=("psnr", "ssim"), extra=None):
        known = {"psnr": _psnr, "ssim": _ssim}
        unknown = [name for name in metrics if name not in known]
        if unknown:
            raise ValueError(f"unknown metrics {unknown}; choose from {list(known)} or pass functions as `extra`")
        self._functions = {**{name: known[name] for name in metrics}, **(extra or {})}
        if not self._functions:
            raise ValueError("no metric chosen")
        self.reset()

    def reset(self):
        """Forgets every frame."""
        self.per_frame = {name: [] for name in self._functions}

    @property
    def num_frames(self):
        return len(next(iter(self.per_frame.values())))

    @torch.no_grad()
    def update(self, video, reference):
        """Adds a piece of one or several videos, both (batch, channels, num_frames, height, width) in [0, 1].

        Nothing is added when any metric fails; errors are those of `psnr` and `ssim`.
        """
        _check(video, reference)
        expected = (video.shape[0], video.shape[2])
        values = {name: function(video, reference) for name, function in self._functions.items()}
        for name, value in values.items():
            if tuple(value.shape) != expected:
                raise ValueError(
                    f"{name} returned shape {tuple(value.shape)}, expected (batch, num_frames) = {expected}"
                )
        for name, value in values.items():
            self.per_frame[name].extend(value.double().flatten().tolist())

    def compute(self):
        """Averages over all frames so far: {name: float, ..., "num_frames": int}. ValueError before the first frame."""
        if not self.num_frames:
            raise ValueError("no frames were added yet")
        averages = {name: sum(values) / len(values) for name, values in self.per_frame.items()}
        return {**averages, "num_frames": self.num_frames}
