"""Runners of Video-LaVIT's golden kinds: codec motion, tokenizers, de-tokenizers. The language model's are beside
it."""

import contextlib
import importlib.util
import io
import re

import numpy as np
import torch

from cinetok.conversion import video_lavit_parts as parts
from cinetok.conversion.mapping import StateDictMapping
from cinetok.modeling.video_lavit.configuration_video_lavit import VideoLavitVisualTokenizerConfig
from cinetok.modeling.video_lavit.image_processing_video_lavit import VideoLavitImageProcessor
from cinetok.modeling.video_lavit.modeling_visual_tokenizer import EvaVisionEncoder
from cinetok.pipelines.video_lavit import detokenizing
from cinetok.video.motion import (
    block_motion_map,
    clip_motion_map,
    dense_motion_map,
    read_motion_vectors,
    resize_motion,
    select_keyframes,
)

from . import Row, golden

if importlib.util.find_spec("golden_kinds.video_lavit_llm"):
    from . import video_lavit_llm  # noqa: F401

# Offset of the visual codes in the language model's vocabulary (ids 32000 and 32001 open and close an image).
VISUAL_OFFSET = 32002


def fill(component, arguments, tensors, names=None):
    """A real (not meta) component with the recorded weights."""
    module = parts._BUILDERS[component](**arguments)
    converted = (parts.COMPONENTS_PARTS[names]() if names else StateDictMapping()).to_hf(tensors)
    module.load_state_dict(converted, strict=True)
    return module.eval()


def below(tensors, prefix):
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


# ------------------------------------------------------------------------------------------------------------ motion


def split_vectors(case):
    counts = case.input("in.counts").tolist()
    return list(np.split(case.input("in.vectors").numpy().astype(np.int32), np.cumsum(counts)[:-1]))


@golden("video_lavit", "motion_map_table")
def motion_map_table(case):
    tables, (height, width) = split_vectors(case), case.input("in.size").tolist()
    start = case.config.get("clip_start", 0)
    _check_maps(case, tables[start:], height, width)
    for name in case.names("out.dense_frame_"):
        frame = int(name.rsplit("_", 1)[1])
        case.check(name, torch.from_numpy(dense_motion_map(tables[frame], height, width)))


@golden("video_lavit", "motion_map_demo")
def motion_map_demo(case):
    # The tables are those of the clip alone; `clip_start` says where it began in the video.
    _check_maps(case, split_vectors(case), *case.input("in.size").tolist())


def _check_maps(case, tables, height, width):
    recorded_maps = [name for name in case.names("out.") if name.endswith((".pooled", ".map"))]
    for use in dict.fromkeys(name.split(".")[1] for name in recorded_maps):
        spec = case.config.get("specs", {}).get(use, {})
        pooled = block_motion_map(tables, height, width, rescale=spec.get("rescale", use == "tokenizer"))
        if case.has(f"out.{use}.pooled"):
            case.check(f"out.{use}.pooled", pooled)
        if case.has(f"out.{use}.map"):
            resized = resize_motion(pooled, *case.recorded[f"out.{use}.map"].shape[-2:])
            kept = spec.get("kept_frames")
            case.check(f"out.{use}.map", resized if kept is None else resized[:, kept])
        if case.has(f"out.{use}.map_antialias"):
            case.ignore(f"out.{use}.map_antialias", "not the reference behaviour (newer torchvision's default)")


@golden("video_lavit", "motion_bitstream")
def motion_bitstream(case):
    stream = io.BytesIO(case.input("in.reencoded_stream").numpy().tobytes())
    motion = read_motion_vectors(stream, fps=None)
    config = case.config
    case.check_value("frame types", motion.frame_types, config["frame_types"])
    case.check_value("size", (motion.height, motion.width), (config["height"], config["width"]))
    case.check("out.counts", torch.tensor([len(table) for table in motion.vectors]))
    case.check("out.vectors", torch.from_numpy(np.concatenate(motion.vectors).astype(np.int16)))
    if case.has("out.map"):
        case.check("out.map", clip_motion_map(motion, config["clip_start"]), group="map")
    if case.has("out.first_rgb"):
        # Recorded for information with PyAV's default conversion; ours is the bicubic one of the original.
        expected = case.recorded["out.first_rgb"].float()
        case.ignore("out.first_rgb", "another chroma interpolation; compared on average below")
        difference = (torch.from_numpy(motion.keyframe(0)).float() - expected).abs().mean().item()
        case.rows.append(Row("first picture, mean difference", difference <= 2.0, difference, note="grey levels"))
    if case.has("in.source_video"):
        source = io.BytesIO(case.input("in.source_video").numpy().tobytes())
        again = read_motion_vectors(source, fps=config["target_fps"])
        case.check_value("re-encoded frame types", again.frame_types, config["frame_types"])


