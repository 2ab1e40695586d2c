"""Frame sources: one way to walk through a video file, an animated picture or a folder of pictures, frame by frame."""

import json
import math
import re
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import VideoReadError
from .containers import container_problem, matroska_block_problem, webp_durations

FOLDER_FPS = 24.0  # of folders without the video.json that `write_video` puts there
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
FOLDER_FACTS = "video.json"
_SEEK_FROM = 2.0  # seconds: decoding a little is cheaper than seeking
_PILLOW_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")

# Codecs that give exactly one frame for every packet, so that packets without a frame are losses.
_ONE_FRAME_PER_PACKET = {
    "h264",
    "hevc",
    "vp9",
    "av1",
    "mjpeg",
    "png",
    "prores",
    "dnxhd",
    "ffv1",
    "rawvideo",
    "huffyuv",
    "gif",
}


class Frame:
    """A decoded frame whose pixels are converted only when asked for.

    Attributes: `index` (in presentation order), `time` and `duration` in seconds, time counting from the first frame.
    """

    __slots__ = ("index", "time", "duration", "_pixels")

    def __init__(self, index, time, duration, pixels):
        self.index, self.time, self.duration, self._pixels = index, time, duration, pixels

    def pixels(self):
        """uint8 (height, width, 3), or (height, width, 4) when the source has transparency."""
        return self._pixels()


def open_source(path, keep=False):
    """The source of a path. With `keep` damaged parts are skipped and described by `source.problem`.

    Raises:
        VideoReadError: nothing there, empty, or not a video.
    """
    path = Path(path)
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise VideoReadError(f"{path}: no such file or folder")
    if not path.is_file():
        raise VideoReadError(f"{path}: not a regular file")
    try:
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError as error:
        raise VideoReadError(f"{path}: cannot be opened: {error.strerror}") from error
    if not head:
        raise VideoReadError(f"{path}: the file is empty (0 bytes)")
    motion_jpeg = path.suffix.lower() in (".mjpeg", ".mjpg")  # pictures one after the other
    if (head.startswith(_PILLOW_MAGIC) and not motion_jpeg) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return PictureSource(path, keep)
    return FileSource(path, keep)


