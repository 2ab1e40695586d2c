"""Motion vectors of the codec: reading them with PyAV alone, motion maps, clip selection and pictures of the field.

Video-LaVIT (arXiv 2402.03161) describes motion by the vectors an MPEG-4 Part 2 encoder finds. `read_motion_vectors`
re-encodes a video to that codec at a low frame rate and exports the vectors with the decoder's `export_mvs` flag, all
in memory: packets go from the encoder straight into a decoder, so there is no temporary file and no ffmpeg binary.
"""

import colorsys
import contextlib
import math
import os
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import VideoReadError

# Columns of a vector table, in the order of the motion-vector extractor that Video-LaVIT was trained with.
VECTOR_COLUMNS = (
    "source",
    "w",
    "h",
    "src_x",
    "src_y",
    "dst_x",
    "dst_y",
    "motion_x",
    "motion_y",
    "motion_scale",
)
# Standard deviations of (x / width, y / height) displacements over the training data; the mean is zero.
MOTION_STD = (0.0993703, 0.1130276)
NO_VECTOR = -10000.0  # marks pixels of a dense map without a vector
_ABSENT = -1000.0  # pooled values below it had no vector at all
_MAX_SIDE = 8191  # MPEG-4 Part 2 codes width and height with 13 bits
BLOCK = 16  # side of a macroblock in pixels


@dataclass
class MotionVectors:
    """Motion vectors of a video.

    Attributes:
        frame_types: one letter per frame, "I" or "P" ("B" only in files that were not re-encoded).
        vectors: per frame an int32 array (number of vectors, 10) with the columns `VECTOR_COLUMNS`: `source` is -1 for
            a reference in the past; `dst` is the block's centre in this frame, `src` the centre in the reference, in
            pixels; `motion / motion_scale` is `src - dst` in sub-pixel precision. I-frames have no rows.
        height, width: size of the frames in pixels.
        fps: frames per second of the stream that was read.
        keyframes: index of an I-frame -> its decoded picture, uint8 (height, width, 3), RGB.
        source: the file.
        complete: False if `on_error="keep"` let a damaged file pass.
    """

    frame_types: str
    vectors: list
    height: int
    width: int
    fps: float
    keyframes: dict = field(default_factory=dict, repr=False)
    source: str = ""
    complete: bool = True

    def __len__(self):
        return len(self.frame_types)

    def keyframe(self, index):
        """The picture of the I-frame `index`, uint8 (height, width, 3). Raises ValueError if it was not kept."""
        if index not in self.keyframes:
            raise ValueError(
                f"frame {index} of {self.source or 'the video'} is no kept I-frame; I-frames: {sorted(self.keyframes)}"
            )
        return self.keyframes[index]


def read_motion_vectors(
    path,
    fps=6,
    *,
    start=0.0,
    end=None,
    keep_keyframes=True,
    bit_rate=8_000_000,
    gop_size=12,
    num_threads=1,
    on_error="raise",
):
    """Reads motion vectors as Video-LaVIT uses them.

    A video too short for a single frame at `fps`, or a still picture, gives one I-frame: its first picture.

    Args:
        path: video file, or a binary file object.
        fps: frames per second to re-encode at: 6 for tokens and understanding, 12 in the authors' reconstruction
            example. None reads the vectors the file itself holds, which must be MPEG-4 Part 2.
        start, end: part of the source to read, in seconds.
        keep_keyframes: also keep the decoded pictures of I-frames (3 bytes a pixel each).
        bit_rate, gop_size: of the re-encoding; the defaults are the model's.
        num_threads: of the encoder. The vectors depend on it (each slice thread searches on its own), so it is pinned
            to 1 and the result is the same on every machine.
        on_error: "raise", or "keep" to return what a damaged file still gives, with `complete=False`.

    Returns:
        `MotionVectors`.

    Raises:
        VideoReadError: the file cannot be read or decoded, is cut off, has no frames in the range, is larger than
            MPEG-4 Part 2 allows (8191 pixels a side), or is of another codec with `fps=None`.
        ValueError: an argument is out of range.
    """
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be positive, or None to read the file's own vectors; got {fps}")
    if start < 0 or (end is not None and end <= start):
        raise ValueError(f"need 0 <= start < end, got start={start}, end={end}")
    if on_error not in ("raise", "keep"):
        raise ValueError(f'on_error must be "raise" or "keep", got {on_error!r}')
    if gop_size < 1 or bit_rate < 1 or num_threads < 1:
        raise ValueError("gop_size, bit_rate and num_threads must be positive")
    reader = _VectorReader(path, on_error, keep_keyframes)
    if fps is None:
        reader.read_own_vectors(start, end)
    else:
        reader.reencode(Fraction(fps).limit_denominator(1001), start, end, bit_rate, gop_size, num_threads)
    return reader.result()


