"""A video in memory."""

from dataclasses import dataclass

import numpy as np


@dataclass(eq=False)
class VideoClip:
    """Decoded frames and when they are shown.

    Attributes:
        frames: uint8 (num_frames, height, width, channels); RGB, or RGBA where alpha was asked for.
        fps: frames per second: the rate asked for, the file's average rate when whole ranges are read, or the mean
            rate of the chosen frames when they were picked by count or index.
        timestamps: float64 (num_frames,), seconds since the first frame of the file.
        source: the file or folder.
        complete: False when fewer frames came than were asked for or declared (only with `on_error="keep"`).
        note: what is missing or damaged, None when nothing is.
    """

    frames: np.ndarray
    fps: float
    timestamps: np.ndarray
    source: str
    complete: bool = True
    note: str | None = None

    def __len__(self):
        return len(self.frames)

    @property
    def height(self):
        return self.frames.shape[1]

    @property
    def width(self):
        return self.frames.shape[2]

    def __repr__(self):
        shape = "x".join(map(str, self.frames.shape))
        state = "" if self.complete else f", incomplete: {self.note}"
        return f"VideoClip({shape} at {self.fps:.6g} fps from {self.source!r}{state})"
