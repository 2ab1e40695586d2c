"""Videos that flow through a tokenizer piece by piece, and where a reconstruction goes: file, quality, plot, picture.

Pieces are float tensors (1, some frames, 3, height, width) in [0, 1].
"""

import contextlib

import numpy as np
import torch
from tqdm.auto import tqdm

from ..metrics import VideoQuality
from ..video import VideoWriter, iter_video, plot_quality, save_comparison_picture, side_by_side
from . import common

_WINDOWS_AT_ONCE = 4
_SSIM_MIN_SIZE = 11
_PICTURE_FRAMES = 32  # kept, evenly spread, for a picture of a video whose length is not known beforehand


def unit_range(pixels, processor):
    """Model range -> [0, 1], as `postprocess` of the processor does it."""
    pixels = pixels.float().cpu()
    if not processor.do_normalize:
        return pixels.clamp(0, 1)
    if all(m == 0.5 for m in processor.image_mean) and all(s == 0.5 for s in processor.image_std):
        return pixels.clamp(-1, 1).add(1).div(2)
    mean, std = (torch.tensor(getattr(processor, name)).view(-1, 1, 1) for name in ("image_mean", "image_std"))
    return pixels.mul(std).add(mean).clamp(0, 1)


def to_bytes(pixels, rounding="truncate"):
    """[0, 1] (1, num_frames, 3, height, width) -> uint8 array (num_frames, height, width, 3)."""
    scaled = pixels[0] * 255
    scaled = scaled.round() if rounding == "nearest" else scaled
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).numpy()


def prepared_pieces(source, processor, chunk_frames, **reading):
    """Yields (pixel values in the model's range, fps) of a file, piece by piece."""
    for clip in iter_video(source, chunk_frames=chunk_frames, **reading):
        yield processor(clip.frames, num_frames=None, return_tensors="pt")["pixel_values_videos"], clip.fps


def encode_vidtok(model, processor, source, args, progress, **reading):
    """`VidTokTokens` of a file."""
    return model.encode_video(
        source,
        processor=processor,
        chunk_frames=args.chunk_frames or common.CHUNK_FRAMES,
        sample_posterior=args.sample,
        generator=torch.Generator().manual_seed(args.seed),
        tile_size=args.tile_size,
        progress=progress,
        **reading,
    )


def vidtok_pairs(model, processor, source, args, progress, **reading):
    """(fps, number of frames, iterator over pairs (input, reconstruction))."""
    tokens = encode_vidtok(model, processor, source, args, progress, **reading)
    decoded = model.decode_frames(tokens, tile_size=args.tile_size)
    inputs = (
        pixels for pixels, _ in prepared_pieces(source, processor, args.chunk_frames or common.CHUNK_FRAMES, **reading)
    )
    pairs = ((unit_range(one, processor), unit_range(other, processor)) for one, other in _in_step(inputs, decoded))
    return tokens.fps, tokens.num_frames, pairs


def _in_step(inputs, decoded):
    """Cuts `inputs` into pieces as long as those of `decoded`."""
    left = None
    for frames in decoded:
        wanted = frames.shape[1]
        while left is None or left.shape[1] < wanted:
            piece = next(inputs)
            left = piece if left is None else torch.cat([left, piece], dim=1)
        yield left[:, :wanted], frames
        left = left[:, wanted:]


def vidtwin_pairs(model, processor, source, args, branch, **reading):
    """(fps, None, iterator over pairs (input, reconstruction)); consecutive windows, a few at a time."""
    generator = torch.Generator().manual_seed(args.seed)
    pieces = prepared_pieces(source, processor, _WINDOWS_AT_ONCE * model.config.num_frames, **reading)
    first, fps = next(pieces)

    @torch.no_grad()
    def pairs():
        pixels = first
        while pixels is not None:
            output = model(
                pixels.to(model.device, model.dtype),
                sample_posterior=args.sample,
                generator=generator,
                branch=branch,
                window_batch_size=_WINDOWS_AT_ONCE,
                return_loss=False,
            )
            yield unit_range(pixels, processor), unit_range(output.reconstruction, processor)
            pixels, _ = next(pieces, (None, None))

    return fps, None, pairs()


class _EvenlySpread:
    """Keeps a bounded number of items, evenly spread over a sequence of unknown length."""

    def __init__(self, limit):
        self.limit, self.stride, self.count, self.items = limit, 1, 0, []

    def add(self, item):
        if self.count % self.stride == 0:
            self.items.append(item)
            if len(self.items) > self.limit:
                self.items = self.items[::2]
                self.stride *= 2
        self.count += 1


