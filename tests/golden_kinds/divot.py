"""Golden runners of Divot's tokenizer and de-tokenizer."""

import json
import re

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D

from cinetok import (
    DivotDDIMScheduler,
    DivotFeatureResampler,
    DivotTokenizerConfig,
    DivotTokenizerModel,
    DivotUNet3DConditionModel,
    DivotVideoProcessor,
)
from cinetok.conversion.checkpoints import load_strict, take_prefix
from cinetok.conversion.divot import (
    drop_unused_tokenizer_tensors,
    resampler_config,
    scheduler_config,
    tokenizer_config,
    unet_config,
    vae_config,
)
from cinetok.conversion.divot_names import resampler_mapping, tokenizer_mapping, unet_mapping, vae_mapping
from cinetok.modeling.divot.modeling_divot_tokenizer import resize_for_clip
from cinetok.modeling.divot.scheduling_divot import divot_betas
from cinetok.modeling.divot.video_processing_divot import comprehension_indices, reconstruction_indices
from cinetok.pipelines.divot.detokenizing import decode_latents, denoise

from . import (
    defer,
    divot_llm,  # noqa: F401 (registers its runners)
    golden,
)

defer("divot", "training_samples", "runs with the trainers")


def build_tokenizer(config, weights):
    config = tokenizer_config(config)
    weights = drop_unused_tokenizer_tensors(weights)
    model = DivotTokenizerModel(DivotTokenizerConfig(**config))
    return load_strict(model, tokenizer_mapping().to_hf(weights), "tokenizer").eval()


def build_unet(config, weights):
    config = unet_config(config)
    return load_strict(DivotUNet3DConditionModel(**config), unet_mapping(config).to_hf(weights), "U-Net").eval()


def build_resampler(config, weights, num_features):
    config = resampler_config(config) | {"num_features": num_features}
    return load_strict(DivotFeatureResampler(**config), resampler_mapping().to_hf(weights), "resampler").eval()


def build_vae(section, weights):
    config = vae_config(section)
    model = AutoencoderKL(**config)
    first, width = section["kwargs" if "kwargs" in section else "ddconfig"], config["block_out_channels"][0]
    narrow = first.get("ddconfig", first)["ch"]
    if narrow != width:
        # diffusers' encoder starts at the width of its first level (as the released VAE does); a case may start
        # narrower, which concerns two modules.
        encoder = model.encoder
        encoder.conv_in = torch.nn.Conv2d(config["in_channels"], narrow, 3, padding=1)
        encoder.down_blocks[0].resnets[0] = ResnetBlock2D(
            in_channels=narrow, out_channels=width, temb_channels=None, groups=32, eps=1e-6
        )
    return load_strict(model, vae_mapping(config).to_hf(weights), "VAE").eval()


class Recorder:
    """Keeps what named modules return in the first call after `attach`."""

    def __init__(self):
        self.values, self._handles = {}, []

    def attach(self, name, module):
        def keep(_, __, output):
            self.values.setdefault(name, output.detach().clone())

        self._handles.append(module.register_forward_hook(keep))

    def detach(self):
        for handle in self._handles:
            handle.remove()


@golden("divot", "tokenizer")
@torch.no_grad()
def run_tokenizer(case):
    model = build_tokenizer(case.config, case.weights())
    frames = (case.input("in.frames_uint8").float() / 255 - 0.5) / 0.5
    seen = Recorder()
    seen.attach("temporal", model.temporal_encoder)
    seen.attach("joint", model.joint_encoder)
    if model.pooled_norm is not None:
        seen.attach("pooled", model.pooled_norm)
    features = model(frames).features
    seen.detach()

    pixels = model.preprocess_pixels(frames.flatten(0, 1))
    tokens = model.vision_model(pixel_values=pixels).last_hidden_state
    case.check("out.features", features)
    for name in case.names("out."):
        expected = case.recorded[name]
        if match := re.fullmatch(r"out\.clip_pixels_stride(\d+)", name):
            case.check(name, pixels[..., :: int(match[1]), :: int(match[1])])
        elif name == "out.vit_tokens":
            case.check(name, tokens[: len(expected)])
        elif name == "out.temporal_encoder_out":
            case.check(name, seen.values["temporal"][: len(expected)])
        elif name == "out.spatial_pool_out":
            case.check(name, model.pool(seen.values["temporal"], len(frames)))
        elif name == "out.pooled_normed":
            # Without the norm: the pooled tokens in the order (frame, row, column).
            pooled = model.pool(seen.values["temporal"], len(frames)).unflatten(0, (len(frames), -1))
            case.check(name, seen.values.get("pooled", pooled.permute(0, 1, 3, 4, 2).flatten(1, 3)))
        elif name == "out.st_transformer_out":
            case.check(name, seen.values["joint"])