class FileSource:
    """A video file read with PyAV: rotation applied, frames in presentation order, losses noticed."""

    def __init__(self, path, keep=False):
        self.path, self.keep = path, keep
        self.problem = None
        self.container_problem = container_problem(path)
        self._opened = False
        self._open()

    def _open(self):
        import av

        path = self.path
        try:
            self._container = av.open(f"file:{path}", metadata_errors="replace")  # a colon in the name is no protocol
        except av.error.FFmpegError as error:
            reason = self.container_problem or f"not a video, or damaged beyond reading ({error.strerror})"
            raise VideoReadError(f"{path}: {reason}") from error
        self._opened, self._stream = True, None
        streams = [s for s in self._container.streams.video if not s.disposition & _ATTACHED_PICTURE]
        if not streams:
            kind = "only audio" if self._container.streams.audio else "no video stream"
            self.close()
            raise VideoReadError(f"{path}: has {kind}, no frames to read")
        self._stream = streams[0]
        if self._stream.codec_context is None:
            self.close()
            raise VideoReadError(f"{path}: this build of FFmpeg cannot decode its video codec")
        self._stream.thread_type = "AUTO"
        rate = self._stream.average_rate or self._stream.guessed_rate or self._stream.base_rate
        self.fps = float(rate) if rate else FOLDER_FPS
        self.tick = float(self._stream.time_base) if self._stream.time_base else 1e-6
        # FFmpeg's own VP8/VP9 decoders leave transparency out; libvpx's do not.
        library = {"vp9": "libvpx-vp9", "vp8": "libvpx"}.get(self._stream.codec_context.name)
        self._alpha_decoder = None
        if library and self._stream.metadata.get("alpha_mode") == "1" and library in av.codecs_available:
            self._alpha_decoder = av.CodecContext.create(library, "r")
        self._one_to_one = self._stream.codec_context.codec.canonical_name in _ONE_FRAME_PER_PACKET
        # Packets carry exact presentation times, and seeking lands on a keyframe at or before the target.
        self.seekable = self._one_to_one and self._container.format.name.startswith(("mov", "matroska"))

    def _decode(self, packet):
        if self._alpha_decoder is None:
            return packet.decode()
        return self._alpha_decoder.decode(packet if packet.size else None)

    def close(self):
        if self._opened:
            self._opened = False
            self._drain()
            self._container.close()

    def _drain(self):
        """Lets the decoder's threads finish. Freed while one of them writes a log message through Python
        (`av.logging.set_level` makes it so), FFmpeg waits for the thread, the thread for the interpreter."""
        import av

        if self._stream is None or self._stream.codec_context is None:
            return
        for _ in range(256):  # every call may report one more damaged frame
            try:
                self._stream.codec_context.decode(None)
                return
            except av.error.EOFError:
                return
            except (av.error.FFmpegError, ValueError):
                continue

    def timeline(self):
        """Times of all frames in presentation order (seconds since the first) from the packets alone, nothing decoded;
        None where packets do not tell (then frames must be counted by decoding)."""
        import av

        if not self.seekable:
            return None
        stamps = []
        try:
            for packet in self._container.demux(self._stream):
                if packet.size and not packet.is_discard:
                    if packet.pts is None or packet.is_corrupt:
                        return None
                    stamps.append(packet.pts)
        except av.error.FFmpegError:
            return None
        finally:
            declared = self._stream.frames
            self.close()
        if not stamps or len(set(stamps)) != len(stamps) or len(stamps) > (declared or len(stamps)):
            return None
        stamps.sort()
        return [(stamp - stamps[0]) * self.tick for stamp in stamps]

    def frames(self, start=0.0):
        """Yields the frames in presentation order. Afterwards `problem` says what was lost, if anything.

        Args:
            start: seconds since the first frame. Frames before it may be skipped; `index` is then None.

        Raises:
            VideoReadError: never for damage; with `keep` unset decoding ends at the first damaged part.
        """
        import av

        if not self._opened:
            self._open()
        losses = []
        index, end, previous = 0, 0.0, -math.inf
        base = None
        packets = expected = 0
        others_end = 0.0  # of sound and the rest, in seconds
        interlaced, skipped = False, False
        constant_rate = self._container.format.name == "avi"  # its packets carry no presentation times
        try:
            demuxer = self._container.demux()
            while True:
                try:
                    packet = next(demuxer)
                except StopIteration:
                    break
                except (av.error.FFmpegError, IndexError) as error:  # IndexError: a stream the header does not know
                    losses.append(f"reading stopped after {index} frames ({error})")
                    break
                if packet.stream.index != self._stream.index:
                    if packet.pts is not None and packet.time_base:
                        others_end = max(others_end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                    continue
                if packet.size:
                    packets += 1
                    expected += not packet.is_discard
                    if packet.is_corrupt:
                        losses.append(f"packet {packets - 1} is damaged or incomplete")
                try:
                    decoded = self._decode(packet)
                except av.error.EOFError:
                    decoded = []
                except av.error.FFmpegError as error:
                    decoded = []
                    losses.append(f"frame {index} or one near it cannot be decoded ({error.strerror})")
                if losses and not self.keep:
                    break
                for frame in decoded:
                    duration = frame.duration * self.tick if frame.duration else 1 / self.fps
                    time = index / self.fps if constant_rate else frame.time
                    if base is None:
                        base = time or 0.0
                    time = end if time is None or time - base <= previous else time - base
                    previous, end = time, time + duration
                    interlaced |= frame.interlaced_frame
                    if frame.is_corrupt:
                        losses.append(f"frame {index} is damaged")
                        if not self.keep:
                            break
                    yield Frame(None if skipped else index, time, duration, partial(_to_array, frame))
                    index += 1
                if start > _SEEK_FROM and base is not None and self.seekable and not skipped and not losses:
                    skipped, start_time = True, base + start
                    self._container.seek(int(start_time / self.tick), stream=self._stream, backward=True)
                    demuxer = self._container.demux()
            if not losses:
                losses += self._missing(index, packets, expected, interlaced, (base or 0.0) + end, others_end, skipped)
        finally:
            self.close()
        if self.container_problem:
            losses.insert(0, self.container_problem)
        self.problem = "; ".join(losses[:3]) + (f"; and {len(losses) - 3} more" if len(losses) > 3 else "") or None

    def _missing(self, delivered, packets, expected, interlaced, end, others_end, skipped):
        stream = self._stream
        mp4 = "mov" in self._container.format.name
        if mp4 and stream.frames > packets and not skipped:
            return [f"it declares {stream.frames} frames, but holds {packets}"]
        if self._one_to_one and not interlaced and not skipped and delivered < expected:
            return [f"it holds {expected} frames, but only {delivered} can be decoded"]
        if self._container.format.name == "avi" and stream.frames > delivered and not skipped:
            return [f"it declares {stream.frames} frames, but only {delivered} can be decoded"]
        problem = matroska_block_problem(self.path)
        if problem:
            return [problem]
        declared, of_stream = (None, False) if mp4 else self._declared_end()
        end = end if of_stream else max(end, others_end)
        if declared is not None and declared - end > max(3 / self.fps, 0.02 * declared, 0.1):
            return [f"it declares {declared:.2f} s of video, but ends at {end:.2f} s"]
        return []

    def _declared_end(self):
        """When the video stream (True) or the whole file (False) should end by the container's word, in seconds, or
        None when it does not say."""
        match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", self._stream.metadata.get("DURATION", ""))
        if match:
            hours, minutes, seconds = match.groups()
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds), True
        # Of MPEG and raw streams, which declare nothing, FFmpeg gives estimates.
        if self._container.duration and self._container.format.name in ("flv", "asf", "ogg", "matroska,webm"):
            return self._container.duration / 1e6, False
        return None, False


_ATTACHED_PICTURE = 0x400  # AV_DISPOSITION_ATTACHED_PIC: cover art of a song


