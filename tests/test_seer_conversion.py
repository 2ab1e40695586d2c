"""Seer's conversion from the authors' files and Stable Diffusion, its cards and its documentation."""

from pathlib import Path

import pytest
import torch
from card_snippets import python_blocks, run_card
from model_cases import seer as tiny
from PIL import Image
from safetensors.torch import save_file
from seer_runs import fresh_process_frames, pipe_fixture, run  # noqa: F401 (fixture)

from cinetok import CheckpointError, SeerPipeline, SeerTextDecomposer, SeerUNet3DConditionModel, convert_checkpoint
from cinetok.conversion import seer as conversion
from cinetok.conversion import stable_diffusion, state_dict_names
from cinetok.model_cards import render_card
from cinetok.modeling.seer.unet_seer import unet_config_from_2d

# --- conversion ------------------------------------------------------------------------------------

ORIGINAL_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "block_out_channels": [64, 64, 64, 64],
    "layers_per_block": 1,
    "downsample_padding": 1,
    "cross_attention_dim": tiny.TEXT_DIM,
    "attention_head_dim": 4,
}
ORIGINAL = {
    "unet": ORIGINAL_UNET,
    "fstext": {
        "num_frames": 6,
        "max_length": 16,
        "in_channels": tiny.TEXT_DIM,
        "out_channels": tiny.TEXT_DIM,
        "n_heads": 3,
        "num_layers": 2,
        "cross_attention_dim": tiny.TEXT_DIM,
    },
    "num_frames": tiny.FRAMES,
    "cond_frames": 1,
    "resolution": tiny.SIZE,
    "mixed_precision": "no",
}


@pytest.fixture(scope="module")
def originals(pipe, tmp_path_factory):
    """The authors' two files, and Stable Diffusion in both layouts, at tiny sizes."""
    folder = tmp_path_factory.mktemp("originals")
    (folder / "seer").mkdir()
    torch.save(pipe.unet.state_dict(), folder / "seer" / "pytorch_model.bin")
    # With several GPUs the training tool writes the names of the distributed wrapper.
    wrapped = {f"module.{name}": value for name, value in pipe.text_decomposer.state_dict().items()}
    torch.save(wrapped, folder / "seer" / "pytorch_model_1.bin")
    torch.save({"state": {}}, folder / "seer" / "optimizer.bin")

    image = tiny.image_unet(block_out_channels=(64, 64, 64, 64))
    sd = folder / "sd"
    for name, model in (("unet", image), ("vae", pipe.vae), ("text_encoder", pipe.text_encoder)):
        model.save_pretrained(sd / name)
    pipe.tokenizer.save_pretrained(sd / "tokenizer")
    (sd / "model_index.json").write_text("{}")

    config, vae_config = {**ORIGINAL_UNET}, dict(pipe.vae.config)
    text = stable_diffusion.text_encoder_mapping().from_hf(pipe.text_encoder.state_dict())
    parts = {
        "model.diffusion_model.": stable_diffusion.unet_mapping(config).from_hf(image.state_dict()),
        "first_stage_model.": stable_diffusion.vae_mapping(vae_config).from_hf(pipe.vae.state_dict()),
        "cond_stage_model.transformer.": text,
    }
    tensors = {prefix + name: value for prefix, part in parts.items() for name, value in part.items()}
    tensors["betas"] = torch.zeros(3)
    tensors["model_ema.decay"] = torch.zeros(())
    positions = torch.arange(tiny.TOKENS)[None]
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = positions
    torch.save({"state_dict": tensors, "global_step": 3}, folder / "sd.ckpt")
    return folder


def sections(pipe):
    text = {k: v for k, v in pipe.text_encoder.config.to_dict().items() if isinstance(v, (int, float, str))}
    for name in ("model_type", "transformers_version", "dtype"):
        text.pop(name, None)
    return {
        **ORIGINAL,
        "vae": {k: v for k, v in pipe.vae.config.items() if not k.startswith("_")},
        "text_encoder": text,
    }


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_convert_pipeline(pipe, originals, tmp_path, layout):
    base = [originals / "sd"] if layout == "diffusers" else [originals / "sd.ckpt", originals / "sd" / "tokenizer"]
    folder = convert_checkpoint("seer", [originals / "seer", *base], tmp_path / "out", original_config=sections(pipe))
    torch.testing.assert_close(fresh_process_frames(folder, tmp_path), run(pipe), atol=1e-5, rtol=1e-4)
    loaded = SeerPipeline.from_pretrained(folder)
    for name in ("unet", "text_decomposer", "vae", "text_encoder"):
        expected = getattr(pipe, name).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in getattr(loaded, name).state_dict().items()), name


