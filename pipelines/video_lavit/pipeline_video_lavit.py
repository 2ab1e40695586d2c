"""Video-LaVIT generation: text and images become images, videos and long videos."""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput, logging
from diffusers.video_processor import VideoProcessor
from PIL import Image

from ...modeling.video_lavit.generation_video_lavit import motion_codes, visual_codes
from ...modeling.video_lavit.image_processing_video_lavit import to_pil
from ...modeling.video_lavit.modeling_visual_tokenizer import check_generator
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
    renoise_keyframes,
    vae_scale_factor,
)

logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt")
MODALITIES = ("video", "image")


@dataclass
class VideoLavitPipelineOutput(BaseOutput):
    """
    Args:
        frames: videos, or None if images were asked for: list of lists of PIL images ("pil"), array (batch, num_frames,
            height, width, 3) ("np") or tensor (batch, num_frames, 3, height, width) ("pt"), both in [0, 1].
        images: images, or None if videos were asked for: list of PIL images, array (batch, height, width, 3) or tensor
            (batch, 3, height, width).
        keyframes: per clip the list of the batch's key frames as PIL images (videos only).
        token_ids: per sample all ids, in the order the language model read and wrote them (1-D tensors on the CPU).
    """

    frames: list | np.ndarray | torch.Tensor | None = None
    images: list | np.ndarray | torch.Tensor | None = None
    keyframes: list | None = None
    token_ids: list | None = None


