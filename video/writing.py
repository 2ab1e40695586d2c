"""Writing videos: H.264 and others by suffix, GIF, animated WebP, folders of PNGs; atomic and in constant memory."""

import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
from fractions import Fraction
from numbers import Real
from pathlib import Path

import numpy as np

from .containers import container_problem
from .sources import FOLDER_FACTS

_MAX_RATE_DENOMINATOR = 1001  # 29.97002997... becomes 30000/1001


class _Format:
    def __init__(self, muxer, codec, pixel_format, options=None, crf=None, muxer_options=None):
        self.muxer, self.codec, self.pixel_format, self.options = muxer, codec, pixel_format, options or {}
        self.crf, self.muxer_options = crf, muxer_options or {}


# x264's macroblock tree makes the result vary from run to run (seen with FFmpeg 8.1); same frames, same file is worth
# the few per cent it saves. For the same reason muxers get +bitexact (no random identifiers).
_X264 = {"x264-params": "mbtree=0"}
_FAST_START = {"movflags": "+faststart"}
_FORMATS = {
    ".mp4": _Format("mp4", "libx264", "yuv420p", _X264, crf=18, muxer_options=_FAST_START),
    ".m4v": _Format("mp4", "libx264", "yuv420p", _X264, crf=18, muxer_options=_FAST_START),
    ".mov": _Format("mov", "libx264", "yuv420p", _X264, crf=18, muxer_options=_FAST_START),
    ".mkv": _Format("matroska", "libx264", "yuv420p", _X264, crf=18),
    ".webm": _Format("webm", "libvpx-vp9", "yuv420p", {"b": "0", "row-mt": "1", "cpu-used": "4"}, crf=24),
    ".avi": _Format("avi", "libx264", "yuv420p", _X264, crf=18),
    ".gif": _Format("gif", "gif", "pal8"),
    ".webp": _Format("webp", "libwebp_anim", "yuv420p", {"quality": "90"}, muxer_options={"loop": "0"}),
}


def write_video(path, frames, fps, *, codec=None, crf=None, pixel_format=None, options=None, overwrite=True):
    """Writes a video file, or a folder of numbered PNGs when `path` has no suffix.

    The suffix selects the format: .mp4/.m4v/.mov/.mkv/.avi H.264, .webm VP9, .gif (a palette for every frame),
    .webp (animated). The size is never changed: where the width or height is odd, 4:2:0 chroma is impossible for H.264
    and 4:4:4 (yuv444p) is used instead, which not every player shows; give even sizes for the widest support.

    Args:
        path: file to write. It appears only when everything has been written (a hidden `.<name>.part-*` beside it
            holds the data until then; a killed process can leave that behind, never an incomplete file at `path`).
        frames: uint8 array or tensor (num_frames, height, width, 3), one frame, a VideoClip, or an iterable of any of
            these (streamed in constant memory). One channel is written as gray.
        fps: frames per second, any positive number or Fraction (29.97002997 is recognised as 30000/1001).
        codec: FFmpeg's encoder name; pixel_format: FFmpeg's name of the stored format.
        crf: constant quality, lower is better (H.264 default 18, VP9 24).
        options: further options of the encoder, as strings.
        overwrite: False raises FileExistsError when `path` exists.

    Returns:
        Path of the file.

    Raises:
        TypeError, ValueError: frames, rate or options that cannot be written; no frames.
        OSError: the disk is full, no permission, ...; names `path`.
    """
    with VideoWriter(
        path, fps, codec=codec, crf=crf, pixel_format=pixel_format, options=options, overwrite=overwrite
    ) as writer:
        for piece in _pieces(frames):
            writer.write(piece)
    return writer.path


def _pieces(frames):
    if hasattr(frames, "frames") or hasattr(frames, "ndim"):
        return [frames]
    if isinstance(frames, (str, bytes)) or not hasattr(frames, "__iter__"):
        raise TypeError(
            f"frames must be an array, tensor, VideoClip or an iterable of them, not {type(frames).__name__}"
        )
    return frames