def write_reconstruction(
    pairs, fps, num_frames, *, output=None, only=False, plot=None, picture=None, progress=False, title=None
):
    """Runs through pairs (input, reconstruction) and writes what is asked for.

    Args:
        pairs: iterator over pairs of pieces in [0, 1]; fps: their rate; num_frames: how many, if known.
        output: video file (input | reconstruction, or with `only` the reconstruction), or None.
        plot, picture: picture files, or None.
        progress: show a progress bar.
        title: of the plot.

    Returns:
        `VideoQuality` of all frames.
    """
    quality = None
    kept = _EvenlySpread(_PICTURE_FRAMES)
    with (
        VideoWriter(output, fps) if output is not None else contextlib.nullcontext() as writer,
        tqdm(total=num_frames, desc="reconstruct", unit="frame", disable=not progress) as bar,
    ):
        for inputs, frames in pairs:
            if quality is None:
                small = min(inputs.shape[-2:]) < _SSIM_MIN_SIZE
                quality = VideoQuality(("psnr",) if small else ("psnr", "ssim"))
            quality.update(frames.transpose(1, 2), inputs.transpose(1, 2))
            left, right = to_bytes(inputs, "nearest"), to_bytes(frames)
            if writer is not None:
                writer.write(right if only else side_by_side(left, right))
            if picture is not None:
                for pair in zip(left, right):
                    kept.add(pair)
            bar.update(len(right))
    if picture is not None:
        originals, reconstructions = (np.stack(frames) for frames in zip(*kept.items))
        save_comparison_picture(picture, originals, reconstructions)
    if plot is not None:
        plot_quality(plot, quality.per_frame, fps, title)
    return quality


@torch.no_grad()
def encode_vidtwin(model, processor, source, args, progress, **reading):
    """(tensors, facts) of a file of VidTwin tokens: the windows of the video, the last completed by repetition."""
    generator = torch.Generator().manual_seed(args.seed)
    parts, num_frames, fps = [], 0, None
    pieces = prepared_pieces(source, processor, _WINDOWS_AT_ONCE * model.config.num_frames, **reading)
    with tqdm(desc="encode", unit="frame", disable=not progress) as bar:
        for pixels, rate in pieces:
            fps = rate
            windows = model.split_windows(pixels.to(model.device, model.dtype))
            for window in windows.split(1):  # one by one: numbers are drawn in the order of `forward`
                encoded = model.encode(window, sample_posterior=args.sample, generator=generator)
                parts.append([encoded.structure.cpu(), encoded.dynamics_x.cpu(), encoded.dynamics_y.cpu()])
            num_frames += pixels.shape[1]
            bar.update(pixels.shape[1])
    names = ("structure", "dynamics_x", "dynamics_y")
    tensors = {name: torch.cat(values) for name, values in zip(names, zip(*parts))}
    facts = {"system": "vidtwin", "num_frames": num_frames, "fps": float(fps), "source": str(source)}
    return tensors, {**facts, "height": model.config.height, "width": model.config.width}


@torch.no_grad()
def decode_vidtwin(model, processor, tensors, num_frames, args, fps):
    """Writes the video that VidTwin tokens stand for."""
    latents = [tensors[name].to(model.device, model.dtype) for name in ("structure", "dynamics_x", "dynamics_y")]
    left = num_frames
    with (
        VideoWriter(args.output, fps) as writer,
        tqdm(total=num_frames, desc="decode", unit="frame", disable=not common.progress(args)) as bar,
    ):
        for window in zip(*(values.split(1) for values in latents)):
            frames = model.decode(*window, branch=args.branch).reconstruction[:, :left]
            writer.write(to_bytes(unit_range(frames, processor)))
            left -= frames.shape[1]
            bar.update(frames.shape[1])


@torch.no_grad()
def reenact(model, processor, args, progress, **reading):
    """Writes structure | dynamics | result (and with `args.views` structure alone | dynamics alone).

    Returns:
        dict of `num_frames` and `fps`.
    """
    generator = torch.Generator().manual_seed(args.seed)
    chunk = _WINDOWS_AT_ONCE * model.config.num_frames
    first, second = (prepared_pieces(path, processor, chunk, **reading) for path in (args.structure, args.dynamics))
    fps, num_frames = None, 0
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(desc="reenact", unit="frame", disable=not progress))
        writer = None
        while True:
            (one, rate), (other, _) = next(first, (None, None)), next(second, (None, None))
            lengths = [0 if pixels is None else pixels.shape[1] for pixels in (one, other)]
            if lengths[0] != lengths[1] and not args.shortest:
                raise common.CommandError(
                    f"{args.structure} and {args.dynamics} differ in length; pass --shortest, or --end SECONDS"
                )
            length = min(lengths)
            if not length:
                break
            if writer is None:
                fps = rate
                writer = stack.enter_context(VideoWriter(args.output, fps))
            videos = [pixels[:, :length].to(model.device, model.dtype) for pixels in (one, other)]
            result = model.reenact(*videos, sample_posterior=args.sample, generator=generator).reconstruction
            panels = [result] if args.only else [*videos, result]
            if args.views:
                for video, branch in zip(videos, ("structure", "dynamics")):
                    panels.append(model(video, branch=branch, sample_posterior=False, return_loss=False).reconstruction)
            writer.write(
                np.concatenate([to_bytes(unit_range(panel, processor), "nearest") for panel in panels], axis=2)
            )
            num_frames += length
            bar.update(length)
    return {"num_frames": num_frames, "fps": fps}
