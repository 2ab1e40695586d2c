"""Conversion of Divot's tokenizer and de-tokenizer."""

import json
from pathlib import Path

import pytest
import torch
from golden_kinds import GoldenCase, plain_file
from model_cases import divot as cases
from safetensors.torch import load_file, save_file

import cinetok
from cinetok import CheckpointError, DivotReconstructionPipeline
from cinetok.conversion import divot as conversion
from cinetok.conversion.divot_names import resampler_mapping, tokenizer_mapping, unet_mapping, vae_mapping

GOLDENS = Path(__file__).parent / "goldens" / "divot"


@pytest.fixture
def golden_files(tmp_path):
    """The committed de-tokenizer case as files in the original's names, and its configuration."""
    case = GOLDENS / "detokenizer_ddim"
    folder = tmp_path / "original"
    folder.mkdir()
    weights, tokenizer = (plain_file(case / name, folder) for name in ("weights.safetensors", "tokenizer.safetensors"))
    return weights, tokenizer, json.loads((case / "config.json").read_text())


def test_convert_detokenizer(golden_files, tmp_path):
    weights, tokenizer, config = golden_files
    config["kwargs"]["timestep_spacing"] = "uniform_trailing"
    folder = cinetok.convert_checkpoint("divot", [weights, tokenizer], tmp_path / "out", original_config=config)
    pipeline = DivotReconstructionPipeline.from_pretrained(folder)
    assert pipeline.scheduler.config.timestep_spacing == "uniform_trailing"
    size = config["kwargs"]["image_size"]
    assert pipeline.unet.config.sample_size == size // 8 and pipeline.video_processor.size == size
    assert pipeline.unet.config.default_fs == config["kwargs"]["fs"]
    assert pipeline.resampler.config.num_features == 64 and pipeline.unet.dtype == torch.float32
    pipeline.set_progress_bar_config(disable=True)
    case = GoldenCase(GOLDENS / "detokenizer_ddim")
    with torch.no_grad():
        context = pipeline.resampler(case.recorded["in.features"]).encoder_hidden_states
        unconditional = pipeline.video_tokenizer.unconditional_features(config["kwargs"]["image_size"])
    assert torch.allclose(context, case.recorded["out.context"], atol=1e-4)
    assert torch.allclose(unconditional, case.recorded["out.uncond_features"], atol=1e-4)
    frames = pipeline(cases.video(0), num_inference_steps=1, output_type="pt", clip_selection="first").frames
    assert frames.shape[:2] == (1, 16)


def test_convert_tokenizer_with_a_separate_clip_file(golden_files, tmp_path):
    from transformers import AutoModel, AutoVideoProcessor

    _, tokenizer, config = golden_files
    tensors = {name: value.float() for name, value in load_file(tokenizer).items()}
    prefix = "vit_model.model."
    clip = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    rest = {name: value.half() for name, value in tensors.items() if not name.startswith(prefix)}
    torch.save(rest, tmp_path / "tokenizer.bin")
    torch.save({"state_dict": clip}, tmp_path / "clip.bin")
    files = [tmp_path / "tokenizer.bin", tmp_path / "clip.bin"]
    folder = cinetok.convert_checkpoint("divot", files, tmp_path / "out", original_config=config["video_tokenizer"])
    model, processor = AutoModel.from_pretrained(folder), AutoVideoProcessor.from_pretrained(folder)
    assert isinstance(model, cinetok.DivotTokenizerModel) and isinstance(processor, cinetok.DivotVideoProcessor)
    features = model(processor(cases.video(0)).pixel_values_videos).features
    assert features.shape == (2, 64, 12)
    back = tokenizer_mapping().from_hf(model.state_dict())
    assert all(torch.equal(back[name], value.float()) for name, value in rest.items())

    with pytest.raises(CheckpointError, match="does not hold its image encoder"):
        cinetok.convert_checkpoint("divot", files[:1], tmp_path / "no", original_config=config["video_tokenizer"])
    with pytest.raises(CheckpointError, match="Divot_tokenizer.bin"):
        cinetok.convert_checkpoint("divot", files[1:], tmp_path / "no", original_config=config["video_tokenizer"])
    with pytest.raises(CheckpointError, match="second tokenizer"):
        cinetok.convert_checkpoint("divot", files[:1] * 2, tmp_path / "no", original_config=config["video_tokenizer"])
    assert not (tmp_path / "no").exists()