def _as_frames(piece):
    """uint8 (num_frames, height, width, 3) of a piece."""
    piece = getattr(piece, "frames", piece)
    if hasattr(piece, "detach"):
        piece = piece.detach().cpu().numpy()
    if not isinstance(piece, np.ndarray):
        try:
            from PIL import Image
        except ImportError:
            Image = None
        if Image is not None and isinstance(piece, Image.Image):
            piece = np.asarray(piece.convert("RGB"))
        elif isinstance(piece, (list, tuple)) and piece:
            return np.concatenate([_as_frames(frame) for frame in piece])
        else:
            raise TypeError(f"frames must be arrays, tensors or pictures, not {type(piece).__name__}")
    if piece.dtype != np.uint8:
        raise TypeError(f"frames must be uint8, not {piece.dtype}; a processor's postprocess() gives bytes")
    if piece.ndim == 3:
        piece = piece[None]
    if piece.ndim != 4 or piece.shape[3] not in (1, 3):
        raise ValueError(f"frames must have shape (num_frames, height, width, 3), got {piece.shape}")
    if piece.shape[3] == 1:
        piece = np.repeat(piece, 3, axis=3)
    if 0 in piece.shape[1:]:
        raise ValueError(f"frames have no pixels: shape {piece.shape}")
    return np.ascontiguousarray(piece)


def _rate(fps):
    if isinstance(fps, bool) or not isinstance(fps, (Real, Fraction)):
        raise TypeError(f"fps must be a number, not {type(fps).__name__}")
    if not math.isfinite(fps) or fps <= 0:
        raise ValueError(f"fps must be positive and finite, got {fps}")
    rate = Fraction(fps).limit_denominator(_MAX_RATE_DENOMINATOR)
    return rate if rate > 0 else Fraction(fps).limit_denominator(1_000_000)


class VideoWriter:
    """Writes a video piece by piece; a context manager. Arguments and errors are those of `write_video`.

    ```python
    with VideoWriter("out.mp4", fps=30) as writer:
        for chunk in iter_video("in.mp4", chunk_frames=16):
            writer.write(chunk)
    ```
    The file appears when the block ends without an error.
    """

    def __init__(self, path, fps, *, codec=None, crf=None, pixel_format=None, options=None, overwrite=True):
        self.path = Path(path)
        self.fps = _rate(fps)
        self.num_frames = 0
        if crf is not None and not (isinstance(crf, Real) and 0 <= crf <= 63):
            raise ValueError(f"crf must be between 0 and 63, got {crf!r}")
        self._size = None
        self._backend = None
        self._closed = False
        suffix = self.path.suffix.lower()
        if suffix and suffix not in _FORMATS:
            raise ValueError(
                f"{path}: unknown suffix {suffix!r}; choose from {', '.join(_FORMATS)}, or none for a folder"
            )
        if not overwrite and self.path.exists():
            raise FileExistsError(f"{path}: exists already")
        if suffix and self.path.is_dir():
            raise IsADirectoryError(f"{path}: is a folder")
        if not suffix and self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise FileExistsError(f"{path}: exists already and is not an empty folder")
        if not suffix and any(value is not None for value in (codec, crf, pixel_format, options)):
            raise ValueError("codec, crf, pixel_format and options do not apply to a folder of PNGs")
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"{path}: the folder {self.path.parent} does not exist")
        self._make = lambda size: (
            _FolderBackend(self.path, self.fps)
            if not suffix
            else _FileBackend(self.path, self.fps, size, _FORMATS[suffix], codec, crf, pixel_format, options)
        )

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(self, frames):
        """Appends uint8 frames (num_frames, height, width, 3), one frame, a VideoClip, or a list of them."""
        if self._closed:
            raise ValueError(f"{self.path}: the writer is closed")
        frames = _as_frames(frames)
        if not len(frames):
            return
        size = frames.shape[1:3]
        if self._size is None:
            self._size = size
            with self._errors():
                self._backend = self._make(size)
        elif size != self._size:
            raise ValueError(
                f"{self.path}: frames of {size[1]}x{size[0]} after frames of {self._size[1]}x{self._size[0]} pixels"
            )
        with self._errors():
            for frame in frames:
                self._backend.write(frame)
        self.num_frames += len(frames)

    def close(self):
        """Finishes the file and puts it in its place. ValueError when no frame was written."""
        if self._closed:
            return
        if self._backend is None:
            self._closed = True
            raise ValueError(f"{self.path}: no frames to write")
        with self._errors():
            self._backend.finish()
        self._closed = True

    def abort(self):
        """Drops everything written so far; nothing is left."""
        if not self._closed and self._backend is not None:
            self._backend.discard()
        self._closed = True

    @contextlib.contextmanager
    def _errors(self):
        """Any failure removes the unfinished file; FFmpeg's errors become OSError or ValueError with the path."""
        import av

        try:
            yield
        except BaseException as error:
            self.abort()
            if isinstance(error, av.error.FFmpegError):
                if isinstance(error, (ValueError, av.error.ExternalError)) or not isinstance(error, OSError):
                    raise ValueError(
                        f"{self.path}: cannot be encoded with these settings ({error.strerror})"
                    ) from error
                raise OSError(error.errno, f"writing failed ({error.strerror})", str(self.path)) from error
            if isinstance(error, OSError) and error.filename is None:
                raise OSError(error.errno, f"writing failed ({error.strerror})", str(self.path)) from error
            raise


