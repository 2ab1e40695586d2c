"""Divot features -> video frames: what every Divot pipeline that makes video shares."""

import contextlib
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ...modeling.divot.scheduling_divot import check_eta

FRAMES_PER_CLIP = 16
FRAMES_PER_SECOND = 8.0
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CALLBACK_TENSORS = ("latents", "pred_original_sample")


@dataclass
class DivotVideoOutput(BaseOutput):
    """Videos made by a Divot pipeline.

    Attributes:
        frames: "pt": float tensor (batch, num_frames, 3, height, width) in [0, 1]; "np": the same as an array
            (batch, num_frames, height, width, 3); "pil": list (batch) of lists of images; "latent": latents (batch,
            channels, num_frames, height, width). Videos of different lengths come as a list.
        features: the Divot features the frames were made from, (num_clips of all videos, num_features, feature_dim).
        fps: frames per second of the videos.
    """

    frames: torch.Tensor | np.ndarray | list
    features: torch.Tensor | None = None
    fps: float = FRAMES_PER_SECOND


def placement(module):
    """(device, dtype) inputs of `module` must have, also when its weights are offloaded between calls."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else module.device, module.dtype


def _check_features(resampler, features, name):
    expected = (resampler.config.num_features, resampler.config.feature_dim)
    if not isinstance(features, torch.Tensor) or not features.is_floating_point():
        kind = features.dtype if isinstance(features, torch.Tensor) else type(features).__name__
        raise TypeError(f"{name} are {kind}; expected a tensor of floats")
    if features.ndim != 3 or tuple(features.shape[1:]) != expected or len(features) < 1:
        raise ValueError(
            f"{name} have shape {tuple(features.shape)}; expected (batch, {expected[0]}, {expected[1]}), as "
            "`DivotTokenizerModel.encode(...).features` gives them"
        )
    if not torch.isfinite(features).all():
        raise ValueError(f"{name} hold NaN or infinite values")


def _check_count(value, name, most=None):
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not an integer")
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    if most is not None and value > most:
        raise ValueError(f"{name}={value} must be at most {most}")


def check_decoding_inputs(
    resampler,
    scheduler,
    features,
    *,
    num_inference_steps,
    output_type,
    unconditional_features=None,
    num_frames=FRAMES_PER_CLIP,
    guidance_scale=7.5,
    guidance_rescale=0.7,
    eta=1.0,
    generator=None,
    callback_on_step_end_tensor_inputs=("latents",),
):
    """Raises ValueError or TypeError for arguments `decode_features` cannot work with."""
    _check_features(resampler, features, "features")
    if unconditional_features is not None:
        _check_features(resampler, unconditional_features, "unconditional_features")
    _check_count(num_inference_steps, "num_inference_steps", scheduler.config.num_train_timesteps)
    _check_count(num_frames, "num_frames")
    for name, value in (("guidance_scale", guidance_scale), ("guidance_rescale", guidance_rescale)):
        if not math.isfinite(value):
            raise ValueError(f"{name}={value} must be a finite number")
    if guidance_rescale < 0:
        raise ValueError(f"guidance_rescale={guidance_rescale} must not be negative")
    check_eta(eta)
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r}; choose from {', '.join(OUTPUT_TYPES)}")
    if isinstance(generator, (list, tuple)) and len(generator) != features.shape[0]:
        raise ValueError(f"{len(generator)} generators for {features.shape[0]} clips; give one, or one per clip")
    unknown = set(callback_on_step_end_tensor_inputs) - set(CALLBACK_TENSORS)
    if unknown:
        raise ValueError(f"callback_on_step_end_tensor_inputs {sorted(unknown)}; choose from {CALLBACK_TENSORS}")


def rescale_guidance(guided, conditional, guidance_rescale):
    """Pulls the standard deviation of the guided prediction back towards that of the conditional one
    (arXiv:2305.08891, section 3.4)."""
    axes = list(range(1, guided.ndim))
    matched = guided * (conditional.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
    return guidance_rescale * matched + (1 - guidance_rescale) * guided


@torch.no_grad()
def denoise(
    unet,
    scheduler,
    context: torch.Tensor,
    unconditional_context: torch.Tensor | None,
    latents: torch.Tensor,
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    guidance_rescale: float = 0.7,
    eta: float = 1.0,
    fs: int | torch.Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    step_noise: torch.Tensor | None = None,
    callback_on_step_end: Callable | None = None,
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    pipeline=None,
) -> torch.Tensor:
    """Runs the sampler from noise to latents.

    The keys and values of all cross attentions are computed once, before the first step.

    Args:
        unet, scheduler: `DivotUNet3DConditionModel` and `DivotDDIMScheduler`.
        context: condition tokens (batch, num_tokens, cross_attention_dim).
        unconditional_context: the same for guidance, (1 or batch, ...). None, or a guidance scale of 1, means one
            prediction per step and no rescaling.
        latents: initial noise (batch, channels, num_frames, height, width).
        num_inference_steps: sampling steps (see `DivotDDIMScheduler.set_timesteps`).
        guidance_scale, guidance_rescale: classifier-free guidance and its rescaling.
        eta: 0 is deterministic DDIM, 1 the released setting.
        fs: frame stride conditioning, one or (batch,).
        generator: draws the noise of the steps, one per sample or one for all.
        step_noise: the noise itself, (steps, batch, channels, num_frames, height, width), instead of a generator.
        callback_on_step_end: called as (pipeline, step, timestep, tensors); may return tensors to replace.
        callback_on_step_end_tensor_inputs: which of "latents" and "pred_original_sample" it gets.
        pipeline: the pipeline, for its progress bar and the callback.

    Returns:
        Latents (batch, channels, num_frames, height, width), float32.
    """
    device, dtype = placement(unet)
    guide = unconditional_context is not None and guidance_scale != 1.0
    batch, num_frames = latents.shape[0], latents.shape[2]
    latents = latents.to(device, torch.float32)
    context = context.to(device, dtype)
    if fs is not None:
        fs = torch.as_tensor(fs, device=device).reshape(-1).expand(batch)
    if guide:
        unconditional_context = unconditional_context.to(device, dtype).expand(batch, -1, -1)
        context = torch.cat([unconditional_context, context])
        fs = torch.cat([fs, fs]) if fs is not None else None
    key_values = unet.project_context(context, num_frames)

    scheduler.set_timesteps(num_inference_steps, device="cpu")
    timesteps = scheduler.timesteps
    if step_noise is not None and len(step_noise) != len(timesteps):
        raise ValueError(f"step_noise holds the noise of {len(step_noise)} steps, the sampler makes {len(timesteps)}")
    bar = pipeline.progress_bar(total=len(timesteps)) if pipeline is not None else contextlib.nullcontext()
    with bar as progress:
        for i, timestep in enumerate(timesteps.tolist()):
            inputs = torch.cat([latents, latents]) if guide else latents
            prediction = unet(inputs.to(dtype), timestep, fs=fs, context_key_values=key_values).sample.float()
            if guide:
                unconditional, conditional = prediction.chunk(2)
                prediction = unconditional + guidance_scale * (conditional - unconditional)
                if guidance_rescale > 0:
                    prediction = rescale_guidance(prediction, conditional, guidance_rescale)
            noise = None if step_noise is None else step_noise[i].to(latents)
            latents, pred_original_sample = scheduler.step(
                prediction, timestep, latents, eta=eta, generator=generator, variance_noise=noise, return_dict=False
            )
            if callback_on_step_end is not None:
                available = {"latents": latents, "pred_original_sample": pred_original_sample}
                tensors = {name: available[name] for name in callback_on_step_end_tensor_inputs}
                replaced = callback_on_step_end(pipeline, i, timestep, tensors) or {}
                latents = replaced.get("latents", latents)
            if progress is not None:
                progress.update()
    return latents


@torch.no_grad()
def decode_latents(vae, latents: torch.Tensor, decode_chunk_size: int = 4) -> torch.Tensor:
    """Latents (batch, channels, num_frames, height, width) -> video (batch, 3, num_frames, 8 * height, 8 * width),
    about [-1, 1] and not clamped, float32. `decode_chunk_size` frames are decoded at a time."""
    device, dtype = placement(vae)
    batch, _, num_frames = latents.shape[:3]
    frames = (latents / vae.config.scaling_factor).transpose(1, 2).flatten(0, 1).to(device, dtype)
    decoded = torch.cat([vae.decode(part).sample.float() for part in frames.split(decode_chunk_size)])
    return decoded.unflatten(0, (batch, num_frames)).transpose(1, 2)


def to_images(frames: torch.Tensor) -> list[PIL.Image.Image]:
    """Frames (num_frames, 3, height, width) in [0, 1] -> images, truncated to 8 bits as the original does when it
    writes a video."""
    arrays = (frames * 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [PIL.Image.fromarray(array) for array in arrays]


def to_output_type(video: torch.Tensor, output_type: str):
    """Video (batch, 3, num_frames, height, width) in [-1, 1] -> frames as described in `DivotVideoOutput`."""
    frames = (video.clamp(-1, 1) + 1) / 2
    if output_type == "pt":
        return frames.transpose(1, 2)
    if output_type == "np":
        return frames.permute(0, 2, 3, 4, 1).cpu().numpy()
    return [to_images(clip) for clip in frames.transpose(1, 2)]


@torch.no_grad()
def decode_features(
    unet,
    vae,
    resampler,
    scheduler,
    features: torch.Tensor,
    *,
    unconditional_features: torch.Tensor | None = None,
    num_frames: int = FRAMES_PER_CLIP,
    height: int | None = None,
    width: int | None = None,
    fs: int | torch.Tensor | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    guidance_rescale: float = 0.7,
    eta: float = 1.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    latents: torch.Tensor | None = None,
    callback_on_step_end: Callable | None = None,
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    decode_chunk_size: int = 4,
    output_type: str = "pil",
    pipeline=None,
):
    """Divot features -> clips of `num_frames` frames at 8 fps.

    Parts may sit on different devices and in different dtypes; the sampler itself runs in float32.

    Args:
        unet, vae, resampler, scheduler: `DivotUNet3DConditionModel`, `AutoencoderKL`, `DivotFeatureResampler`,
            `DivotDDIMScheduler`.
        features: (batch, num_features, feature_dim).
        unconditional_features: features of a mid-gray clip (1, num_features, feature_dim), see
            `DivotTokenizerModel.unconditional_features`. Without them there is no guidance.
        num_frames: frames per clip; the model was trained on 16.
        height, width: size in pixels. Default: what the U-Net was trained on (256).
        fs: frame stride conditioning. Default: the U-Net's (3).
        num_inference_steps, guidance_scale, guidance_rescale, eta: see `denoise`; the defaults are the released ones.
        generator: draws initial noise and step noise; one, or one per clip.
        latents: initial noise (batch, channels, num_frames, height / 8, width / 8) instead of drawing it.
        callback_on_step_end, callback_on_step_end_tensor_inputs, pipeline: see `denoise`.
        decode_chunk_size: frames the VAE decodes at a time.
        output_type: "pil", "np", "pt" or "latent".

    Returns:
        Frames as described in `DivotVideoOutput`.

    Raises:
        TypeError: features that are not a tensor of floats.
        ValueError: features of the wrong shape or not finite, or other arguments that do not fit.
    """
    check_decoding_inputs(
        resampler,
        scheduler,
        features,
        num_inference_steps=num_inference_steps,
        output_type=output_type,
        unconditional_features=unconditional_features,
        num_frames=num_frames,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
        eta=eta,
        generator=generator,
        callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
    )
    device, dtype = placement(resampler)
    context = resampler(features.to(device, dtype)).encoder_hidden_states
    unconditional_context = None
    if unconditional_features is not None and guidance_scale != 1.0:
        unconditional_context = resampler(unconditional_features.to(device, dtype)).encoder_hidden_states

    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    size = (height or unet.config.sample_size * scale, width or unet.config.sample_size * scale)
    if any(s % scale for s in size):
        raise ValueError(f"height and width {size} must be multiples of {scale}")
    shape = (features.shape[0], unet.config.in_channels, num_frames, size[0] // scale, size[1] // scale)
    if latents is None:
        generators = list(generator) if isinstance(generator, (list, tuple)) else generator
        latents = randn_tensor(shape, generator=generators, device=placement(unet)[0], dtype=torch.float32)
    elif tuple(latents.shape) != shape:
        raise ValueError(f"latents have shape {tuple(latents.shape)}; expected {shape}")
    latents = denoise(
        unet,
        scheduler,
        context,
        unconditional_context,
        latents,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
        eta=eta,
        fs=fs,
        generator=list(generator) if isinstance(generator, (list, tuple)) else generator,
        callback_on_step_end=callback_on_step_end,
        callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        pipeline=pipeline,
    )
    if output_type == "latent":
        return latents
    return to_output_type(decode_latents(vae, latents, decode_chunk_size), output_type)
