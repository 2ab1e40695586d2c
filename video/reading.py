"""Reading videos: whole, by count, rate, index or time range, and streaming in constant memory."""

import math
from numbers import Integral, Real

import numpy as np

from ..errors import VideoReadError
from .clip import VideoClip
from .sampling import uniform_indices
from .sources import open_source

_SEQUENTIAL_INDICES = 64  # frames up to this index are reached by decoding, later ones by seeking
_SEEK_GAP = 4.0  # seconds without a wanted frame from which on seeking pays


def read_video(
    path,
    *,
    num_frames=None,
    fps=None,
    start=0.0,
    end=None,
    indices=None,
    alpha="blend",
    background=(0, 0, 0),
    on_error="raise",
):
    """Reads a video into memory.

    Reads everything FFmpeg does (mp4, mov, mkv, webm, avi, gif, ...), animated WebP and PNG, single pictures, and
    folders of pictures (24 fps unless a `video.json` written by `write_video` says otherwise). Rotation and mirroring
    noted in the file are applied. Pixels are delivered as stored: a pixel aspect ratio is not applied.

    Cut-off and damaged files are noticed by what their container declares (sizes, frame counts, durations) and by
    frames that do not decode. MPEG-TS and raw streams declare nothing: there only what FFmpeg reports is seen.

    Args:
        path: file or folder.
        num_frames: alone: that many frames spread evenly over the range, first and last included. With `fps`: that
            many frames at that rate from `start` on.
        fps: resample by timestamps to this constant rate: at each instant start + k / fps the frame then on screen.
            Frames are repeated or left out as needed; right for variable frame rates too.
        start, end: time range in seconds since the first frame; frames with start <= time < end. None: to the end.
        indices: frame numbers to read, in any order, repeats allowed; not with any of the above.
        alpha: "blend" transparent pixels over `background` (RGB bytes), or "keep" to get RGBA frames (opaque ones
            with 255).
        on_error: "raise", or "keep" to get what can be read of a damaged file; `complete` and `note` of the clip say
            what is missing.

    Returns:
        VideoClip.

    Raises:
        VideoReadError: no such file, empty, no video, damaged, cut off, or fewer frames than asked for.
        ValueError, TypeError: contradictory or impossible arguments.
    """
    request = _Request(path, num_frames, fps, start, end, indices, alpha, background, on_error)
    times, frames = [], []
    for time, pixels in request.select():
        times.append(time)
        frames.append(pixels)
    return request.clip(times, frames)


def iter_video(
    path,
    *,
    chunk_frames=16,
    fps=None,
    start=0.0,
    end=None,
    transform=None,
    alpha="blend",
    background=(0, 0, 0),
    on_error="raise",
):
    """Reads a video of any length piece by piece in constant memory.

    Args:
        path: as for `read_video`.
        chunk_frames: frames per piece; only the last piece may have fewer.
        fps, start, end, alpha, background, on_error: as for `read_video`.
        transform: function from one frame (uint8 (height, width, channels)) to another, applied while decoding (to
            resize, say).

    Yields:
        VideoClip with up to `chunk_frames` frames. With `on_error="keep"` only the last one can tell that something is
        missing.

    Raises:
        As `read_video`; files whose container shows that they are cut off fail before the first piece.
    """
    if isinstance(chunk_frames, bool) or not isinstance(chunk_frames, Integral) or chunk_frames < 1:
        raise ValueError(f"chunk_frames must be a positive integer, got {chunk_frames!r}")
    request = _Request(path, None, fps, start, end, None, alpha, background, on_error)
    return _chunks(request, chunk_frames, transform)


def _chunks(request, chunk_frames, transform):
    times, frames = [], []
    for time, pixels in request.select():
        if len(frames) == chunk_frames:  # held back until another frame comes: the last piece carries the verdict
            yield request.clip(times, frames, last=False)
            times, frames = [], []
        times.append(time)
        frames.append(pixels if transform is None else transform(pixels))
    yield request.clip(times, frames)


