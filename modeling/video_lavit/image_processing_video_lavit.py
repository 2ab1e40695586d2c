"""Image preprocessing of Video-LaVIT's visual tokenizer."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_base import BatchFeature, ImageProcessingMixin

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def to_pil(image):
    """An RGB `PIL.Image` from a path, a PIL image, an array or a tensor.

    Args:
        image: path; PIL image of any mode; uint8 (height, width, 3); uint8 or float [0, 1] tensor (3, height, width).

    Raises:
        ValueError: a file that cannot be read, or an array of another shape.
        TypeError: anything else.
    """
    if isinstance(image, (str, Path)):
        try:
            with Image.open(image) as opened:
                return opened.convert("RGB")
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{image}: not a readable image ({error})") from error
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(
                f"an image tensor is (3, height, width), got {tuple(image.shape)}; give a video as a video"
            )
        if image.is_floating_point():
            image = (image.clamp(0, 1) * 255).round().to(torch.uint8)
        return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f"an image array is uint8 (height, width, 3), got {image.dtype} {image.shape}; give a video as a video"
            )
        return Image.fromarray(image)
    raise TypeError(f"an image is a path, a PIL image, an array or a tensor, not {type(image).__name__}")


class VideoLavitImageProcessor(ImageProcessingMixin):
    r"""Turns images into `pixel_values` (batch, 3, size, size): squashed to a square, CLIP mean and standard deviation.

    The aspect ratio is lost and nothing is cropped, as in the original. The resize is Pillow's bicubic on bytes.

    Args:
        size: side of the square in pixels.
        image_mean, image_std: per channel, for values in [0, 1].
    """

    model_input_names = ["pixel_values"]

    def __init__(self, size=224, image_mean=None, image_std=None, **kwargs):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size is the side of the square in pixels, got {size!r}")
        self.size = size
        self.image_mean = list(CLIP_MEAN if image_mean is None else image_mean)
        self.image_std = list(CLIP_STD if image_std is None else image_std)
        super().__init__(**kwargs)

    def __call__(self, images, return_tensors="pt"):
        """Prepares one image or a list of them.

        Args:
            images: anything `to_pil` takes, or a list of such.
            return_tensors: "pt" or "np".

        Returns:
            BatchFeature with `pixel_values` (batch, 3, size, size), float32.
        """
        if not isinstance(images, (list, tuple)):
            images = [images]
        if not images:
            raise ValueError("no images given")
        pixels = torch.stack([self._prepare(image) for image in images])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def _prepare(self, image):
        resized = to_pil(image).resize((self.size, self.size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
        mean = torch.tensor(self.image_mean)[:, None, None]
        std = torch.tensor(self.image_std)[:, None, None]
        return (pixels - mean) / std


__all__ = ["CLIP_MEAN", "CLIP_STD", "VideoLavitImageProcessor", "to_pil"]
