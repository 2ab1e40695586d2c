"""Runners of Seer's golden kinds."""

import hashlib
import math

import torch

from cinetok import SeerDDIMScheduler, SeerPipeline, SeerTextDecomposer, SeerUNet3DConditionModel
from cinetok.conversion.seer import COMPONENTS, text_decomposer_config, unet_config
from cinetok.conversion.stable_diffusion import build_text_encoder, build_vae, load_text_encoder, load_vae
from cinetok.modeling.seer.attention_seer import SeerRotaryEmbedding, apply_rotary_embedding
from cinetok.modeling.seer.image_processing_seer import preprocess_image, preview_frames, resample_frames
from cinetok.modeling.seer.unet_seer import SeerDownsample, SeerResnetBlock, SeerTransformer3DModel, SeerUpsample
from cinetok.pipelines.seer.pipeline_seer import predict_noise
from golden_kinds import Tolerance, defer, golden

for _kind in ("dataset_item", "training_step"):
    defer("seer", _kind, "trainer issue")
for _kind in ("fvd_end_to_end", "fvd_preprocess", "i3d_logits", "frechet_and_kernel_distance", "inception_score"):
    defer("seer", _kind, "evaluation issue")


# --- weights given by a rule --------------------------------------------------------------------------------------

_MASK = 2**64 - 1


def _wrap(value):
    """An unsigned 64-bit number as the signed number of the same bits."""
    value &= _MASK
    return value - 2**64 if value >= 2**63 else value


