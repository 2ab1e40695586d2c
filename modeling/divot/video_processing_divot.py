"""Video processor of Divot: which frames of a video are looked at, and how they become pixels.

A clip is 2 seconds: 16 positions at 8 frames per second, of which 0, 4, 8, 12 and 15 are used (every fourth and the
last one; not equally spaced). Three ways to choose clips:

- "comprehension": at most `max_clips`; long videos are split into that many equal parts and the beginning of each part
  is used, others are cut into consecutive clips
- "first": the first two seconds, as the original reconstructs
- "all": consecutive clips to the end, as long videos are reconstructed
"""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.video_processing_utils import VideoProcessorMixin

from ...video import VideoClip, read_video
from ...video.sources import open_source

CLIP_SELECTIONS = ("comprehension", "first", "all")
_RANGE_SLACK = 1e-4


def clip_positions(frames_per_clip=16, frame_stride=4):
    """Positions of a clip that the tokenizer looks at: every `frame_stride`-th one, and the last; with a stride of 0
    all of them."""
    if frame_stride == 0:
        return list(range(frames_per_clip))
    return [*range(0, frames_per_clip, frame_stride), frames_per_clip - 1]


def _clip_indices(start, end, num_frames, frames_per_clip, frame_stride):
    """Frame indices for a clip that spans [start, end) of the video's frames (floats)."""
    step = (end - start) / frames_per_clip
    positions = clip_positions(frames_per_clip, frame_stride)
    return [min(int(start + step * position), num_frames - 1) for position in positions]


def _check_video(num_frames, video_fps):
    if num_frames < 1:
        raise ValueError("the video has no frames")
    if not (video_fps > 0 and math.isfinite(video_fps)):
        raise ValueError(f"video_fps={video_fps} is not a positive number of frames per second")


def comprehension_indices(num_frames, video_fps, *, fps=8.0, frames_per_clip=16, frame_stride=4, max_clips=20):
    """Frames the language model sees.

    A video of at least `max_clips * frames_per_clip` positions is split into `max_clips` parts of equally many whole
    frames, and the first two seconds of each are used (the whole part where it is a little shorter than that). A
    shorter one is cut into consecutive clips; the positions of the last one are spread over what is left.

    Args:
        num_frames, video_fps: of the video.
        fps: positions per second.
        frames_per_clip, frame_stride: see `clip_positions`.
        max_clips: most clips; None for no limit (the whole video in consecutive clips).

    Returns:
        One list of frame indices per clip.
    """
    _check_video(num_frames, video_fps)
    interval = video_fps / fps
    span = frames_per_clip * interval
    layout = (num_frames, frames_per_clip, frame_stride)
    if max_clips is not None and num_frames // interval >= max_clips * frames_per_clip:
        part = num_frames // max_clips
        if part // interval < frames_per_clip:
            span = part
        return [_clip_indices(i * part, i * part + span, *layout) for i in range(max_clips)]
    clips, start = [], 0
    while start < num_frames:
        clips.append(_clip_indices(start, min(start + span, num_frames), *layout))
        start += span
    return clips


def reconstruction_indices(num_frames, video_fps, *, fps=8.0, frames_per_clip=16, frame_stride=4):
    """Frames of the first clip only, as the original reconstructs.

    A video shorter than a clip is read with a whole number of frames between positions, which for fewer than
    `frames_per_clip` frames is 0: every position is then the first frame (`DivotVideoProcessor` refuses such videos).
    """
    _check_video(num_frames, video_fps)
    interval = video_fps / fps
    if num_frames < frames_per_clip * interval:
        interval = num_frames // frames_per_clip
    return _clip_indices(0.0, frames_per_clip * interval, num_frames, frames_per_clip, frame_stride)


