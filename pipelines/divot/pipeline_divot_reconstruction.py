"""Video -> Divot features -> video (arXiv:2412.04432)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from ...modeling.divot.modeling_divot_tokenizer import DivotTokenizerModel
from ...modeling.divot.resampler_divot import DivotFeatureResampler
from ...modeling.divot.scheduling_divot import DivotDDIMScheduler
from ...modeling.divot.unet_divot import DivotUNet3DConditionModel
from ...modeling.divot.video_processing_divot import DivotVideoProcessor
from .detokenizing import DivotVideoOutput, check_decoding_inputs, decode_features, placement, to_images


class DivotReconstructionPipeline(DiffusionPipeline):
    r"""Encodes videos into Divot features and samples videos from the features.

    Any length: videos are cut into clips of two seconds, each of which becomes 64 features and 16 frames at 8 fps. The
    result resembles the input without being equal to it: features hold what a clip shows, the sampler fills in how.

    Args:
        video_processor (`DivotVideoProcessor`): chooses and prepares frames.
        video_tokenizer (`DivotTokenizerModel`): frames to features.
        resampler (`DivotFeatureResampler`): features to the condition of the U-Net.
        unet (`DivotUNet3DConditionModel`): denoises latents.
        vae (`AutoencoderKL`): latents to frames, one by one.
        scheduler (`DivotDDIMScheduler`): the sampler.
    """

    model_cpu_offload_seq = "video_tokenizer->resampler->unet->vae"
    _callback_tensor_inputs = ["latents", "pred_original_sample"]

    def __init__(
        self,
        video_processor: DivotVideoProcessor,
        video_tokenizer: DivotTokenizerModel,
        resampler: DivotFeatureResampler,
        unet: DivotUNet3DConditionModel,
        vae: AutoencoderKL,
        scheduler: DivotDDIMScheduler,
    ):
        super().__init__()
        self.register_modules(
            video_processor=video_processor,
            video_tokenizer=video_tokenizer,
            resampler=resampler,
            unet=unet,
            vae=vae,
            scheduler=scheduler,
        )

    @torch.no_grad()
    def encode_video(self, video, *, video_fps=None, clip_selection="all", clip_batch_size=4):
        """Videos -> features.

        Args:
            video, video_fps: see `DivotVideoProcessor`.
            clip_selection: "all" (the whole video), "first" (the first two seconds, as the original) or
                "comprehension" (at most 20 clips spread over the video).
            clip_batch_size: clips encoded at a time.

        Returns:
            (features (clips of all videos, num_features, feature_dim), clips per video, frames per video at 8 fps).

        Raises:
            ValueError, TypeError, VideoReadError: videos that cannot be used.
        """
        inputs = self.video_processor(video, video_fps=video_fps, clip_selection=clip_selection, return_metadata=True)
        device, dtype = placement(self.video_tokenizer)
        pixels = inputs["pixel_values_videos"]
        features = [
            self.video_tokenizer(part.to(device, dtype)).features.float() for part in pixels.split(clip_batch_size)
        ]
        clips = inputs["num_clips"].tolist()
        per_clip = self.video_processor.frames_per_clip
        if clip_selection == "all":
            # The last clip, however short, makes at least one frame.
            frames = [
                min(max(facts["num_output_frames"], (count - 1) * per_clip + 1), count * per_clip)
                for facts, count in zip(inputs["video_metadata"], clips)
            ]
        else:
            frames = [count * per_clip for count in clips]
        return torch.cat(features), clips, frames

    @torch.no_grad()
    def __call__(
        self,
        video=None,
        *,
        video_fps: float | None = None,
        clip_selection: str = "all",
        features: torch.Tensor | None = None,
        clips_per_video: Sequence[int] | None = None,
        frames_per_video: Sequence[int] | None = None,
        unconditional_features: torch.Tensor | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.7,
        eta: float = 1.0,
        fs: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        clip_batch_size: int = 4,
        decode_chunk_size: int = 4,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> DivotVideoOutput | tuple:
        """Reconstructs videos, or makes videos from features computed before.

        Args:
            video: one video or a list: paths, `VideoClip`s, arrays (num_frames, height, width, 3) of bytes, or lists of
                PIL images.
            video_fps: rate of arrays and lists of images; default: they are taken as 8 fps already.
            clip_selection: "all" reconstructs the whole video, "first" its first two seconds as the original does.
            features: instead of videos, features (num_clips, num_features, feature_dim).
            clips_per_video: how many consecutive clips of `features` make each video; default: one.
            frames_per_video: frames of each video; default: 16 per clip. The last clip of a video may stand for less
                than two seconds; so many of its frames are then left out, evenly.
            unconditional_features: features of a mid-gray clip, (1, num_features, feature_dim), when they are at hand
                from an earlier call; otherwise they are computed once per call.
            num_inference_steps, guidance_scale, guidance_rescale, eta, fs: of the sampler; the defaults are the
                released settings. A guidance scale of 1 halves the work.
            generator: one for all, or one per video. Every clip gets noise of its own, which does not depend on what
                else is in the batch.
            clip_batch_size: clips sampled at a time.
            decode_chunk_size: frames the VAE decodes at a time.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after every step of every batch of
                clips; may return tensors to replace.
            callback_on_step_end_tensor_inputs: which of "latents" and "pred_original_sample" it gets.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: return `DivotVideoOutput` instead of a tuple.

        Returns:
            `DivotVideoOutput`; its `frames` are a list when videos differ in length.

        Raises:
            ValueError, TypeError: arguments that do not fit. VideoReadError: a file that cannot be read.
        """
        if (video is None) == (features is None):
            raise ValueError("give either a video or features")
        if clip_batch_size < 1 or decode_chunk_size < 1:
            raise ValueError("clip_batch_size and decode_chunk_size must be at least 1")
        per_clip = self.video_processor.frames_per_clip
        if features is None:
            features, clips_per_video, frames_per_video = self.encode_video(
                video, video_fps=video_fps, clip_selection=clip_selection, clip_batch_size=clip_batch_size
            )
        check_decoding_inputs(
            self.resampler,
            self.scheduler,
            features,
            num_inference_steps=num_inference_steps,
            output_type=output_type,
            unconditional_features=unconditional_features,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            eta=eta,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        clips_per_video = list(clips_per_video) if clips_per_video is not None else [1] * len(features)
        if sum(clips_per_video) != len(features) or min(clips_per_video, default=0) < 1:
            raise ValueError(
                f"clips_per_video={clips_per_video} do not add up to the {len(features)} clips of features"
            )
        if frames_per_video is None:
            frames_per_video = [count * per_clip for count in clips_per_video]
        if len(frames_per_video) != len(clips_per_video):
            raise ValueError(f"{len(frames_per_video)} frames_per_video for {len(clips_per_video)} videos")
        for total, count in zip(frames_per_video, clips_per_video):
            if not (count - 1) * per_clip < total <= count * per_clip:
                raise ValueError(
                    f"frames_per_video: {total} frames for a video of {count} clips; the last clip may be shortened, "
                    f"so give {(count - 1) * per_clip + 1} to {count * per_clip}"
                )
        generators = self._clip_generators(generator, clips_per_video)
        if guidance_scale != 1.0 and unconditional_features is None:
            unconditional_features = self.video_tokenizer.unconditional_features(self.video_processor.size)

        clips = []
        for start in range(0, len(features), clip_batch_size):
            batch = slice(start, start + clip_batch_size)
            decoded = decode_features(
                self.unet,
                self.vae,
                self.resampler,
                self.scheduler,
                features[batch],
                unconditional_features=unconditional_features,
                num_frames=per_clip,
                fs=fs,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                guidance_rescale=guidance_rescale,
                eta=eta,
                generator=generators[batch] if generators is not None else None,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                decode_chunk_size=decode_chunk_size,
                output_type="latent" if output_type == "latent" else "pt",
                pipeline=self,
            )
            # (frames, ...) per clip, so that clips of a video can be joined along time
            clips += list(decoded.transpose(1, 2) if output_type == "latent" else decoded)
        self.maybe_free_model_hooks()
        frames = self._join(clips, clips_per_video, frames_per_video, output_type)
        if not return_dict:
            return frames, features
        return DivotVideoOutput(frames=frames, features=features)

    @staticmethod
    def _clip_generators(generator, clips_per_video):
        """One generator per clip, seeded from the caller's, so that noise does not depend on how clips are batched."""
        if generator is None:
            return None
        if isinstance(generator, torch.Generator):
            sources = [generator] * len(clips_per_video)
        else:
            sources = list(generator)
            if len(sources) != len(clips_per_video):
                raise ValueError(
                    f"{len(sources)} generators for {len(clips_per_video)} videos; give one, or one per video"
                )
        result = []
        for source, count in zip(sources, clips_per_video):
            seeds = torch.randint(2**62, (count,), generator=source, device=source.device).tolist()
            result += [torch.Generator(source.device).manual_seed(seed) for seed in seeds]
        return result

    def _join(self, clips, clips_per_video, frames_per_video, output_type):
        """Clips (frames first) -> videos in the form `output_type` asks for."""
        videos, position = [], 0
        for count, total in zip(clips_per_video, frames_per_video):
            parts = clips[position : position + count]
            position += count
            length = len(parts[-1])
            rest = total - sum(len(part) for part in parts[:-1])
            parts[-1] = parts[-1][[k * length // rest for k in range(rest)]]
            videos.append(torch.cat(parts))
        if output_type == "latent":
            videos = [video.transpose(0, 1) for video in videos]
        elif output_type == "np":
            videos = [video.permute(0, 2, 3, 1).cpu().numpy() for video in videos]
        elif output_type == "pil":
            return [to_images(video) for video in videos]
        if len({len(video) if output_type != "latent" else video.shape[1] for video in videos}) > 1:
            return videos
        return torch.stack(videos) if output_type != "np" else np.stack(videos)