def _shift_right(z, bits):
    """Logical shift of int64 tensors (torch only has the arithmetic one)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def formula_tensor(name, shape, prefix, gain):
    """The tensor that the `weights_formula` of a case defines: splitmix64 of the index, seeded by the name."""
    count = math.prod(shape)
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if name.endswith("rotary_emb.freqs"):
        return SeerRotaryEmbedding(2 * count).freqs
    if name.endswith("running_mean"):
        spread, centre = 0.2, 0.0
    elif name.endswith("running_var"):
        spread, centre = 0.4, 1.0
    elif len(shape) >= 2:
        spread, centre = gain * math.sqrt(3.0 / math.prod(shape[1:])), 0.0
    else:
        spread, centre = 0.2, 0.0 if name.endswith("bias") else 1.0
    base = int.from_bytes(hashlib.sha256((prefix + name).encode()).digest()[:8], "little")
    z = torch.arange(1, count + 1) * _wrap(0x9E3779B97F4A7C15) + _wrap(base)  # int64 arithmetic wraps around
    z = (z ^ _shift_right(z, 30)) * _wrap(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _wrap(0x94D049BB133111EB)
    z = z ^ _shift_right(z, 31)
    uniform = _shift_right(z, 40).double() / 2**24
    return ((2 * uniform - 1) * spread + centre).float().reshape(shape)


def _shapes(tensors):
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _weights(case, component, shapes):
    """Original tensors of a component, from wherever the case says they are.

    `weights` of the case or of its configuration may give, for each component or for all, a file name or
    `{"formula": PREFIX}`. Otherwise the `weights_formula` holds, unless it is for another component and there is a file.

    Args:
        component: "unet", "fstext", "vae" or "text_encoder"; the name of the only one does not matter.
        shapes: original names -> shapes, for the formula.
    """
    sources = case.spec.get("weights") or case.config.get("weights")
    source = sources.get(component) if isinstance(sources, dict) and "formula" not in sources else sources
    rule = case.spec.get("weights_formula")
    if isinstance(source, str):
        return case.weights(source)
    if isinstance(source, dict) and "formula" in source:
        rule = {**(rule or {}), **source, "PREFIX": source["formula"]}
    elif rule is None or (rule.get("applies_to", component) != component and _has_file(case)):
        return case.weights()
    prefix, gain = rule.get("PREFIX", ""), rule.get("GAIN", 1.0)
    return {name: formula_tensor(name, tuple(shape), prefix, gain) for name, shape in shapes.items()}


def _has_file(case):
    return any(case.path.glob("weights.safetensors*"))


def _load(module, tensors, mapping=None):
    module.load_state_dict(mapping.to_hf(tensors) if mapping else tensors, strict=True)
    return module.eval()


def _build_unet(case, config):
    unet = SeerUNet3DConditionModel(**unet_config(config))
    mapping = COMPONENTS["unet"](config)
    return _load(unet, _weights(case, "unet", _shapes(mapping.from_hf(unet.state_dict()))), mapping)


def _build_text_decomposer(case, config):
    model = SeerTextDecomposer(**text_decomposer_config(config))
    mapping = COMPONENTS["text_decomposer"](config)
    return _load(model, _weights(case, "fstext", _shapes(mapping.from_hf(model.state_dict()))), mapping)


def _check_if_recorded(case, name, value, **options):
    """For what not every case of a kind records."""
    if case.has(name):
        case.check(name, value, **options)


# --- tracing of sub-modules ---------------------------------------------------------------------------------------


def _trace(case, run, module, call):
    """Runs `call` and returns its result and the outputs of the sub-modules recorded as {run}.mid.{path}."""
    prefix = f"{run}.mid."
    seen, hooks = {}, []
    for name in case.names(prefix):
        path = name.removeprefix(prefix)

        def record(_module, _inputs, output, name=name):
            seen[name] = output

        hooks.append(module.get_submodule(path).register_forward_hook(record))
    try:
        result = call()
    finally:
        for hook in hooks:
            hook.remove()
    return result, seen


def _check_trace(case, seen):
    for name, value in seen.items():
        expected = case.recorded[name]
        # The same tokens are recorded as (batch * frames, tokens) or (batch, frames, height, width) in places.
        same_order = value.shape[-1] == expected.shape[-1] and value.numel() == expected.numel()
        case.check(name, value.reshape(expected.shape) if same_order else value)


# --- models -------------------------------------------------------------------------------------------------------


@golden("seer", "unet_forward")
@torch.no_grad()
def run_unet_forward(case):
    unet = _build_unet(case, case.config)
    for run in case.spec["runs"]:
        name = run["name"]
        sample, timestep, context = (case.input(f"{name}.in.{key}") for key in ("sample", "timestep", "context"))
        conds = run["cond_frame"] if isinstance(run["cond_frame"], list) else [run["cond_frame"]]
        for cond in conds:

            def call(cond=cond, sample=sample, timestep=timestep, context=context):
                return unet(sample, timestep, context, num_cond_frames=cond).sample

            if run.get("trace") and cond == run.get("trace_cond", conds[0]):
                result, seen = _trace(case, name, unet, call)
                _check_trace(case, seen)
            else:
                result = call()
            case.check(f"{name}.out.cond{cond}", result)


@golden("seer", "inflate_from_image_unet")
@torch.no_grad()
def run_inflate(case):
    from diffusers import UNet2DConditionModel

    image_unet = UNet2DConditionModel(**case.config["image_unet_config"])
    image_unet = _load(image_unet, _weights(case, "image_unet", _shapes(image_unet.state_dict())))
    unet = SeerUNet3DConditionModel.from_unet2d(image_unet)
    new = {k: list(v.shape) for k, v in unet.state_dict().items() if k not in image_unet.state_dict()}
    case.check_value("names and shapes of the new tensors", new, case.spec["new_tensors"])
    for run in case.spec["runs"]:
        name = run["name"]
        sample, timestep, context = (case.input(f"{name}.in.{key}") for key in ("sample", "timestep", "context"))
        case.check(f"{name}.out.inflated", unet(sample, timestep, context).sample)
        if case.has(f"{name}.out.image_unet"):
            image = image_unet(sample[:, :, 0], timestep, context[:, 0]).sample
            case.check(f"{name}.out.image_unet", image[:, :, None])


@golden("seer", "spatial_transformer")
@torch.no_grad()
def run_transformer(case):
    config = case.config
    module = SeerTransformer3DModel(
        config["in_channels"],
        config["n_heads"],
        config["d_head"],
        cross_attention_dim=None if config.get("temporal") else config["context_dim"],
        num_layers=config["depth"],
    )
    _load(module, _weights(case, "module", _shapes(module.state_dict())))
    for run in case.spec["runs"]:
        name = run["name"]
        clip = case.input(f"{name}.in.x")
        context = case.input(f"{name}.in.context") if case.has(f"{name}.in.context") else None

        cond = run.get("cond_frame", 0)

        def call(clip=clip, context=context, cond=cond):
            return module(clip, context, cond)

        result, seen = _trace(case, name, module, call)
        _check_trace(case, seen)
        case.check(f"{name}.out", result)


@golden("seer", "resnet_pack")
@torch.no_grad()
def run_resnet_pack(case):
    config = case.config
    cin, cout, temb_channels, eps = (config[key] for key in ("cin", "cout", "temb", "eps"))
    modules = torch.nn.ModuleDict(
        {
            "resnet": SeerResnetBlock(cin, cout, temb_channels, eps=eps),
            "resnet_same": SeerResnetBlock(cout, cout, temb_channels, eps=eps),
            "downsampler": SeerDownsample(cout),
            "upsampler": SeerUpsample(cout),
        }
    )
    _load(modules, _weights(case, "modules", _shapes(modules.state_dict())))
    for run in case.spec["runs"]:
        name = run["name"]
        hidden_states, temb = case.input(f"{name}.in.x"), case.input(f"{name}.in.temb")
        for key in ("resnet", "resnet_same"):
            hidden_states = modules[key](hidden_states, temb)
            case.check(f"{name}.out.{key}", hidden_states)
        hidden_states = modules["downsampler"](hidden_states)
        case.check(f"{name}.out.down", hidden_states)
        case.check(f"{name}.out.up", modules["upsampler"](hidden_states))


@golden("seer", "fstext_forward")
@torch.no_grad()
def run_text_decomposer(case):
    model = _build_text_decomposer(case, case.config)
    for run in case.spec["runs"]:
        name = run["name"]
        context = case.input(f"{name}.in.context")

        def call(context=context, num_frames=run["num_frames"]):
            return model(context, num_frames=num_frames).hidden_states

        result, seen = _trace(case, name, model, call)
        for key, value in seen.items():
            # Blocks see (batch * frames, tokens) or (batch * tokens, frames), the second kind being causal in time.
            batch_size, num_frames, num_tokens, _ = case.recorded[key].shape
            if key.endswith("transformer_blocks.1"):
                value = value.unflatten(0, (batch_size, num_tokens)).transpose(1, 2)
            else:
                value = value.unflatten(0, (batch_size, num_frames))
            case.check(key, value)
        case.check(f"{name}.out", result)


@golden("seer", "rotary")
def run_rotary(case):
    for run in case.spec["runs"]:
        name, x, index = run["name"], case.input(f"{run['name']}.in.x"), torch.tensor(run["index"])
        for dtype in ("float32", "float16"):
            short = dtype.replace("float", "fp")
            rotary = SeerRotaryEmbedding(run["dim"], angle_dtype=dtype)
            turned = apply_rotary_embedding(x.to(getattr(torch, dtype)), *rotary(index, getattr(torch, dtype)))
            tolerance, angle_tolerance = _rotary_tolerances(case, short)
            _check_if_recorded(case, f"{name}.out.{short}", turned, tolerance=tolerance)
            angles = rotary.angles(index).repeat_interleave(2, dim=-1)
            _check_if_recorded(case, f"{name}.out.angle_{short}", angles, tolerance=angle_tolerance)


def _rotary_tolerances(case, short):
    """Tolerances of the turned values and of the angles: for each precision or one for all, in words or numbers. That of
    the angles may be part of the words for fp32 ("..., angles atol 1e-3")."""
    spec = case.tolerance_spec

    def of(precision):
        return spec[precision] if isinstance(spec, dict) and precision in spec else spec

    angles = of("angles") if isinstance(spec, dict) and "angles" in spec else of("fp32")
    if isinstance(angles, str) and "angles " in angles:
        angles = angles.split("angles ")[1]
    return Tolerance.parse(of(short)), Tolerance.parse(angles)


# --- images and schedules -----------------------------------------------------------------------------------------


@golden("seer", "image_preprocess")
def run_image_preprocess(case):
    for run in case.spec["runs"]:
        image = case.input(f"{run['name']}.in.image").numpy()
        case.check(f"{run['name']}.out", preprocess_image(image, run["res"]) * 2 - 1)


@golden("seer", "cast_num_frames")
def run_cast_num_frames(case):
    for run in case.spec["runs"]:
        case.check(f"{run['name']}.out", resample_frames(case.input(f"{run['name']}.in.t"), run["frames"]))


def _schedule_keys(case):
    return sorted({name.rsplit(".", 1)[0] for name in case.names("S")})


@golden("seer", "ddim_schedule")
def run_ddim_schedule(case):
    scheduler = SeerDDIMScheduler(num_train_timesteps=case.config["num_train_timesteps"])
    for key in _schedule_keys(case):
        # Keys read "S{steps}.eta{eta}".
        steps, eta = key.split(".", 1)
        num_steps, eta = int(steps.removeprefix("S")), float(eta.removeprefix("eta"))
        scheduler.set_timesteps(num_steps)
        timesteps = scheduler.timesteps.flip(0)
        case.check(f"{key}.timesteps", timesteps)
        tables = [scheduler.coefficients(t, eta) for t in timesteps]
        for position, name in enumerate(("alpha", "alpha_prev", "sqrt_one_minus_alpha", "sigma")):
            _check_if_recorded(case, f"{key}.{name}", torch.stack([row[position] for row in tables]))
    _check_if_recorded(case, "betas", scheduler.betas)
    _check_if_recorded(case, "alphas_cumprod", scheduler.alphas_cumprod)
    if "requested_step_counts_that_fail" not in case.spec:
        return
    failing = []
    for num_steps in range(1, scheduler.config.num_train_timesteps + 1):
        try:
            scheduler.set_timesteps(num_steps)
        except ValueError:
            failing.append(num_steps)
    case.check_value("step counts that fail", failing, case.spec["requested_step_counts_that_fail"])


# --- sampling -----------------------------------------------------------------------------------------------------


@golden("seer", "ddim_sampling")
@torch.no_grad()
def run_ddim_sampling(case):
    unet = _build_unet(case, case.config["unet"])
    scheduler = SeerDDIMScheduler()
    calls = []
    unet.register_forward_hook(lambda _module, inputs, output: calls.append((inputs[0], output[0])))
    for run in case.spec["runs"]:
        name, scale, eta = run["name"], run["scale"], run["eta"]
        reference, latents = case.input(f"{name}.in.x0_emb"), case.input(f"{name}.in.x_T")
        text = case.input(f"{name}.in.context")
        if scale != 1.0:
            text = torch.cat((case.input(f"{name}.in.uncond"), text))
        noises = case.input(f"{name}.in.noise") if eta > 0 else None
        scheduler.set_timesteps(run["S"])
        calls.clear()
        steps = []
        for index, t in enumerate(scheduler.timesteps):
            predicted = predict_noise(unet, reference, latents, t, text, scale)
            noise = None if noises is None else noises[index]
            steps.append(scheduler.step(predicted, t, latents, eta=eta, variance_noise=noise))
            latents = steps[-1].prev_sample
        timesteps = scheduler.timesteps[:, None].expand(-1, latents.shape[0])
        _check_if_recorded(case, f"{name}.out.timesteps", timesteps)
        _check_if_recorded(case, f"{name}.out.unet_in_first", calls[0][0])
        _check_if_recorded(case, f"{name}.out.unet_out_first", calls[0][1])
        _check_if_recorded(case, f"{name}.out.x_prev", torch.stack([step.prev_sample for step in steps]))
        _check_if_recorded(case, f"{name}.out.pred_x0", torch.stack([step.pred_original_sample for step in steps]))
        case.check(f"{name}.out.samples", latents)


def _stable_diffusion_part(case, component, build, mapping, load):
    config = case.config[component]
    shapes = _shapes(mapping.from_hf(build(config).state_dict()))
    return load(_weights(case, component, shapes), config, f"{case.path}: the {component}")


@golden("seer", "image_to_video_pipeline")
@torch.no_grad()
def run_image_to_video(case):
    run, config = case.spec["run"], case.config
    mappings = COMPONENTS["vae"](config), COMPONENTS["text_encoder"](config)
    vae = _stable_diffusion_part(case, "vae", build_vae, mappings[0], load_vae)
    pipeline = SeerPipeline(
        tokenizer=None,  # token ids are given
        text_encoder=_stable_diffusion_part(case, "text_encoder", build_text_encoder, mappings[1], load_text_encoder),
        vae=vae,
        unet=_build_unet(case, config["unet"]),
        text_decomposer=_build_text_decomposer(case, config["fstext"]),
        scheduler=SeerDDIMScheduler(),
        num_frames=run["num_frames"],
        num_cond_frames=run["cond_frames"],
        resolution=run["resolution"],
    )
    pipeline.set_progress_bar_config(disable=True)
    image = case.input("in.image").numpy()
    pixels = preprocess_image(image, run["resolution"])
    _check_if_recorded(case, "out.pixels", pixels * 2 - 1)
    text = pipeline.encode_tokens(case.input("in.input_ids"), case.input("in.attention_mask"))
    empty = pipeline.encode_tokens(case.input("in.empty_input_ids"), case.input("in.empty_attention_mask"))
    _check_if_recorded(case, "out.text_emb", text)
    _check_if_recorded(case, "out.empty_emb", empty)
    reference = pixels.expand(1, run["cond_frames"], -1, -1, -1)
    posterior = vae.encode(reference[0] * 2 - 1).latent_dist
    _check_if_recorded(case, "out.vae_mean", posterior.mean)
    _check_if_recorded(case, "out.vae_std", posterior.std)
    reference_latents = pipeline.encode_reference(reference, noise=case.input("in.vae_noise")[None])
    _check_if_recorded(case, "out.latents_x0", reference_latents)
    _check_if_recorded(case, "out.text_seq", pipeline.text_decomposer(text, num_frames=run["num_frames"]).hidden_states)

    seen = {}
    decode = vae.decode

    def record(latents, *args, **kwargs):
        seen.setdefault("decoder_input", []).append(latents)
        return decode(latents, *args, **kwargs)

    vae.decode = record
    frames = pipeline(
        prompt_embeds=text,
        negative_prompt_embeds=empty,
        image=image,
        num_inference_steps=run["ddim_steps"],
        guidance_scale=run["scale"],
        latents=case.input("in.x_T"),
        reference_latents=reference_latents,
        output_type="pt",
    ).frames
    _check_if_recorded(case, "out.decoder_input", torch.cat(seen["decoder_input"]))
    case.check("out.video", frames[:, run["cond_frames"] :].transpose(1, 2))
    gif = preview_frames(frames[0])
    _check_if_recorded(case, "out.gif_frames", gif, tolerance=Tolerance(atol=1.0))  # the case's note allows off-by-one