class DivotVideoProcessor(VideoProcessorMixin):
    r"""Turns videos or still images into `pixel_values_videos` (num_clips, 5, 3, height, width), float32 in [-1, 1].

    Frames are resized with PIL's bilinear filter (the shorter side to `size`), cropped around the centre to `size` x
    `size`, scaled to [0, 1] and normalised with `image_mean` and `image_std`.

    Args:
        size: pixels of the square result.
        keep_aspect_ratio: resize the shorter side and crop; False squeezes the frame into the square.
        fps: positions per second.
        frames_per_clip, frame_stride: positions per clip, and which of them are used (see `clip_positions`).
        max_clips: most clips per video for `clip_selection="comprehension"`.
        clip_selection: "comprehension", "first" or "all" (see above); can be given per call.
        image_mean, image_std: (x - mean) / std, one number per channel.
    """

    model_input_names = ["pixel_values_videos"]

    def __init__(
        self,
        size=256,
        keep_aspect_ratio=True,
        fps=8.0,
        frames_per_clip=16,
        frame_stride=4,
        max_clips=20,
        clip_selection="comprehension",
        image_mean=None,
        image_std=None,
        **kwargs,
    ):
        super().__init__(
            size=size,
            keep_aspect_ratio=keep_aspect_ratio,
            fps=fps,
            frames_per_clip=frames_per_clip,
            frame_stride=frame_stride,
            max_clips=max_clips,
            clip_selection=clip_selection,
            image_mean=[0.5, 0.5, 0.5] if image_mean is None else list(image_mean),
            image_std=[0.5, 0.5, 0.5] if image_std is None else list(image_std),
            **kwargs,
        )

    def __call__(
        self,
        videos=None,
        *,
        images=None,
        video_fps=None,
        clip_selection=None,
        max_clips=None,
        return_tensors="pt",
        return_metadata=False,
    ):
        """Prepares videos, or still images (one clip each, the image repeated).

        Args:
            videos: one video or a list: a path, a `VideoClip`, an array or tensor (num_frames, height, width, 3) of
                bytes or of floats in [0, 1], or a list of PIL images (the frames of one video).
            images: instead of videos, one image or a list: a PIL image, or an array (height, width, 3).
            video_fps: rate of videos that do not know theirs (arrays, lists of images); default: the processor's `fps`.
            clip_selection, max_clips: override the processor's for this call.
            return_tensors: "pt" or "np".
            return_metadata: also return `video_metadata`, one dictionary per video (source, fps, num_frames, indices,
                num_output_frames: frames at `fps` that the clips stand for).

        Returns:
            BatchFeature with `pixel_values_videos` (clips of all videos, 5, 3, size, size) and `num_clips`
            (num_videos,).

        Raises:
            TypeError: an unsupported type. ValueError: wrong shape or range, NaN, too few frames, an unknown option.
            VideoReadError: a file that cannot be read.
        """
        if (videos is None) == (images is None):
            raise ValueError("give either videos or images")
        clip_selection = clip_selection or self.clip_selection
        if clip_selection not in CLIP_SELECTIONS:
            raise ValueError(f"clip_selection={clip_selection!r}; choose from {', '.join(CLIP_SELECTIONS)}")
        if return_tensors not in ("pt", "np"):
            raise ValueError(f'return_tensors={return_tensors!r}; choose "pt" or "np"')
        max_clips = self.max_clips if max_clips is None else max_clips
        if max_clips < 1:
            raise ValueError(f"max_clips={max_clips} must be at least 1")
        pixels, counts, metadata = [], [], []
        if images is not None:
            repeats = len(clip_positions(self.frames_per_clip, self.frame_stride))
            for image in _as_images(images):
                pixels.append(self._prepare(image).expand(repeats, -1, -1, -1)[None])
                counts.append(1)
                metadata.append({"source": None, "fps": None, "num_frames": 1, "indices": [[0] * repeats]})
        else:
            for video in _as_videos(videos):
                clips, facts = self._load(video, video_fps, clip_selection, max_clips)
                pixels.append(torch.stack([torch.stack([self._prepare(frame) for frame in clip]) for clip in clips]))
                counts.append(len(clips))
                metadata.append(facts)
        if not pixels:
            raise ValueError("the list of videos or images is empty")
        data = {"pixel_values_videos": torch.cat(pixels), "num_clips": torch.tensor(counts)}
        if return_tensors == "np":
            data = {name: value.numpy() for name, value in data.items()}
        if return_metadata:
            data["video_metadata"] = metadata
        return BatchFeature(data)

    preprocess = __call__

    def choose_frames(self, num_frames, video_fps, clip_selection=None, max_clips=None):
        """Frame indices of every clip (a list of lists) for a video of `num_frames` frames at `video_fps`.

        Raises:
            ValueError: `clip_selection="first"` and too few frames for one clip.
        """
        clip_selection = clip_selection or self.clip_selection
        rule = {"fps": self.fps, "frames_per_clip": self.frames_per_clip, "frame_stride": self.frame_stride}
        if clip_selection == "first":
            if num_frames < self.frames_per_clip and num_frames < self.frames_per_clip * video_fps / self.fps:
                raise ValueError(
                    f"too few frames: the video has {num_frames} at {video_fps:g} fps; a clip needs "
                    f"{self.frames_per_clip}. Use clip_selection='all', which spreads the clip over what is there"
                )
            return [reconstruction_indices(num_frames, video_fps, **rule)]
        if clip_selection == "all":
            return comprehension_indices(num_frames, video_fps, max_clips=None, **rule)
        return comprehension_indices(num_frames, video_fps, max_clips=max_clips or self.max_clips, **rule)

    def _load(self, video, video_fps, clip_selection, max_clips):
        """Frames of every clip of a video, each (height, width, 3) bytes, and what is known of it."""
        source = None
        if isinstance(video, (str, Path)):
            source = str(video)
            num_frames, video_fps = _probe(video)
            indices = self.choose_frames(num_frames, video_fps, clip_selection, max_clips)
            wanted = sorted({index for clip in indices for index in clip})
            frames = dict(zip(wanted, read_video(video, indices=wanted).frames, strict=True))
        else:
            if isinstance(video, VideoClip):
                source, video_fps, video = video.source, video.fps, video.frames
            frames = _to_bytes(video)
            num_frames, video_fps = len(frames), self.fps if video_fps is None else video_fps
            indices = self.choose_frames(num_frames, video_fps, clip_selection, max_clips)
        played = self.frames_per_clip if clip_selection == "first" else num_frames * self.fps / video_fps
        facts = {
            "source": source,
            "fps": video_fps,
            "num_frames": num_frames,
            "indices": indices,
            "num_output_frames": max(1, round(played)),
        }
        return [[frames[index] for index in clip] for clip in indices], facts

    def _prepare(self, frame):
        """(height, width, 3) bytes -> (3, size, size), float32."""
        image = Image.fromarray(np.ascontiguousarray(frame))
        size, (width, height) = self.size, image.size
        if not self.keep_aspect_ratio:
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        else:
            short = min(width, height)
            target = (int(size * width / short), int(size * height / short))
            if target != image.size:
                image = image.resize(target, Image.Resampling.BILINEAR)
            left, top = round((target[0] - size) / 2), round((target[1] - size) / 2)
            image = image.crop((left, top, left + size, top + size))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div(255)
        mean, std = (pixels.new_tensor(values).view(-1, 1, 1) for values in (self.image_mean, self.image_std))
        return pixels.sub(mean).div(std)