class _VectorReader:
    """One pass over one file."""

    def __init__(self, path, on_error, keep_keyframes):
        import av

        self.av = av
        self.path = path
        self.name = str(path) if isinstance(path, (str, Path)) else getattr(path, "name", "<file object>")
        self.on_error, self.keep_keyframes = on_error, keep_keyframes
        self.types, self.vectors, self.keyframes = [], [], {}
        self.height = self.width = 0
        self.fps = 0.0
        self.complete = True
        self._letters = {int(t): t.name for t in av.video.frame.PictureType}

    def result(self):
        if not self.types:
            raise VideoReadError(f"{self.name}: no frames in the requested range")
        return MotionVectors(
            "".join(self.types),
            self.vectors,
            self.height,
            self.width,
            self.fps,
            self.keyframes,
            self.name,
            self.complete,
        )

    def _open(self):
        if isinstance(self.path, (str, Path)) and not os.path.exists(self.path):
            raise VideoReadError(f"{self.name}: no such file")
        try:
            container = self.av.open(str(self.path) if isinstance(self.path, Path) else self.path)
        except (self.av.error.FFmpegError, OSError) as error:
            raise VideoReadError(f"{self.name}: not a readable video ({error})") from error
        if not container.streams.video:
            container.close()
            raise VideoReadError(f"{self.name}: has no video stream")
        return container

    def _problem(self, text):
        if self.on_error == "raise":
            raise VideoReadError(f'{self.name}: {text}; pass on_error="keep" to use what could be read')
        self.complete = False

    def _frames(self, container, stream, start, end):
        """Decoded frames of the range, with a check that the file gave as many as it announces."""
        origin = (stream.start_time or 0) * stream.time_base if stream.time_base else 0
        if start > 0:
            container.seek(int((start + origin) / stream.time_base), stream=stream, backward=True)
        decoded = discarded = 0
        try:
            for packet in container.demux(stream):
                discarded += packet.is_discard
                for frame in packet.decode():
                    decoded += 1
                    time = None if frame.pts is None else frame.pts * frame.time_base - origin
                    if time is not None and time < start:
                        continue
                    if time is not None and end is not None and time >= end:
                        return
                    yield frame
        except self.av.error.FFmpegError as error:
            self._problem(f"decoding stopped after {decoded} frames ({error})")
            return
        expected = stream.frames - discarded
        if start == 0 and stream.frames and decoded < expected:
            self._problem(f"announces {expected} frames but only {decoded} could be decoded")

    def read_own_vectors(self, start, end):
        with self._open() as container:
            stream = container.streams.video[0]
            if stream.codec_context.name != "mpeg4":
                raise VideoReadError(
                    f"{self.name}: is {stream.codec_context.name}, not MPEG-4 Part 2; pass fps= to re-encode it"
                )
            # The option must reach the decoder before its first packet; options of av.open() do not.
            stream.codec_context.options = {"flags2": "+export_mvs"}
            self.fps = float(stream.average_rate or stream.guessed_rate or 0)
            for frame in self._frames(container, stream, start, end):
                self._take(frame)

    def reencode(self, fps, start, end, bit_rate, gop_size, num_threads):
        av = self.av
        self.fps = float(fps)
        with self._open() as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            first = pump = None
            for frame in self._frames(container, stream, start, end):
                if pump is None:
                    first = frame
                    pump = self._pump(stream, frame, fps, bit_rate, gop_size, num_threads)
                    next(pump)
                try:
                    pump.send(frame)
                except av.error.FFmpegError as error:
                    raise VideoReadError(f"{self.name}: cannot be re-encoded to MPEG-4 Part 2 ({error})") from error
            if pump is not None:
                with contextlib.suppress(StopIteration):
                    pump.send(None)
            if first is not None and not self.types:
                # Shown for less than half a frame at `fps`: the filter dropped it all. Keep the first picture.
                first.pts = 0
                pump = self._pump(stream, first, None, bit_rate, gop_size, num_threads)
                next(pump)
                with contextlib.suppress(StopIteration):
                    pump.send(first)
                    pump.send(None)

    def _pump(self, stream, first, fps, bit_rate, gop_size, num_threads):
        """A coroutine that takes source frames (None at the end) through filter, encoder and exporting decoder.

        `fps=None` keeps every frame (a single one).
        """
        av = self.av
        graph = av.filter.Graph()
        source = graph.add_buffer(
            width=first.width, height=first.height, format=first.format.name, time_base=stream.time_base
        )
        # The command-line program the model was prepared with turns frames upright before its other filters.
        steps = (*_upright(first.rotation), *([] if fps is None else [("fps", str(fps))]), ("format", "yuv420p"))
        chain = [graph.add(*step) for step in steps]
        sink = graph.add("buffersink")
        for left, right in zip([source, *chain], [*chain, sink]):
            left.link_to(right)
        graph.configure()
        encoder = None
        decoder = av.CodecContext.create("mpeg4", "r")
        decoder.options = {"flags2": "+export_mvs"}
        # Decodes beside the encoder, on another core; threads do not change what is decoded.
        decoder.thread_type, decoder.thread_count = "FRAME", 2
        while True:
            frame = yield
            source.push(frame)
            while True:
                try:
                    picture = sink.pull()
                except (av.error.BlockingIOError, av.error.EOFError):
                    break
                if encoder is None:
                    if max(picture.width, picture.height) > _MAX_SIDE:
                        raise VideoReadError(
                            f"{self.name}: {picture.width}x{picture.height} is too large for MPEG-4 Part 2, which ends "
                            f"at {_MAX_SIDE} pixels a side; scale the video down first"
                        )
                    encoder = av.CodecContext.create("mpeg4", "w")
                    encoder.width, encoder.height, encoder.pix_fmt = picture.width, picture.height, "yuv420p"
                    rate = fps or Fraction(1)
                    encoder.time_base, encoder.framerate = 1 / rate, rate
                    encoder.bit_rate, encoder.gop_size, encoder.thread_count = bit_rate, gop_size, num_threads
                # Without this the source's own I and P types are forced on the encoder.
                picture.pict_type = 0
                for packet in encoder.encode(picture):
                    for decoded in decoder.decode(packet):
                        self._take(decoded)
            if frame is None:
                break
        packets = encoder.encode(None) if encoder is not None else []
        for packet in [*packets, None]:
            for decoded in decoder.decode(packet):
                self._take(decoded)

    def _take(self, frame):
        letter = self._letters[int(frame.pict_type)]
        data = frame.side_data.get(self.av.sidedata.sidedata.Type.MOTION_VECTORS)
        if letter == "I" and self.keep_keyframes:
            picture = frame.reformat(format="rgb24", interpolation="BICUBIC")
            self.keyframes[len(self.types)] = picture.to_ndarray()
        self.types.append(letter)
        self.vectors.append(_table(data.to_ndarray()) if data is not None else np.zeros((0, 10), np.int32))
        self.height, self.width = frame.height, frame.width