def test_convert_single_models(pipe, originals, tmp_path):
    folder = convert_checkpoint(
        "seer", originals / "seer" / "pytorch_model.bin", tmp_path / "unet", original_config=ORIGINAL_UNET
    )
    inputs = tiny.unet_inputs(1)
    with torch.no_grad():
        loaded = SeerUNet3DConditionModel.from_pretrained(folder)
        assert torch.equal(loaded(**inputs).sample, pipe.unet(**inputs).sample)
    folder = convert_checkpoint(
        "seer", originals / "seer" / "pytorch_model_1.bin", tmp_path / "text", original_config=ORIGINAL["fstext"]
    )
    inputs = tiny.text_decomposer_inputs(1)
    with torch.no_grad():
        loaded = SeerTextDecomposer.from_pretrained(folder)
        assert torch.equal(loaded(**inputs).hidden_states, pipe.text_decomposer(**inputs).hidden_states)


def test_convert_image_unet(tmp_path):
    image = tiny.image_unet()
    save_file(image.state_dict(), tmp_path / "image.safetensors")
    config = {"image_unet_config": {k: v for k, v in image.config.items() if not k.startswith("_")}}
    folder = convert_checkpoint("seer", tmp_path / "image.safetensors", tmp_path / "out", original_config=config)
    loaded = SeerUNet3DConditionModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in image.state_dict().items())


