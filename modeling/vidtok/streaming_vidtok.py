"""VidTok from file to file in constant memory, and the file its tokens travel in."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ...errors import TokenFileError
from ...video import VideoClip, VideoWriter, iter_video
from .video_processing_vidtok import VidTokVideoProcessor

_FORMAT = "cinetok-vidtok-tokens"
_FORMAT_VERSION = 1


@dataclass
class VidTokTokens:
    """The tokens of a video and everything needed to decode them.

    Attributes:
        latents: (1, latent_channels, num_latent_frames, latent_height, latent_width), or None.
        indices: (1, num_latent_frames, latent_height, latent_width), int32, or None (FSQ models).
        num_frames, height, width: of the encoded video.
        fps: frames per second of the encoded video.
        num_front_frames: decoded frames to leave out in front (v1.1 pads there).
        window_latent_frames: latent frames per independent window of a non-causal model, 0 for causal models.
        fingerprint: of the model that made them, see `VidTokModel.fingerprint`.
        source: where the video came from, for information.
    """

    latents: torch.Tensor | None
    indices: torch.Tensor | None
    num_frames: int
    height: int
    width: int
    fps: float
    fingerprint: str
    num_front_frames: int = 0
    window_latent_frames: int = 0
    source: str = ""
    extra: dict = field(default_factory=dict)

    @property
    def num_latent_frames(self):
        return self.indices.shape[1] if self.indices is not None else self.latents.shape[2]

    def facts(self):
        """Everything but the tensors, as a dictionary."""
        return {name: value for name, value in asdict(self).items() if name not in ("latents", "indices")}

    def save(self, path):
        """Writes a safetensors file with the facts in its header; atomic.

        Returns:
            Path of the file.
        """
        path = Path(path)
        name = "indices" if self.indices is not None else "latents"
        tensors = {name: getattr(self, name).contiguous()}
        header = {"format": _FORMAT, "format_version": str(_FORMAT_VERSION), "facts": json.dumps(self.facts())}
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.part-", dir=path.parent)
        os.close(handle)
        try:
            save_file(tensors, temporary, metadata=header)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except SafetensorError as error:
            raise OSError(f"{path}: writing failed ({error})") from error
        finally:
            Path(temporary).unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path):
        """Reads a file written by `save`.

        Raises:
            TokenFileError: no such file, damaged, or not a file of VidTok tokens.
        """
        path = Path(path)
        if not path.is_file():
            raise TokenFileError(f"{path}: no such file of tokens")
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise TokenFileError(f"{path}: not a readable safetensors file ({error})") from error
        if header.get("format") != _FORMAT:
            raise TokenFileError(f"{path}: not a file of VidTok tokens; make one with `cinetok tokenize`")
        if header.get("format_version") != str(_FORMAT_VERSION):
            raise TokenFileError(f"{path}: format version {header.get('format_version')} is not known to this release")
        try:
            facts = json.loads(header["facts"])
            if not isinstance(facts, Mapping) or not {"latents", "indices"} & set(tensors):
                raise KeyError("latents or indices")
            return cls(latents=tensors.get("latents"), indices=tensors.get("indices"), **facts)
        except (KeyError, TypeError, ValueError) as error:
            raise TokenFileError(f"{path}: incomplete ({error!r}); encode the video again") from error


class VidTokFilesMixin:
    """`encode_video` and `decode_to_file` for `VidTokModel`."""

    def fingerprint(self):
        """Short hash of the architecture and of a sample of the weights: tells whether tokens fit this model."""
        config = self.config
        facts = [config.is_causal, config.version, config.regularizer, config.latent_channels, config.fsq_levels]
        digest = hashlib.sha256(json.dumps(facts).encode())
        for name, tensor in sorted(self.state_dict().items()):
            sample = tensor.detach().flatten()[:: max(1, tensor.numel() // 16)].to("cpu", torch.float16)
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def encode_video(
        self,
        source,
        *,
        processor=None,
        chunk_frames=16,
        fps=None,
        start=0.0,
        end=None,
        num_frames=None,
        sample_posterior=False,
        generator=None,
        tile_size=None,
        tile_overlap=None,
        progress=False,
    ):
        """Encodes a video file, or an iterator over pieces of one, in constant memory.

        Causal models give exactly the latents of the whole clip; non-causal ones encode independent windows of
        `chunk_frames` frames.

        Args:
            source: path of a video, `VideoClip`, uint8 array (num_frames, height, width, 3), or an iterable of such pieces.
            processor: `VidTokVideoProcessor` applied to every piece; None keeps the video's size.
            chunk_frames: frames read and encoded at a time, a multiple of the temporal compression.
            fps, start, end: rate and time range (seconds) read from a file; for arrays and iterables `fps` is their rate.
            num_frames: length of an iterable, if known. v1.1 pads in front of the first frame by what the length asks for;
                if it is not known, the video is completed at its end instead (`decode_to_file` removes either).
            sample_posterior, generator, tile_size, tile_overlap: see `encode`.
            progress: show a progress bar.

        Returns:
            `VidTokTokens`.

        Raises:
            VideoReadError: the file cannot be read to its end. ValueError: wrong arguments, no frames, changing sizes.
        """
        factor = self.config.temporal_compression_ratio
        if chunk_frames < factor or chunk_frames % factor:
            raise ValueError(f"chunk_frames must be a multiple of {factor}, got {chunk_frames}")
        processor = processor or VidTokVideoProcessor(do_resize=False, do_center_crop=False)
        reads_file = isinstance(source, (str, Path))
        if reads_file and self.config.version == "1.1":
            num_frames = sum(len(piece) for piece in iter_video(source, chunk_frames=64, fps=fps, start=start, end=end))
        if reads_file:
            pieces = iter_video(source, chunk_frames=chunk_frames, fps=fps, start=start, end=end)
        else:
            pieces = _pieces(source)
            if num_frames is None and hasattr(source, "__len__") and not isinstance(source, (list, tuple)):
                num_frames = len(source)
        state = _EncodeState(self, num_frames, sample_posterior, generator, tile_size, tile_overlap)
        rate, name = fps, str(source) if reads_file else ""
        with tqdm(total=num_frames, desc="encode", unit="frame", disable=not progress) as bar:
            for frames in _rechunk(pieces, chunk_frames):
                if rate is None and isinstance(frames, VideoClip):
                    rate = frames.fps
                video = processor(getattr(frames, "frames", frames), return_tensors="pt")["pixel_values_videos"]
                state.add(video.to(self.device, self.dtype))
                bar.update(video.shape[1])
        return state.finish(rate, name)

    @torch.no_grad()
    def decode_frames(self, tokens, *, chunk_latent_frames=4, tile_size=None, tile_overlap=None):
        """Decodes `VidTokTokens` piece by piece.

        Yields:
            tensors (1, some frames, channels, height, width) in about [-1, 1]; together exactly the encoded frames.

        Raises:
            TokenFileError: the tokens were made by another model.
        """
        if tokens.fingerprint != self.fingerprint():
            raise TokenFileError(
                f"these tokens were made by another model (fingerprint {tokens.fingerprint}, this model's is "
                f"{self.fingerprint()}); decode them with the model that made them"
            )
        skip, left = tokens.num_front_frames, tokens.num_frames
        window = tokens.window_latent_frames
        step = window or chunk_latent_frames
        cache = None
        for first in range(0, tokens.num_latent_frames, step):
            is_last = first + step >= tokens.num_latent_frames
            piece = (
                {"indices": tokens.indices[:, first : first + step].to(self.device)}
                if tokens.indices is not None
                else {"latents": tokens.latents[:, :, first : first + step].to(self.device, self.dtype)}
            )
            stream = {} if window else {"cache": cache, "use_cache": True, "is_last": is_last}
            output = self.decode(
                **piece,
                **stream,
                height=tokens.height,
                width=tokens.width,
                tile_size=tile_size,
                tile_overlap=tile_overlap,
            )
            cache = output.cache
            frames = output.reconstruction[:, skip:][:, :left]
            skip = max(0, skip - output.reconstruction.shape[1])
            left -= frames.shape[1]
            if frames.shape[1]:
                yield frames
        if left:
            raise TokenFileError(f"the tokens decode to {left} frames fewer than the {tokens.num_frames} they promise")

    def decode_to_file(
        self,
        tokens,
        path,
        *,
        processor=None,
        fps=None,
        chunk_latent_frames=4,
        tile_size=None,
        tile_overlap=None,
        progress=False,
        **options,
    ):
        """Decodes tokens into a video file in constant memory.

        Args:
            tokens: `VidTokTokens`, or the path of a file of them.
            path: video file to write (see `write_video`); it appears only when it is complete.
            processor: undoes the normalisation; None for the default one.
            fps: rate of the file; None for the encoded video's.
            chunk_latent_frames: latent frames decoded at a time.
            progress: show a progress bar.
            options: further arguments of `VideoWriter` (crf, codec, ...).

        Returns:
            Path of the file.
        """
        if not isinstance(tokens, VidTokTokens):
            tokens = VidTokTokens.load(tokens)
        processor = processor or VidTokVideoProcessor()
        with (
            VideoWriter(path, fps or tokens.fps, **options) as writer,
            tqdm(total=tokens.num_frames, desc="decode", unit="frame", disable=not progress) as bar,
        ):
            for frames in self.decode_frames(
                tokens, chunk_latent_frames=chunk_latent_frames, tile_size=tile_size, tile_overlap=tile_overlap
            ):
                writer.write(processor.postprocess(frames)[0])
                bar.update(frames.shape[1])
        return writer.path


class _EncodeState:
    """Collects the tokens of a video that comes in pieces."""

    def __init__(self, model, num_frames, sample_posterior, generator, tile_size, tile_overlap):
        self.model, self.expected = model, num_frames
        self.options = {
            "sample_posterior": sample_posterior,
            "generator": generator,
            "tile_size": tile_size,
            "tile_overlap": tile_overlap,
        }
        self.completes_end = model.config.version == "1.1" and num_frames is None
        self.cache, self.waiting, self.shape = None, None, None
        self.num_frames, self.tokens, self.window = 0, [], 0

    def add(self, video):
        """A piece (1, some frames, channels, height, width); it is encoded when the next one comes."""
        if self.shape is not None and video.shape[2:] != self.shape:
            raise ValueError(
                f"the size changed from {tuple(self.shape[1:])} to {tuple(video.shape[3:])} within the video"
            )
        self.shape = video.shape[2:]
        if self.waiting is not None:
            self._encode(self.waiting, is_last=False)
        self.waiting = video
        self.num_frames += video.shape[1]

    def finish(self, fps, source):
        model = self.model
        if self.waiting is None:
            raise ValueError("the video has no frames")
        if self.expected is not None and self.expected != self.num_frames:
            raise ValueError(f"num_frames={self.expected} was announced, but {self.num_frames} frames came")
        factor = model.config.temporal_compression_ratio
        front = 0
        if self.completes_end:
            front = factor - 1
            missing = -(self.num_frames + front) % factor
            last = self.waiting[:, -1:].expand(-1, missing, -1, -1, -1)
            self.waiting = torch.cat([self.waiting, last], dim=1)
        elif model.config.version == "1.1":
            front = -self.num_frames % factor
        self._encode(self.waiting, is_last=True)
        has_indices = model.config.regularizer == "fsq"
        tokens = torch.cat(self.tokens, dim=1 if has_indices else 2)
        return VidTokTokens(
            latents=None if has_indices else tokens,
            indices=tokens.to(torch.int32) if has_indices else None,
            num_frames=self.num_frames,
            height=self.shape[1],
            width=self.shape[2],
            fps=float(fps or 0.0),
            fingerprint=model.fingerprint(),
            num_front_frames=front,
            window_latent_frames=self.window,
            source=source,
        )

    def _encode(self, video, is_last):
        if self.model.config.is_causal:
            # Unknown length: as if it were one more than a multiple of the compression, completed at the end.
            total = self.expected if not self.completes_end else 1
            stream = {"cache": self.cache, "use_cache": True, "is_last": is_last, "num_frames": total}
        else:
            stream = {}
        output = self.model.encode(video, **stream, **self.options)
        self.cache = output.cache
        tokens = output.indices if output.indices is not None else output.latents
        if not self.model.config.is_causal and not self.window:
            self.window = tokens.shape[1] if output.indices is not None else tokens.shape[2]
        self.tokens.append(tokens.cpu())


def _pieces(source):
    if isinstance(source, VideoClip) or hasattr(source, "ndim"):
        return [source]
    if not isinstance(source, Iterable):
        raise TypeError(
            f"cannot read a video from {type(source).__name__}; pass a path, VideoClip, array or an iterable"
        )
    return source


def _rechunk(pieces, chunk_frames):
    """Yields pieces of exactly `chunk_frames` frames (the last one may have fewer); clips keep their rate."""
    left, rate = None, None
    for piece in pieces:
        rate = piece.fps if isinstance(piece, VideoClip) else rate
        frames = torch.as_tensor(getattr(piece, "frames", piece))
        left = frames if left is None else torch.cat([left, frames])
        while left.shape[0] >= chunk_frames:
            yield _piece(left[:chunk_frames], rate)
            left = left[chunk_frames:]
    if left is not None and left.shape[0]:
        yield _piece(left, rate)


def _piece(frames, rate):
    if rate is None:
        return frames
    return VideoClip(
        frames=frames.numpy(), fps=rate, timestamps=torch.arange(frames.shape[0]).numpy() / rate, source=""
    )