def test_convert_refuses_what_does_not_fit(golden_files, tmp_path):

    weights, tokenizer, config = golden_files
    tensors = {name: value.float() for name, value in load_file(weights).items()}
    out = tmp_path / "out"

    def attempt(changed, match, config=config):
        save_file(changed, tmp_path / "weights.safetensors")
        with pytest.raises(CheckpointError, match=match):
            cinetok.convert_checkpoint(
                "divot", [tmp_path / "weights.safetensors", tokenizer], out, original_config=config
            )
        assert not out.exists()

    missing = dict(tensors)
    missing.pop("diffusion_model.out.2.bias")
    attempt(missing, "1 missing: conv_out.bias")
    attempt(tensors | {"diffusion_model.extra.weight": torch.zeros(1)}, "extra.weight")
    attempt(tensors | {"other.weight": torch.zeros(1)}, "other.weight")
    attempt(tensors | {"diffusion_model.out.2.bias": torch.zeros(5)}, "another shape: conv_out.bias")
    attempt(tensors | {"diffusion_model.out.2.bias": torch.full((4,), float("nan"))}, "NaN")
    wrong = json.loads(json.dumps(config))
    wrong["diffusion_model"]["use_causal_attention"] = True
    attempt(tensors, "use_causal_attention", wrong)
    wrong = json.loads(json.dumps(config))
    del wrong["image_proj_model"]["dim"]
    attempt(tensors, "lacks 'dim'", wrong)
    # Noise tables and DynamiCrafter's prefix are tolerated.
    tolerated = {
        (f"model.{name}" if name.startswith("diffusion_model.") else name): value for name, value in tensors.items()
    }
    tolerated |= {"betas": torch.zeros(1000), "loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    save_file(tolerated, tmp_path / "weights.safetensors")
    cinetok.convert_checkpoint("divot", [tmp_path / "weights.safetensors", tokenizer], out, original_config=config)
    assert (out / "unet").is_dir()
    assert json.loads((out / "conversion.json").read_text())["left_out"]["detokenizer"]["tensors"] == 3
    with pytest.raises(CheckpointError, match="do not make release"):
        cinetok.convert_checkpoint("divot", tokenizer, tmp_path / "x", release="divot_detokenizer_stage1")


# What the authors' yaml says besides its sections.
_RELEASED_YAML = {
    "_target_": "src.models.dc_detokenizer.DynamiCrafter.from_pretrained",
    "unconditional_guidance_scale": 7.5,
    "ddim_steps": 50,
    "pretrained_model_path": "pretrained/Divot_tokenizer_detokenizer/Divot_detokenizer_stage1.bin",
}


def _flat(config):
    """A recorded configuration laid out like the authors' yaml: without a tokenizer section, arguments at the root."""
    parts = {name: config[name] for name in ("diffusion_model", "first_stage_model", "image_proj_model")}
    parts = {name: {"_target_": "original.Class", **section} for name, section in parts.items()}
    return json.loads(json.dumps({**_RELEASED_YAML, **parts}))


def test_convert_with_the_authors_yaml(golden_files, tmp_path, monkeypatch):
    """Their file does not describe the tokenizer, which is then the released one."""
    weights, tokenizer, config = golden_files
    build, tiny, seen = conversion._build_tokenizer, conversion.tokenizer_config(config["video_tokenizer"]), []
    monkeypatch.setattr(conversion, "_build_tokenizer", lambda files, given: seen.append(given) or build(files, tiny))
    folder = cinetok.convert_checkpoint("divot", [weights, tokenizer], tmp_path / "out", original_config=_flat(config))
    pipeline = DivotReconstructionPipeline.from_pretrained(folder)
    assert seen == [{}]
    assert pipeline.unet.config.sample_size == 32 and pipeline.video_processor.size == 256
    assert pipeline.unet.config.default_fs == 3
    assert json.loads((folder / "conversion.json").read_text())["sampling"] == {}


def test_convert_reads_every_key(golden_files, tmp_path):
    weights, tokenizer, config = golden_files
    flat = {**_flat(config), "video_tokenizer": config["video_tokenizer"]}
    flat |= {"image_size": 64, "fs": 5, "scale_factor": 0.2, "ddim_steps": 30, "unconditional_guidance_scale": 4.0}
    with pytest.warns(UserWarning, match=r"pass num_inference_steps=30, guidance_scale=4\.0"):
        folder = cinetok.convert_checkpoint("divot", [weights, tokenizer], tmp_path / "out", original_config=flat)
    pipeline = DivotReconstructionPipeline.from_pretrained(folder)
    assert pipeline.unet.config.sample_size == 8 and pipeline.video_processor.size == 64
    assert pipeline.unet.config.default_fs == 5 and pipeline.vae.config.scaling_factor == 0.2
    assert json.loads((folder / "conversion.json").read_text())["sampling"] == {
        "num_inference_steps": 30,
        "guidance_scale": 4.0,
    }

    def refused(match, *path, value):
        wrong = json.loads(json.dumps(flat))
        section = wrong
        for name in path[:-1]:
            section = section[name]
        section[path[-1]] = value
        with pytest.raises(CheckpointError, match=match):
            cinetok.convert_checkpoint("divot", [weights, tokenizer], tmp_path / "no", original_config=wrong)
        assert not (tmp_path / "no").exists()

    refused("tanh_out", "first_stage_model", "ddconfig", "tanh_out", value=True)
    refused("resamp_with_conv", "first_stage_model", "ddconfig", "resamp_with_conv", value=False)
    refused("attn_type", "first_stage_model", "ddconfig", "attn_type", value="linear")
    refused("unknown keys: surprise", "first_stage_model", "ddconfig", "surprise", value=1)
    refused("U-Net configuration has unknown keys: surprise", "diffusion_model", "surprise", value=1)
    refused("resampler configuration has unknown keys: surprise", "image_proj_model", "surprise", value=1)
    refused("de-tokenizer configuration has unknown keys: surprise", "surprise", value=1)
    refused("tokenizer configuration has unknown keys", "video_tokenizer", "kwargs", "surprise", value=1)
    refused("num_frames", "num_frames", value=7)
    refused("channels", "channels", value=8)
    refused("image_size=60", "image_size", value=60)
    silent = json.loads(json.dumps(flat))
    del silent["diffusion_model"]["use_relative_position"]  # the original's default is another network
    with pytest.raises(CheckpointError, match="use_relative_position"):
        cinetok.convert_checkpoint("divot", [weights, tokenizer], tmp_path / "no", original_config=silent)


def test_resampler_options():
    section = {"dim": 8, "depth": 1, "heads": 2, "dim_head": 4, "num_queries": 3, "embedding_dim": 6, "output_dim": 5}
    plain = conversion.resampler_config(section)
    assert plain["feed_forward_ratio"] == 4 and plain["normalize_output"] is True
    model = cinetok.DivotFeatureResampler(
        **conversion.resampler_config(section | {"ff_mult": 2, "norm_out": False}), num_features=4
    )
    names = resampler_mapping().from_hf(model.state_dict())
    assert names["layers.0.1.1.weight"].shape == (16, 8) and not any("norm_out" in name for name in names)
    x = torch.randn(2, 4, 6)
    inside = []
    model.perceiver.proj_out.register_forward_hook(lambda m, i, out: inside.append(out))
    assert torch.equal(model(x).encoder_hidden_states, inside[0])


@pytest.mark.parametrize(
    "module, mapping",
    [
        (cases.unet, lambda m: unet_mapping(m.config)),
        (cases.resampler, lambda m: resampler_mapping()),
        (cases.tokenizer, lambda m: tokenizer_mapping()),
        (cases.vae, lambda m: vae_mapping(m.config)),
    ],
    ids=["unet", "resampler", "tokenizer", "vae"],
)
def test_names_there_and_back(module, mapping):
    module = module()
    table, ours = mapping(module), module.state_dict()
    back = table.to_hf(table.from_hf(dict(ours)))
    assert set(back) == set(ours) and all(torch.equal(back[name], ours[name]) for name in ours)
