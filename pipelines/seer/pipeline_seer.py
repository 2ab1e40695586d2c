"""Text-instructed video prediction with Seer (https://arxiv.org/abs/2303.14897)."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from ...modeling.seer.image_processing_seer import preprocess_image

logger = logging.get_logger(__name__)

# Frames the VAE takes at a time; bounds its memory, not its result.
_VAE_CHUNK = 8


@dataclass
class SeerPipelineOutput(BaseOutput):
    """
    Attributes:
        frames: reference and predicted frames of every sample: a list of lists of PIL images, an array (batch,
            num_frames, height, width, 3) or a tensor (batch, num_frames, 3, height, width), the latter two in [0, 1].
    """

    frames: Any


class SeerPipeline(DiffusionPipeline):
    """Predicts how a clip goes on, from one or more reference frames and a sentence.

    Args:
        tokenizer, text_encoder: CLIP of Stable Diffusion 1.x. The text encoder is given the padding mask.
        vae: frame autoencoder of Stable Diffusion 1.x.
        unet: `SeerUNet3DConditionModel`.
        text_decomposer: `SeerTextDecomposer`, turns the sentence into one text per frame.
        scheduler: `SeerDDIMScheduler` for the authors' results; other schedulers of diffusers work as well.
        num_frames: frames of a window the model was trained with, reference frames included.
        num_cond_frames: reference frames the model was trained with.
        resolution: height and width of frames in pixels.
    """

    model_cpu_offload_seq = "text_encoder->text_decomposer->unet->vae"
    _callback_tensor_inputs = ["latents", "encoder_hidden_states"]

    def __init__(
        self,
        tokenizer,
        text_encoder,
        vae,
        unet,
        text_decomposer,
        scheduler,
        num_frames: int = 16,
        num_cond_frames: int = 1,
        resolution: int = 256,
    ):
        super().__init__()
        if not 1 <= num_cond_frames < num_frames:
            raise ValueError(
                f"num_cond_frames must be at least 1 and below num_frames={num_frames}, got {num_cond_frames}"
            )
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            unet=unet,
            text_decomposer=text_decomposer,
            scheduler=scheduler,
        )
        self.register_to_config(num_frames=num_frames, num_cond_frames=num_cond_frames, resolution=resolution)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)

    @property
    def guidance_scale(self):
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self):
        return self._guidance_scale != 1.0

    @property
    def num_timesteps(self):
        return self._num_timesteps

    @property
    def interrupt(self):
        return self._interrupt

    # --- parts of a run ------------------------------------------------------------------------------------------

    def encode_tokens(self, input_ids, attention_mask):
        """Token ids and padding mask (batch, tokens) -> the text encoder's last hidden state (batch, tokens, width)."""
        return self.text_encoder(input_ids, attention_mask=attention_mask).last_hidden_state

    def encode_prompt(self, prompt, device=None):
        """A list of sentences -> (batch, tokens, width). What exceeds the text encoder's length is cut, with a warning
        that says what was lost."""
        device = device or self._execution_device
        longest = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        inputs = self.tokenizer(prompt, padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
        # `verbose`: the tokenizer's own warning about the length would speak of errors to come.
        for text, ids in zip(prompt, self.tokenizer(prompt, truncation=False, verbose=False).input_ids):
            if len(ids) > longest:
                lost = self.tokenizer.decode(ids[longest - 1 : -1])
                logger.warning(
                    f"the text encoder takes {longest} tokens; of the prompt {text!r} this is left out: {lost}"
                )
        return self.encode_tokens(inputs.input_ids.to(device), inputs.attention_mask.to(device))

    def encode_reference(self, frames, generator=None, noise=None):
        """Samples the latents of reference frames.

        Args:
            frames: (batch, num_frames, 3, height, width) in [0, 1].
            generator: one for all, or a list with one per sample.
            noise: standard normal (batch, num_frames, latent channels, latent height, latent width) to use instead.

        Returns:
            (batch, latent channels, num_frames, latent height, latent width), scaled.
        """
        batch_size = frames.shape[0]
        pixels = (2 * frames - 1).flatten(0, 1).to(self._execution_device, self.vae.dtype)
        moments = [self.vae.encode(chunk).latent_dist for chunk in pixels.split(_VAE_CHUNK)]
        mean = torch.cat([m.mean for m in moments]).unflatten(0, (batch_size, -1))
        std = torch.cat([m.std for m in moments]).unflatten(0, (batch_size, -1))
        if noise is None:
            noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        latents = (mean + std * noise.to(mean)) * self.vae.config.scaling_factor
        return latents.transpose(1, 2)

    def decode_latents(self, latents):
        """(batch, latent channels, num_frames, latent height, latent width) -> float32 frames (batch, num_frames, 3,
        height, width) in [0, 1]."""
        batch_size = latents.shape[0]
        latents = latents.transpose(1, 2).flatten(0, 1).to(self.vae.dtype) / self.vae.config.scaling_factor
        frames = torch.cat([self.vae.decode(chunk).sample for chunk in latents.split(_VAE_CHUNK)])
        return (frames.float() / 2 + 0.5).clamp(0, 1).unflatten(0, (batch_size, -1))

    def _reference_frames(self, image, video, num_prompts, single_prompt, height, width):
        """All reference frames as one tensor (num_prompts, num_frames, 3, height, width) in [0, 1]."""
        clips = _collect_clips(image, video, num_prompts, single_prompt, self.config.num_cond_frames)
        lengths = {len(clip) for clip in clips}
        if lengths == {0}:
            raise ValueError("no reference frame: the clip is empty; at least one is needed")
        if len(lengths) > 1:
            raise ValueError(f"all samples of a batch need the same number of reference frames, got {sorted(lengths)}")
        return torch.stack([torch.stack([preprocess_image(f, height, width).cpu() for f in clip]) for clip in clips])

    def _check_size(self, height, width):
        factor = self.vae_scale_factor
        if height % factor or width % factor:
            raise ValueError(f"height and width must be multiples of {factor}, got {height}x{width}")

        def problem(height, width):
            try:
                self.unet.check_latent_size(height // factor, width // factor)
            except ValueError as error:
                return str(error)
            return None

        found = problem(height, width)
        if found is None:
            return
        # The U-Net's own hint is in latents.
        side, limit = max(height, width), 256 * factor
        sizes = (range(side - factor, 0, -factor), range(side + factor, limit + 1, factor))
        near = (next((size for size in candidates if problem(size, size) is None), None) for candidates in sizes)
        raise ValueError(
            f"frames of {height}x{width} pixels are not possible: {found.partition('; square sizes')[0]}; square sizes "
            f"near: {' or '.join(f'{size}x{size}' for size in near if size is not None)} pixels"
        )

    def _denoise(self, reference_latents, latents, text, num_cond_frames, step_kwargs, bar, on_step_end):
        """The sampling loop of one window: `latents` of the future frames, from noise to data."""
        self.scheduler.set_timesteps(self._num_inference_steps, device=latents.device)
        for t in self.scheduler.timesteps:
            if self.interrupt:
                continue
            noise = predict_noise(
                self.unet,
                reference_latents,
                self.scheduler.scale_model_input(latents, t),
                t,
                text,
                self.guidance_scale,
                num_cond_frames,
            )
            latents = self.scheduler.step(noise, t, latents, **step_kwargs, return_dict=False)[0]
            latents, text = on_step_end(t, latents, text)
            bar.update()
        return latents

    # --- the run -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image=None,
        video=None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] = "",
        num_videos_per_prompt: int = 1,
        num_frames_per_window: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        reference_latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        skip_reference_feed_forward: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
    ) -> SeerPipelineOutput | tuple:
        """
        Frames of any size are resized until they cover `height` x `width` and cropped at their centre.

        Args:
            prompt: what happens, as a plain sentence ("close book"); a list for a batch.
            image: one reference image for all prompts, or a list with one for each. A model trained with two reference
                frames sees it twice. With a single prompt a list is the reference frames of one clip, as with `video`.
                An image is a PIL image, an array (height, width, 3) or a tensor (3, height, width); uint8 or [0, 1].
            video: the reference frames of one clip for all prompts (a list of images, an array or tensor of them, or a
                `VideoClip`), or a list of such clips with one for each prompt. Give either `image` or `video`.
            num_frames: frames of the result, reference frames included; by default those of a window.
            height, width: of the frames in pixels.
            num_inference_steps: denoising steps. The authors' sampler makes 31 of 30.
            guidance_scale: weight of the text; 1 is without guidance.
            negative_prompt: what guidance leads away from; empty in the authors' scripts.
            num_videos_per_prompt: samples of each prompt.
            num_frames_per_window: how many frames are predicted together with their reference frames, by default as in
                training. A longer result is made of several windows, each conditioned on the last frames of the one
                before (as many as the model was trained with); surplus frames of the last window are left out. Of
                reference frames that fill a window by themselves, only the last are looked at; all are output.
            eta: fresh noise of DDIM, 0 for none.
            generator: one for all samples, or a list with one for each.
            latents: noise of the (first window's) future frames: (batch, latent channels, frames, latent height, latent
                width).
            reference_latents: scaled latents of the (first window's) reference frames, laid out likewise, instead of
                sampling them from the VAE.
            prompt_embeds, negative_prompt_embeds: (batch, tokens, width) of the text encoder instead of prompts.
            skip_reference_feed_forward: leave reference frames out of the temporal feed-forwards, as in the authors'
                training. Their sampler includes them.
            output_type: "pil", "np" or "pt".
            return_dict: False returns a tuple.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after every step of every window; it
                may return replacements of the tensors.
            callback_on_step_end_tensor_inputs: names of the tensors it is given, out of "latents" (of the future
                frames) and "encoder_hidden_states" (text of all frames, with guidance the unconditional half first).

        Returns:
            `SeerPipelineOutput` with reference frames, untouched but for resizing, followed by predicted frames.

        Raises:
            ValueError: contradictory or impossible arguments; no reference frame; as many reference frames as frames.
            TypeError: arguments of another type, such as a fractional height.
        """
        # 1. Check inputs
        height = self.config.resolution if height is None else height
        width = self.config.resolution if width is None else width
        num_frames = self.config.num_frames if num_frames is None else num_frames
        window = self.config.num_frames if num_frames_per_window is None else num_frames_per_window
        _check_counts(height=height, width=width, num_frames=num_frames, num_frames_per_window=window)
        prompts = _as_prompts(prompt, prompt_embeds)
        self._check_size(height, width)
        self._check_inputs(output_type, window, num_videos_per_prompt, callback_on_step_end_tensor_inputs)
        frames = self._reference_frames(image, video, len(prompts), not isinstance(prompt, list), height, width)
        frames = frames.repeat_interleave(num_videos_per_prompt, dim=0)
        if frames.shape[1] >= num_frames:
            raise ValueError(
                f"{frames.shape[1]} reference frames leave nothing to predict of num_frames={num_frames}; ask for more "
                "frames or give fewer"
            )
        batch_size = frames.shape[0]
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for {batch_size} samples; give one, or one for each")
        self._guidance_scale, self._num_inference_steps = guidance_scale, num_inference_steps
        self._interrupt = False
        device, dtype = self._execution_device, self.unet.dtype

        # 2. Encode the text
        if prompt_embeds is None:
            prompt_embeds = self.encode_prompt(prompts, device)
        if negative_prompt_embeds is None and self.do_classifier_free_guidance:
            negative = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt] * len(prompts)
            if len(negative) != len(prompts):
                raise ValueError(f"{len(negative)} negative prompts for {len(prompts)} prompts")
            negative_prompt_embeds = self.encode_prompt(negative, device)
        _check_embeds(prompt_embeds, negative_prompt_embeds)
        prompt_embeds, negative_prompt_embeds = (
            None if embeds is None else embeds.to(device, dtype).repeat_interleave(num_videos_per_prompt, dim=0)
            for embeds in (prompt_embeds, negative_prompt_embeds)
        )

        # 3. Plan windows and steps
        windows = _plan_windows(frames.shape[1], num_frames, window, self.config.num_cond_frames)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self._num_timesteps = len(self.scheduler.timesteps) * len(windows)
        step_kwargs = _accepted(self.scheduler.step, eta=eta, generator=generator)
        step = -1

        def on_step_end(t, latents, text):
            nonlocal step
            step += 1
            if callback_on_step_end is None:
                return latents, text
            tensors = {"latents": latents, "encoder_hidden_states": text}
            given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
            tensors.update(callback_on_step_end(self, step, t, given) or {})
            return tensors["latents"], tensors["encoder_hidden_states"]

        # 4. Predict window after window
        with self.progress_bar(total=self._num_timesteps) as bar:
            for index, (num_reference, num_new) in enumerate(windows):
                reference = frames[:, -num_reference:]
                if index > 0 or reference_latents is None:
                    reference_latents = self.encode_reference(reference, generator)
                shape = (*reference_latents.shape[:2], num_new, *reference_latents.shape[3:])
                noise = latents if index == 0 else None
                if noise is None:
                    noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
                self._check_latents(noise, reference_latents, shape, num_reference)
                text = self._frame_texts(prompt_embeds, negative_prompt_embeds, num_reference + num_new)
                predicted = self._denoise(
                    reference_latents.to(device, dtype),
                    noise.to(device, dtype) * self.scheduler.init_noise_sigma,
                    text,
                    num_reference if skip_reference_feed_forward else 0,
                    step_kwargs,
                    bar,
                    on_step_end,
                )
                # 5. Decode
                frames = torch.cat((frames, self.decode_latents(predicted).cpu()), dim=1)

        self.maybe_free_model_hooks()
        frames = _postprocess(frames[:, :num_frames], output_type)
        return SeerPipelineOutput(frames=frames) if return_dict else (frames,)

    def _frame_texts(self, prompt_embeds, negative_prompt_embeds, num_frames):
        """One text per frame and sample. The unconditional text is the same in all frames, without the decomposer."""
        text = self.text_decomposer(prompt_embeds.to(self.text_decomposer.dtype), num_frames, return_dict=False)[0]
        text = text.to(prompt_embeds.dtype)
        if not self.do_classifier_free_guidance:
            return text
        unconditional = negative_prompt_embeds[:, None].expand(-1, num_frames, -1, -1)
        return torch.cat((unconditional, text))

    def _check_inputs(self, output_type, window, num_videos_per_prompt, callback_tensors):
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be 'pil', 'np' or 'pt', got {output_type!r}")
        if num_videos_per_prompt < 1:
            raise ValueError(f"num_videos_per_prompt must be at least 1, got {num_videos_per_prompt}")
        if window <= self.config.num_cond_frames:
            raise ValueError(
                f"num_frames_per_window={window} leaves nothing to predict after {self.config.num_cond_frames} "
                "reference frames"
            )
        unknown = set(callback_tensors) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be out of {self._callback_tensor_inputs}, found "
                f"{sorted(unknown)}"
            )

    @staticmethod
    def _check_latents(noise, reference_latents, shape, num_reference):
        if tuple(noise.shape) != shape:
            raise ValueError(f"`latents` must be {shape}, got {tuple(noise.shape)}")
        if reference_latents.shape[2] != num_reference:
            raise ValueError(f"`reference_latents` must hold {num_reference} frames, got {reference_latents.shape[2]}")


