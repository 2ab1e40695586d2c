"""Images and clips in and out of Seer, as in the authors' data loaders and scripts."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


def preprocess_image(image, height, width=None):
    """Resizes an image until it covers `height` x `width` (bilinear, antialiased, aspect ratio kept), then crops its
    centre.

    Args:
        image: PIL image of any mode (converted to RGB); or an array (height, width, channels) or tensor (channels,
            height, width), uint8 or floats in [0, 1].
        height, width: of the result in pixels; `width` defaults to `height`.

    Returns:
        float32 tensor (3, height, width) in [0, 1].

    Raises:
        TypeError: another type of image.
        ValueError: not three channels, no pixels, or floats that are not finite or outside [0, 1].
    """
    width = height if width is None else width
    if isinstance(image, Image.Image):
        pixels = _to_pixels(_resize(image.convert("RGB"), height, width))
    elif isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"an image array must be (height, width, 3), got {image.shape}")
        return preprocess_image(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1), height, width)
    elif isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"an image tensor must be (3, height, width), got {tuple(image.shape)}")
        if not image.numel():
            raise ValueError(f"an image without pixels: {tuple(image.shape)}")
        if image.dtype == torch.uint8:
            pil = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
            return preprocess_image(pil, height, width).to(image.device)
        if not image.is_floating_point():
            raise TypeError(f"an image tensor must be uint8 or floating point, got {image.dtype}")
        pixels = image.float()
        if not torch.isfinite(pixels).all():
            raise ValueError("the image holds NaN or infinite values")
        if pixels.min() < 0 or pixels.max() > 1:
            raise ValueError(
                f"floating point images must lie in [0, 1], got [{pixels.min():.3g}, {pixels.max():.3g}]; "
                "use (x + 1) / 2 on images in [-1, 1]"
            )
        size = _covering_size(*pixels.shape[-2:], height, width)
        if size != tuple(pixels.shape[-2:]):
            pixels = F.interpolate(pixels[None], size=size, mode="bilinear", antialias=True)[0].clamp(0, 1)
    else:
        raise TypeError(f"an image must be a PIL image, an array or a tensor, got {type(image).__name__}")
    top, left = (round((size - target) / 2) for size, target in zip(pixels.shape[-2:], (height, width)))
    return pixels[:, top : top + height, left : left + width].contiguous()


def _covering_size(image_height, image_width, height, width):
    # The tighter side gets its target exactly; the other keeps the aspect ratio, truncated to an integer.
    if image_height * width <= image_width * height:
        return height, max(width, int(height * image_width / image_height))
    return max(height, int(width * image_height / image_width)), width


def _resize(image, height, width):
    new_height, new_width = _covering_size(image.height, image.width, height, width)
    if (new_width, new_height) == image.size:
        return image
    return image.resize((new_width, new_height), Image.Resampling.BILINEAR)


def _to_pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def resample_frames(clip, num_frames):
    """Brings a clip to a number of frames as the authors' loaders do.

    Too many frames are blended linearly in time with half-pixel centres (every result is a mixture of two neighbours,
    not a pick); too few are followed by frames of zeros (mid grey in [-1, 1]).

    Args:
        clip: (channels, num_frames, height, width).
        num_frames: wanted.
    """
    missing = num_frames - clip.shape[1]
    if missing == 0:
        return clip
    if missing > 0:
        return F.pad(clip, (0, 0, 0, 0, 0, missing))
    return F.interpolate(clip[None], size=(num_frames, *clip.shape[2:]), mode="trilinear", align_corners=False)[0]


def preview_frames(video, padding=2):
    """Frames as the authors write them to a gif: a black border, values truncated to bytes.

    Args:
        video: (num_frames, 3, height, width) in [0, 1].
        padding: width of the border in pixels.

    Returns:
        uint8 array (num_frames, height + 2 * padding, width + 2 * padding, 3).
    """
    padded = F.pad(video.float(), (padding,) * 4)
    return (padded * 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