class _FileBackend:
    def __init__(self, path, fps, size, form, codec, crf, pixel_format, options):
        import av

        self._path = path
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.part-", dir=path.parent)
        os.close(handle)
        self._temporary = Path(temporary)
        self._container = None
        try:
            name = codec or form.codec
            settings = dict(form.options if codec is None else {})
            crf = form.crf if crf is None and codec in (None, form.codec) else crf
            if crf is not None:
                settings["crf"] = str(crf)
            settings.update({key: str(value) for key, value in (options or {}).items()})
            height, width = size
            if pixel_format is None:
                pixel_format = form.pixel_format
                if pixel_format == "yuv420p" and name in ("libx264", "libx265") and (height % 2 or width % 2):
                    pixel_format = "yuv444p"
            self._container = av.open(
                f"file:{self._temporary}", "w", format=form.muxer, options={"fflags": "+bitexact", **form.muxer_options}
            )
            self._graph = None
            if name == "gif" and pixel_format == "pal8":
                self._graph = _palette_graph(width, height, fps)
            try:
                self._stream = self._container.add_stream(name, rate=fps, options=settings)
            except (av.codec.codec.UnknownCodecError, ValueError) as error:
                raise ValueError(f"{path}: {form.muxer} files cannot hold codec {name!r}: {error}") from error
            self._stream.width, self._stream.height = width, height
            try:
                self._stream.pix_fmt = pixel_format
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            self._stream.codec_context.time_base = 1 / fps
            self._count = 0
            self._time_base = 1 / fps
            self._stream.codec_context.open()
            unknown = sorted(self._stream.codec_context.options)  # what the encoder did not take
            if unknown:
                raise ValueError(f"{path}: encoder {name!r} has no option {', '.join(unknown)}")
        except BaseException:
            self.discard()
            raise

    def write(self, array):
        import av

        frame = av.VideoFrame.from_ndarray(array, format="rgb24")
        frame.pts, frame.time_base = self._count, self._time_base
        self._count += 1
        if self._graph is not None:
            self._graph.push(frame)
            frame = self._graph.pull()
            frame.pts, frame.time_base = self._count - 1, self._time_base
        self._container.mux(self._stream.encode(frame))

    def finish(self):
        self._container.mux(self._stream.encode(None))
        self._container.close()
        self._container = None
        with open(self._temporary, "rb+") as file:
            os.fsync(file.fileno())  # delayed allocation: a full disk may show only now
        problem = container_problem(self._temporary)  # FFmpeg does not report every failed write
        if problem:
            raise OSError(errno.EIO, f"writing failed ({problem})", str(self._path))
        os.chmod(self._temporary, 0o666 & ~_umask())
        os.replace(self._temporary, self._path)

    def discard(self):
        if self._container is not None:
            with contextlib.suppress(Exception):
                self._container.close()
        with contextlib.suppress(FileNotFoundError):
            self._temporary.unlink()


def _palette_graph(width, height, fps):
    """A palette of its own for every frame: best quality that needs no second pass over the video."""
    import av

    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=1 / fps)
    split = graph.add("split")
    palette = graph.add("palettegen", "stats_mode=single:reserve_transparent=0")
    use = graph.add("paletteuse", "new=1:dither=bayer:bayer_scale=5")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return graph


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


class _FolderBackend:
    def __init__(self, path, fps):
        self._path, self._fps = path, fps
        self._temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.part-", dir=path.parent))
        self._count = 0

    def write(self, array):
        from PIL import Image

        Image.fromarray(array).save(self._temporary / f"frame_{self._count:06d}.png")
        self._count += 1

    def finish(self):
        facts = {"fps": float(self._fps), "num_frames": self._count}
        (self._temporary / FOLDER_FACTS).write_text(json.dumps(facts) + "\n")
        os.chmod(self._temporary, 0o777 & ~_umask())
        if self._path.is_dir():
            self._path.rmdir()
        os.replace(self._temporary, self._path)

    def discard(self):
        shutil.rmtree(self._temporary, ignore_errors=True)