def _to_array(frame):
    has_alpha = any(component.is_alpha for component in frame.format.components)
    pixels = frame.to_ndarray(format="rgba" if has_alpha else "rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        pixels = _oriented(pixels, np.frombuffer(bytes(matrix), dtype=np.int32))
    return pixels


def _oriented(pixels, matrix):
    """Applies a display matrix [a b u; c d v; x y w]: a pixel at (x, y) is shown at (a x + c y, b x + d y). Quarter
    turns and mirrors, all that cameras write, are exact; other angles go to the nearest of them."""
    a, b, c, d = (int(matrix[i]) for i in (0, 1, 3, 4))
    if abs(a) + abs(d) >= abs(b) + abs(c):
        flip_columns, flip_rows = a < 0, d < 0
    else:
        pixels = pixels.transpose(1, 0, 2)
        flip_columns, flip_rows = c < 0, b < 0
    if flip_columns:
        pixels = pixels[:, ::-1]
    if flip_rows:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _picture_array(image):
    """A Pillow image as uint8 RGB or RGBA."""
    if image.mode.startswith("I;16") or image.mode == "I":
        gray = np.clip(np.asarray(image).astype(np.float32) / 257 + 0.5, 0, 255).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    has_alpha = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    return np.asarray(image.convert("RGBA" if has_alpha else "RGB"))


class PictureSource:
    """A still picture, or an animated one (WebP, PNG), read with Pillow. Stills last one frame at `FOLDER_FPS`."""

    tick = 1e-3
    seekable = False

    def __init__(self, path, keep=False):
        from PIL import Image, UnidentifiedImageError

        self.path, self.keep = path, keep
        self.problem = None
        self.container_problem = container_problem(path)
        try:
            self._image = Image.open(path)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            reason = self.container_problem or f"not a picture, or damaged beyond reading ({error})"
            raise VideoReadError(f"{path}: {reason}") from error
        self._count = getattr(self._image, "n_frames", 1)
        self.fps = FOLDER_FPS
        if self._count > 1:
            self._image.seek(0)
            self._image.load()
            durations = webp_durations(path) or [self._image.info.get("duration") or 0]
            if sum(durations) > 0:
                self.fps = 1000 * len(durations) / sum(durations)

    def close(self):
        self._image.close()

    def timeline(self):
        return None

    def frames(self, start=0.0):
        from PIL import ImageOps

        time, losses = 0.0, []
        for index in range(self._count):
            try:
                self._image.seek(index)
                self._image.load()
                picture = ImageOps.exif_transpose(self._image) if self._count == 1 else self._image
                pixels = _picture_array(picture)
            except (OSError, EOFError, SyntaxError, ValueError) as error:
                losses.append(f"it declares {self._count} frames, but frame {index} cannot be decoded ({error})")
                break
            duration = (self._image.info.get("duration") or 0) / 1000 if self._count > 1 else 0
            duration = duration if duration > 0 else 1 / self.fps
            yield Frame(index, time, duration, lambda pixels=pixels: pixels)
            time += duration
        self._image.close()
        if self.container_problem:
            losses.insert(0, self.container_problem)
        self.problem = "; ".join(losses) or None


def _natural_order(path):
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", path.name)]


class FolderSource:
    """A folder of pictures of one size, in natural order of their names; `video.json`, if there, gives the rate."""

    tick = 1e-6
    seekable = False

    def __init__(self, path):
        self.path = path
        self.problem = self.container_problem = None
        self._files = sorted(
            (p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")),
            key=_natural_order,
        )
        if not self._files:
            raise VideoReadError(f"{path}: the folder holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
        self.fps, self._declared = FOLDER_FPS, len(self._files)
        if (path / FOLDER_FACTS).is_file():
            try:
                facts = json.loads((path / FOLDER_FACTS).read_text())
                self.fps, self._declared = float(facts["fps"]), int(facts["num_frames"])
            except (ValueError, KeyError, TypeError) as error:
                raise VideoReadError(f"{path / FOLDER_FACTS}: must hold fps and num_frames ({error!r})") from error
            if not (self.fps > 0 and math.isfinite(self.fps)):
                raise VideoReadError(f"{path / FOLDER_FACTS}: fps must be positive, not {self.fps}")
        if self._declared != len(self._files):
            self.container_problem = f"its {FOLDER_FACTS} declares {self._declared} frames, it holds {len(self._files)}"

    def close(self):
        pass

    def timeline(self):
        return [index / self.fps for index in range(len(self._files))]

    def frames(self, start=0.0):
        first = None
        for index, file in enumerate(self._files):
            source = PictureSource(file)
            pictures = [picture.pixels() for picture in source.frames()]
            if source.problem or not pictures:
                self.problem = f"{file.name}: {source.problem or 'cannot be decoded'}"
                return
            pixels = pictures[0]
            if first is None:
                first = pixels.shape
            if pixels.shape[:2] != first[:2]:
                raise VideoReadError(
                    f"{file}: {pixels.shape[1]}x{pixels.shape[0]} pixels, the first frame has {first[1]}x{first[0]}"
                )
            yield Frame(index, index / self.fps, 1 / self.fps, lambda pixels=pixels: pixels)
        self.problem = self.container_problem