@golden("video_lavit", "keyframe_selection")
def keyframe_selection(case):
    config = case.config
    for number, entry in enumerate(case.spec["cases"]):
        chosen = select_keyframes(
            entry["frame_types"], entry["max_clips"], num_frames=config["num_frames"], gop_size=config["gop"]
        )
        case.check_value(f"key_frames {number}", chosen, entry["key_frames"])


@golden("video_lavit", "image_preprocess")
def image_preprocess(case):
    processor = VideoLavitImageProcessor(case.config["image_size"])
    case.check("out.pixel_values", processor(case.input("in.image_uint8").numpy())["pixel_values"][0])


# -------------------------------------------------------------------------------------------------------- tokenizers


@golden("video_lavit", "eva_encoder")
@torch.no_grad()
def eva_encoder(case):
    # The encoder alone: the configuration's checks are about parts that are not here.
    config = VideoLavitVisualTokenizerConfig()
    for name, value in parts._eva_arguments(case.config).items():
        setattr(config, name, value)
    config._attn_implementation = "sdpa"
    encoder = EvaVisionEncoder(config).eval()
    encoder.load_state_dict(case.weights(), strict=True)
    pixels = case.input("in.pixel_values")
    outputs = {}
    hooks = [
        block.register_forward_hook(lambda module, inputs, output, k=k: outputs.__setitem__(k, output))
        for k, block in enumerate(encoder.blocks)
    ]
    case.check("out.features", encoder(pixels))
    for hook in hooks:
        hook.remove()
    for name in case.names("out.block_"):
        case.check(name, outputs[int(name.rsplit("_", 1)[1])])
    if case.has("out.clip_embedding"):
        case.check("out.clip_embedding", encoder.clip_embedding(pixels))


@golden("video_lavit", "visual_tokenizer")
@torch.no_grad()
def visual_tokenizer(case):
    model = fill("visual_tokenizer", parts.visual_tokenizer_arguments(case.config), case.weights())
    pixels, noise = case.input("in.pixel_values"), case.input("in.gumbel")
    encoded = model.encode(pixels, gumbel_noise=noise)
    case.check("out.encoder_features", encoded.last_hidden_state)
    case.check("out.keep_logprob", encoded.keep_log_probs)
    case.check("out.keep_mask", encoded.keep_mask.long())
    case.check("out.merged_features", encoded.merged_features)
    case.check("out.pre_quant", encoded.pre_quant)
    case.check("out.token_nums", encoded.num_tokens)
    kept = encoded.indices != -1
    case.check("out.token_ids", encoded.indices[kept] + VISUAL_OFFSET)
    case.check("out.quantized", encoded.quantized[kept])
    wrapped = [
        torch.cat(
            [torch.tensor([VISUAL_OFFSET - 2]), row[row != -1] + VISUAL_OFFSET, torch.tensor([VISUAL_OFFSET - 1])]
        )
        for row in encoded.indices
    ]
    case.check("out.token_ids_with_special", torch.cat(wrapped))
    case.check("out.llm_features", torch.cat(model.get_image_features(pixels, gumbel_noise=noise)))
    _ignore_margins(case)


