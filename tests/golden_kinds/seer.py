"""Runners of Seer's golden kinds."""

import hashlib
import math

import torch

from cinetok import SeerDDIMScheduler, SeerPipeline, SeerTextDecomposer, SeerUNet3DConditionModel
from cinetok.conversion.seer import COMPONENTS, text_decomposer_config, unet_config
from cinetok.conversion.stable_diffusion import load_text_encoder, load_vae
from cinetok.modeling.seer.attention_seer import SeerRotaryEmbedding, apply_rotary_embedding
from cinetok.modeling.seer.image_processing_seer import preprocess_image, preview_frames, resample_frames
from cinetok.modeling.seer.unet_seer import SeerDownsample, SeerResnetBlock, SeerTransformer3DModel, SeerUpsample
from cinetok.pipelines.seer.pipeline_seer import predict_noise
from golden_kinds import Tolerance, defer, golden, load_tensors

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


def _formula_weights(case, shapes, prefix=None):
    rule = case.spec["weights_formula"]
    prefix = rule["PREFIX"] if prefix is None else prefix
    return {name: formula_tensor(name, tuple(shape), prefix, rule["GAIN"]) for name, shape in shapes.items()}


def _load(module, tensors, mapping=None):
    module.load_state_dict(mapping.to_hf(tensors) if mapping else tensors, strict=True)
    return module.eval()


def _build_unet(case, config):
    unet = SeerUNet3DConditionModel(**unet_config(config))
    mapping = COMPONENTS["unet"](config)
    if "weights_formula" not in case.spec:
        return _load(unet, case.weights(), mapping)
    stored = mapping.from_hf(unet.state_dict())
    return _load(unet, _formula_weights(case, {k: tuple(v.shape) for k, v in stored.items()}), mapping)


def _build_text_decomposer(config, weights):
    return _load(SeerTextDecomposer(**text_decomposer_config(config)), weights, COMPONENTS["text_decomposer"](config))


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
        for cond in run["cond_frame"]:

            def call(cond=cond, sample=sample, timestep=timestep, context=context):
                return unet(sample, timestep, context, num_cond_frames=cond).sample

            if run.get("trace") and cond == run.get("trace_cond", cond):
                result, seen = _trace(case, name, unet, call)
                _check_trace(case, seen)
            else:
                result = call()
            case.check(f"{name}.out.cond{cond}", result)


@golden("seer", "inflate_from_image_unet")
@torch.no_grad()
def run_inflate(case):
    from diffusers import UNet2DConditionModel

    config = dict(case.config["image_unet_config"])
    image_unet = _load(UNet2DConditionModel(**config), _formula_weights(case, case.spec["weights_2d"]))
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
    _load(module, case.weights())
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
    _load(modules, case.weights())
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
    model = _build_text_decomposer(case.config, case.weights())
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
            case.check(f"{name}.out.{short}", turned, group=short)
            angles = rotary.angles(index).repeat_interleave(2, dim=-1)
            # The tolerance of the angles is part of the text for fp32 ("..., angles atol 1e-3").
            case.check(f"{name}.out.angle_{short}", angles, tolerance=_angle_tolerance(case))


def _angle_tolerance(case):
    return Tolerance.parse(case.spec["tolerance"]["fp32"].split("angles ")[1])


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
            case.check(f"{key}.{name}", torch.stack([row[position] for row in tables]))
    failing = []
    for num_steps in range(1, scheduler.config.num_train_timesteps + 1):
        try:
            scheduler.set_timesteps(num_steps)
        except ValueError:
            failing.append(num_steps)
    case.check_value("step counts that fail", failing, case.spec["requested_step_counts_that_fail"])
    case.check("betas", scheduler.betas)
    case.check("alphas_cumprod", scheduler.alphas_cumprod)


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
        case.check(f"{name}.out.timesteps", timesteps)
        case.check(f"{name}.out.unet_in_first", calls[0][0])
        case.check(f"{name}.out.unet_out_first", calls[0][1])
        case.check(f"{name}.out.x_prev", torch.stack([step.prev_sample for step in steps]))
        case.check(f"{name}.out.pred_x0", torch.stack([step.pred_original_sample for step in steps]))
        case.check(f"{name}.out.samples", latents)


def _case_weights(case, name):
    """Weights of a component of a case of many, wherever the case says they are."""
    tensors = load_tensors(case.file(case.spec["weights"][name]))
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


@golden("seer", "image_to_video_pipeline")
@torch.no_grad()
def run_image_to_video(case):
    run, config = case.spec["run"], case.config
    vae = load_vae(_case_weights(case, "vae"), config["vae"], "the case's autoencoder")
    pipeline = SeerPipeline(
        tokenizer=None,  # token ids are given
        text_encoder=load_text_encoder(_case_weights(case, "text_encoder"), config["text_encoder"], "the text encoder"),
        vae=vae,
        unet=_build_unet(case, config["unet"]),
        text_decomposer=_build_text_decomposer(config["fstext"], _case_weights(case, "fstext")),
        scheduler=SeerDDIMScheduler(),
        num_frames=run["num_frames"],
        num_cond_frames=run["cond_frames"],
        resolution=run["resolution"],
    )
    pipeline.set_progress_bar_config(disable=True)
    image = case.input("in.image").numpy()
    pixels = preprocess_image(image, run["resolution"])
    case.check("out.pixels", pixels * 2 - 1)
    text = pipeline.encode_tokens(case.input("in.input_ids"), case.input("in.attention_mask"))
    empty = pipeline.encode_tokens(case.input("in.empty_input_ids"), case.input("in.empty_attention_mask"))
    case.check("out.text_emb", text)
    case.check("out.empty_emb", empty)
    reference = pixels.expand(1, run["cond_frames"], -1, -1, -1)
    posterior = vae.encode(reference[0] * 2 - 1).latent_dist
    case.check("out.vae_mean", posterior.mean)
    case.check("out.vae_std", posterior.std)
    reference_latents = pipeline.encode_reference(reference, noise=case.input("in.vae_noise")[None])
    case.check("out.latents_x0", reference_latents)
    case.check("out.text_seq", pipeline.text_decomposer(text, num_frames=run["num_frames"]).hidden_states)

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
    case.check("out.decoder_input", torch.cat(seen["decoder_input"]))
    case.check("out.video", frames[:, run["cond_frames"] :].transpose(1, 2))
    gif = preview_frames(frames[0])
    case.check("out.gif_frames", gif, tolerance=Tolerance(atol=1.0))  # the case's note allows off-by-one
