"""Video-LaVIT reconstruction: a video's keyframe and motion, raw or through their codes, become video again."""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor

from ...modeling.video_lavit.image_processing_video_lavit import VideoLavitImageProcessor
from ...modeling.video_lavit.modeling_visual_tokenizer import check_generator
from ...modeling.video_lavit.motion_processing import VideoLavitMotionProcessor
from .detokenizing import (
    check_picture_size,
    decode_keyframes,
    decode_video,
    denoise_keyframes,
    denoise_video,
    encode_keyframe_prompt,
    encode_motion_condition,
    encode_video_keyframe,
    image_to_tensor,
    prepare_keyframe_latents,
    vae_scale_factor,
)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class VideoLavitVideoOutput(BaseOutput):
    """
    Args:
        frames: videos: list of lists of PIL images ("pil"), array (batch, num_frames, height, width, 3) ("np") or
            tensor (batch, num_frames, 3, height, width) ("pt"), both in [0, 1]; latents for "latent".
    """

    frames: list | np.ndarray | torch.Tensor


@dataclass
class VideoLavitImageOutput(BaseOutput):
    """
    Args:
        images: list of PIL images ("pil"), array (batch, height, width, 3) ("np") or tensor (batch, 3, height, width)
            ("pt"), both in [0, 1]; latents for "latent".
    """

    images: list | np.ndarray | torch.Tensor


@dataclass
class VideoLavitTokens(BaseOutput):
    """
    Args:
        visual_indices: one 1-d tensor of codes per clip (their number varies).
        motion_indices: (clips, 3, 5, 9).
        num_clips: clips per video.
        clip_starts: per video, the frame indices (at `fps`) where clips start.
    """

    visual_indices: list
    motion_indices: torch.Tensor
    num_clips: list
    clip_starts: list


