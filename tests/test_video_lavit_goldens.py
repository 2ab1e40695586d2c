"""Runners of Video-LaVIT's golden kinds on cases of other sizes, batches and selections than the committed ones."""

import json
from pathlib import Path

import torch
from golden_kinds import GoldenCase, load_tensors
from model_cases import video_lavit as cases
from run_goldens import run_case
from safetensors.torch import save_file

from cinetok.conversion import video_lavit_parts as parts

GOLDENS = Path(__file__).parent / "goldens" / "video_lavit"
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


def write_case(folder, kind, config, io, weights, **spec):
    spec = {"tolerance": TOLERANCE, **spec, "system": "video_lavit", "kind": kind}
    (folder / "case.json").write_text(json.dumps(spec))
    (folder / "config.json").write_text(json.dumps(config))
    for name, tensors in (("io", io), ("weights", weights)):
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    return folder


def copy_case(name, folder, keep, change_calls=lambda text: text):
    """A committed case with fewer recorded results and other words about its calls."""
    case = GoldenCase(GOLDENS / name)
    io = {key: value for key, value in case.recorded.items() if keep(key)}
    calls = [change_calls(text) for text in case.spec["calls"]]
    weights = load_tensors(case.file("weights.safetensors"))
    return write_case(folder, case.kind, case.config, io, weights, tolerance=case.tolerance_spec, calls=calls)


def failures(folder):
    return [row for row in run_case(folder).rows if not row.passed]


@torch.no_grad()
def test_an_encoder_of_any_width(tmp_path):
    vision = {"image_size": 42, "layers": 2, "width": 40, "head_width": 10, "mlp_ratio": 4.3637, "patch_size": 14}
    config = {"embed_dim": 6, "vision_cfg": vision}
    arguments = {**parts._eva_arguments(config), "merger_num_attention_heads": 1, "merger_num_hidden_layers": 0}
    encoder = cases.tiny("visual_tokenizer", arguments).encoder
    pixels = cases.rows((3, 42, 42), 2)
    io = {
        "in.pixel_values": pixels,
        "out.features": encoder(pixels),
        "out.clip_embedding": encoder.clip_embedding(pixels),
    }
    assert not failures(write_case(tmp_path, "eva_encoder", config, io, encoder.state_dict()))


def test_only_what_a_case_records_is_run_and_guidance_is_its_own(tmp_path):
    def keep(name):
        return name.startswith("in.") and "long" not in name or name.startswith("out.euler_a")

    def without(name):
        return keep(name) and name not in ("in.last_frame_uint8", "in.renoise", "in.noise_level")

    assert not failures(copy_case("image_detokenizer", tmp_path, without))
    changed = copy_case("image_detokenizer", tmp_path, without, lambda t: t.replace("guidance 3.0", "guidance 5"))
    assert any("guided_first" in row.name for row in failures(changed))


def test_options_of_a_video_call_are_read_from_the_case(tmp_path):
    def keep(name):
        return name.startswith(
            ("in.image", "in.noise_image", "in.size", "in.steps", "in.raw", "in.noise_latent_raw")
        ) or (name.startswith("out.raw"))

    assert not failures(copy_case("video_detokenizer", tmp_path, keep))
    for old, new in (("-> 3.0", "-> 4.0"), ("ref_frame=False", "ref_frame=True"), ("strength=0.05", "strength=0.5")):
        changed = copy_case("video_detokenizer", tmp_path, keep, lambda text, old=old, new=new: text.replace(old, new))
        assert failures(changed), old


@torch.no_grad()
def test_chunks_of_a_batch_run_over_its_frames_as_in_the_original(tmp_path):
    case = GoldenCase(GOLDENS / "video_detokenizer")
    latents = case.recorded["out.raw.latents_after_step"][-1].repeat(2, 1, 1, 1, 1)
    flat = latents.flatten(0, 1) / case.config["vae"]["scaling_factor"]
    assert latents.shape[1] == 4  # chunks of 3: the second holds the end of one clip and the beginning of the next
    vae = parts._BUILDERS["vae"](**case.config["vae"])
    vae.load_state_dict({k[4:]: v for k, v in case.weights().items() if k.startswith("vae.")})
    frames = torch.cat([vae.decode(chunk, num_frames=len(chunk)).sample for chunk in flat.split(3)])
    io = {name: case.recorded[name] for name in ("in.size", "in.steps")}
    for name in ("in.image", "in.noise_image", "in.raw_motion", "in.noise_latent_raw"):
        io[name] = case.recorded[name].repeat(2, *[1] * (case.recorded[name].ndim - 1))
    io["out.raw.frames_float_first"] = frames.unflatten(0, (2, 4))[:, :1].transpose(1, 2)
    assert (frames[0] - frames[4]).abs().max() > 0.01
    calls, weights = case.spec["calls"], load_tensors(case.file("weights.safetensors"))
    write_case(tmp_path, case.kind, case.config, io, weights, tolerance=case.tolerance_spec, calls=calls)
    assert not failures(tmp_path)


def test_motion_maps_are_compared_without_pooled_ones(tmp_path):
    name = "motion_map_table"
    case = GoldenCase(GOLDENS / name)
    io = {key: value for key, value in case.recorded.items() if not key.endswith(".pooled")}
    (tmp_path / "case.json").write_text(json.dumps(case.spec))
    (tmp_path / "config.json").write_text(json.dumps(case.config))
    save_file(io, tmp_path / "io.safetensors")
    assert not failures(tmp_path)


@torch.no_grad()
def test_networks_with_a_plain_first_block(tmp_path):
    arguments = dict(cases.UNET)
    for side in ("down_block_types", "up_block_types"):
        arguments[side] = tuple(reversed(cases.UNET[side]))
    unet, inputs = cases.tiny("unet", arguments), cases.unet_inputs(1)
    names = {
        "sample": "sample",
        "timestep": "timestep",
        "encoder_hidden_states": "motion_condition",
        "added_time_ids": "added_time_ids",
    }
    io = {f"in.{new}": inputs[old] for old, new in names.items()}
    io["out.sample"] = unet(**inputs).sample
    assert not failures(write_case(tmp_path, "unet3d_motion", arguments, io, unet.state_dict()))