@golden("video_lavit", "motion_tokenizer")
@torch.no_grad()
def motion_tokenizer(case):
    model = fill("motion_tokenizer", parts.motion_tokenizer_arguments(case.config), case.weights())
    motion, size = case.input("in.motion"), case.input("in.size").tolist()
    stages = {}

    def record(name, layers, channels_first):
        for k, layer in enumerate(layers):

            def hook(module, inputs, output, k=k):
                output = output.permute(0, 4, 1, 2, 3) if channels_first else output
                flat = output.flatten()
                stages[f"out.{name}_{k}"] = flat[:: max(1, flat.numel() // 4096)]

            layer.register_forward_hook(hook)

    record("enc_down", model.encoder.down_sample_layers, False)
    record("dec_up", model.decoder.up_sample_layers, True)
    encoded = model.encode(motion)
    decoded = model.decode(encoded.indices).reconstruction
    for name in case.names("out.enc_down_") + case.names("out.dec_up_"):
        case.check(name, stages[name])
    case.check("out.encoder_features", encoded.last_hidden_state)
    case.check("out.pre_quant", encoded.pre_quant.permute(0, 2, 3, 4, 1))
    case.check("out.token_ids", encoded.indices.flatten(1))
    case.check("out.quantized", encoded.quantized.permute(0, 2, 3, 4, 1))
    case.check("out.reconstruction", decoded)
    # The whole model at once, and from codebook rows, must agree.
    case.check("out.reconstruction", model(motion).reconstruction)
    case.check("out.reconstruction", model.decode(quantized=encoded.quantized).reconstruction)
    case.check("out.reconstruct_resized", model.to_raw_motion(decoded, *size))
    if case.has("in.alt_ids"):
        alternative = model.decode(case.input("in.alt_ids")).reconstruction
        if case.has("out.from_token_resized"):
            case.check("out.from_token_resized", model.to_raw_motion(alternative, *size))
    _ignore_margins(case)


def _ignore_margins(case):
    for name in case.names("out.margin_"):
        case.ignore(name, "recorded for information: the smallest gap of the discrete decisions")


# ------------------------------------------------------------------------------------------------------ de-tokenizers


@golden("video_lavit", "keyframe_token_decoder")
@torch.no_grad()
def keyframe_token_decoder(case):
    model = fill("keyframe_decoder", parts.keyframe_decoder_arguments(case.config), case.weights())
    counts = case.input("in.token_nums")
    rows = case.input("in.quantized").split(counts.tolist())
    output = model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), counts)
    case.check("out.decoded_features", output.decoded_features)
    case.check("out.prompt_embeds", output.prompt_embeds)
    case.check("out.pooled_prompt_embeds", output.pooled_prompt_embeds)


@golden("video_lavit", "motion_condition_encoder")
@torch.no_grad()
def motion_condition_encoder(case):
    model = fill("motion_encoder", parts.motion_encoder_arguments(case.config), case.weights())
    case.check("out.encoded", model(case.input("in.motion_16")).sample)
    motion = case.input("in.motion")
    case.check("out.resized", resize_motion(motion, 16, 16))
    case.check("out.encode_motion", model(motion).sample[:, :, ::7])


@golden("video_lavit", "unet3d_motion")
@torch.no_grad()
def unet3d_motion(case):
    arguments = {name: value for name, value in case.config.items() if name != "weights_from"}
    model = fill("unet", arguments, case.weights())
    inner = {
        "out.conv_in": "conv_in",
        "out.down0_res0": "down_blocks.0.resnets.0",
        "out.down0_attn0": "down_blocks.0.attentions.0",
        "out.mid": "mid_block",
    }
    outputs = {}
    for name, path in inner.items():
        if not case.has(name):
            continue
        model.get_submodule(path).register_forward_hook(
            lambda m, i, output, name=name: outputs.__setitem__(
                name, output[0] if isinstance(output, tuple) else output
            )
        )
    sample = model(
        case.input("in.sample"),
        case.input("in.timestep"),
        encoder_hidden_states=case.input("in.motion_condition"),
        added_time_ids=case.input("in.added_time_ids"),
    ).sample
    for name, value in outputs.items():
        case.check(name, value)
    case.check("out.sample", sample)


@contextlib.contextmanager
def replayed_noise(noises):
    """Makes the ancestral Euler scheduler take recorded noise, one tensor per step, instead of drawing it."""
    from diffusers.schedulers import scheduling_euler_ancestral_discrete as module

    drawn, queue = module.randn_tensor, list(noises)
    module.randn_tensor = lambda shape, **options: queue.pop(0)
    try:
        yield
    finally:
        module.randn_tensor = drawn


class Recorder:
    """Keeps every latents a loop makes, and the guided prediction that led to the first."""

    def __init__(self, scheduler):
        self.latents, self.first, self.scheduler = [], None, scheduler
        self.step = scheduler.step

    def __enter__(self):
        def step(prediction, *arguments, **options):
            if self.first is None:
                self.first = prediction
            return self.step(prediction, *arguments, **options)

        step.__signature__ = __import__("inspect").signature(self.step)
        self.scheduler.step = step
        return self

    def __exit__(self, *_):
        del self.scheduler.step

    def __call__(self, step, timestep, latents):
        self.latents.append(latents)
        return latents


def to_uint8(images):
    """(..., 3, height, width) about [-1, 1] -> uint8 (..., height, width, 3)."""
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1)