def test_original_names_match_those_of_diffusers(pipe, originals):
    """diffusers' own reader of single files is the reference for the names of Stable Diffusion."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    tensors = torch.load(originals / "sd.ckpt", weights_only=True)["state_dict"]
    unet = convert_ldm_unet_checkpoint(tensors, {"layers_per_block": 1})
    expected = tiny.image_unet(block_out_channels=(64, 64, 64, 64)).state_dict()
    assert unet.keys() == expected.keys() and all(torch.equal(unet[k], expected[k]) for k in unet)
    vae = convert_ldm_vae_checkpoint(tensors, pipe.vae.config)
    expected = pipe.vae.state_dict()
    assert vae.keys() == expected.keys() and all(torch.equal(vae[k], expected[k]) for k in vae)


@pytest.mark.parametrize(
    "component, build",
    [
        (
            "image_unet_original",
            lambda: (stable_diffusion.build_unet(stable_diffusion.UNET_CONFIG), stable_diffusion.UNET_CONFIG),
        ),
        (
            "vae_original",
            lambda: (stable_diffusion.build_vae(stable_diffusion.VAE_CONFIG), stable_diffusion.VAE_CONFIG),
        ),
        ("vae", lambda: (stable_diffusion.build_vae(stable_diffusion.VAE_CONFIG), stable_diffusion.VAE_CONFIG)),
    ],
)
def test_name_tables_are_invertible_at_released_sizes(component, build):
    module, config = build()
    mapping = state_dict_names("seer", component, config)
    state_dict = module.state_dict()
    original = mapping.from_hf(state_dict)
    assert len(original) == len(state_dict) and original.keys() != state_dict.keys()
    back = mapping.to_hf(original)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state_dict.items()}


def test_releases_fit_the_models():
    names = {release.name for release in conversion.RELEASES}
    assert {"sthv2_seer", "bridge_seer", "epickitchen_seer", "sthv2bridge_seer", "fstext_init"} <= names
    for release in conversion.RELEASES:
        for label, _ in conversion.card_facts(release)["facts"]:
            assert label
        pipeline = release.config.get("pipeline")
        assert pipeline is None or pipeline["num_cond_frames"] < pipeline["num_frames"]
    frames = {
        r.name: (r.config["pipeline"]["num_frames"], r.config["pipeline"]["num_cond_frames"])
        for r in conversion.RELEASES[:4]
    }
    assert frames == {
        "sthv2_seer": (12, 2),
        "bridge_seer": (16, 1),
        "epickitchen_seer": (16, 1),
        "sthv2bridge_seer": (16, 1),
    }


def test_bad_conversions(pipe, originals, tmp_path):
    def fails(message, checkpoints, **options):
        options = options or {"original_config": sections(pipe)}
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint("seer", checkpoints, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    seer, sd = originals / "seer", originals / "sd"
    fails("give Stable Diffusion 1.5 as one more", [seer])
    fails("nothing given holds the text decomposer", [seer / "pytorch_model.bin", sd])
    fails("same part", [seer, seer / "pytorch_model.bin", sd])
    fails("given twice", [seer, sd, originals / "sd.ckpt"])
    fails("does not fit its configuration", [seer, sd], release="sthv2_seer")
    fails("does not fit its configuration", [seer / "pytorch_model_1.bin"], release="fstext_init")
    fails("no use for it", [seer, sd], original_config=ORIGINAL_UNET)
    fails("expected the arguments of the U-Net", [seer, sd], original_config={"model": {}})
    fails(
        "holds no training state|hold no training state", [seer, sd], original_config=ORIGINAL, keep_training_state=True
    )
    fails("use_linear_projection", [seer, sd], original_config={**ORIGINAL_UNET, "use_linear_projection": True})
    fails("no in_channels|no n_heads|no num_layers", [seer], original_config={"n_heads": 2})
    fails("cannot be rounded that way", [seer, sd], original_config={**ORIGINAL, "mixed_precision": "bf16"})
    fails("`unet` must be a section", [seer, sd], original_config={**ORIGINAL, "unet": "sd15"})
    fails("act_fn='mish'", [seer, sd], original_config={**ORIGINAL_UNET, "act_fn": "mish"})

    (tmp_path / "empty").mkdir()
    fails("no pytorch_model.bin", [tmp_path / "empty", sd])
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    fails("neither a U-Net nor a text decomposer", [tmp_path / "other.safetensors", sd])

    tensors = dict(pipe.unet.state_dict())
    tensors.pop("conv_in.bias")
    torch.save(tensors, tmp_path / "incomplete.bin")
    fails("conv_in.bias", [tmp_path / "incomplete.bin"], original_config=ORIGINAL_UNET)
    tensors = dict(pipe.unet.state_dict())
    name = "mid_block.temporal_attentions.0.transformer_blocks.0.attn1.rotary_emb.freqs"
    tensors[name] = tensors[name] * 2
    torch.save(tensors, tmp_path / "frequencies.bin")
    fails("does not hold the frequencies", [tmp_path / "frequencies.bin"], original_config=ORIGINAL_UNET)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{}")
    fails("missing; expected a Stable Diffusion", [seer, tmp_path / "broken"])


def test_stable_diffusion_is_inflated_without_seer_weights(originals, tmp_path, monkeypatch):
    """The release for training anew, at the tiny size of the fixture."""
    release = next(r for r in conversion.RELEASES if r.name == "seer_sd15_init")
    config = {
        "unet": {},
        "text_decomposer": {
            "hidden_size": tiny.TEXT_DIM,
            "num_attention_heads": 3,
            "num_layers": 1,
            "cross_attention_dim": 24,
        },
        "pipeline": {"num_frames": tiny.FRAMES, "num_cond_frames": 1, "resolution": tiny.SIZE},
    }
    conversion._convert_pipeline(
        conversion._sources([originals / "sd"]), tmp_path / "out", config, {}, release.name, fresh=True
    )
    pipe = SeerPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert run(pipe).shape == (1, tiny.FRAMES, 3, tiny.SIZE, tiny.SIZE)
    temporal = [p for name, p in pipe.unet.named_parameters() if name.endswith("temporal_attentions.0.proj_out.weight")]
    assert temporal and all(p.abs().sum() == 0 for p in temporal)


# The authors' inference.yaml, without what has no influence on the models (paths, batches, the sampler's options).
AUTHORS_YAML = """
pretrained_model_name_or_path: "runwayml/stable-diffusion-v1-5"
dataset: "sthv2"
resolution: 256
cond_frames: 2 #sthv2 = (1 or 2), bridgedata = 1, epickitchen = 1
num_frames: 12 #sthv2 = (12 or 16), bridgedata = 16, epickitchen = (12 or 16)
seed: 0
mixed_precision: "fp16" #choices=["no", "fp16", "bf16"]
"""


def test_the_authors_yaml_describes_their_release(tmp_path):
    from cinetok.conversion.original_config import read_original_config

    (tmp_path / "inference.yaml").write_text(AUTHORS_YAML)
    config, parts = conversion._config_from_original(read_original_config(tmp_path / "inference.yaml"))
    assert config == next(r for r in conversion.RELEASES if r.name == "sthv2_seer").config and not parts
    for precision, dtype in (('"fp16"', "float16"), ('"no"', "float32"), ("no", "float32"), ("", "float32")):
        (tmp_path / "other.yaml").write_text(
            AUTHORS_YAML.replace('mixed_precision: "fp16"', f"mixed_precision: {precision}")
        )
        config, _ = conversion._config_from_original(read_original_config(tmp_path / "other.yaml"))
        assert config["unet"] == config["text_decomposer"] == {"rotary_angle_dtype": dtype}, precision


def test_fine_tuned_checkpoints_round_their_angles_as_the_releases_do(pipe, originals, tmp_path):
    config = sections(pipe)
    del config["mixed_precision"]
    folder = convert_checkpoint(
        "seer", [originals / "seer", originals / "sd"], tmp_path / "out", original_config=config
    )
    loaded = SeerPipeline.from_pretrained(folder)
    released = conversion.RELEASES[0].config["unet"]["rotary_angle_dtype"]
    assert loaded.unet.config.rotary_angle_dtype == loaded.text_decomposer.config.rotary_angle_dtype == released
    assert (
        loaded.unet.mid_block.temporal_attentions[0].transformer_blocks[0].attn1.rotary_emb.angle_dtype == torch.float16
    )
    # Models described by themselves have no precision of a run.
    for sections_given in ({"unet": ORIGINAL_UNET}, {"unet": ORIGINAL_UNET, "fstext": ORIGINAL["fstext"]}):
        config, _ = conversion._config_from_original(sections_given)
        assert SeerUNet3DConditionModel(**config["unet"]).config.rotary_angle_dtype == "float32"


def test_a_single_section_is_a_single_model(pipe, originals, tmp_path):
    for section, file, cls, part in (
        ("unet", "pytorch_model.bin", SeerUNet3DConditionModel, pipe.unet),
        ("fstext", "pytorch_model_1.bin", SeerTextDecomposer, pipe.text_decomposer),
    ):
        folder = convert_checkpoint(
            "seer", originals / "seer" / file, tmp_path / section, original_config={section: ORIGINAL[section]}
        )
        loaded = cls.from_pretrained(folder).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in part.state_dict().items())


def test_settings_without_effect_in_the_original():
    plain = conversion.unet_config(ORIGINAL_UNET)
    assert conversion.unet_config({**ORIGINAL_UNET, "downsample_padding": 0, "act_fn": "swish"}) == plain


def test_unet_configuration_of_stable_diffusion():
    config = unet_config_from_2d({**stable_diffusion.UNET_CONFIG, "_class_name": "UNet2DConditionModel"})
    assert config["num_attention_heads"] == 8 and config["cross_attention_dim"] == 768


# --- cards and documentation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sthv2bridge_seer", "sthv2_seer", "fstext_init", "seer_sd15_init"])
def test_card_snippets_run(pipe, tmp_path, name):
    release = next(r for r in conversion.RELEASES if r.name == name)
    if name == "fstext_init":
        tiny.text_decomposer(max_length=77).save_pretrained(tmp_path / name)
    else:
        pipe.save_pretrained(tmp_path / name)
        Image.new("RGB", (40, 50), "red").save(tmp_path / "book.jpg")
    card = render_card(release)
    run_card(card, tmp_path)
    assert (tmp_path / "close_book.mp4").exists() == (release.card == "seer")
    assert release.name in card.split("```bash")[1]


def test_documentation_snippet_runs(tmp_path):
    blocks = python_blocks((Path(__file__).parents[1] / "docs" / "seer.md").read_text())
    scope = {}
    exec(blocks[-1], scope)  # the models, with tiny configurations
    assert scope["noise"].shape == (1, 4, 4, 8, 8)