class VideoLavitReconstructionPipeline(DiffusionPipeline):
    r"""Reconstructs videos from one keyframe and the codec's motion per clip ([Video-LaVIT](https://arxiv.org/abs/2402.03161)).

    Either half of a clip can be passed raw or through its codes: the motion through the motion tokenizer, the keyframe
    through the visual tokenizer and the keyframe de-tokenizer. Components a folder does not hold are None; what needs
    them says so. A folder of [`VideoLavitPipeline`] holds all of them but the processors, and loads as this pipeline.

    Args:
        unet ([`VideoLavitUNetSpatioTemporalConditionModel`]), vae ([`~diffusers.AutoencoderKLTemporalDecoder`]),
        scheduler ([`~diffusers.EulerDiscreteScheduler`]), motion_encoder ([`VideoLavitMotionEncoder`]):
            The video de-tokenizer.
        motion_processor ([`VideoLavitMotionProcessor`]): reads videos; if None, one with the motion tokenizer's sizes.
        motion_tokenizer ([`VideoLavitMotionTokenizer`]): for motion codes.
        visual_tokenizer ([`VideoLavitVisualTokenizer`]), image_processor ([`VideoLavitImageProcessor`]):
            For visual codes; without an image processor, one with the visual tokenizer's size.
        keyframe_decoder ([`VideoLavitKeyframeDecoder`]), keyframe_unet ([`~diffusers.UNet2DConditionModel`]),
        keyframe_vae ([`~diffusers.AutoencoderKL`]), keyframe_scheduler ([`~diffusers.DDIMScheduler`] or
        [`~diffusers.EulerAncestralDiscreteScheduler`]):
            The keyframe de-tokenizer.
    """

    model_cpu_offload_seq = (
        "visual_tokenizer->keyframe_decoder->keyframe_unet->keyframe_vae->motion_tokenizer->motion_encoder->unet->vae"
    )
    _optional_components = [
        "unet",
        "vae",
        "scheduler",
        "motion_encoder",
        "motion_processor",
        "motion_tokenizer",
        "visual_tokenizer",
        "image_processor",
        "keyframe_decoder",
        "keyframe_unet",
        "keyframe_vae",
        "keyframe_scheduler",
    ]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet=None,
        vae=None,
        scheduler=None,
        motion_encoder=None,
        motion_processor=None,
        motion_tokenizer=None,
        visual_tokenizer=None,
        image_processor=None,
        keyframe_decoder=None,
        keyframe_unet=None,
        keyframe_vae=None,
        keyframe_scheduler=None,
    ):
        super().__init__()
        self.register_modules(
            unet=unet,
            vae=vae,
            scheduler=scheduler,
            motion_encoder=motion_encoder,
            motion_processor=motion_processor,
            motion_tokenizer=motion_tokenizer,
            visual_tokenizer=visual_tokenizer,
            image_processor=image_processor,
            keyframe_decoder=keyframe_decoder,
            keyframe_unet=keyframe_unet,
            keyframe_vae=keyframe_vae,
            keyframe_scheduler=keyframe_scheduler,
        )

    def _need(self, purpose, *names):
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise ValueError(f"{purpose} needs {', '.join(missing)}, which this pipeline was made without")

    # ------------------------------------------------------------------------------------------------------- checks

    def check_inputs(
        self,
        video,
        image,
        motion,
        motion_indices,
        image_indices,
        height,
        width,
        quantize_motion,
        batch,
        generator=None,
    ):
        """Raises ValueError for inputs that contradict each other, TypeError for a generator of another type."""
        self._need("making videos", "unet", "vae", "scheduler", "motion_encoder")
        check_picture_size(height, width, vae_scale_factor(self.vae) * 2**self.unet.num_upsamplers)
        given = {"video": video, "motion": motion, "motion_indices": motion_indices}
        present = [name for name, value in given.items() if value is not None]
        if len(present) != 1:
            raise ValueError(f"give exactly one of video, motion and motion_indices, got {present or 'none'}")
        if video is None and (image is None) == (image_indices is None):
            raise ValueError("with motion or motion_indices give exactly one of image and image_indices")
        if video is not None and image is not None and image_indices is not None:
            raise ValueError("image and image_indices both replace the video's keyframe; give one of them")
        if motion_indices is not None and quantize_motion:
            raise ValueError("motion_indices are codes already; leave quantize_motion out")
        if quantize_motion or motion_indices is not None:
            self._need("motion codes", "motion_tokenizer")
        for name, value in (("image", image), ("image_indices", image_indices)):
            if value is not None and len(value) != batch:
                raise ValueError(f"{len(value)} entries of {name} for {batch} clips")
        check_generator(generator, batch, f"{batch} clips")

    # -------------------------------------------------------------------------------------------------------- encode

    @torch.no_grad()
    def tokenize(self, video, *, max_clips=None, generator=None, **options):
        """Codes of a video or a list of them.

        Args:
            video: path, file object or `MotionVectors`, or a list of such.
            max_clips: most clips per video; default: the motion processor's.
            generator: `torch.Generator` (or a list, one per clip) of the keep decisions of the visual tokenizer.
            options: further arguments of `read_motion_vectors` (`start`, `end`, `on_error`).

        Returns:
            [`VideoLavitTokens`].
        """
        self._need("tokenizing", "visual_tokenizer", "motion_tokenizer")
        features = self._motion_processor()(video, max_clips=max_clips, **options)
        pixels = self._image_processor()(features["keyframes"])["pixel_values"]
        motion = features["motion_values"].to(self._execution_device, self.motion_tokenizer.dtype)
        return VideoLavitTokens(
            visual_indices=self._visual_codes(pixels, generator),
            motion_indices=self.motion_tokenizer.encode(motion).indices,
            num_clips=features["num_clips"],
            clip_starts=features["clip_starts"],
        )

    def _motion_processor(self):
        if self.motion_processor is not None or self.motion_tokenizer is None:
            return self.motion_processor or VideoLavitMotionProcessor()
        config = self.motion_tokenizer.config
        return VideoLavitMotionProcessor(num_frames=config.num_frames, height=config.height, width=config.width)

    def _image_processor(self):
        return self.image_processor or VideoLavitImageProcessor(self.visual_tokenizer.config.image_size)

    def _visual_codes(self, pixels, generator):
        pixels = pixels.to(self._execution_device, self.visual_tokenizer.dtype)
        encoded = self.visual_tokenizer.encode(pixels, generator=generator)
        return [row[:count] for row, count in zip(encoded.indices, encoded.num_tokens.tolist())]

    def prepare_motion(self, clips, motion, motion_indices, quantize_motion, height, width):
        """Raw motion maps (batch, 2, num_frames, height / 8, width / 8) from whatever was given."""
        scale = vae_scale_factor(self.vae)
        size = (height // scale, width // scale)
        if clips is not None:
            motion = torch.stack([clip.motion for clip in clips])
        if motion_indices is None and not quantize_motion:
            motion = torch.as_tensor(motion, dtype=torch.float32)
            if motion.ndim != 5 or motion.shape[1] != 2 or tuple(motion.shape[-2:]) != size:
                raise ValueError(
                    f"raw motion must be (batch, 2, num_frames, {size[0]}, {size[1]}), the size of the latents, got "
                    f"{tuple(motion.shape)}; pass quantize_motion=True for maps of the motion tokenizer"
                )
            return motion.to(self._execution_device)
        if motion_indices is None:
            motion = torch.as_tensor(motion).to(self._execution_device, self.motion_tokenizer.dtype)
            motion_indices = self.motion_tokenizer.encode(motion).indices
        decoded = self.motion_tokenizer.decode(motion_indices.to(self._execution_device)).reconstruction
        return self.motion_tokenizer.to_raw_motion(decoded, *size)

    # -------------------------------------------------------------------------------------------------------- images

    @torch.no_grad()
    def reconstruct_images(
        self,
        image=None,
        *,
        image_indices=None,
        height=512,
        width=512,
        num_inference_steps=50,
        guidance_scale=3.0,
        generator=None,
        latents=None,
        output_type="pil",
        callback_on_step_end=None,
    ):
        """Images through their visual codes, or from codes: the keyframe de-tokenizer by itself.

        Args:
            image: image or list of images (path, PIL, array, tensor).
            image_indices: instead: list of 1-d tensors of visual codes.
            height, width: size of the result in pixels.
            guidance_scale: 1 or less switches guidance off.
            generator: `torch.Generator` or a list with one per image: keep decisions, then noise.
            latents: standard normal initial latents (batch, 4, height / 8, width / 8).
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: function (pipeline, step, timestep, {"latents": ...}) -> the same dictionary.

        Returns:
            [`VideoLavitImageOutput`].
        """
        self._need(
            "visual codes to images", "visual_tokenizer", "keyframe_decoder", "keyframe_unet", "keyframe_vae",
            "keyframe_scheduler",
        )  # fmt: skip
        if (image is None) == (image_indices is None):
            raise ValueError("give exactly one of image and image_indices")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
        levels = len(self.keyframe_unet.config.block_out_channels) - 1
        check_picture_size(height, width, vae_scale_factor(self.keyframe_vae) * 2**levels)
        device = self._execution_device
        if image_indices is None:
            image_indices = self._visual_codes(self._image_processor()(image)["pixel_values"], generator)
        check_generator(generator, len(image_indices), f"{len(image_indices)} images")
        prompt, pooled = encode_keyframe_prompt(self.visual_tokenizer, self.keyframe_decoder, image_indices, device)
        prompt, pooled = prompt.to(self.keyframe_unet.dtype), pooled.to(self.keyframe_unet.dtype)

        self.keyframe_scheduler.set_timesteps(num_inference_steps, device=device)
        latents = prepare_keyframe_latents(
            self.keyframe_unet,
            self.keyframe_vae,
            self.keyframe_scheduler,
            len(prompt),
            height,
            width,
            dtype=prompt.dtype,
            device=device,
            generator=generator,
            latents=latents,
        )
        latents = denoise_keyframes(
            self.keyframe_unet,
            self.keyframe_scheduler,
            prompt,
            pooled,
            latents,
            height,
            width,
            guidance_scale=guidance_scale,
            generator=generator,
            progress_bar=self.progress_bar,
            on_step_end=self._step_callback(callback_on_step_end),
        )
        if output_type == "latent":
            images = latents
        else:
            decoded = decode_keyframes(self.keyframe_vae, latents).float()
            images = VaeImageProcessor(do_resize=False).postprocess(decoded, output_type=output_type)
        self.maybe_free_model_hooks()
        return VideoLavitImageOutput(images=images)

    def _step_callback(self, callback):
        if callback is None:
            return None

        def on_step_end(step, timestep, latents):
            return callback(self, step, timestep, {"latents": latents}).pop("latents", latents)

        return on_step_end

    # -------------------------------------------------------------------------------------------------------- videos

    @torch.no_grad()
    def __call__(
        self,
        video=None,
        *,
        image=None,
        motion=None,
        image_indices=None,
        motion_indices=None,
        quantize_motion=False,
        quantize_keyframe=False,
        height=320,
        width=576,
        start=None,
        motion_fps=None,
        num_inference_steps=25,
        min_guidance_scale=1.0,
        guidance_scale=None,
        fps=6,
        motion_bucket_id=127,
        noise_aug_strength=0.02,
        cond_on_ref_frame=True,
        decode_chunk_size=8,
        keyframe_num_inference_steps=50,
        keyframe_guidance_scale=3.0,
        generator=None,
        latents=None,
        image_noise=None,
        output_type="pil",
        return_dict=True,
        callback_on_step_end=None,
    ):
        r"""Reconstructs one clip per entry.

        Args:
            video: path, file object or `MotionVectors`, or a list of such. Keyframe and motion are read from it.
            image: keyframe(s) instead of the video's: image or list of images (path, PIL, array, tensor).
            motion (`torch.Tensor`): motion instead of a video: raw maps (batch, 2, num_frames, height / 8, width / 8),
                or with `quantize_motion` maps for the motion tokenizer (batch, 2, 24, 20, 36), scaled by ten.
            image_indices: keyframes as visual codes, a list of 1-d tensors.
            motion_indices (`torch.LongTensor`): motion as codes, (batch, 135) or (batch, 3, 5, 9).
            quantize_motion: pass the motion through its codes.
            quantize_keyframe: pass the keyframe through its codes.
            height, width: size of the frames in pixels, multiples of 64 for the released network.
            start: index of the I-frame where the clip starts; default: the first with a whole clip after it.
            motion_fps: frames per second the video is re-encoded at; default: the motion processor's (6). The authors'
                example of raw motion uses 12.
            min_guidance_scale, guidance_scale: guidance of the first and of the last frame, linear in between. Default
                of the last: 4.0 for motion from codes, 3.0 for raw motion, as the authors use the two networks.
            fps, motion_bucket_id, noise_aug_strength: what the network is told; the last is also the strength of
                the noise on the keyframe.
            cond_on_ref_frame: guide towards the keyframe as well (the unconditional branch does not see it).
            decode_chunk_size: frames the VAE decodes together.
            keyframe_num_inference_steps, keyframe_guidance_scale: see `reconstruct_images`, for keyframes from codes.
            generator: `torch.Generator`, or a list with one per clip. Drawn in this order: keyframe codes and noise
                (where used), noise on the keyframe, initial latents.
            latents: standard normal initial latents (batch, num_frames, 4, height / 8, width / 8).
            image_noise: standard normal noise on the keyframe (batch, 3, height, width).
            output_type: "pil", "np", "pt" or "latent".
            return_dict: return a [`VideoLavitVideoOutput`] instead of a tuple.
            callback_on_step_end: function (pipeline, step, timestep, {"latents": ...}) -> the same dictionary.

        Raises:
            VideoReadError: a file cannot be read.
            ValueError: contradicting inputs, sizes that do not fit, a missing component, no I-frame at `start`, another
                number of codes than 135, codes outside the codebook.
            TypeError: a generator, image or video of another type.
        """
        # 1. Inputs
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
        videos = None if video is None else _as_list(video)
        images = None if image is None else _as_list(image)
        batch = len(next((x for x in (videos, motion, motion_indices) if x is not None), ()))
        self.check_inputs(
            videos, images, motion, motion_indices, image_indices, height, width, quantize_motion, batch, generator
        )
        if guidance_scale is None:
            guidance_scale = 3.0 if motion_indices is None and not quantize_motion else 4.0
        device, dtype = self._execution_device, self.unet.dtype

        # 2. Motion
        scale = vae_scale_factor(self.vae)
        clips = None
        if videos is not None:
            clips = [
                self._motion_processor().clip_for_reconstruction(
                    one, height // scale, width // scale, start=start, fps=motion_fps, tokenized=quantize_motion
                )
                for one in videos
            ]
        raw_motion = self.prepare_motion(clips, motion, motion_indices, quantize_motion, height, width).to(dtype)

        # 3. Keyframes
        if images is None and image_indices is None:
            images = [clip.keyframe for clip in clips]
        if quantize_keyframe or image_indices is not None:
            redrawn = self.reconstruct_images(
                images if image_indices is None else None,
                image_indices=image_indices,
                height=height,
                width=width,
                num_inference_steps=keyframe_num_inference_steps,
                guidance_scale=keyframe_guidance_scale,
                generator=generator,
                output_type="pt",
            ).images
            pixels = redrawn * 2 - 1
        else:
            pixels = torch.stack([image_to_tensor(one, height, width) for one in images])
        pixels = pixels.to(device, dtype)
        image_latents = encode_video_keyframe(
            self.vae, pixels, noise_aug_strength, generator=generator, noise=image_noise
        )
        condition = encode_motion_condition(self.motion_encoder, raw_motion)

        # 4. Denoising
        latents = denoise_video(
            self.unet,
            self.scheduler,
            image_latents,
            raw_motion,
            condition,
            num_inference_steps=num_inference_steps,
            min_guidance_scale=min_guidance_scale,
            max_guidance_scale=guidance_scale,
            fps=fps,
            motion_bucket_id=motion_bucket_id,
            noise_aug_strength=noise_aug_strength,
            cond_on_ref_frame=cond_on_ref_frame,
            latents=latents,
            generator=generator,
            progress_bar=self.progress_bar,
            on_step_end=self._step_callback(callback_on_step_end),
        )

        # 5. Frames
        if output_type == "latent":
            frames = latents
        else:
            decoded = decode_video(self.vae, latents, decode_chunk_size)
            frames = VideoProcessor(do_resize=False).postprocess_video(decoded, output_type=output_type)
        self.maybe_free_model_hooks()
        return VideoLavitVideoOutput(frames=frames) if return_dict else (frames,)


def _as_list(value):
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 4:
        return list(value)
    return [value]


__all__ = [
    "VideoLavitImageOutput",
    "VideoLavitReconstructionPipeline",
    "VideoLavitTokens",
    "VideoLavitVideoOutput",
]