def predict_noise(unet, reference_latents, latents, timestep, text, guidance_scale, num_cond_frames=0):
    """The guided noise of the future frames.

    Args:
        unet: `SeerUNet3DConditionModel`.
        reference_latents, latents: of the reference and the (noisy) future frames, (batch, channels, frames, height,
            width). The U-Net sees both with the same timestep.
        timestep: scalar.
        text: (batch, all frames, tokens, width); with guidance the unconditional texts are stacked in front on the
            batch axis.
        guidance_scale: weight of the text, 1 for none.
        num_cond_frames: reference frames that skip the temporal feed-forwards.
    """
    clip = torch.cat((reference_latents, latents), dim=2)
    if guidance_scale == 1.0:
        noise = unet(clip, timestep, text, num_cond_frames, return_dict=False)[0]
        return noise[:, :, reference_latents.shape[2] :]
    noise = unet(torch.cat((clip, clip)), timestep, text, num_cond_frames, return_dict=False)[0]
    unconditional, conditional = noise[:, :, reference_latents.shape[2] :].chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def _as_prompts(prompt, prompt_embeds):
    """A list of prompts, or of as many empty strings as there are embeddings."""
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("give either `prompt` or `prompt_embeds`")
    if prompt_embeds is not None:
        return [""] * prompt_embeds.shape[0]
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise TypeError(f"`prompt` must be a string or a list of strings, got {prompt!r}")
    return prompts