def _table(structured):
    table = np.empty((len(structured), len(VECTOR_COLUMNS)), np.int32)
    for column, name in enumerate(VECTOR_COLUMNS):
        table[:, column] = structured[name]
    return table


def _upright(rotation):
    """Filters that undo a display rotation of `rotation` degrees counter-clockwise (multiples of 90)."""
    return {
        90: [("transpose", "cclock")],
        180: [("hflip", None), ("vflip", None)],
        270: [("transpose", "clock")],
    }.get(round(rotation) % 360, [])


def select_keyframes(frame_types, max_clips=8, *, num_frames=24, gop_size=12):
    """Chooses where clips start, as Video-LaVIT does for understanding.

    Starts are I-frames of regular groups of pictures (so a scene cut's extra I-frame does not start a clip) with a
    whole clip after them; as a clip spans two groups, every second one is used. Where too few are regular all I-frames
    count; clips that then reach over the end are padded by `clip_motion_map`.

    Args:
        frame_types: string of "I", "P", "B".
        max_clips: at most about this many clips (the rule compares half the number of starts with it).

    Returns:
        list of frame indices.

    Raises:
        ValueError: there is no I-frame, or `max_clips` is not positive.
    """
    if max_clips < 1:
        raise ValueError(f"max_clips must be positive, got {max_clips}")
    intra = [index for index, letter in enumerate(frame_types) if letter == "I"]
    if not intra:
        raise ValueError("the video has no I-frame to start a clip from; re-encode it (fps=6)")
    starts = intra
    if len(intra) > 1:
        starts = [index for index, following in zip(intra, intra[1:]) if following - index == gop_size]
    starts = [index for index in starts if len(frame_types) - index >= num_frames]
    if len(starts) < 2:
        starts = intra
    if len(starts) <= 2 * max_clips:
        return starts[1::2] if len(starts) > 2 else starts[0::2]
    chosen = starts[1::2]
    if len(chosen) > max_clips:
        chosen = [chosen[int(i)] for i in np.linspace(0, len(chosen) - 1, max_clips)]
    return chosen


