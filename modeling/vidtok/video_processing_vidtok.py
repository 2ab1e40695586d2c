"""Video processor of VidTok: resize the shorter side, centre crop, map to [-1, 1], and back to bytes.

Torch only: it needs neither torchvision nor torchcodec; files are read with PyAV.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers.image_processing_utils import BatchFeature
from transformers.video_processing_utils import VideoProcessorMixin

from ...video import VideoClip, read_video

_RANGE_SLACK = 1e-4
_SETTINGS = (
    "do_resize",
    "size",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "fps",
    "num_frames",
)


class VidTokVideoProcessor(VideoProcessorMixin):
    r"""Turns videos into `pixel_values_videos` (batch, num_frames, channels, height, width), float32 in [-1, 1].

    Frames are scaled to [0, 1], resized so that the shorter side is `size["shortest_edge"]` (bilinear with antialias,
    aspect kept, longer side rounded down), cropped around the centre to `crop_size` (smaller frames are padded with
    black before normalisation, -1 after it) and normalised with `image_mean` and `image_std`.

    Args:
        do_resize: resize the shorter side; False keeps the frames' size.
        size: {"shortest_edge": pixels}, or {"height": ..., "width": ...} to resize to exactly that.
        do_center_crop: crop; False keeps the aspect ratio and every pixel.
        crop_size: {"height": pixels, "width": pixels}.
        do_rescale, rescale_factor: multiply bytes by the factor. Float videos are taken as [0, 1] already.
        do_normalize, image_mean, image_std: (x - mean) / std, one number per channel.
        fps: rate at which files are read; None keeps theirs.
        num_frames: number of frames read from files; None reads all (with `fps`: that many from the start).
    """

    model_input_names = ["pixel_values_videos"]

    def __init__(
        self,
        do_resize=True,
        size=None,
        do_center_crop=True,
        crop_size=None,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=None,
        image_std=None,
        fps=None,
        num_frames=None,
        **kwargs,
    ):
        super().__init__(
            do_resize=do_resize,
            size={"shortest_edge": 256} if size is None else size,
            do_center_crop=do_center_crop,
            crop_size={"height": 256, "width": 256} if crop_size is None else crop_size,
            do_rescale=do_rescale,
            rescale_factor=rescale_factor,
            do_normalize=do_normalize,
            image_mean=[0.5, 0.5, 0.5] if image_mean is None else list(image_mean),
            image_std=[0.5, 0.5, 0.5] if image_std is None else list(image_std),
            fps=fps,
            num_frames=num_frames,
            **kwargs,
        )

    def preprocess(self, videos, *, return_metadata=False, return_tensors="pt", device=None, **overrides):
        """Prepares one video or a list of them.

        Args:
            videos: a path, a `VideoClip`, an array or tensor (num_frames, height, width, 3) of bytes or of floats in
                [0, 1], a batch of such (5 dimensions), a list of PIL images (the frames of one video), or a list of
                any of these.
            return_metadata: also return `video_metadata`, one dictionary per video (fps, num_frames, height, width,
                source, timestamps in seconds).
            return_tensors: "pt", "np", or None for a list with one tensor per video, which may differ in shape.
            device: where the tensors are computed and returned; default: where the input is.
            overrides: any argument of `__init__` for this call only.

        Returns:
            BatchFeature with `pixel_values_videos` (batch, num_frames, 3, height, width).

        Raises:
            TypeError: an unsupported type or dtype, or an unknown argument.
            ValueError: wrong rank, channels, range, NaN, no frames, or videos that do not fit one batch.
            VideoReadError: a file that cannot be read.
        """
        settings = self._settings(overrides)
        if return_tensors not in ("pt", "np", None):
            raise ValueError(f'return_tensors must be "pt", "np" or None, not {return_tensors!r}')
        clips = [self._load(video, settings) for video in _as_list(videos)]
        if not clips:
            raise ValueError("videos is an empty list")
        pixels, metadata = [], []
        for frames, facts in clips:
            pixels.append(self._prepare(frames.to(device) if device is not None else frames, settings))
            height, width = frames.shape[1:3]
            metadata.append({**facts, "num_frames": frames.shape[0], "height": height, "width": width})
        if return_tensors is not None:
            shapes = {tuple(video.shape) for video in pixels}
            if len(shapes) > 1:
                raise ValueError(
                    f"the videos do not fit one batch, prepared shapes (T, C, H, W) are {sorted(shapes)}; give them "
                    "the same number of frames and size (num_frames=, do_center_crop=True) or pass return_tensors=None"
                )
            pixels = torch.stack(pixels)
            if return_tensors == "np":
                pixels = pixels.cpu().numpy()
        data = {"pixel_values_videos": pixels}
        if return_metadata:
            data["video_metadata"] = metadata
        return BatchFeature(data)

    def _settings(self, overrides):
        unknown = sorted(set(overrides) - set(_SETTINGS))
        if unknown:
            raise TypeError(f"unknown arguments {unknown}; known ones are {', '.join(_SETTINGS)}")
        settings = {name: overrides.get(name, getattr(self, name)) for name in _SETTINGS}
        if settings["do_resize"] and not (
            _is_size(settings["size"], "shortest_edge") or _is_size(settings["size"], "height", "width")
        ):
            raise ValueError(
                f'size must be {{"shortest_edge": pixels}} or {{"height": ..., "width": ...}}, got {settings["size"]!r}'
            )
        if settings["do_center_crop"] and not _is_size(settings["crop_size"], "height", "width"):
            raise ValueError(f'crop_size must be {{"height": pixels, "width": pixels}}, got {settings["crop_size"]!r}')
        return settings

    def _load(self, video, settings):
        """One video -> frames (num_frames, height, width, 3), uint8 or float in [0, 1], and what is known of it."""
        if isinstance(video, (str, Path)):
            video = read_video(video, fps=settings["fps"], num_frames=settings["num_frames"])
        if isinstance(video, VideoClip):
            facts = {"fps": video.fps, "source": video.source, "timestamps": np.asarray(video.timestamps).tolist()}
            return _check_frames(torch.from_numpy(np.ascontiguousarray(video.frames)), video.source), facts
        facts = {"fps": None, "source": None, "timestamps": None}
        if _is_pil(video):
            video = [video]
        if isinstance(video, (list, tuple)):
            if not video:
                raise ValueError("a video is an empty list of frames")
            if _is_pil(video[0]):
                sizes = {frame.size for frame in video}
                if len(sizes) > 1:
                    raise ValueError(f"the frames of a video differ in size (width, height): {sorted(sizes)}")
                video = np.stack([np.asarray(frame.convert("RGB")) for frame in video])
            elif all(isinstance(frame, (np.ndarray, torch.Tensor)) for frame in video):
                video = torch.stack([torch.as_tensor(frame) for frame in video])
        if isinstance(video, np.ndarray):
            video = torch.from_numpy(np.ascontiguousarray(video))
        if not isinstance(video, torch.Tensor):
            raise TypeError(
                f"cannot read a video of type {type(video).__name__}; pass a path, VideoClip, array, tensor or pictures"
            )
        return _check_frames(video, "video"), facts

    def _prepare(self, frames, settings):
        """(num_frames, height, width, 3) -> (num_frames, 3, height, width), float32."""
        pixels = frames.permute(0, 3, 1, 2).to(torch.float32)
        if settings["do_rescale"] and frames.dtype == torch.uint8:
            # dividing by 255 and multiplying by 1 / 255 differ in the last bit; the original divides
            pixels = (
                pixels.div(255) if settings["rescale_factor"] == 1 / 255 else pixels.mul(settings["rescale_factor"])
            )
        pixels = pixels.contiguous()
        if settings["do_resize"]:
            pixels = _resize(pixels, settings["size"])
        if settings["do_center_crop"]:
            pixels = _center_crop(pixels, settings["crop_size"]["height"], settings["crop_size"]["width"])
        if settings["do_normalize"]:
            mean, std = (pixels.new_tensor(settings[name]).view(-1, 1, 1) for name in ("image_mean", "image_std"))
            pixels = pixels.sub(mean).div_(std)
        return pixels

    def postprocess(self, video, output_type="np", rounding="truncate"):
        """Turns a model's output into byte frames. Values outside [-1, 1] are clamped, as the original does.

        Args:
            video: float tensor (batch, num_frames, channels, height, width), nominally in [-1, 1] (the normalisation
                of this processor is undone).
            output_type: "np" for an array, "pt" for a tensor, both uint8 (batch, num_frames, height, width, channels);
                "pil" for a list of lists of PIL images.
            rounding: "truncate" is the original's conversion to bytes and the default; "nearest" is half a level
                brighter on average and closer to the input.

        Raises:
            TypeError: not a floating-point tensor. ValueError: wrong rank or channels, NaN, unknown option.
        """
        if not isinstance(video, torch.Tensor):
            raise TypeError(f"video must be a torch tensor, not {type(video).__name__}")
        if not video.is_floating_point():
            raise TypeError(f"video must be a floating-point tensor in [-1, 1], not {video.dtype}")
        if video.ndim != 5 or video.shape[2] != len(self.image_mean):
            raise ValueError(
                f"video must have shape (batch, num_frames, {len(self.image_mean)}, height, width), "
                f"got {tuple(video.shape)}"
            )
        if output_type not in ("np", "pt", "pil"):
            raise ValueError(f'output_type must be "np", "pt" or "pil", not {output_type!r}')
        if rounding not in ("truncate", "nearest"):
            raise ValueError(f'rounding must be "truncate" or "nearest", not {rounding!r}')
        if video.isnan().any():
            raise ValueError("video contains NaN")
        video = video.detach().to(torch.float32)
        if self.do_normalize:
            if all(m == 0.5 for m in self.image_mean) and all(s == 0.5 for s in self.image_std):
                video = video.clamp(-1, 1).add_(1).div_(2)  # the original's order of operations
            else:
                mean, std = (video.new_tensor(getattr(self, n)).view(-1, 1, 1) for n in ("image_mean", "image_std"))
                video = video.mul(std).add_(mean).clamp_(0, 1)
        else:
            video = video.clamp(0, 1)
        video = video.mul_(255)
        if rounding == "nearest":
            video = video.round_()
        frames = video.to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()
        if output_type == "pt":
            return frames
        frames = frames.cpu().numpy()
        if output_type == "np":
            return frames
        from PIL import Image

        return [[Image.fromarray(frame) for frame in clip] for clip in frames]


def _is_pil(value):
    from PIL import Image

    return isinstance(value, Image.Image)


def _is_size(value, *names):
    return (
        isinstance(value, dict)
        and set(value) == set(names)
        and all(isinstance(value[n], int) and not isinstance(value[n], bool) and value[n] > 0 for n in names)
    )


def _as_list(videos):
    """Separates "one video" from "a list of videos"."""
    if isinstance(videos, (np.ndarray, torch.Tensor)) and videos.ndim == 5:
        return list(videos)
    if isinstance(videos, (list, tuple)):
        if videos and (
            _is_pil(videos[0]) or (isinstance(videos[0], (np.ndarray, torch.Tensor)) and videos[0].ndim == 3)
        ):
            return [videos]
        if all(isinstance(v, (np.ndarray, torch.Tensor)) and v.ndim == 5 for v in videos) and videos:
            return [video for batch in videos for video in batch]
        return list(videos)
    return [videos]


def _check_frames(frames, name):
    """Frames (num_frames, height, width, 3) of bytes, or of floats in [0, 1]; anything else is refused."""
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(
            f"{name}: frames must have shape (num_frames, height, width, 3), got {tuple(frames.shape)}; "
            "channels come last and an alpha channel must be blended first"
        )
    if 0 in frames.shape:
        raise ValueError(f"{name}: no frames or no pixels, shape {tuple(frames.shape)}")
    if frames.dtype == torch.uint8:
        return frames
    if not frames.is_floating_point():
        raise TypeError(f"{name}: frames must be uint8 or floating point, not {frames.dtype}")
    low, high = (bound.item() for bound in torch.aminmax(frames))
    if math.isnan(low) or math.isnan(high):
        raise ValueError(f"{name}: frames contain NaN")
    if low < -_RANGE_SLACK or high > 1 + _RANGE_SLACK:
        raise ValueError(f"{name}: float frames must be in [0, 1], found {low:g} to {high:g}; pass bytes as uint8")
    return frames


def _resize(pixels, size):
    height, width = pixels.shape[-2:]
    if "shortest_edge" in size:
        short, edge = min(height, width), size["shortest_edge"]
        target = (int(edge * height / short), int(edge * width / short))
    else:
        target = (size["height"], size["width"])
    if target == (height, width):
        return pixels
    return F.interpolate(pixels, size=target, mode="bilinear", align_corners=False, antialias=True)


def _center_crop(pixels, crop_height, crop_width):
    height, width = pixels.shape[-2:]
    missing_height, missing_width = max(0, crop_height - height), max(0, crop_width - width)
    if missing_height or missing_width:
        left, top = missing_width // 2, missing_height // 2
        pixels = F.pad(pixels, (left, missing_width - left, top, missing_height - top))
        height, width = pixels.shape[-2:]
    top, left = round((height - crop_height) / 2), round((width - crop_width) / 2)  # half to even, as the original
    return pixels[..., top : top + crop_height, left : left + crop_width]
