"""Motion preprocessing of Video-LaVIT: from a video file to clips of one keyframe and 24 motion maps each."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.image_processing_base import BatchFeature
from transformers.video_processing_utils import VideoProcessorMixin

from ...video.motion import MotionVectors, clip_motion_map, read_motion_vectors, select_keyframes


@dataclass
class MotionClip:
    """A clip as the video de-tokenizer takes it.

    Attributes:
        keyframe: uint8 (height, width, 3), RGB, at the video's own size.
        motion: float32 (2, num_frames, map_height, map_width); see `clip_motion_map`.
        start: index of the keyframe in the re-encoded video.
        fps: frames per second of the motion.
    """

    keyframe: np.ndarray
    motion: torch.Tensor
    start: int
    fps: float


class VideoLavitMotionProcessor(VideoProcessorMixin):
    r"""Turns videos into keyframes and motion maps.

    For understanding and tokens (`__call__`): clips are selected by `select_keyframes`, maps are 20 x 36 and scaled by
    ten. For the video de-tokenizer fed with raw motion (`clip_for_reconstruction`): one clip, maps at an eighth of the
    picture, not scaled.

    Args:
        fps: frames per second the video is re-encoded at; None reads the vectors of MPEG-4 Part 2 files as they are.
        num_frames: maps per clip.
        gop_size: distance of the encoder's I-frames.
        height, width: size of the maps for the tokenizer, in cells.
        max_clips: most clips taken from a video.
    """

    model_input_names = ["motion_values"]

    def __init__(self, fps=6, num_frames=24, gop_size=12, height=20, width=36, max_clips=8, **kwargs):
        if min(num_frames, gop_size, height, width, max_clips) < 1:
            raise ValueError("num_frames, gop_size, height, width and max_clips must be positive")
        super().__init__(
            fps=fps,
            num_frames=num_frames,
            gop_size=gop_size,
            height=height,
            width=width,
            max_clips=max_clips,
            **kwargs,
        )

    def read(self, video, *, fps=None, **options):
        """`MotionVectors` of a path, a file object, or already read vectors (returned as they are)."""
        if isinstance(video, MotionVectors):
            return video
        if not (isinstance(video, (str, Path)) or hasattr(video, "read")):
            raise TypeError(
                f"motion is read from a video file (path or file object) or `MotionVectors`, not {type(video).__name__}"
            )
        return read_motion_vectors(video, self.fps if fps is None else fps, gop_size=self.gop_size, **options)

    def __call__(self, videos, *, max_clips=None, return_tensors="pt", **options):
        """Keyframes and tokenizer maps of one video or a list of them.

        Args:
            videos: path, file object or `MotionVectors`, or a list of such.
            max_clips: overrides the processor's.
            options: further arguments of `read_motion_vectors` (`start`, `end`, `on_error`).

        Returns:
            BatchFeature with `motion_values` (clips of all videos, 2, num_frames, height, width), `keyframes` (list of
            uint8 arrays (H, W, 3), one per clip, for the image processor), `num_clips` (list, per video) and
            `clip_starts` (list of lists of frame indices).

        Raises:
            VideoReadError: a file cannot be read.
            ValueError: a video without an I-frame.
        """
        if not isinstance(videos, (list, tuple)):
            videos = [videos]
        if not videos:
            raise ValueError("no videos given")
        maps, keyframes, starts = [], [], []
        for video in videos:
            motion = self.read(video, **options)
            chosen = select_keyframes(
                motion.frame_types,
                self.max_clips if max_clips is None else max_clips,
                num_frames=self.num_frames,
                gop_size=self.gop_size,
            )
            starts.append(chosen)
            for start in chosen:
                keyframes.append(motion.keyframe(start))
                maps.append(self._map(motion, start, self.height, self.width, True))
        features = BatchFeature({"motion_values": torch.stack(maps)}, tensor_type=return_tensors)
        features["keyframes"] = keyframes
        features["num_clips"] = [len(chosen) for chosen in starts]
        features["clip_starts"] = starts
        return features

    def clip_for_reconstruction(self, video, height, width, *, start=None, fps=None, tokenized=False, **options):
        """One clip for the video de-tokenizer.

        Args:
            video: path, file object or `MotionVectors`.
            height, width: size of the raw map in cells: the latent size, an eighth of the pictures'.
            start: index of the I-frame to start at; default: the first I-frame with a whole clip after it, else the
                first one. Frames past the end of the video are without motion.
            fps: overrides the processor's (the authors' example uses 12).
            tokenized: return the map for the motion tokenizer (20 x 36, scaled by ten) instead of the raw one.

        Returns:
            `MotionClip`.

        Raises:
            ValueError: no I-frame, or `start` is none.
        """
        motion = self.read(video, fps=fps, **options)
        if start is None:
            intra = [index for index, letter in enumerate(motion.frame_types) if letter == "I"]
            if not intra:
                raise ValueError("the video has no I-frame to start a clip from; re-encode it (fps=6)")
            start = next((index for index in intra if len(motion) - index >= self.num_frames), intra[0])
        if tokenized:
            maps = self._map(motion, start, self.height, self.width, True)
        else:
            maps = self._map(motion, start, height, width, False)
        return MotionClip(motion.keyframe(start), maps, start, motion.fps)

    def _map(self, motion, start, height, width, rescale):
        return clip_motion_map(
            motion,
            start,
            height=height,
            width=width,
            rescale=rescale,
            num_frames=self.num_frames,
            gop_size=self.gop_size,
        )


__all__ = ["MotionClip", "VideoLavitMotionProcessor"]