def _probe(path):
    """(number of frames, frames per second) of a file, from its packets where they tell, else by decoding it once."""
    source = open_source(path)
    try:
        timeline, fps = source.timeline(), source.fps
    finally:
        source.close()
    return (len(timeline) if timeline is not None else len(read_video(path).frames)), fps


def _is_image(value):
    return isinstance(value, Image.Image) or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 3)


def _as_images(images):
    images = [images] if _is_image(images) else list(images)
    for image in images:
        if not _is_image(image):
            raise TypeError(
                f"cannot read an image of type {type(image).__name__}; pass PIL images or (height, width, 3)"
            )
    return [_to_bytes([image])[0] for image in images]


def _as_videos(videos):
    if isinstance(videos, (str, Path, VideoClip)):
        return [videos]
    if isinstance(videos, (np.ndarray, torch.Tensor)):
        return list(videos) if videos.ndim == 5 else [videos]
    if not isinstance(videos, (list, tuple)):
        raise TypeError(
            f"cannot read a video of type {type(videos).__name__}; pass a path, VideoClip, array or PIL images"
        )
    return [videos] if videos and all(_is_image(frame) for frame in videos) else list(videos)


def _to_bytes(frames):
    """Frames of one video -> uint8 array (num_frames, height, width, 3)."""
    if isinstance(frames, (list, tuple)):
        if not frames:
            raise ValueError("a video is an empty list of frames")
        frames = [np.asarray(f.convert("RGB")) if isinstance(f, Image.Image) else np.asarray(f) for f in frames]
        if len({frame.shape for frame in frames}) > 1:
            raise ValueError(f"the frames of a video differ in size: {sorted({frame.shape for frame in frames})}")
        frames = np.stack(frames)
    if isinstance(frames, torch.Tensor):
        frames = frames.cpu().numpy()
    if not isinstance(frames, np.ndarray):
        raise TypeError(
            f"cannot read a video of type {type(frames).__name__}; pass a path, VideoClip, array or PIL images"
        )
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames have shape {tuple(frames.shape)}; expected (num_frames, height, width, 3)")
    if frames.dtype == np.uint8:
        return frames
    if not np.issubdtype(frames.dtype, np.floating):
        raise TypeError(f"frames are {frames.dtype}; pass bytes (uint8) or floats in [0, 1]")
    if not np.isfinite(frames).all():
        raise ValueError("frames hold NaN or infinite values")
    if frames.min() < -_RANGE_SLACK or frames.max() > 1 + _RANGE_SLACK:
        raise ValueError(
            f"float frames must be in [0, 1], found {frames.min():g} to {frames.max():g}; pass bytes as uint8"
        )
    return np.round(frames * 255).clip(0, 255).astype(np.uint8)


__all__ = ["DivotVideoProcessor", "clip_positions", "comprehension_indices", "reconstruction_indices"]