class VideoLavitPipeline(DiffusionPipeline):
    r"""Text-to-image, text-to-video, image(+text)-to-video and long video with [Video-LaVIT](https://arxiv.org/abs/2402.03161).

    The language model writes the visual codes of a key frame and the motion codes of its clip; the keyframe
    de-tokenizer (SDXL-shaped) draws the key frame, the video de-tokenizer (SVD-shaped) moves it. Longer videos repeat
    this with everything so far as the prompt.

    Args:
        language_model ([`VideoLavitForCausalLM`]), processor ([`VideoLavitProcessor`]):
            Writes codes; the weights for generation.
        visual_tokenizer ([`VideoLavitVisualTokenizer`]), motion_tokenizer ([`VideoLavitMotionTokenizer`]):
            Codes of given images; codes to features and maps.
        keyframe_decoder ([`VideoLavitKeyframeDecoder`]), keyframe_unet ([`~diffusers.UNet2DConditionModel`]),
        keyframe_vae ([`~diffusers.AutoencoderKL`]), keyframe_scheduler ([`~diffusers.DDIMScheduler`] or
        [`~diffusers.EulerAncestralDiscreteScheduler`]):
            The keyframe de-tokenizer.
        unet ([`VideoLavitUNetSpatioTemporalConditionModel`]), motion_encoder ([`VideoLavitMotionEncoder`]),
        vae ([`~diffusers.AutoencoderKLTemporalDecoder`]), scheduler ([`~diffusers.EulerDiscreteScheduler`]):
            The video de-tokenizer.
        text_to_image (any text-to-image [`~diffusers.DiffusionPipeline`], *optional*):
            Draws key frames instead of the language model when `use_text_to_image=True` (the authors use
            playground-v2-1024px-aesthetic).
    """

    model_cpu_offload_seq = (
        "language_model->visual_tokenizer->keyframe_decoder->keyframe_unet->keyframe_vae->motion_tokenizer->"
        "motion_encoder->unet->vae"
    )
    _optional_components = ["text_to_image"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        language_model,
        processor,
        visual_tokenizer,
        motion_tokenizer,
        keyframe_decoder,
        keyframe_unet,
        keyframe_vae,
        keyframe_scheduler,
        unet,
        motion_encoder,
        vae,
        scheduler,
        text_to_image=None,
    ):
        super().__init__()
        self.register_modules(
            language_model=language_model,
            processor=processor,
            visual_tokenizer=visual_tokenizer,
            motion_tokenizer=motion_tokenizer,
            keyframe_decoder=keyframe_decoder,
            keyframe_unet=keyframe_unet,
            keyframe_vae=keyframe_vae,
            keyframe_scheduler=keyframe_scheduler,
            unet=unet,
            motion_encoder=motion_encoder,
            vae=vae,
            scheduler=scheduler,
            text_to_image=text_to_image,
        )

    def to(self, *args, **kwargs):
        """Moves every component, the optional pipeline included (see [`~diffusers.DiffusionPipeline.to`])."""
        if self.text_to_image is not None:
            self.text_to_image.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    # ------------------------------------------------------------------------------------------------------- inputs

    def check_inputs(
        self, samples, modality, sizes, num_clips, use_text_to_image, inverse_rate, output_type, generator
    ):
        """Raises ValueError or TypeError for inputs that contradict each other."""
        if modality not in MODALITIES:
            raise ValueError(f"modality must be one of {MODALITIES}, got {modality!r}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
        if num_clips < 1 or (modality == "image" and num_clips != 1):
            raise ValueError(f"num_clips {num_clips}: 1 or more for videos, 1 for images")
        if not 0.0 <= inverse_rate < 1.0:
            raise ValueError(
                f"inverse_rate {inverse_rate}: must be in [0, 1), the part of the key frame's steps to skip"
            )
        (height, width), (keyframe_height, keyframe_width) = sizes
        levels = len(self.keyframe_unet.config.block_out_channels) - 1
        check_picture_size(keyframe_height, keyframe_width, vae_scale_factor(self.keyframe_vae) * 2**levels)
        if modality == "video":
            levels = len(self.unet.config.block_out_channels) - 1
            check_picture_size(height, width, vae_scale_factor(self.vae) * 2**levels)
        check_generator(generator, len(samples), f"{len(samples)} prompts")
        with_image = [any(not isinstance(part, str) for part in parts) for parts in samples]
        if modality == "video" and any(with_image) != all(with_image):
            raise ValueError("either all prompts of a batch hold an image (the first key frame) or none")
        if use_text_to_image:
            if modality == "image":
                raise ValueError(
                    "use_text_to_image draws the key frame of a video; for an image call that pipeline itself"
                )
            if self.text_to_image is None:
                raise ValueError(
                    "use_text_to_image needs the component text_to_image; "
                    "VideoLavitPipeline.from_pretrained(..., text_to_image=pipeline)"
                )
            if any(with_image):
                raise ValueError("use_text_to_image draws the key frame; leave images out of the prompt")

    @staticmethod
    def prepare_samples(prompt, image):
        """Prompts as one list of parts (strings and PIL images, in reading order) per sample.

        Raises:
            ValueError: neither text nor image, an empty prompt, numbers that differ, an unreadable image.
            TypeError: a part that is neither text nor image.
        """
        if prompt is None and image is None:
            raise ValueError("give a prompt, an image, or both")
        images = None if image is None else (list(image) if isinstance(image, (list, tuple)) else [image])
        if prompt is None:
            prompts = [[] for _ in images]
        elif isinstance(prompt, str):
            prompts = [[prompt]]
        elif isinstance(prompt, (list, tuple)):
            prompts = [list(parts) if isinstance(parts, (list, tuple)) else [parts] for parts in prompt]
        else:
            raise TypeError(f"prompt must be a string or a list with an entry per sample, not {type(prompt).__name__}")
        if images is not None:
            if len(images) != len(prompts):
                raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
            # Opened here: a path among the parts would be read as text.
            prompts = [[*parts, to_pil(one)] for parts, one in zip(prompts, images)]
        if not prompts or not all(prompts):
            raise ValueError("every prompt needs a text or an image")
        return [[part if isinstance(part, str) else to_pil(part) for part in parts] for parts in prompts]

    def encode_samples(self, samples, generator, with_marks=True):
        """Ids of every sample: text as it is, images as their visual codes, between marks unless `with_marks=False`.

        The authors' code puts marks around the images of a video's prompt and none around those of an image's.
        """
        config = self.language_model.config
        contexts = []
        for index, parts in enumerate(samples):
            ids = []
            for part in parts:
                if isinstance(part, str):
                    ids += self.processor.encode_prompt(part)
                    continue
                own = generator[index] if isinstance(generator, (list, tuple)) else generator
                pixels = self.processor.images(part)["pixel_values"]
                pixels = pixels.to(self._execution_device, self.visual_tokenizer.dtype)
                encoded = self.visual_tokenizer.encode(pixels, generator=own)
                codes = encoded.indices[0, : int(encoded.num_tokens[0])] + config.visual_code_offset
                marks = ([config.image_start_token_id], [config.image_end_token_id]) if with_marks else ([], [])
                ids += [*marks[0], *codes.tolist(), *marks[1]]
            contexts.append(torch.tensor(ids, dtype=torch.long))
        return contexts

    # -------------------------------------------------------------------------------------------------------- tokens

    def write_tokens(self, method, contexts, max_new_tokens, description, **options):
        """`generate_image_tokens` or `generate_motion_tokens` under a progress bar."""
        with self.progress_bar(total=max_new_tokens) as bar:
            bar.set_description(description)
            return method(contexts, max_new_tokens=max_new_tokens, on_step=lambda step: bar.update(), **options)

    # ----------------------------------------------------------------------------------------------------- key frames

    def draw_keyframes(
        self, codes, height, width, num_inference_steps, guidance_scale, generator, previous, inverse_rate, on_step_end
    ):
        """Visual codes to images (batch, 3, height, width) in about [-1, 1].

        `previous`: last frames of the previous clip (PIL), or None. They are noised to a late timestep and
        only the rest is denoised, which links the clips.
        """
        device, dtype = self._execution_device, self.keyframe_unet.dtype
        prompt, pooled = encode_keyframe_prompt(self.visual_tokenizer, self.keyframe_decoder, codes, device)
        prompt, pooled = prompt.to(dtype), pooled.to(dtype)
        self.keyframe_scheduler.set_timesteps(num_inference_steps, device=device)
        start_step = 0
        if previous is None:
            latents = prepare_keyframe_latents(
                self.keyframe_unet,
                self.keyframe_vae,
                self.keyframe_scheduler,
                len(codes),
                height,
                width,
                dtype=dtype,
                device=device,
                generator=generator,
            )
        else:
            start_step = int(inverse_rate * num_inference_steps)
            pixels = torch.stack([image_to_tensor(frame, height, width) for frame in previous]).to(device)
            latents = renoise_keyframes(
                self.keyframe_vae, self.keyframe_scheduler, pixels, start_step, generator=generator
            ).to(dtype)
        latents = denoise_keyframes(
            self.keyframe_unet,
            self.keyframe_scheduler,
            prompt,
            pooled,
            latents,
            height,
            width,
            guidance_scale=guidance_scale,
            start_step=start_step,
            generator=generator,
            progress_bar=self.progress_bar,
            on_step_end=on_step_end,
        )
        return decode_keyframes(self.keyframe_vae, latents).float()

    def _own_keyframes(self, samples, height, width, num_inference_steps, guidance_scale, generator):
        """Key frames from the optional text-to-image pipeline, one per prompt: list of PIL images."""
        self.text_to_image.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        prompts = [" ".join(parts) for parts in samples]
        output = self.text_to_image(
            prompt=prompts,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=list(generator) if isinstance(generator, tuple) else generator,
            output_type="pil",
        )
        return output.images

    # -------------------------------------------------------------------------------------------------------- videos

    def animate(self, keyframes, codes, height, width, generator, on_step_end, decode_chunk_size, **options):
        """Key frames (PIL) and motion codes (batch, 135) to frames (batch, 3, num_frames, height, width), about [-1,
        1]."""
        device, dtype = self._execution_device, self.unet.dtype
        pixels = torch.stack([image_to_tensor(frame, height, width) for frame in keyframes]).to(device, dtype)
        scale = vae_scale_factor(self.vae)
        decoded = self.motion_tokenizer.decode(codes.to(device)).reconstruction
        motion = self.motion_tokenizer.to_raw_motion(decoded, height // scale, width // scale).to(dtype)
        image_latents = encode_video_keyframe(self.vae, pixels, options["noise_aug_strength"], generator=generator)
        latents = denoise_video(
            self.unet,
            self.scheduler,
            image_latents,
            motion,
            encode_motion_condition(self.motion_encoder, motion),
            generator=generator,
            progress_bar=self.progress_bar,
            on_step_end=on_step_end,
            **options,
        )
        return decode_video(self.vae, latents, decode_chunk_size)

    # ---------------------------------------------------------------------------------------------------------- call

    @torch.no_grad()
    def __call__(
        self,
        prompt=None,
        image=None,
        *,
        modality="video",
        num_clips=1,
        height=None,
        width=None,
        keyframe_height=None,
        keyframe_width=None,
        num_inference_steps=None,
        guidance_scale=None,
        min_guidance_scale=1.0,
        keyframe_num_inference_steps=50,
        keyframe_guidance_scale=7.0,
        image_token_guidance_scale=4.0,
        motion_token_guidance_scale=7.0,
        negative_prompt=None,
        do_sample_motion=None,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        min_new_tokens=20,
        max_image_tokens=None,
        max_motion_tokens=500,
        use_text_to_image=False,
        inverse_rate=0.85,
        drop_repeated_frames=True,
        fps=6,
        motion_bucket_id=127,
        noise_aug_strength=0.02,
        cond_on_ref_frame=True,
        decode_chunk_size=8,
        generator=None,
        output_type="pil",
        return_dict=True,
        callback_on_step_end=None,
    ):
        r"""Makes one image or video per prompt.

        Args:
            prompt: a string, or a list with an entry per sample: a string, or a list of strings (text) and images
                (`pathlib.Path`, PIL, array, tensor) in reading order.
            image: image or list of images (one per sample), read after the prompt. In a video's prompt the last image
                is the first clip's key frame, drawn by whatever model made it; only motion is written for that clip.
            modality: "video" or "image".
            num_clips: clips of 24 frames (4 seconds) per video; quality degrades above three.
            height, width: size of the result in pixels; default 512 x 896 for videos, 1024 x 1024 for images.
            keyframe_height, keyframe_width: size key frames of videos are drawn at; default 576 x 1024. They are
                resized to the video's size.
            num_inference_steps: default 25 for videos, 50 for images.
            guidance_scale: for videos the guidance of the last frame (default 4.0), for images that of the image
                (default 7.0; 1 or less switches it off).
            min_guidance_scale: guidance of a video's first frame; linear in between.
            keyframe_num_inference_steps, keyframe_guidance_scale: of a video's key frames.
            image_token_guidance_scale, motion_token_guidance_scale: guidance of the language model (with images in
                the prompt of an image the authors use 5.0).
            negative_prompt: string or list of strings the image's codes are guided away from; default: no prompt at
                all.
            do_sample_motion: draw motion codes; default: not for text-to-video, but with a given key frame.
            temperature, top_k, top_p, min_new_tokens: drawing of codes.
            max_image_tokens, max_motion_tokens: at most so many ids; default 500 per key frame, 200 for an image.
            use_text_to_image: let the component `text_to_image` draw a video's first key frame.
            inverse_rate: part of the key frame's steps that later clips skip by starting from the previous clip's
                last frame with noise on it.
            drop_repeated_frames: leave out the first frame of every later clip, which repeats the frame before it.
            fps, motion_bucket_id, noise_aug_strength: what the video network is told; the last is also the strength of
                the noise on its key frame.
            cond_on_ref_frame: guide towards the key frame as well.
            decode_chunk_size: frames the video VAE decodes together (8 is the model's).
            generator: `torch.Generator`, or a list with one per sample; then results do not depend on the batch.
            output_type: "pil", "np" or "pt".
            return_dict: return a [`VideoLavitPipelineOutput`] instead of a tuple of its entries.
            callback_on_step_end: function (pipeline, step, timestep, {"latents": ...}) -> the same dictionary, called
                in every denoising loop.

        Raises:
            ValueError: contradicting inputs, sizes that do not fit the networks, an unreadable image, a prompt that
                is too long, or a sample for which the language model wrote no visual code.
            TypeError: a prompt, image or generator of another type.
        """
        # 1. Inputs
        is_video = modality == "video"
        samples = self.prepare_samples(prompt, image)
        height, width = height or (512 if is_video else 1024), width or (896 if is_video else 1024)
        if is_video:
            keyframe_height, keyframe_width = keyframe_height or 576, keyframe_width or 1024
        else:
            keyframe_height, keyframe_width = height, width
            keyframe_num_inference_steps = num_inference_steps or 50
            keyframe_guidance_scale = 7.0 if guidance_scale is None else guidance_scale
        sizes = ((height, width), (keyframe_height, keyframe_width))
        self.check_inputs(samples, modality, sizes, num_clips, use_text_to_image, inverse_rate, output_type, generator)
        on_step_end = self._step_callback(callback_on_step_end)
        drawing = {
            "generator": generator,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_new_tokens": min_new_tokens,
        }

        # 2. Prompts
        if use_text_to_image:
            drawn = self._own_keyframes(
                samples,
                keyframe_height,
                keyframe_width,
                keyframe_num_inference_steps,
                keyframe_guidance_scale,
                generator,
            )
            samples = [[*parts, one] for parts, one in zip(samples, drawn)]
        contexts = self.encode_samples(samples, generator, with_marks=is_video)
        given = None
        if is_video and not all(isinstance(part, str) for part in samples[0]):
            given = [next(part for part in reversed(parts) if not isinstance(part, str)) for parts in samples]
        if do_sample_motion is None:
            do_sample_motion = given is not None
        negative = self._negative_ids(negative_prompt, len(samples))

        clips, keyframes, previous = [], [], None
        for clip in range(num_clips):
            # 3. Key frame: its codes, then its picture
            if clip == 0 and given is not None:
                pictures = given
            else:
                tokens = self.write_tokens(
                    self.language_model.generate_image_tokens,
                    contexts,
                    max_image_tokens or (500 if is_video else 200),
                    "visual codes",
                    guidance_scale=image_token_guidance_scale,
                    negative_prompts=negative,
                    **drawing,
                )
                contexts = tokens.sequences
                drawn = self.draw_keyframes(
                    self._codes_of_images(tokens.new_token_ids),
                    keyframe_height,
                    keyframe_width,
                    keyframe_num_inference_steps,
                    keyframe_guidance_scale,
                    generator,
                    previous,
                    inverse_rate,
                    on_step_end,
                )
                if not is_video:
                    break
                pictures = VaeImageProcessor(do_resize=False).postprocess(drawn, output_type="pil")
            keyframes.append(pictures)

            # 4. Motion codes
            tokens = self.write_tokens(
                self.language_model.generate_motion_tokens,
                contexts,
                max_motion_tokens,
                "motion codes",
                guidance_scale=motion_token_guidance_scale,
                do_sample=do_sample_motion,
                **drawing,
            )
            contexts = tokens.sequences
            count = self.motion_tokenizer.config.num_tokens
            codes = [motion_codes(ids, self.language_model.config, count) for ids in tokens.new_token_ids]

            # 5. Frames
            frames = self.animate(
                pictures,
                torch.stack(codes),
                height,
                width,
                generator,
                on_step_end,
                decode_chunk_size,
                num_inference_steps=num_inference_steps or 25,
                min_guidance_scale=min_guidance_scale,
                max_guidance_scale=4.0 if guidance_scale is None else guidance_scale,
                fps=fps,
                motion_bucket_id=motion_bucket_id,
                noise_aug_strength=noise_aug_strength,
                cond_on_ref_frame=cond_on_ref_frame,
            )
            previous = [_to_picture(frame) for frame in frames[:, :, -1]]
            clips.append(frames[:, :, 1:] if clip > 0 and drop_repeated_frames else frames)

        # 6. Result
        output = VideoLavitPipelineOutput(token_ids=[ids.cpu() for ids in contexts])
        if is_video:
            videos = torch.cat(clips, dim=2)
            output.frames = VideoProcessor(do_resize=False).postprocess_video(videos, output_type=output_type)
            output.keyframes = keyframes
        else:
            output.images = VaeImageProcessor(do_resize=False).postprocess(drawn, output_type=output_type)
        self.maybe_free_model_hooks()
        return output if return_dict else (output.frames, output.images, output.keyframes, output.token_ids)

    def _negative_ids(self, negative_prompt, count):
        if negative_prompt is None:
            return None
        texts = [negative_prompt] * count if isinstance(negative_prompt, str) else list(negative_prompt)
        if len(texts) != count:
            raise ValueError(f"{len(texts)} negative prompts for {count} prompts")
        start = self.language_model.config.image_start_token_id
        return [[*self.processor.encode_prompt(text), start] for text in texts]

    def _codes_of_images(self, new_token_ids):
        limit = self.visual_tokenizer.config.num_positions
        codes = []
        for index, ids in enumerate(new_token_ids):
            found = visual_codes(ids, self.language_model.config)
            if len(found) == 0:
                raise ValueError(f"the language model wrote no visual code for sample {index}; try another generator")
            if len(found) > limit:
                # The decoder has no place for more codes than an image has positions; the original fails there.
                logger.warning(f"sample {index}: {len(found)} visual codes were written; the first {limit} are drawn")
            codes.append(found[:limit])
        return codes

    def _step_callback(self, callback):
        if callback is None:
            return None

        def on_step_end(step, timestep, latents):
            return callback(self, step, timestep, {"latents": latents}).pop("latents", latents)

        return on_step_end


def _to_picture(frame):
    """One frame (3, height, width) in about [-1, 1] as a PIL image."""
    array = ((frame.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


__all__ = ["VideoLavitPipeline", "VideoLavitPipelineOutput"]