def _step(case, name, length):
    """Every how many rows and columns were recorded: as the case says, else what fits the size."""
    stated = re.search(r"every (\d+)", case.spec["tensors"].get(name, {}).get("meaning", ""))
    recorded = case.recorded[name].shape[-1]
    return int(stated[1]) if stated else next(k for k in range(1, 64) if -(-length // k) == recorded)


@golden("divot", "pixel_preprocessing")
@torch.no_grad()
def run_pixel_preprocessing(case):
    tokenizer = DivotTokenizerConfig()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (tokenizer.image_mean, tokenizer.image_std))
    size = case.config["kwargs"].get("image_size", 224)
    # The data transform exists with two normalisations.
    normalization = {"image_mean": tokenizer.image_mean, "image_std": tokenizer.image_std}
    normalization = normalization if case.config["kwargs"].get("type", "clip") == "clip" else {}
    for name in case.names("in.clip"):
        key = name.removeprefix("in.")
        pixels = resize_for_clip((case.input(name).float() / 255 - 0.5) / 0.5, tokenizer.vision_config.image_size)
        pixels = ((pixels + 1) / 2 - mean) / std
        step = _step(case, f"out.{key}.pixels_sub", pixels.shape[-1])
        corner = case.recorded[f"out.{key}.corner"].shape[-1]
        case.check(f"out.{key}.pixels_sub", pixels[..., ::step, ::step])
        case.check(f"out.{key}.corner", pixels[..., -corner:, -corner:])
        case.check(f"out.{key}.sum", pixels.sum((-2, -1)))
    for name in case.names("in.pil"):
        key = name.removeprefix("in.")
        image = case.input(name).numpy()
        for keep_ratio in (True, False):
            result = f"out.{key}.keep_ratio_{keep_ratio}"
            if not case.has(result):
                continue
            processor = DivotVideoProcessor(size=size, keep_aspect_ratio=keep_ratio, **normalization)
            pixels = processor(images=image).pixel_values_videos[0, 0]
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
            case.check(result, ((pixels * std + mean) * 255).round().to(torch.uint8))
            case.check(f"{result}.float_row0", pixels[:, 0])


@golden("divot", "image_proj_resampler")
@torch.no_grad()
def run_resampler(case):
    features = case.input("in.features")
    model = build_resampler(case.config, case.weights(), features.shape[1])
    seen = Recorder()
    seen.attach("proj_in", model.perceiver.proj_in)
    seen.attach("attention", model.perceiver.layers[0].attention)
    seen.attach("feed_forward", model.perceiver.layers[0].feed_forward)
    case.check("out.context", model(features).encoder_hidden_states)
    case.check("out.proj_in_out", seen.values["proj_in"])
    case.check("out.layer0_attention_out", seen.values["attention"])
    case.check("out.layer0_feedforward_out", seen.values["feed_forward"])


@golden("divot", "unet")
@torch.no_grad()
def run_unet(case):
    model = build_unet(case.config, case.weights())
    x, timesteps, context = (case.input(f"in.{name}") for name in ("x", "timesteps", "context"))
    fs = case.input("in.fs") if case.has("in.fs") else timesteps.new_full(timesteps.shape, model.config.default_fs)
    first = model.down_blocks[0]
    modules = {
        "time_embed_out": model.time_embedding,
        "fps_embedding_out": model.fs_embedding,
        "input_blocks.0_out": model.conv_in,
        "init_attn_out": model.transformer_in,
        "input_blocks.1.0_resblock_out": first.resnets[0],
        "middle_block_out": model.mid_resnet_2,
        "input_blocks.1_out": first.temporal_attentions[0] if first.attentions else first.resnets[0],
    }
    if first.attentions:
        modules["input_blocks.1.1_spatial_out"] = first.attentions[0]
    seen = Recorder()
    for name, module in modules.items():
        if case.has(f"out.{name}"):
            seen.attach(name, module)
    prediction = model(x, timesteps, context, fs=fs).sample
    seen.detach()
    for name, value in seen.values.items():
        case.check(f"out.{name}", value[:1])
    case.check("out.eps_or_v", prediction)
    # The same with keys and values computed beforehand, as the sampler does it.
    key_values = model.project_context(context, x.shape[2])
    case.check("out.eps_or_v", model(x, timesteps, fs=fs, context_key_values=key_values).sample)
    if case.has("in.x_perframe"):
        perframe = case.input("in.x_perframe"), timesteps[:1], case.input("in.context_perframe")
        case.check("out.pred_perframe", model(*perframe, fs=fs[:1]).sample)
    if case.has("out.pred_default_fs"):
        case.check("out.pred_default_fs", model(x[:1], timesteps[:1], context[:1]).sample)
    if case.has("in.context_nonimage"):
        case.check("out.pred_77", model(x[:1], timesteps[:1], case.input("in.context_nonimage"), fs=fs[:1]).sample)


@golden("divot", "vae")
@torch.no_grad()
def run_vae(case):
    model = build_vae(case.config, case.weights())
    scale = model.config.scaling_factor
    assert scale == case.spec["scale_factor"]
    seen = Recorder()
    if model.encoder.down_blocks[0].downsamplers is not None:
        seen.attach("encoder.down.0.downsample_out", model.encoder.down_blocks[0].downsamplers[0])
    for half in ("encoder", "decoder"):
        seen.attach(f"{half}.mid.attn_1_out", getattr(model, half).mid_block.attentions[0])
    posterior = model.encode(case.input("in.image")).latent_dist
    case.check("out.moments", posterior.parameters)
    case.check("out.mode", posterior.mode())
    case.check("out.logvar_clamped", posterior.logvar)
    case.check("out.sample", posterior.mean + posterior.std * case.input("in.posterior_noise"))
    case.check("out.scaled_mode", scale * posterior.mode())
    case.check("out.kl", posterior.kl())
    case.check("out.decoded", decode_latents(model, case.input("in.latent")[:, :, None])[:, :, 0])
    for name, value in seen.values.items():
        if case.has(f"out.{name}"):
            case.check(f"out.{name}", value)


@golden("divot", "noise_schedule")
def run_noise_schedule(case):
    settings = scheduler_config(case.config)
    scheduler = DivotDDIMScheduler(**settings)
    betas = divot_betas(**settings)
    cumprod = np.cumprod(1 - betas)
    previous = np.append(1.0, cumprod[:-1])
    variance = betas * (1 - previous) / (1 - cumprod)
    tables = {
        "betas": scheduler.betas,
        "alphas_cumprod": scheduler.alphas_cumprod,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": scheduler.alphas_cumprod.sqrt(),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - cumprod),
        "log_one_minus_alphas_cumprod": np.log(1 - cumprod),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - cumprod),
        "posterior_mean_coef2": (1 - previous) * np.sqrt(1 - betas) / (1 - cumprod),
    }
    for name in case.names("out.ddpm."):
        case.check(name, torch.as_tensor(tables[name.removeprefix("out.ddpm.")]).float())
    for name in case.names("out.ddim."):
        spacing, steps, table = name.removeprefix("out.ddim.").split(".", 2)
        scheduler = DivotDDIMScheduler(**settings, timestep_spacing=spacing)
        scheduler.set_timesteps(int(steps))
        timesteps = scheduler.timesteps.flip(0)
        eta = float(table.removeprefix("sigmas_eta")) if table.startswith("sigmas") else 0.0
        coefficients = [scheduler.step_coefficients(int(t), eta, i) for i, t in enumerate(scheduler.timesteps)]
        alphas, before, sigmas = np.array(coefficients[::-1]).T
        values = {"timesteps": timesteps, "alphas": alphas, "alphas_prev": before}
        case.check(name, torch.as_tensor(values.get(table, sigmas)))


