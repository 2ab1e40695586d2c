"""Runners of VidTok's golden kinds: whole models, building blocks, regularizers (see each case.json for the calls)."""

import re

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from cinetok import VidTokConfig, VidTokModel
from cinetok.conversion.vidtok import config_from_original
from cinetok.modeling.vidtok.layers_vidtok import TemporalResnetBlock
from cinetok.modeling.vidtok.regularizers_vidtok import FiniteScalarQuantizer

from . import Tolerance, defer, golden, vidtok_video  # noqa: F401

for _kind in ("loss", "disc", "lpips", "ema"):
    defer("vidtok", _kind, "belongs to the full trainer")


def load(case):
    """The case's model, strictly loaded."""
    torch.set_num_threads(max(1, case.spec.get("threads", 1)))
    config = VidTokConfig(**config_from_original(case.config).to_dict())
    model = VidTokModel(config).eval()
    model.load_state_dict(case.weights(), strict=True)
    return model


def to_video(tensor):
    """(B, C, T, H, W) of the cases <-> (B, T, C, H, W) of the models."""
    return tensor.transpose(1, 2)


class Captured:
    """Outputs of named submodules during one call, in the originals' layouts (slices of the time axis joined again)."""

    def __init__(self, model, names):
        self.outputs, self.handles = {}, []
        for name in names:
            module = model.get_submodule(name)
            self.handles.append(module.register_forward_hook(self._hook(name)))

    def _hook(self, name):
        return lambda module, inputs, output: self.outputs.setdefault(name, []).append(output.clone())

    def get(self, name, ndim):
        frames = torch.cat(self.outputs[name])  # (T, B, H, W, C)
        if ndim == 5:
            return frames.permute(1, 4, 0, 2, 3)
        return frames.permute(1, 0, 4, 2, 3).flatten(0, 1)

    def remove(self):
        for handle in self.handles:
            handle.remove()


def scalar_tolerance(case):
    """Scalars (kl_loss, aux_loss) have a relative tolerance of their own where the case says so."""
    match = re.search(r"scalars \([^)]*\) rtol ([0-9.e+-]+)", case.tolerance_spec)
    return Tolerance(rtol=float(match.group(1))) if match else case.tolerance()


@golden("vidtok", "vidtok")
def run_model(case):
    model = load(case)
    with torch.no_grad():
        for call in case.spec["plan"]["calls"]:
            if call.get("pad_gen_frames"):
                _run_pad_gen_frames(case, model, call)
            else:
                _run_call(case, model, call)


def _run_pad_gen_frames(case, model, call):
    first, second = case.input(call["x"]), case.input(call["x2"])
    factor = model.config.temporal_compression_ratio
    num_frames = first.shape[2]
    if second.shape[2] == num_frames and num_frames % factor == 1 % factor and num_frames > factor:
        video = to_video(torch.cat([first, second], dim=2))
        chunks = model.reconstruct_in_chunks(video, chunk_frames=num_frames - 1, pad_gen_frames=True).reconstruction
        chunks = list(to_video(chunks).split(num_frames, dim=2))
    else:
        chunks = [_reconstruct(model, first)]
        context = chunks[0][:, :, chunks[0].shape[2] - (factor - 1) :].clamp(-1, 1)
        chunks.append(_reconstruct(model, torch.cat([context, second], dim=2))[:, :, -second.shape[2] :])
    for i, chunk in enumerate(chunks, start=1):  # clamped: the recorded chunks are what the authors' script writes
        case.check(f"output.{call['tag']}.chunk{i}", chunk.clamp(-1, 1))


def _reconstruct(model, video):
    latents = model.encode(to_video(video), official_padding=True).latents
    frames = to_video(model.decode(latents).reconstruction)
    return frames[:, :, -video.shape[2] :] if model.config.version == "1.1" else frames


