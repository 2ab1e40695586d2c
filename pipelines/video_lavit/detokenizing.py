"""Video-LaVIT's de-tokenizers, as functions that its pipelines share: codes to keyframe, keyframe + motion to video.

The keyframe de-tokenizer is SDXL-shaped and conditioned on visual codes; the video de-tokenizer is Stable Video
Diffusion's network conditioned on motion. Components are diffusers models; state is passed in and returned.
"""

import contextlib
import inspect

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from ...modeling.video_lavit.image_processing_video_lavit import to_pil


def check_picture_size(height, width, multiple):
    """Raises ValueError unless both sides are positive multiples of `multiple` pixels."""
    if height < multiple or width < multiple or height % multiple or width % multiple:
        raise ValueError(f"height and width must be multiples of {multiple} pixels, got {height} x {width}")


def image_to_tensor(image, height, width):
    """One image as the VAEs take it: (3, height, width) float32 in [-1, 1], resized with Pillow's bicubic if needed."""
    picture = to_pil(image)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def vae_scale_factor(vae):
    """Pixels per latent cell along each side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@contextlib.contextmanager
def _decodable(vae):
    """Runs the VAE in float32 where its weights are float16 and its config says that overflows."""
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    # torch's own cast: diffusers' warns every time, about modules to keep in float32 of which a VAE has none.
    if upcast:
        torch.nn.Module.to(vae, torch.float32)
    try:
        yield vae
    finally:
        if upcast:
            torch.nn.Module.to(vae, torch.float16)


# ------------------------------------------------------------------------------------------------ visual codes -> image


def encode_keyframe_prompt(visual_tokenizer, keyframe_decoder, indices, device=None):
    """Conditioning of the keyframe U-Net from visual codes.

    Args:
        indices: list of 1-d code tensors (one per image), or (batch, num_tokens) with -1 after the last; without the
            offset of the language model's vocabulary.
        device: where the decoder runs; default: where the codebook is.

    Returns:
        (prompt_embeds (batch, num_queries, channels), pooled_prompt_embeds (batch, channels)).

    Raises:
        ValueError: codes outside the codebook, none or too many for an image.
    """
    decoded = visual_tokenizer.decode(indices)
    longest = int(decoded.num_tokens.max())
    features = decoded.features[:, :longest].to(device, keyframe_decoder.dtype)
    output = keyframe_decoder(features, decoded.num_tokens.to(device))
    return output.prompt_embeds, output.pooled_prompt_embeds


def prepare_keyframe_latents(
    unet, vae, scheduler, batch_size, height, width, *, dtype, device, generator=None, latents=None
):
    """Initial latents (batch, 4, height / 8, width / 8): standard normal times `training_noise_sigma`.

    `latents` replaces the standard normal draw.
    """
    scale = vae_scale_factor(vae)
    shape = (batch_size, unet.config.in_channels, height // scale, width // scale)
    if latents is None:
        latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    elif tuple(latents.shape) != shape:
        raise ValueError(f"latents must be {shape}, got {tuple(latents.shape)}")
    return latents.to(device, dtype) * training_noise_sigma(scheduler)


def training_noise_sigma(scheduler):
    """The scheduler's `init_noise_sigma` before any `set_timesteps`, that is over all training steps.

    The released code scales the initial noise before it sets the inference steps. It is the same number for DDIM (1);
    for ancestral Euler it is 14.65 whatever the number of steps.
    """
    return type(scheduler).from_config(scheduler.config).init_noise_sigma


def renoise_keyframes(vae, scheduler, images, start_step, *, generator=None, noise=None):
    """Latents that link a clip's keyframe to the previous clip: its last frame, noised to `timesteps[start_step]`.

    The paper describes DDIM inversion; the released code adds noise. It also multiplies by `init_noise_sigma`, which is
    1 for DDIM and too much for ancestral Euler; kept as released.

    Args:
        images: (batch, 3, height, width) in [-1, 1].
        start_step: index into `scheduler.timesteps`, which must have been set.
        noise: replaces the standard normal draw.

    Returns:
        (batch, 4, height / 8, width / 8), to be passed to `denoise_keyframes` with the same `start_step`.
    """
    with _decodable(vae):
        latents = vae.encode(images.to(vae.dtype)).latent_dist.mode() * vae.config.scaling_factor
    if noise is None:
        noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
    timestep = scheduler.timesteps[start_step : start_step + 1].to(latents.device)
    noisy = scheduler.add_noise(latents, noise.to(latents), timestep.expand(len(latents)))
    return noisy * scheduler.init_noise_sigma


def denoise_keyframes(
    unet,
    scheduler,
    prompt_embeds,
    pooled_prompt_embeds,
    latents,
    height,
    width,
    *,
    guidance_scale=3.0,
    start_step=0,
    original_size=None,
    target_size=None,
    crops_coords_top_left=(0, 0),
    generator=None,
    progress_bar=None,
    on_step_end=None,
):
    """The keyframe U-Net's denoising loop.

    Args:
        unet: SDXL-shaped `UNet2DConditionModel`.
        scheduler: DDIM or ancestral Euler, with its timesteps set.
        prompt_embeds, pooled_prompt_embeds: see `encode_keyframe_prompt`. The unconditional branch is all zeros.
        latents: from `prepare_keyframe_latents` (already scaled), or from `renoise_keyframes`.
        height, width: size of the image in pixels.
        guidance_scale: 1 or less switches guidance off.
        start_step: first of the scheduler's timesteps to run.
        original_size, target_size, crops_coords_top_left: SDXL's micro-conditioning; the sizes default to the image's.
        progress_bar: a pipeline's `progress_bar`, called with `total=` the number of steps.
        on_step_end: function (step, timestep, latents) -> latents.

    Returns:
        latents (batch, 4, height / 8, width / 8).
    """
    guided = guidance_scale > 1.0
    batch = len(prompt_embeds)
    time_ids = [*(original_size or (height, width)), *crops_coords_top_left, *(target_size or (height, width))]
    time_ids = torch.tensor([time_ids], dtype=prompt_embeds.dtype, device=prompt_embeds.device)
    if guided:
        prompt_embeds = torch.cat([torch.zeros_like(prompt_embeds), prompt_embeds])
        pooled_prompt_embeds = torch.cat([torch.zeros_like(pooled_prompt_embeds), pooled_prompt_embeds])
    conditions = {"text_embeds": pooled_prompt_embeds, "time_ids": time_ids.expand(len(prompt_embeds), -1)}
    step_options = _generator_option(scheduler, generator)
    timesteps = scheduler.timesteps[start_step:]
    with progress_bar(total=len(timesteps)) if progress_bar else contextlib.nullcontext() as bar:
        for step, timestep in enumerate(timesteps):
            model_input = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, timestep)
            prediction = unet(
                model_input.to(prompt_embeds.dtype),
                timestep,
                encoder_hidden_states=prompt_embeds,
                added_cond_kwargs=conditions,
                return_dict=False,
            )[0]
            if guided:
                unconditional, conditional = prediction.split(batch)
                prediction = unconditional + guidance_scale * (conditional - unconditional)
            latents = scheduler.step(prediction, timestep, latents, **step_options, return_dict=False)[0]
            if on_step_end is not None:
                latents = on_step_end(step, timestep, latents)
            if bar is not None:
                bar.update()
    return latents


def decode_keyframes(vae, latents):
    """Latents to images (batch, 3, height, width), about [-1, 1] (not clamped)."""
    with _decodable(vae):
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]


def _generator_option(scheduler, generator):
    # DDIM and ancestral Euler take a generator; other schedulers a user puts in may not.
    return {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}


# ------------------------------------------------------------------------------------------- keyframe + motion -> video


def encode_motion_condition(motion_encoder, motion):
    """Condition tokens (batch, num_frames, grid * grid, channels) of raw motion maps (batch, 2, num_frames, h, w)."""
    return motion_encoder(motion.to(motion_encoder.dtype)).sample


def encode_video_keyframe(vae, images, noise_aug_strength=0.02, *, generator=None, noise=None):
    """Image latents (batch, 4, h, w) of slightly noised keyframes: the distribution's mode, *not* scaled.

    Args:
        images: (batch, 3, height, width) in [-1, 1].
        noise: replaces the standard normal draw.
    """
    if noise is None:
        noise = randn_tensor(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    noisy = images + noise_aug_strength * noise.to(images)
    with _decodable(vae):
        return vae.encode(noisy.to(vae.dtype)).latent_dist.mode()


def denoise_video(
    unet,
    scheduler,
    image_latents,
    motion,
    motion_condition,
    *,
    num_inference_steps=25,
    min_guidance_scale=1.0,
    max_guidance_scale=4.0,
    fps=6,
    motion_bucket_id=127,
    noise_aug_strength=0.02,
    cond_on_ref_frame=True,
    latents=None,
    generator=None,
    progress_bar=None,
    on_step_end=None,
):
    """The video U-Net's denoising loop.

    Args:
        unet: `VideoLavitUNetSpatioTemporalConditionModel`.
        scheduler: `EulerDiscreteScheduler` with v-prediction, continuous time and Karras sigmas.
        image_latents: (batch, 4, h, w) from `encode_video_keyframe`.
        motion: raw motion maps (batch, 2, num_frames, h, w) at latent size.
        motion_condition: from `encode_motion_condition`.
        min_guidance_scale, max_guidance_scale: guidance of the first and last frame, linear in between. A constant is
            two equal numbers; both 1 switch it off.
        fps: frames per second told to the network; unlike Stable Video Diffusion's it is not reduced by one.
        cond_on_ref_frame: the unconditional branch sees no keyframe (zeros); False lets it see it.
        latents: replaces the standard normal draw (batch, num_frames, 4, h, w).
        progress_bar, on_step_end: see `denoise_keyframes`.

    Returns:
        latents (batch, num_frames, 4, h, w).
    """
    device, dtype = image_latents.device, unet.dtype
    batch, num_frames = motion_condition.shape[:2]
    height, width = image_latents.shape[-2:]
    if tuple(motion.shape) != (batch, unet.config.in_channels - 2 * image_latents.shape[1], num_frames, height, width):
        raise ValueError(
            f"motion must be ({batch}, 2, {num_frames}, {height}, {width}) like the latents, got {tuple(motion.shape)}"
        )
    guided = max(min_guidance_scale, max_guidance_scale) > 1.0 or min_guidance_scale < 1.0

    # Conditions concatenated to the latents: (batch, num_frames, 4 + 2, h, w)
    image_latents = image_latents.to(dtype)[:, None].expand(-1, num_frames, -1, -1, -1)
    motion = motion.to(device, dtype).transpose(1, 2)
    motion_condition = motion_condition.to(device, dtype)
    time_ids = torch.tensor([[fps, motion_bucket_id, noise_aug_strength]], dtype=dtype, device=device)
    if guided:
        unconditional = torch.zeros_like(image_latents) if cond_on_ref_frame else image_latents
        image_latents = torch.cat([unconditional, image_latents])
        motion = torch.cat([torch.zeros_like(motion), motion])
        motion_condition = torch.cat([torch.zeros_like(motion_condition), motion_condition])
    conditions = torch.cat([image_latents, motion], dim=2)
    time_ids = time_ids.expand(len(conditions), -1)
    scales = torch.linspace(min_guidance_scale, max_guidance_scale, num_frames, device=device, dtype=dtype)
    scales = scales[None, :, None, None, None]

    scheduler.set_timesteps(num_inference_steps, device=device)
    shape = (batch, num_frames, unet.config.out_channels, height, width)
    if latents is None:
        latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    elif tuple(latents.shape) != shape:
        raise ValueError(f"latents must be {shape}, got {tuple(latents.shape)}")
    latents = latents.to(device, dtype) * scheduler.init_noise_sigma

    step_options = _generator_option(scheduler, generator)
    with progress_bar(total=num_inference_steps) if progress_bar else contextlib.nullcontext() as bar:
        for step, timestep in enumerate(scheduler.timesteps):
            model_input = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, timestep)
            prediction = unet(
                torch.cat([model_input.to(dtype), conditions], dim=2),
                timestep,
                encoder_hidden_states=motion_condition,
                added_time_ids=time_ids,
                return_dict=False,
            )[0]
            if guided:
                without, with_ = prediction.split(batch)
                prediction = without + scales * (with_ - without)
            latents = scheduler.step(prediction, timestep, latents, **step_options, return_dict=False)[0]
            if on_step_end is not None:
                latents = on_step_end(step, timestep, latents)
            if bar is not None:
                bar.update()
    return latents


def decode_video(vae, latents, decode_chunk_size=8):
    """Latents (batch, num_frames, 4, h, w) to frames (batch, 3, num_frames, height, width), about [-1, 1].

    The temporal decoder sees `decode_chunk_size` frames at a time, which changes the picture slightly: 8 is usual.
    """
    latents = latents / vae.config.scaling_factor
    chunks = []
    with _decodable(vae):
        for chunk in latents.to(vae.dtype).split(decode_chunk_size, dim=1):
            frames = vae.decode(chunk.flatten(0, 1), num_frames=chunk.shape[1]).sample
            chunks.append(frames.unflatten(0, chunk.shape[:2]))
    return torch.cat(chunks, dim=1).transpose(1, 2).float()


__all__ = [
    "check_picture_size",
    "decode_keyframes",
    "decode_video",
    "denoise_keyframes",
    "denoise_video",
    "encode_keyframe_prompt",
    "encode_motion_condition",
    "encode_video_keyframe",
    "image_to_tensor",
    "prepare_keyframe_latents",
    "renoise_keyframes",
    "training_noise_sigma",
    "vae_scale_factor",
]