@golden("video_lavit", "image_detokenizer")
@torch.no_grad()
def image_detokenizer(case):
    from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler

    config, weights = case.config, case.weights()
    decoder = fill(
        "keyframe_decoder", parts.keyframe_decoder_arguments(config["decoder"]), below(weights, "tokenizer_decoder.")
    )
    unet = fill("keyframe_unet", config["unet"], below(weights, "unet."))
    vae = fill("keyframe_vae", config["vae"], below(weights, "vae."))
    codebook = weights["visual_tokenizer.quantize.embedding.weight"]
    side = config["decoder"]["img_size"] // config["decoder"]["patch_size"]
    tokenizer = parts._BUILDERS["visual_tokenizer"](
        image_size=14 * side,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        merger_num_hidden_layers=1,
        codebook_size=len(codebook),
        codebook_dim=codebook.shape[1],
    )
    tokenizer.quantize.embedding.weight.copy_(codebook)

    ids = case.input("in.token_ids").split(case.input("in.token_nums").tolist())
    codes = [row[row >= VISUAL_OFFSET] - VISUAL_OFFSET for row in ids]
    prompt, pooled = detokenizing.encode_keyframe_prompt(tokenizer, decoder, codes)
    for name, value in (("out.prompt_embeds", prompt), ("out.pooled_prompt_embeds", pooled)):
        if case.has(name):
            case.check(name, value, group="latents")

    height, width = case.input("in.size").tolist()
    noise = case.input("in.noise")
    schedulers = {
        "ddim": (DDIMScheduler, "scheduler_ddim"),
        "euler_a": (EulerAncestralDiscreteScheduler, "scheduler_euler_ancestral"),
    }
    for name, (scheduler_class, key) in schedulers.items():
        if case.names(f"out.{name}."):
            scheduler = scheduler_class(**config[key])
            scheduler.set_timesteps(int(case.input("in.steps")))
            latents = detokenizing.prepare_keyframe_latents(
                unet, vae, scheduler, len(codes), height, width, dtype=noise.dtype, device=noise.device, latents=noise
            )
            _run_keyframes(case, f"out.{name}", unet, vae, scheduler, prompt, pooled, latents, 0, "in.step_noise")

        long = f"out.long_{name}"
        if case.names(f"{long}."):
            scheduler = scheduler_class(**config[key])
            start = int(case.input("in.noise_level"))
            scheduler.set_timesteps(int(case.input("in.long_steps")))
            frames = case.input("in.last_frame_uint8").numpy()
            images = torch.stack([detokenizing.image_to_tensor(frame, height, width) for frame in frames])
            latents = detokenizing.renoise_keyframes(vae, scheduler, images, start, noise=case.input("in.renoise"))
            if case.has(f"{long}.start_latents"):
                case.check(f"{long}.start_latents", latents, group="latents")
            _run_keyframes(case, long, unet, vae, scheduler, prompt, pooled, latents, start, "in.long_step_noise")


def _run_keyframes(case, name, unet, vae, scheduler, prompt, pooled, latents, start, noise_name):
    height, width = (side * detokenizing.vae_scale_factor(vae) for side in latents.shape[-2:])
    guidance = float(_said(case, "guidance", r"(\d+(?:\.\d+)?)", 3.0))
    # DDIM draws nothing, so a case of DDIM alone need not hold the noise.
    noises = case.input(noise_name) if case.has(noise_name) else ()
    with Recorder(scheduler) as recorder, replayed_noise(noises):
        latents = detokenizing.denoise_keyframes(
            unet,
            scheduler,
            prompt,
            pooled,
            latents,
            height,
            width,
            guidance_scale=guidance,
            start_step=start,
            on_step_end=recorder,
        )
    results = {
        "timesteps": scheduler.timesteps[start:].float(),
        "guided_first": recorder.first,
        "latents_after_step": torch.stack(recorder.latents),
    }
    for key, value in results.items():
        if case.has(f"{name}.{key}"):
            case.check(f"{name}.{key}", value, group="latents")
    if case.has(f"{name}.images_uint8"):
        images = to_uint8(detokenizing.decode_keyframes(vae, latents))
        case.check(f"{name}.images_uint8", images, group="images_uint8")


def _said(case, word, pattern, default, call=""):
    """What follows `word` in the case's description of the calls that begin with `call`, or the original's default."""
    for text in case.spec.get("calls", ()):
        if text.startswith(call):
            found = re.search(rf"\b{word}[ =]+{pattern}", text)
            if found:
                return found.group(1)
    return default


