"""One video through a tokenizer as VidTok's evaluation does it (arXiv 2412.13061, section 4.1)."""

import numpy as np
import torch

from ..metrics import VideoQuality
from ..video import iter_video
from ..video.sampling import frame_interval
from .streams import unit_range

_READ_FRAMES = 16


@torch.no_grad()
def evaluate_video(model, processor, path, mode, args, generator):
    """`VideoQuality` of a video.

    Args:
        mode: "clips": consecutive, independent clips of `args.chunk_frames` (causal: one more) frames, the last one
            completed by repeating its last frame, as the authors' script does. "whole": one stream.
        args: `fps` (every n-th frame is taken), `chunk_frames` and `sample`.
        generator: of the samples.
    """
    quality = VideoQuality()
    if mode == "whole":
        count = sum(len(frames) for frames in _sampled(path, args.fps, _READ_FRAMES))
        tokens = model.encode_video(
            _sampled(path, args.fps, _READ_FRAMES),
            processor=processor,
            num_frames=count,
            sample_posterior=args.sample,
            generator=generator,
        )
        inputs = (_prepare(processor, frames) for frames in _sampled(path, args.fps, _READ_FRAMES))
        left = None
        for frames in model.decode_frames(tokens):
            while left is None or left.shape[1] < frames.shape[1]:
                piece = next(inputs)
                left = piece if left is None else torch.cat([left, piece], dim=1)
            _add(quality, frames, left[:, : frames.shape[1]], processor)
            left = left[:, frames.shape[1] :]
        return quality
    if model.config.model_type == "vidtwin":
        length = model.config.num_frames
    else:
        length = args.chunk_frames + (1 if model.config.is_causal else 0)
    for frames in _sampled(path, args.fps, length):
        frames = np.concatenate([frames, np.repeat(frames[-1:], length - len(frames), axis=0)])
        pixels = _prepare(processor, frames)
        output = model(
            pixels.to(model.device, model.dtype),
            sample_posterior=args.sample,
            generator=generator,
            return_loss=False,
        )
        _add(quality, output.reconstruction, pixels, processor)
    return quality


def _prepare(processor, frames):
    return processor(frames, num_frames=None, return_tensors="pt")["pixel_values_videos"]


def _add(quality, frames, inputs, processor):
    quality.update(*(unit_range(pixels, processor).transpose(1, 2) for pixels in (frames, inputs)))


def _sampled(path, fps, length):
    """Every n-th frame of a file, in arrays of `length` frames (the last one may have fewer)."""
    kept, index, interval = [], 0, None
    for clip in iter_video(path, chunk_frames=_READ_FRAMES):
        interval = interval or frame_interval(clip.fps, fps)
        for frame in clip.frames:
            if index % interval == 0:
                kept.append(frame)
            index += 1
        while len(kept) >= length:
            yield np.stack(kept[:length])
            kept = kept[length:]
    if kept:
        yield np.stack(kept)