class _Request:
    """What was asked for; selects it from a source and judges what came."""

    def __init__(self, path, num_frames, fps, start, end, indices, alpha, background, on_error):
        if on_error not in ("raise", "keep"):
            raise ValueError(f'on_error must be "raise" or "keep", not {on_error!r}')
        if alpha not in ("blend", "keep"):
            raise ValueError(f'alpha must be "blend" or "keep", not {alpha!r}')
        if fps is not None:
            _check_number("fps", fps, positive=True)
        _check_number("start", start)
        if end is not None:
            _check_number("end", end)
            if end <= start:
                raise ValueError(f"end ({end} s) must be after start ({start} s)")
        if num_frames is not None:
            _check_index("num_frames", num_frames, minimum=1)
        if indices is not None:
            if num_frames is not None or fps is not None or start or end is not None:
                raise ValueError("indices cannot be combined with num_frames, fps, start or end")
            indices = [_check_index("indices", i, minimum=0) for i in np.asarray(indices).reshape(-1).tolist()]
            if not indices:
                raise ValueError("indices is empty")
        self.path, self.num_frames, self.fps, self.start, self.end = path, num_frames, fps, float(start), end
        self.indices, self.alpha, self.keep = indices, alpha, on_error == "keep"
        self.background = np.asarray(background, dtype=np.float32).reshape(3)
        self.source = None
        self.notes = []

    def __str__(self):
        if self.indices is not None:
            shown = ", ".join(map(str, self.indices[:8])) + (", ..." if len(self.indices) > 8 else "")
            return f"frames {shown}"
        what = "all frames" if self.num_frames is None else f"{self.num_frames} frames"
        if self.fps is not None:
            what += f" at {float(self.fps):g} fps"
        if self.start or self.end is not None:
            what += f" from {self.start:g} s to " + ("the end" if self.end is None else f"{self.end:g} s")
        return what

    def fail(self, reason):
        raise VideoReadError(f"{self.path}: asked for {self}: {reason}")

    def lacking(self, reason):
        """Less came than was asked for: an error, or a note with `on_error="keep"`."""
        if not self.keep:
            self.fail(reason)
        self.notes.append(reason)

    def select(self):
        """Yields (time in seconds, pixels) of the chosen frames."""
        self.source = open_source(self.path, self.keep)
        try:
            if self.needs_everything and self.source.container_problem and not self.keep:
                self.fail(self.source.container_problem)
            if self.indices is not None:
                yield from self._by_index(self.indices)
            elif self.fps is not None:
                yield from self._by_rate()
            elif self.num_frames is not None:
                yield from self._by_count()
            else:
                yield from self._by_time()
        finally:
            self.source.close()

    @property
    def needs_everything(self):
        bounded = self.end is not None or (self.num_frames is not None and self.fps is not None)
        return self.indices is None and not bounded

    def _walk(self):
        """The frames of the source from about `start` on; at its end, what the source noticed."""
        yield from self.source.frames(self.start)
        if self.source.problem:
            self.lacking(self.source.problem)

    def _by_time(self):
        reached = 0.0
        for frame in self._walk():
            if self.end is not None and frame.time >= self.end - self._slack:
                return
            reached = frame.time + frame.duration
            if frame.time >= self.start - self._slack:
                yield frame.time, self._finish(frame)
        self._check_reached(reached)

    def _check_reached(self, reached):
        """The range was not ended by a frame after it: the video must at least last until there."""
        if self.start > 0 and self.start >= reached:
            self.fail(f"the video ends at {reached:.3f} s")
        if self.end is not None and self.end > reached + 1 / self.source.fps:
            self.lacking(f"the video ends at {reached:.3f} s")

    @property
    def _slack(self):
        # Timestamps are rounded to the container's tick (1 ms in Matroska, 10 ms in GIF): comparisons need leeway.
        return min(self.source.tick, 0.25 / self.source.fps) + 1e-6

    def _by_rate(self):
        """The frame on screen at start + k / fps, for every k whose interval lies at least half inside the range: as
        many frames as the range lasts, rounded."""
        step, limit = 1 / float(self.fps), self.num_frames
        end = math.inf if self.end is None else self.end
        held, reached, count = None, 0.0, 0
        waiting = []  # chosen, but their interval is not yet known to lie in the video

        def due(time):
            in_range = time + step / 2 <= end + 1e-6 or count == 0
            return in_range and (limit is None or count < limit)

        for frame in self._walk():
            pixels = None
            while held is not None and due(time := self.start + count * step) and time < frame.time - self._slack:
                pixels = self._finish(held) if pixels is None else pixels
                waiting.append((time, pixels))
                count += 1
            held, reached = frame, frame.time + frame.duration
            while waiting and waiting[0][0] + step / 2 <= reached + 1e-6:
                yield waiting.pop(0)
            if not waiting and not due(self.start + count * step):
                return
        pixels = None
        while held is not None and due(time := self.start + count * step) and time < reached - self._slack:
            pixels = self._finish(held) if pixels is None else pixels
            waiting.append((time, pixels))
            count += 1
        count -= len(waiting)
        for time, pixels in waiting:
            if time + step / 2 <= reached + self._slack or count == 0:
                yield time, pixels
                count += 1
        if limit is not None and count < limit:
            self.lacking(f"only {count} came, the video ends at {reached:.3f} s")
        else:
            self._check_reached(reached)

    def _by_count(self):
        times = self.source.timeline()
        if times is None:  # a first pass counts the frames by decoding them, without converting a pixel
            times, durations = [], 0.0
            for frame in self.source.frames():
                times.append(frame.time)
                durations = frame.duration
            if self.source.problem and self.end is None:
                self.lacking(self.source.problem)
            exact = False
        else:
            durations, exact = 1 / self.source.fps, True
            if self.source.container_problem and self.end is None:
                self.lacking(self.source.container_problem)
        reached = times[-1] + durations if times else 0.0
        end = math.inf if self.end is None else self.end - self._slack
        inside = [i for i, time in enumerate(times) if self.start - self._slack <= time < end]
        if not inside:
            self.fail(f"no frames came, the video ends at {reached:.3f} s")
        self._check_reached(reached)
        wanted = self.num_frames
        if wanted > len(inside):
            self.lacking(f"only {len(inside)} came")
            wanted = len(inside)
        chosen = [inside[i] for i in uniform_indices(len(inside), wanted)]
        self.source.close()
        self.source = open_source(self.path, self.keep)
        yield from self._pick(chosen, times if exact else None)

    def _by_index(self, indices):
        times = None
        if max(indices) > _SEQUENTIAL_INDICES and self.source.seekable:
            times = self.source.timeline()
            if times is not None and max(indices) >= len(times):
                times = None  # decoding decides what there is
            self.source.close()
            self.source = open_source(self.path, self.keep)
        yield from self._pick(indices, times)

    def _pick(self, indices, times):
        """The frames of these indices. With the `times` of all frames, stretches without wanted frames are skipped."""
        wanted, found, count = sorted(set(indices)), {}, 0
        problem = None
        if times is None or not self.source.seekable:
            runs = [(0.0, wanted)]
        else:
            runs = []
            for index in wanted:
                if runs and times[index] - times[runs[-1][1][-1]] < _SEEK_GAP:
                    runs[-1][1].append(index)
                else:
                    runs.append((times[index], [index]))
        for start, run in runs:
            pending = set(run)
            for frame in self.source.frames(start):
                index = frame.index
                if index is None:  # after a seek: known by its time
                    index = int(np.searchsorted(times, frame.time - self._slack))
                count = max(count, index + 1)
                if index in pending and (times is None or abs(times[index] - frame.time) <= self._slack):
                    found[index] = (frame.time, self._finish(frame))
                    pending.discard(index)
                if not pending or index > run[-1]:
                    break
            problem = problem or self.source.problem
        missing = [index for index in wanted if index not in found]
        if missing:
            if times is None:
                reason = f"there are only {count} frames"
            else:
                reason = f"{len(missing)} of them, the first number {missing[0]}, did not come"
            self.lacking(reason + (f" ({problem})" if problem else ""))
        for index in indices:
            if index in found:
                yield found[index]

    def _finish(self, frame):
        """The pixels of a frame with alpha blended or kept."""
        pixels = frame.pixels()
        if self.alpha == "keep":
            if pixels.shape[2] == 3:
                pixels = np.concatenate([pixels, np.full_like(pixels[:, :, :1], 255)], axis=2)
        elif pixels.shape[2] == 4:
            opacity = pixels[:, :, 3:].astype(np.float32) / 255
            blended = pixels[:, :, :3] * opacity + self.background * (1 - opacity)
            pixels = (blended + 0.5).astype(np.uint8)
        return pixels

    def clip(self, times, frames, last=True):
        """The clip of selected frames, which are taken out of the list; the `last` piece carries the notes."""
        if not frames:
            self.fail(self.notes[0] if self.notes else self.source.problem or "no frames came")
        shapes = {frame.shape for frame in frames}
        if len(shapes) > 1:
            self.fail(f"the frames change size: {sorted(shapes)}; convert the file to one size first")
        times = np.asarray(times, dtype=np.float64)
        note = "; ".join(dict.fromkeys(self.notes)) if last and self.notes else None
        stacked = np.empty((len(frames), *frames[0].shape), dtype=frames[0].dtype)
        for index in range(len(frames)):
            stacked[index] = frames[index]
            frames[index] = None  # freed as it goes: the video is held once, not twice
        return VideoClip(stacked, self._rate(times), times, str(self.path), note is None, note)

    def _rate(self, times):
        if self.fps is not None:
            return float(self.fps)
        if (self.num_frames is not None or self.indices is not None) and len(times) > 1 and times[-1] > times[0]:
            return (len(times) - 1) / (times[-1] - times[0])
        return self.source.fps


def _check_number(name, value, positive=False):
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name} must be {'positive' if positive else 'at least 0'} and finite, got {value}")


def _check_index(name, value, minimum):
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be integers, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)