def _check_counts(**counts):
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")


def _check_embeds(prompt_embeds, negative_prompt_embeds):
    if prompt_embeds.ndim != 3:
        raise ValueError(f"`prompt_embeds` must be (batch, tokens, width), got {tuple(prompt_embeds.shape)}")
    if negative_prompt_embeds is not None and negative_prompt_embeds.shape != prompt_embeds.shape:
        raise ValueError(
            f"`negative_prompt_embeds` must have the shape of the prompts' {tuple(prompt_embeds.shape)}, got "
            f"{tuple(negative_prompt_embeds.shape)}"
        )


def _plan_windows(num_reference, num_frames, window, num_cond_frames):
    """List of (reference frames, new frames) for every window."""
    first = num_reference if num_reference < window else num_cond_frames
    windows = [(first, min(window, num_frames - num_reference + first) - first)]
    known = num_reference + windows[0][1]
    while known < num_frames:
        # Full windows only: group norms pool over frames, so results depend on their number.
        windows.append((num_cond_frames, window - num_cond_frames))
        known += window - num_cond_frames
    return windows


def _is_frame(value):
    return isinstance(value, Image.Image) or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 3)


def _collect_clips(image, video, num_prompts, single_prompt, num_copies):
    """The reference frames of every prompt, as lists of images."""
    if image is None and video is None:
        raise ValueError("no reference frame: give `image` or `video`")
    if image is not None and video is not None:
        raise ValueError("give `image` or `video`, not both")
    if _is_frame(image):
        return [[image] * num_copies] * num_prompts
    given = video if image is None else image
    if _is_frame(given):
        raise ValueError("`video` must hold several frames; give a single frame as `image`")
    given = _split(given)
    if not given:
        raise ValueError("no reference frame: the clip is empty; at least one is needed")
    if all(_is_frame(item) for item in given):
        if video is not None or (single_prompt and len(given) > 1):
            return [given] * num_prompts
        clips = [[item] * num_copies for item in given]
    else:
        clips = [_split(clip) for clip in given]
    if len(clips) != num_prompts:
        raise ValueError(f"{len(clips)} {'images' if video is None else 'clips'} for {num_prompts} prompts")
    return clips


def _split(clip):
    """The frames (or clips) of a list, array, tensor or `VideoClip`, as a list."""
    if _is_frame(clip):
        raise ValueError("a clip must hold several frames; got a single image among clips")
    frames = getattr(clip, "frames", clip)
    if frames is not clip:
        frames = np.asarray(frames)
    if not isinstance(frames, (list, tuple, np.ndarray, torch.Tensor)):
        raise TypeError(f"reference frames must be images, lists, arrays or tensors, got {type(clip).__name__}")
    return list(frames)


def _accepted(function, **kwargs):
    """Those of `kwargs` that `function` has parameters for (schedulers differ)."""
    import inspect

    return {name: value for name, value in kwargs.items() if name in inspect.signature(function).parameters}


def _postprocess(frames, output_type):
    if output_type == "pt":
        return frames
    arrays = frames.permute(0, 1, 3, 4, 2).numpy()
    if output_type == "np":
        return arrays
    return [[Image.fromarray(frame) for frame in clip] for clip in (arrays * 255).round().astype("uint8")]