def _displacements(table, height, width, rescale):
    """Pixel positions (n,) and normalised displacements (n, 2) of a vector table."""
    table = np.asarray(table, np.int64)
    std = np.asarray(MOTION_STD) / (10.0 if rescale else 1.0)
    # From the reference position to the block: the coded vector points the other way.
    values = table[:, :1] * table[:, 7:9] / table[:, 9:10] / np.array([width, height]) / std
    x = np.clip(table[:, 5], 0, width - 1)
    y = np.clip(table[:, 6], 0, height - 1)
    return y, x, values.astype(np.float32)


def dense_motion_map(table, height, width, *, rescale=True):
    """One frame's vectors at the pixels of their block centres.

    Args:
        table: (n, 10), see `MotionVectors.vectors`.
        rescale: scale by ten, as the motion tokenizer expects; the raw maps of the de-tokenizer are not.

    Returns:
        float32 array (height, width, 2), (x, y) displacement divided by the frame size and by `MOTION_STD`; -10000
        where there is no vector. Of several vectors at a pixel the last stays.
    """
    dense = np.full((height, width, 2), NO_VECTOR, np.float32)
    y, x, values = _displacements(table, height, width, rescale)
    dense[y, x] = values
    return dense


def block_motion_map(tables, height, width, *, rescale=True, num_frames=24, gop_size=12):
    """Motion of one clip on the grid of 16x16 blocks.

    Equals max-pooling the dense maps per component, without building them. Blocks without a vector, I-frames and
    missing frames are zero. The frame at `gop_size` is the next I-frame and holds no motion: it becomes the mean of its
    neighbours.

    Args:
        tables: vector tables of up to `num_frames` frames, the first being the clip's I-frame.

    Returns:
        float32 tensor (2, num_frames, ceil(height / 16), ceil(width / 16)); channel 0 is x.
    """
    rows, columns = -(-height // BLOCK), -(-width // BLOCK)
    cells = np.full((num_frames * rows * columns, 2), NO_VECTOR, np.float32)
    tables = list(tables)[:num_frames]
    counts = [len(table) for table in tables]
    if sum(counts):
        y, x, values = _displacements(np.concatenate(tables), height, width, rescale)
        frame = np.repeat(np.arange(len(tables)), counts)
        pixel = (frame * height + y) * width + x
        # Of several vectors at one pixel the last row stays: the first occurrence in reversed order.
        _, last = np.unique(pixel[::-1], return_index=True)
        keep = len(pixel) - 1 - last
        cell = (frame[keep] * rows + y[keep] // BLOCK) * columns + x[keep] // BLOCK
        for component in range(2):
            np.maximum.at(cells[:, component], cell, values[keep, component])
    cells[cells < _ABSENT] = 0.0
    pooled = torch.from_numpy(cells.reshape(num_frames, rows, columns, 2)).permute(3, 0, 1, 2).contiguous()
    if 0 < gop_size < num_frames - 1:
        pooled[:, gop_size] = (pooled[:, gop_size - 1] + pooled[:, gop_size + 1]) / 2
    return pooled


def resize_motion(motion, height, width):
    """Bicubic resize of motion maps (..., num_frames, h, w) without antialiasing; values keep their scale."""
    flat = motion.reshape(-1, 1, *motion.shape[-2:])
    flat = F.interpolate(flat, size=(height, width), mode="bicubic", align_corners=False, antialias=False)
    return flat.reshape(*motion.shape[:-2], height, width)


def clip_motion_map(motion, start, *, height=20, width=36, rescale=True, num_frames=24, gop_size=12):
    """Motion map of the clip that starts at I-frame `start`.

    Args:
        motion: `MotionVectors`.
        start: index of an I-frame. Frames past the end of the video are without motion.
        height, width: size of the map: 20 x 36 with `rescale=True` for the motion tokenizer, an eighth of the video's
            size with `rescale=False` for the de-tokenizer.

    Returns:
        float32 tensor (2, num_frames, height, width).

    Raises:
        ValueError: `start` is no I-frame.
    """
    if not 0 <= start < len(motion) or motion.frame_types[start] != "I":
        raise ValueError(f"a clip starts at an I-frame; frame {start} of {motion.source or 'the video'} is none")
    tables = motion.vectors[start : start + num_frames]
    pooled = block_motion_map(
        tables, motion.height, motion.width, rescale=rescale, num_frames=num_frames, gop_size=gop_size
    )
    return resize_motion(pooled, height, width)


def render_motion(motion, *, max_displacement=None, height=None, width=None):
    """Pictures of the motion field: the hue is the direction, the brightness the speed, black is at rest.

    Args:
        motion: `MotionVectors`, or a motion map (2, num_frames, h, w) in any scale.
        max_displacement: displacement drawn at full brightness (pixels per frame for `MotionVectors`, map units for a
            map). Default: the 99th percentile of the video.
        height, width: size of the pictures; default the video's size, or 16 pixels a cell for a map.

    Yields:
        uint8 arrays (height, width, 3), one per frame.
    """
    if isinstance(motion, MotionVectors):
        fields = (_block_displacement(table, motion.height, motion.width) for table in motion.vectors)
        height, width = height or motion.height, width or motion.width
        rows, columns = -(-motion.height // BLOCK), -(-motion.width // BLOCK)
        # The grid may reach over the right and bottom edges.
        crop = (motion.height / (rows * BLOCK), motion.width / (columns * BLOCK))
        speeds = [np.hypot(table[:, 7], table[:, 8]) / table[:, 9] for table in motion.vectors if len(table)]
    else:
        array = np.asarray(motion, np.float32)
        if array.ndim != 4 or array.shape[0] != 2:
            raise ValueError(f"a motion map is (2, num_frames, height, width), got {tuple(array.shape)}")
        fields = iter(array.transpose(1, 2, 3, 0))
        height, width = height or array.shape[2] * BLOCK, width or array.shape[3] * BLOCK
        rows, columns = array.shape[2:]
        crop = (1.0, 1.0)
        speeds = [np.hypot(array[0], array[1]).ravel()]
    if max_displacement is None:
        moving = np.concatenate(speeds) if speeds else np.zeros(1)
        max_displacement = max(float(np.percentile(moving, 99)) if moving.size else 0.0, 1e-6)
    # Nearest cell of every pixel, computed once.
    row = np.minimum((np.arange(height) + 0.5) / height * crop[0] * rows, rows - 1).astype(int)
    column = np.minimum((np.arange(width) + 0.5) / width * crop[1] * columns, columns - 1).astype(int)
    for displacement in fields:
        yield _colour_wheel(displacement, max_displacement)[row][:, column]


def _block_displacement(table, height, width):
    field_ = np.zeros((-(-height // BLOCK), -(-width // BLOCK), 2), np.float32)
    if len(table):
        y = np.clip(table[:, 6], 0, height - 1) // BLOCK
        x = np.clip(table[:, 5], 0, width - 1) // BLOCK
        field_[y, x] = table[:, :1] * table[:, 7:9] / table[:, 9:10]
    return field_


_HUES = np.array([colorsys.hsv_to_rgb(h / 360, 1.0, 1.0) for h in range(360)], np.float32)


def _colour_wheel(displacement, maximum):
    angle = np.degrees(np.arctan2(displacement[..., 1], displacement[..., 0])).astype(int) % 360
    speed = np.minimum(np.hypot(displacement[..., 0], displacement[..., 1]) / maximum, 1.0)
    return np.round(_HUES[angle] * speed[..., None] * 255).astype(np.uint8)


__all__ = [
    "MOTION_STD",
    "VECTOR_COLUMNS",
    "MotionVectors",
    "block_motion_map",
    "clip_motion_map",
    "dense_motion_map",
    "read_motion_vectors",
    "render_motion",
    "resize_motion",
    "select_keyframes",
]