def _run_call(case, model, call):
    tag, video = call["tag"], case.input(call["x"])
    prefix = f"output.{tag}."
    factor = model.config.temporal_compression_ratio
    middle = [name[len(f"mid.{tag}.") :] for name in case.names(f"mid.{tag}.")]
    captured = Captured(model, middle)
    encode_options, decode_options = {"official_padding": True}, {}
    if "tiling" in call:
        chunk_frames = call["tiling"]["t_chunk_enc"]
        encode_options = {"streaming": "official", "chunk_frames": chunk_frames}
        decode_options = {**encode_options, "overlap": call["tiling"]["use_overlap"]}
    global_step = call.get("global_step", 0)
    raw_latents = []
    if model.config.regularizer == "fsq":
        hook = lambda module, inputs, output: raw_latents.append(inputs[0])  # noqa: E731
        handle = model.quantizer.register_forward_hook(hook)
    encoded = model.encode(
        to_video(video), compute_aux_loss="tiling" not in call, num_steps=global_step // 2, **encode_options
    )

    def check(name, value, **options):
        if case.has(prefix + name):
            case.check(prefix + name, value, **options)

    if model.config.regularizer == "kl":
        posterior = encoded.posterior
        check("moments", posterior.parameters)
        check("z_mode", encoded.latents)
        kl_loss = encoded.kl_loss
        if "tiling" in call:
            # The authors average over their chunks; the chunks here are the same slices of the moments.
            kl_loss = _mean_over_chunks(model, posterior.parameters, call, factor, _kl_loss)
        check("kl_loss", kl_loss, tolerance=scalar_tolerance(case))
        decoded = to_video(model.decode(encoded.latents, **decode_options).reconstruction)
        check("decode_mode", decoded)
        captured.remove()
        if "noise" in call:
            sample = posterior.mean + posterior.std * case.input(call["noise"])
            check("z_sample", sample)
            frames = to_video(model.decode(sample, **decode_options).reconstruction)
            if model.config.version == "1.1":
                frames = frames[:, :, -video.shape[2] :]
            check("forward_sample", frames)
    else:
        handle.remove()
        (raw,) = raw_latents
        check("z_encoder", raw)
        check("z_quantized", encoded.latents)
        check("indices", encoded.indices)
        if "tiling" in call:
            loss = lambda part: model.quantizer.aux_loss(part, model.quantizer(part)[0], global_step // 2)  # noqa: E731
            aux_loss = _mean_over_chunks(model, raw, call, factor, loss)
        else:
            aux_loss = encoded.aux_loss
        check("aux_loss", aux_loss, tolerance=scalar_tolerance(case))
        decoded = to_video(model.decode(encoded.latents, **decode_options).reconstruction)
        check("decode", decoded)
        captured.remove()
        if call.get("from_indices"):
            again = to_video(model.decode(indices=encoded.indices, **decode_options).reconstruction)
            case.check_value(f"{prefix}decode(indices)", bool(torch.allclose(again, decoded, atol=1e-5)), True)
        if call.get("forward"):
            frames = decoded[:, :, -video.shape[2] :] if model.config.version == "1.1" else decoded
            check("forward_num_frames", frames.shape[2])
    for name in middle:
        expected = case.recorded[f"mid.{tag}.{name}"]
        case.check(f"mid.{tag}.{name}", captured.get(name, expected.ndim))


def _kl_loss(moments):
    posterior = DiagonalGaussianDistribution(moments)
    return 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).sum() / moments.shape[0]


def _mean_over_chunks(model, moments, call, factor, loss):
    step = call["tiling"]["t_chunk_enc"] // factor
    borders = [0, *range(1, moments.shape[2], step), moments.shape[2]]
    return torch.stack([loss(moments[:, :, a:b]) for a, b in zip(borders, borders[1:])]).mean()


@golden("vidtok", "blocks")
def run_blocks(case):
    weights, inputs = case.weights(), case.input("input.x")
    channels = case.config["channels"]
    version = {"v10": "1.0", "v11": "1.1"}[case.config["code"]]
    hidden_states = inputs.permute(2, 0, 1)[:, :, None, None]  # (pixels, C, T) -> (T, pixels, 1, 1, C)
    for name, is_causal in (("causal_1d", True), ("noncausal_1d", False)):
        config = VidTokConfig(
            is_causal=is_causal,
            version=version,
            norm_type="groupnorm",
            base_channels=channels,
            channel_multipliers=[1],
            temporal_compression_ratio=1,
        )
        block = TemporalResnetBlock(config, channels)
        prefix = next(p for p in (f"{name}.", f"{name.removesuffix('_1d')}.") if any(k.startswith(p) for k in weights))
        tensors = {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}
        block.load_state_dict(tensors, strict=True)
        with torch.no_grad():
            output = block(hidden_states.clone())
        case.check(f"output.{name}", output[:, :, 0, 0].permute(1, 2, 0))


@golden("vidtok", "fsq")
def run_fsq(case):
    config = dict(case.config)
    quantizer = FiniteScalarQuantizer(
        config.pop("levels"), **{key: value for key, value in config.items() if key != "target"}
    )
    for call in case.spec["plan"]["calls"]:
        prefix = f"output.{call['tag']}."
        latents = case.input(call["z"]).clone().requires_grad_()
        quantized, indices = quantizer(latents)
        aux_loss = quantizer.aux_loss(latents, quantized, call["n_steps"])
        results = {
            "quantized": quantized,
            "indices": indices,
            "aux_loss": aux_loss,
            "entropy_weight": torch.tensor(quantizer.entropy_weight(call["n_steps"])),
            "bound": quantizer.bound(latents.movedim(1, -1)),
            "codes_from_indices": quantizer.indices_to_codes(indices.flatten()),
        }
        weighted = (quantized * case.input(call["w"])).sum()
        results["grad_z_of_sum_quantized_times_w"] = torch.autograd.grad(weighted, latents, retain_graph=True)[0]
        if aux_loss.requires_grad:
            results["grad_z_of_aux_loss"] = torch.autograd.grad(aux_loss, latents)[0]
        for name in case.names(prefix):
            case.check(name, results[name[len(prefix) :]])


@golden("vidtok", "kl")
def run_kl(case):
    for call in case.spec["plan"]["calls"]:
        prefix = f"output.{call['tag']}."
        posterior = DiagonalGaussianDistribution(case.input(call["moments"]))
        latents = posterior.mode()
        if "noise" in call:
            latents = posterior.mean + posterior.std * case.input(call["noise"])
        results = {
            "z": latents,
            "kl_loss": _kl_loss(posterior.parameters),
            "logvar_clamped": posterior.logvar,
            "std": posterior.std,
            "kl_map": posterior.kl(),
        }
        for name in case.names(prefix):
            case.check(name, results[name[len(prefix) :]])