# Arguments of the original's classes where a case is silent: of the de-tokenizer, and of its sampler.
_DETOKENIZER = {"unconditional_guidance_scale": 7.5, "num_frames": 5, "image_size": 256, "fs": 3, "ddim_steps": 50}
_DETOKENIZER |= {"ddim_eta": 1.0, "timestep_spacing": "uniform", "guidance_rescale": 0.7, "scale_factor": 0.18215}
_SAMPLER = {"eta": 0.0, "unconditional_guidance_scale": 1.0, "guidance_rescale": 0.0, "timestep_spacing": "uniform"}
_SAMPLER |= {"fs": None, "use_uc": True, "batch": 1}


@golden("divot", "detokenizer_ddim")
@torch.no_grad()
def run_detokenizer(case):
    config, weights = case.config, case.weights()
    features = case.input("in.features")
    unet = build_unet(config["diffusion_model"], take_prefix(weights, "diffusion_model."))
    vae = build_vae(config["first_stage_model"], take_prefix(weights, "first_stage_model."))
    resampler = build_resampler(
        config["image_proj_model"], take_prefix(weights, "image_proj_model."), features.shape[1]
    )
    tokenizer = build_tokenizer(config["video_tokenizer"], case.weights("tokenizer.safetensors"))
    settings = _DETOKENIZER | config.get("kwargs", {})
    vae.register_to_config(scaling_factor=settings["scale_factor"])

    def condition(features):
        return resampler(features).encoder_hidden_states

    def sample(context, unconditional, x_start, noise, options):
        steps, predicted = [], []

        def keep(_, __, ___, tensors):
            steps.append(tensors["latents"])
            predicted.append(tensors["pred_original_sample"])

        scheduler = DivotDDIMScheduler(timestep_spacing=options["timestep_spacing"])
        latents = denoise(
            unet,
            scheduler,
            context,
            unconditional,
            x_start,
            num_inference_steps=options["S"],
            guidance_scale=options["unconditional_guidance_scale"],
            guidance_rescale=options["guidance_rescale"],
            eta=options["eta"],
            fs=None if options["fs"] is None else torch.as_tensor(options["fs"]),
            step_noise=noise.unflatten(0, (-1, len(x_start))),
            callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=("latents", "pred_original_sample"),
        )
        return latents, torch.cat(steps), torch.cat(predicted)

    unconditional_features = tokenizer.unconditional_features(settings["image_size"])
    context, unconditional = condition(features), condition(unconditional_features)
    case.check("out.uncond_features", unconditional_features)
    case.check("out.context", context)
    case.check("out.uncond_context", unconditional)
    options = settings | {"S": settings["ddim_steps"], "eta": settings["ddim_eta"]}
    inputs = case.input("in.x_T"), case.input("in.step_noise")
    latents, steps, predicted = sample(context, unconditional, *inputs, options)
    case.check("out.ddim_x", steps)
    if case.has("out.ddim_pred_x0"):
        case.check("out.ddim_pred_x0", predicted)
    case.check("out.video", decode_latents(vae, latents))
    for name, given in config.get("sampling", {}).items():
        run = _SAMPLER | given
        conditions = torch.cat([condition(features + 0.37 * i) for i in range(run["batch"])])
        inputs = case.input(f"in.{name}.x_T"), case.input(f"in.{name}.step_noise")
        _, steps, _ = sample(conditions, unconditional if run["use_uc"] else None, *inputs, run)
        case.check(f"out.{name}.x_steps", steps)


@golden("divot", "frame_sampling")
def run_frame_sampling(case):
    settings = case.config["kwargs"]
    options = {
        "fps": settings["fps"],
        "frames_per_clip": settings["clip_frames"],
        "frame_stride": settings["stride"],
    }
    table = json.loads(case.file("table.json").read_text())
    for i, row in enumerate(table["comprehension"]):
        clips = comprehension_indices(row["video_frames"], row["video_fps"], max_clips=row["max_clips"], **options)
        case.check_value(f"comprehension[{i}].indices", [index for clip in clips for index in clip], row["indices"])
        case.check_value(f"comprehension[{i}].clips", len(clips), row["clips"])
    for i, row in enumerate(table["reconstruction"]):
        indices = reconstruction_indices(row["video_frames"], row["video_fps"], **options)
        case.check_value(f"reconstruction[{i}].indices", indices, row["indices"])