def _video_options(case, name):
    """What one call of a video case passes besides its tensors."""
    number, call = r"([\d.]*\d)", f"{name}."
    return {
        "num_inference_steps": int(_said(case, "with", r"(\d+) steps", 0, call)) or int(case.input("in.steps")),
        "noise_aug_strength": float(_said(case, "noise_aug_strength", number, 0.02, call)),
        "cond_on_ref_frame": _said(case, "cond_on_ref_frame", r"(\w+)", "True", call) == "True",
        "min_guidance_scale": float(_said(case, "guidance", number, 1.0, call)),
        "max_guidance_scale": float(_said(case, "guidance", rf"[\d.]+ -> {number}", 4.0, call)),
        "fps": int(_said(case, "fps", r"(\d+)", 6, call)),
        "motion_bucket_id": int(_said(case, "motion_bucket_id", r"(\d+)", 127, call)),
    }


@golden("video_lavit", "video_detokenizer")
@torch.no_grad()
def video_detokenizer(case):
    from diffusers import EulerDiscreteScheduler

    config, weights = case.config, case.weights()
    unet = fill("unet", config["unet"], below(weights, "unet."))
    vae = fill("vae", config["vae"], below(weights, "vae."))
    motion_encoder = fill(
        "motion_encoder", parts.motion_encoder_arguments(config["motion_encoder"]), below(weights, "motion_encoder.")
    )
    tokenizer = parts._BUILDERS["motion_tokenizer"](**parts.motion_tokenizer_arguments(config["motion_tokenizer"]))
    loaded = tokenizer.load_state_dict(below(weights, "motion_tokenizer."), strict=False)
    # Files may leave out the encoder where nothing recorded uses it.
    assert not loaded.unexpected_keys and all(name.startswith("encode") for name in loaded.missing_keys), loaded
    scheduler = EulerDiscreteScheduler(**config["scheduler"])

    image, noise = case.input("in.image"), case.input("in.noise_image")
    height, width = (int(side) // detokenizing.vae_scale_factor(vae) for side in case.input("in.size"))
    calls = {
        "token": lambda: tokenizer.to_raw_motion(
            tokenizer.decode(case.input("in.token_ids")).reconstruction, height, width
        ),
        "raw": lambda: case.input("in.raw_motion"),
        "quant": lambda: tokenizer.to_raw_motion(
            tokenizer(case.input("in.quant_motion")).reconstruction, height, width
        ),
    }
    for name, make_motion in calls.items():
        if not case.names(f"out.{name}."):
            continue
        options = _video_options(case, name)
        motion = make_motion()
        frames = motion.shape[2]
        noises = {case.recorded[n].shape[1]: n for n in case.names("in.noise_latent_")}
        latent_noise = f"in.noise_latent_{name}" if case.has(f"in.noise_latent_{name}") else noises[frames]
        condition = detokenizing.encode_motion_condition(motion_encoder, motion)
        image_latents = detokenizing.encode_video_keyframe(vae, image, options["noise_aug_strength"], noise=noise)
        inputs = []
        hook = unet.register_forward_pre_hook(lambda module, args, into=inputs: into.append(args[0]))
        with Recorder(scheduler) as recorder:
            latents = detokenizing.denoise_video(
                unet,
                scheduler,
                image_latents,
                motion,
                condition,
                **options,
                latents=case.input(latent_noise),
                on_step_end=recorder,
            )
        hook.remove()
        # The original's chunks run over all frames of the batch; ours never mix two videos.
        chunk = int(_said(case, "decode_chunk_size", r"(\d+)", 8, f"{name}."))
        video = detokenizing.decode_video(vae, latents.flatten(0, 1)[None], chunk)
        video = video[0].unflatten(1, latents.shape[:2]).movedim(1, 0)
        shown = [k for k in (0, 1, 7, 8, 9, 15, 16, 23) if k < frames]
        results = {
            "motion_latent": (motion, "first"),
            "motion_condition_sub": (condition[:, :, ::16], "first"),
            "unet_input_first_sub": (inputs[0][:, [k for k in (0, 3, 23) if k < frames]], "first"),
            "guided_first": (recorder.first, "first"),
            "latents_after_step": (torch.stack(recorder.latents), "latents"),
            "timesteps": (scheduler.timesteps, "first"),
            "sigmas": (scheduler.sigmas, "first"),
            "frames_float_first": (video[:, :, :1], "latents"),
            "frames_uint8_sub": (to_uint8(video[:, :, shown].transpose(1, 2)), "frames_uint8_sub"),
        }
        for key, (value, group) in results.items():
            if case.has(f"out.{name}.{key}"):
                case.check(f"out.{name}.{key}", value, group=group)
