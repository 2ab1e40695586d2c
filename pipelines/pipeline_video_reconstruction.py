"""Video -> latents -> video with the tokenizers VidTok (arXiv 2412.13061) and VidTwin (arXiv 2412.17726)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from ..metrics import VideoQuality

OUTPUT_TYPES = ("pil", "np", "pt")
BRANCHES = ("all", "structure", "dynamics")
# SSIM's window needs frames of this size; smaller videos are measured by PSNR alone.
_SSIM_MIN_SIZE = 11


@dataclass
class VideoReconstructionOutput(BaseOutput):
    """What `VideoReconstructionPipeline` returns.

    Attributes:
        frames: "pt": float tensor (batch, num_frames, 3, height, width) in [0, 1]; "np": the same as an array (batch,
            num_frames, height, width, 3); "pil": list (batch) of lists of images.
        inputs: the prepared input (resized, cropped) in the same form, or None unless `return_inputs=True`.
        quality: one dictionary per video with "psnr" (dB), "ssim" (frames of 11x11 pixels and more), "num_frames" and
            "per_frame" (name -> list of values), or None unless `compute_quality=True`.
        fps: frames per second of every video, None where the input did not say.
    """

    frames: torch.Tensor | np.ndarray | list
    inputs: torch.Tensor | np.ndarray | list | None = None
    quality: list | None = None
    fps: list | None = None


class VideoReconstructionPipeline(DiffusionPipeline):
    r"""Compresses videos to latents and decodes them again, any length, piece by piece.

    Args:
        tokenizer (`VidTokModel` or `VidTwinModel`): encodes and decodes.
        video_processor (`VidTokVideoProcessor` or `VidTwinVideoProcessor`): reads, resizes and normalises videos.
    """

    model_cpu_offload_seq = "tokenizer"
    _callback_tensor_inputs = ["frames", "latents"]

    def __init__(self, tokenizer, video_processor):
        super().__init__()
        self.register_modules(tokenizer=tokenizer, video_processor=video_processor)

    @property
    def is_vidtwin(self):
        """Whether the tokenizer separates structure and dynamics."""
        return self.tokenizer.config.model_type == "vidtwin"

    # ------------------------------------------------------------------------------------------------------- inputs

    def check_inputs(
        self,
        branch,
        chunk_frames,
        tile_size,
        tile_overlap,
        keep_size,
        generator,
        batch_size,
        output_type,
        callback_tensors,
    ):
        """Raises ValueError for arguments that contradict each other or the tokenizer."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        if branch not in BRANCHES:
            raise ValueError(f"branch must be one of {', '.join(BRANCHES)}, got {branch!r}")
        if not self.is_vidtwin and branch != "all":
            raise ValueError(f'branch="{branch}" is for VidTwin; VidTok has no separate structure and dynamics')
        if self.is_vidtwin and (tile_size is not None or tile_overlap is not None):
            raise ValueError("tile_size and tile_overlap are for VidTok; VidTwin's frame size is part of the model")
        if self.is_vidtwin and keep_size:
            raise ValueError(
                f"keep_size is for VidTok; this VidTwin takes {self.tokenizer.config.height}x"
                f"{self.tokenizer.config.width} pixels"
            )
        if chunk_frames < 1:
            raise ValueError(f"chunk_frames must be at least 1, got {chunk_frames}")
        if isinstance(generator, (list, tuple)) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for {batch_size} videos; give one, or one per video")
        unknown = sorted(set(callback_tensors) - set(self._callback_tensor_inputs))
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs {unknown}: choose from {', '.join(self._callback_tensor_inputs)}"
            )

    def prepare_video(self, video, *, fps=None, num_frames=None, keep_size=False):
        """Videos -> (pixel values (batch, num_frames, 3, height, width) in [-1, 1], list of fps).

        Args:
            video: see `__call__`.
            fps: rate at which files are read; None keeps theirs (or the processor's).
            num_frames: frames read of files; None reads all.
            keep_size: neither resize nor crop.
        """
        options = {"num_frames": num_frames}
        if fps is not None:
            options["fps"] = fps
        if keep_size:
            options.update(do_resize=False, do_center_crop=False)
        prepared = self.video_processor(video, return_metadata=True, return_tensors="pt", **options)
        return prepared["pixel_values_videos"], [facts["fps"] for facts in prepared["video_metadata"]]

    # ----------------------------------------------------------------------------------------------------- the parts

    def _placement(self):
        """Device and dtype of the tokenizer, which is brought there if it is offloaded between calls (offloading hooks
        only watch `forward`, not `encode` and `decode`)."""
        hook = getattr(self.tokenizer, "_hf_hook", None)
        if hook is not None and hasattr(hook, "pre_forward"):
            hook.pre_forward(self.tokenizer)
        return self._execution_device, self.tokenizer.dtype

    def _pieces(self, pixels, branch, sample_posterior, generator, chunk_frames, tile_size, tile_overlap):
        """Yields (frames (batch, some, 3, height, width) in about [-1, 1], latents) in the order of time."""
        device, dtype = self._placement()
        starts = range(0, pixels.shape[1], chunk_frames)
        for start in starts:
            chunk = pixels[:, start : start + chunk_frames].to(device, dtype)
            if self.is_vidtwin:
                output = self.tokenizer(
                    chunk,
                    sample_posterior=sample_posterior,
                    generator=generator,
                    branch=branch,
                    window_batch_size=max(1, 4 // chunk.shape[0]) * chunk.shape[0],
                    return_loss=False,
                )
                yield output.reconstruction, (output.structure, output.dynamics_x, output.dynamics_y)
                continue
            sampling = {"sample_posterior": sample_posterior, "generator": generator}
            tiling = {"tile_size": tile_size, "tile_overlap": tile_overlap}
            height, width = chunk.shape[-2:]
            if not self.tokenizer.config.is_causal:  # sees a whole piece at once, so pieces are independent
                encoded = self.tokenizer.encode(chunk, **sampling, **tiling)
                decoded = self.tokenizer.decode(
                    encoded.latents, num_frames=chunk.shape[1], height=height, width=width, **tiling
                )
                yield decoded.reconstruction, encoded.latents
                continue
            if start == 0:
                encoder_cache = decoder_cache = None
            is_last = start + chunk_frames >= pixels.shape[1]
            encoded = self.tokenizer.encode(
                chunk,
                cache=encoder_cache,
                use_cache=True,
                is_last=is_last,
                num_frames=pixels.shape[1] if start == 0 else None,
                **sampling,
                **tiling,
            )
            encoder_cache = encoded.cache
            if not encoded.latents.shape[2]:  # too few frames for a latent so far
                yield chunk[:, :0], encoded.latents
                continue
            decoded = self.tokenizer.decode(
                encoded.latents,
                height=height,
                width=width,
                cache=decoder_cache,
                use_cache=True,
                is_last=is_last,
                **tiling,
            )
            decoder_cache = decoded.cache
            yield decoded.reconstruction, encoded.latents

    def _trim(self, pieces, num_frames):
        """Joins pieces and removes the frames that padding in time added: in front for v1.1, at the end otherwise."""
        frames = torch.cat(pieces, dim=1)
        if getattr(self.tokenizer.config, "version", None) == "1.1":
            return frames[:, -num_frames:]
        return frames[:, :num_frames]

    def _to_unit_range(self, pixels):
        processor = self.video_processor
        if not processor.do_normalize:
            return pixels.float().clamp(0, 1)
        mean, std = (
            pixels.new_tensor(getattr(processor, n)).float().view(-1, 1, 1) for n in ("image_mean", "image_std")
        )
        return (pixels.float() * std + mean).clamp(0, 1)

    def _finish(self, pixels, output_type):
        """Frames of the model's range -> what `output_type` asks for."""
        if output_type == "pil":
            return self.video_processor.postprocess(pixels, output_type="pil")
        frames = self._to_unit_range(pixels)
        return frames if output_type == "pt" else frames.permute(0, 1, 3, 4, 2).numpy()

    def measure(self, frames, inputs):
        """Quality of every video: both (batch, num_frames, 3, height, width) in the model's range. See
        `VideoReconstructionOutput.quality`."""
        metrics = ("psnr", "ssim") if min(inputs.shape[-2:]) >= _SSIM_MIN_SIZE else ("psnr",)
        results = []
        for video, reference in zip(frames, inputs):
            quality = VideoQuality(metrics)
            video, reference = (self._to_unit_range(x)[None].transpose(1, 2) for x in (video, reference))
            quality.update(video, reference)
            results.append({**quality.compute(), "per_frame": quality.per_frame})
        return results

    # ---------------------------------------------------------------------------------------------------------- call

    @torch.no_grad()
    def __call__(
        self,
        video,
        *,
        branch: str = "all",
        sample_posterior: bool = False,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        chunk_frames: int = 16,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
        fps: float | None = None,
        num_frames: int | None = None,
        keep_size: bool = False,
        compute_quality: bool = False,
        return_inputs: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("frames",),
    ) -> VideoReconstructionOutput | tuple:
        """Reconstructs videos.

        Args:
            video: one video or a list of videos of equal size and length: paths, `VideoClip`s, arrays or tensors
                (num_frames, height, width, 3) of bytes or of floats in [0, 1], batches of such (5 dimensions), or lists
                of PIL images.
            branch: VidTwin: "all", or only what "structure" or "dynamics" contribute.
            sample_posterior: decode a sample of the latents, as the authors' scripts do, instead of their mean.
            generator: one, or one per video, for the samples. Numbers are drawn piece by piece.
            chunk_frames: frames that go through the model at a time. Causal VidTok models give the same result for any
                number; non-causal ones treat pieces independently. VidTwin rounds it up to whole windows.
            tile_size, tile_overlap: VidTok: spatial tiles in pixels, for frames too large for the memory at hand.
            fps: rate at which files are read; default: as the processor says, or the file's own.
            num_frames: frames read of files, spread evenly over them (with `fps`: from the start); default: all.
            keep_size: VidTok: keep the videos' own size instead of resizing and cropping as the processor says.
            compute_quality: also compute PSNR and SSIM against the prepared input.
            return_inputs: also return the prepared input.
            output_type: "pil", "np" or "pt".
            return_dict: return `VideoReconstructionOutput` instead of a tuple (frames, inputs, quality, fps).
            callback_on_step_end: called as (pipeline, step, step, tensors) after every piece; may return replacements
                of "frames" (batch, frames of this piece, 3, height, width), in about [-1, 1].
            callback_on_step_end_tensor_inputs: which of "frames" and "latents" (VidTwin: a tuple of three) it gets.

        Returns:
            `VideoReconstructionOutput` with as many frames as the input.

        Raises:
            ValueError, TypeError: arguments or videos that do not fit. VideoReadError: a file that cannot be read.
        """
        # 1. Inputs
        pixels, rates = self.prepare_video(video, fps=fps, num_frames=num_frames, keep_size=keep_size)
        batch_size, total = pixels.shape[:2]
        self.check_inputs(
            branch,
            chunk_frames,
            tile_size,
            tile_overlap,
            keep_size,
            generator,
            batch_size,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        if isinstance(generator, tuple):
            generator = list(generator)
        chunk_frames = self._whole_windows(chunk_frames)

        # 2. Encode and decode, piece by piece
        pieces = []
        steps = self._pieces(pixels, branch, sample_posterior, generator, chunk_frames, tile_size, tile_overlap)
        with self.progress_bar(total=-(-total // chunk_frames)) as bar:
            for step, (frames, latents) in enumerate(steps):
                if callback_on_step_end is not None:
                    tensors = {"frames": frames, "latents": latents}
                    given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    frames = (callback_on_step_end(self, step, step, given) or {}).get("frames", frames)
                pieces.append(frames.float().cpu())
                bar.update()

        # 3. Result
        frames = self._trim(pieces, total)
        self.maybe_free_model_hooks()
        output = VideoReconstructionOutput(
            frames=self._finish(frames, output_type),
            inputs=self._finish(pixels, output_type) if return_inputs else None,
            quality=self.measure(frames, pixels.cpu()) if compute_quality else None,
            fps=rates,
        )
        return output if return_dict else (output.frames, output.inputs, output.quality, output.fps)

    def _whole_windows(self, chunk_frames):
        """VidTwin works in windows of fixed length."""
        if not self.is_vidtwin:
            return chunk_frames
        window = self.tokenizer.config.num_frames
        return -(-chunk_frames // window) * window

    @torch.no_grad()
    def reenact(
        self,
        structure_from,
        dynamics_from,
        *,
        sample_posterior: bool = False,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        chunk_frames: int = 16,
        fps: float | None = None,
        num_frames: int | None = None,
        return_inputs: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> VideoReconstructionOutput | tuple:
        """What is seen in one video, moving as another (VidTwin, section 4.3 of the paper).

        Args:
            structure_from, dynamics_from: videos as for `__call__`, with equal numbers of frames.
            sample_posterior, generator, chunk_frames, fps, num_frames, output_type, return_dict: as for `__call__`.
            return_inputs: also return both prepared videos, as a pair.

        Returns:
            `VideoReconstructionOutput`; `fps` are those of `structure_from`.

        Raises:
            ValueError: the tokenizer is not VidTwin, or the videos differ in number or length.
            TypeError, VideoReadError: as for `__call__`.
        """
        if not self.is_vidtwin:
            raise ValueError("reenact needs VidTwin, whose latents separate structure and dynamics; this is VidTok")
        first, rates = self.prepare_video(structure_from, fps=fps, num_frames=num_frames)
        second, _ = self.prepare_video(dynamics_from, fps=fps, num_frames=num_frames)
        if first.shape != second.shape:
            raise ValueError(
                f"structure_from has {first.shape[0]} videos of {first.shape[1]} frames, dynamics_from "
                f"{second.shape[0]} of {second.shape[1]}; give equal numbers (num_frames= reads as many of both)"
            )
        self.check_inputs("all", chunk_frames, None, None, False, generator, len(first), output_type, ())
        if isinstance(generator, tuple):
            generator = list(generator)
        device, dtype = self._placement()
        step = self._whole_windows(chunk_frames)
        pieces = []
        with self.progress_bar(total=-(-first.shape[1] // step)) as bar:
            for start in range(0, first.shape[1], step):
                pair = (video[:, start : start + step].to(device, dtype) for video in (first, second))
                output = self.tokenizer.reenact(*pair, sample_posterior=sample_posterior, generator=generator)
                pieces.append(output.reconstruction.float().cpu())
                bar.update()
        frames = torch.cat(pieces, dim=1)
        self.maybe_free_model_hooks()
        output = VideoReconstructionOutput(
            frames=self._finish(frames, output_type),
            inputs=tuple(self._finish(video, output_type) for video in (first, second)) if return_inputs else None,
            fps=rates,
        )
        return output if return_dict else (output.frames, output.inputs, output.quality, output.fps)


__all__ = ["VideoReconstructionOutput", "VideoReconstructionPipeline"]
