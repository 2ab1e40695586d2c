"""Short training clips cut at random from videos and photographs held in memory."""

import bisect
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from ..video import read_video

_PICTURES = {".png", ".jpg", ".jpeg"}


@dataclass(frozen=True)
class ClipSource:
    """A file to cut clips from.

    Attributes:
        path: a video or a picture (a picture becomes a clip by a moving, zooming window).
        start, stop: frames used of a video; the rest is held out.
        weight: how often it is drawn, relative to the others.
    """

    path: str
    start: int = 0
    stop: int | None = None
    weight: float = 1.0


class RandomClips(Dataset):
    """Random crops of random sources: item i depends on `seed` and i alone, so training can be resumed exactly.

    Args:
        sources: list of `ClipSource`.
        num_frames, size: frames and side length in pixels of a clip.
        length: number of items.
        seed: everything random follows from it.
        first: index of the first item, to continue an earlier data set's sequence.
        max_side: videos are kept in memory with their shorter side reduced to this many pixels.
    """

    def __init__(self, sources, num_frames, size, length, seed=0, first=0, max_side=360):
        self.sources = list(sources)
        self.num_frames, self.size, self.length, self.seed, self.first = num_frames, size, length, seed, first
        self.frames = [self._load(source, max_side) for source in self.sources]
        self.borders = np.cumsum([source.weight for source in self.sources])

    @staticmethod
    def _load(source, max_side):
        picture = Path(source.path).suffix.lower() in _PICTURES
        frames = torch.from_numpy(read_video(source.path).frames[source.start : source.stop])
        frames = frames.permute(0, 3, 1, 2)
        side = max_side if not picture else 2 * max_side
        scale = side / min(frames.shape[-2:])
        if scale < 1:
            frames = torch.cat(
                [
                    F.interpolate(frame[None].float(), scale_factor=scale, mode="bilinear", antialias=True)
                    .round()
                    .clamp(0, 255)
                    .to(torch.uint8)
                    for frame in frames
                ]
            )
        return frames

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        random = np.random.default_rng([self.seed, self.first + index])
        chosen = bisect.bisect_right(self.borders, random.uniform(0, self.borders[-1]))
        frames = self.frames[min(chosen, len(self.frames) - 1)]
        if frames.shape[0] < self.num_frames:
            windows = self._moving_windows(frames, random)
        else:
            windows = self._cut(frames, random)
        clip = torch.cat(
            [
                F.interpolate(window.float(), (self.size, self.size), mode="bilinear", antialias=True)
                for window in windows
            ]
        )
        if random.random() < 0.5:
            clip = clip.flip(-1)
        if random.random() < 0.5:
            clip = clip.flip(0)
        return {"pixel_values_videos": clip / 127.5 - 1}

    def _side(self, frames, random):
        """Side of the window that becomes the clip: from a little enlarged to the whole frame."""
        shortest = min(frames.shape[-2:])
        low = min(shortest, 0.9 * self.size)
        return int(np.exp(random.uniform(np.log(low), np.log(shortest))))

    def _cut(self, frames, random):
        largest_stride = max(1, min(3, (frames.shape[0] - 1) // max(1, self.num_frames - 1)))
        stride = int(random.integers(1, largest_stride + 1))
        start = int(random.integers(0, frames.shape[0] - (self.num_frames - 1) * stride))
        side = self._side(frames, random)
        top = int(random.integers(0, frames.shape[-2] - side + 1))
        left = int(random.integers(0, frames.shape[-1] - side + 1))
        picked = frames[start : start + (self.num_frames - 1) * stride + 1 : stride]
        return [frame[None, :, top : top + side, left : left + side] for frame in picked]

    def _moving_windows(self, frames, random):
        frame = frames[int(random.integers(frames.shape[0]))]
        height, width = frame.shape[-2:]
        first = self._side(frames, random)
        last = int(np.clip(first * random.uniform(0.92, 1.08), 16, min(height, width)))
        speed = random.uniform(0, 0.02) * first * self.num_frames
        angle = random.uniform(0, 2 * np.pi)
        top, left = random.uniform(0, height - first), random.uniform(0, width - first)
        windows = []
        for step in np.linspace(0, 1, self.num_frames):
            side = round(first + (last - first) * step)
            y = int(np.clip(top + speed * step * np.sin(angle), 0, height - side))
            x = int(np.clip(left + speed * step * np.cos(angle), 0, width - side))
            windows.append(frame[None, :, y : y + side, x : x + side])
        return windows
