"""Conversion of Video-LaVIT's tokenizers and de-tokenizers from the authors' files, and the cards."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from card_snippets import python_blocks
from golden_kinds import load_tensors, plain_file
from model_cases import video_lavit as cases
from moving_clips import moving_clip, moving_frames
from safetensors.torch import save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoVideoProcessor

from cinetok import CheckpointError, VideoLavitImageProcessor, VideoLavitReconstructionPipeline, convert_checkpoint
from cinetok.conversion import find_release, state_dict_names
from cinetok.conversion import video_lavit_parts as parts
from cinetok.model_cards import render_card

GOLDENS = Path(__file__).parent / "goldens" / "video_lavit"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return moving_clip(tmp_path_factory.mktemp("clips"), 60)


def original_folder(root):
    """A small copy of the authors' folder: every file, their names and prefixes, tiny networks, random weights."""
    visual, rest = dict(cases.tiny("visual_tokenizer", cases.VISUAL).state_dict()), {}
    encoder = {name.removeprefix("encoder."): visual[name] for name in visual if name.startswith("encoder.")}
    rest = {name: value for name, value in visual.items() if not name.startswith("encoder.")}
    unet, condition = (
        cases.tiny(n, a).state_dict() for n, a in (("unet", cases.UNET), ("motion_encoder", cases.MOTION_ENCODER))
    )
    condition = {f"motion_encoder.{name}": value for name, value in condition.items()}
    files = {
        "visual_tokenizer/eva_vitg_psz14.bin": encoder,
        "visual_tokenizer/tokenizer_encoder.bin": {**rest, "vit_proj.weight": torch.zeros(4, 32)},
        "visual_tokenizer/highres_tokenizer_decoder.bin": cases.tiny(
            "keyframe_decoder", cases.KEYFRAME_DECODER
        ).state_dict(),
        "motion_tokenizer.bin": cases.tiny("motion_tokenizer", cases.MOTION).state_dict(),
        "video_3d_unet.bin": {**{f"unet.{name}": value + 0.01 for name, value in unet.items()}, **condition},
        "video_detokenizer/unet/diffusion_pytorch_model.bin": {**unet, **condition},
        "video_detokenizer/vae/diffusion_pytorch_model.safetensors": cases.tiny("vae", cases.VAE).state_dict(),
        "image_detokenizer/unet/diffusion_pytorch_model.bin": cases.tiny(
            "keyframe_unet", cases.KEYFRAME_UNET
        ).state_dict(),
        "image_detokenizer/vae/diffusion_pytorch_model.safetensors": cases.tiny(
            "keyframe_vae", cases.KEYFRAME_VAE
        ).state_dict(),
    }
    for name, tensors in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {key: value.contiguous() for key, value in tensors.items()}
        save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    configs = {"video_detokenizer/unet": cases.UNET, "video_detokenizer/vae": cases.VAE,
               "image_detokenizer/unet": cases.KEYFRAME_UNET, "image_detokenizer/vae": cases.KEYFRAME_VAE}  # fmt: skip
    for folder, arguments in configs.items():
        (root / folder / "config.json").write_text(json.dumps({"_class_name": "X", **arguments}))
    return root


@pytest.fixture
def small_defaults(monkeypatch):
    """Makes the converter expect the tiny networks where it takes sizes from our configurations' defaults."""
    for name, arguments in (
        ("visual_tokenizer", cases.VISUAL),
        ("motion_tokenizer", cases.MOTION),
        ("keyframe_decoder", cases.KEYFRAME_DECODER),
        ("motion_encoder", cases.MOTION_ENCODER),
    ):
        builder = parts._BUILDERS[name]
        monkeypatch.setitem(
            parts._BUILDERS, name, lambda builder=builder, base=arguments, **given: builder(**{**base, **given})
        )


def convert_quietly(*arguments, **options):
    with contextlib.redirect_stderr(io.StringIO()):
        return convert_checkpoint("video_lavit", *arguments, **options)


def run_snippet(name, folder, clip, monkeypatch):
    """Runs the card's snippet beside the folder, at a size that suits the tiny networks."""
    release = find_release(name, "video_lavit")
    card = render_card(release, model_id=folder.name, height=cases.HEIGHT, width=cases.WIDTH, steps=1)
    monkeypatch.chdir(folder.parent)
    Path("clip.mp4").write_bytes(Path(clip).read_bytes())
    PIL.Image.fromarray(moving_frames(1)[0]).save("picture.png")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for block in python_blocks(card):
            exec(compile(block, f"{name}.md", "exec"), {})
    made = {
        "image_detokenizer": "reconstruction.png",
        "detokenizer": "reconstruction.mp4",
        "unet": "reconstruction.mp4",
    }
    wanted = next((file for ending, file in made.items() if name.endswith(ending)), None)
    assert wanted is None or Path(wanted).stat().st_size > 0


@pytest.mark.parametrize(
    ("release", "given"),
    [
        (
            "video_lavit_visual_tokenizer",
            ["visual_tokenizer/eva_vitg_psz14.bin", "visual_tokenizer/tokenizer_encoder.bin"],
        ),
        ("video_lavit_motion_tokenizer", ["motion_tokenizer.bin"]),
        ("video_lavit_image_detokenizer", ["visual_tokenizer", "image_detokenizer"]),
        ("video_lavit_video_detokenizer", ["video_detokenizer", "motion_tokenizer.bin"]),
        ("video_lavit_video_3d_unet", ["video_3d_unet.bin", "video_detokenizer"]),
    ],
)
def test_releases_convert_from_the_folder_and_from_their_files(
    tmp_path, small_defaults, clip, release, given, monkeypatch
):
    root = original_folder(tmp_path / "original")
    whole = convert_quietly(root, tmp_path / "whole", release=release)
    part = convert_quietly([root / name for name in given], tmp_path / "part", release=release)
    assert json.loads((part / "conversion.json").read_text())["release"] == release
    run_snippet(release, whole, clip, monkeypatch)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    assert files and files == sorted(path.relative_to(part) for path in part.rglob("*.safetensors"))
    assert all((whole / name).read_bytes() == (part / name).read_bytes() for name in files)
    if release.endswith("_tokenizer"):
        model, info = AutoModel.from_pretrained(whole, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        key = "visual" if "visual" in release else "motion"
        expected = cases.tiny(f"{key}_tokenizer", cases.VISUAL if key == "visual" else cases.MOTION).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
        if key == "motion":
            assert AutoVideoProcessor.from_pretrained(whole)(clip)["motion_values"].shape[1:] == (2, 24, 4, 8)
        else:
            assert VideoLavitImageProcessor.from_pretrained(whole).size == 56
        return
    loaded = VideoLavitReconstructionPipeline.from_pretrained(whole)
    loaded.set_progress_bar_config(disable=True)
    if release == "video_lavit_image_detokenizer":
        options = {"height": 16, "width": 24, "num_inference_steps": 1, "output_type": "pt"}
        assert loaded.reconstruct_images(cases.images(1), **options).images.shape == (1, 3, 16, 24)
    else:
        assert loaded(**cases.raw_inputs(1)).frames.shape == (1, cases.FRAMES, 3, cases.HEIGHT, cases.WIDTH)
        shift = 0.01 if release == "video_lavit_video_3d_unet" else 0.0
        expected = cases.tiny("unet", cases.UNET).state_dict()["conv_in.weight"] + shift
        torch.testing.assert_close(loaded.unet.conv_in.weight, expected)


def test_scheduler_files_are_honoured(tmp_path):
    folder = tmp_path / "image_detokenizer/scheduler"
    folder.mkdir(parents=True)
    original = parts.OriginalFolder([tmp_path])
    assert type(original.keyframe_scheduler()).__name__ == "DDIMScheduler"
    for named, expected in (
        ("EulerAncestralDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
        ("EulerDiscreteScheduler", "DDIMScheduler"),
    ):
        config = {"_class_name": named, "beta_start": 0.00085, "steps_offset": 1, "clip_sample": False}
        (folder / "scheduler_config.json").write_text(json.dumps(config))
        scheduler = original.keyframe_scheduler()
        assert type(scheduler).__name__ == expected and scheduler.config.beta_start == 0.00085
    (folder / "scheduler_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        original.keyframe_scheduler()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("encoder.norm.weight"), "1 missing: encoder.norm.weight"),
        (lambda t: t.__setitem__("extra.weight", torch.zeros(1)), "1 unexpected: extra.weight"),
        (
            lambda t: t.__setitem__("encoder.norm.weight", torch.zeros(3)),
            r"encoder.norm.weight \(3,\) instead of \(16,\)",
        ),
        (lambda t: t["encoder.norm.weight"].fill_(float("nan")), "NaN"),
    ],
)
def test_wrong_tensors_are_refused_and_nothing_is_written(tmp_path, small_defaults, change, message):
    root = original_folder(tmp_path / "original")
    tensors = torch.load(root / "motion_tokenizer.bin", weights_only=True)
    change(tensors)
    torch.save(tensors, root / "motion_tokenizer.bin")
    with pytest.raises(CheckpointError, match=message):
        convert_quietly(root, tmp_path / "out", release="video_lavit_motion_tokenizer")
    assert not (tmp_path / "out").exists()


def test_missing_files_are_named(tmp_path, small_defaults):
    root = original_folder(tmp_path / "original")
    (root / "visual_tokenizer/tokenizer_encoder.bin").unlink()
    with pytest.raises(CheckpointError, match="visual_tokenizer/tokenizer_encoder.bin is missing"):
        convert_quietly(root, tmp_path / "out", release="video_lavit_visual_tokenizer")
    with pytest.raises(CheckpointError, match="video_detokenizer/vae.* is missing"):
        convert_quietly(root / "video_3d_unet.bin", tmp_path / "out", release="video_lavit_video_3d_unet")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        convert_quietly(tmp_path / "absent", tmp_path / "out", release="video_lavit_motion_tokenizer")
    with pytest.raises(CheckpointError, match="no training state"):
        convert_quietly(root, tmp_path / "out", release="video_lavit_motion_tokenizer", keep_training_state=True)


@pytest.mark.parametrize(
    "name", ["motion_tokenizer", "visual_tokenizer", "keyframe_token_decoder", "motion_condition_encoder_temporal_pos"]
)
def test_original_configurations_convert(tmp_path, name):
    config = GOLDENS / name / "config.json"
    weights = plain_file(GOLDENS / name / "weights.safetensors", tmp_path)
    output = convert_quietly(weights, tmp_path / "out", original_config=config)
    if name.endswith("_tokenizer"):
        model = AutoModel.from_pretrained(output)
        assert AutoConfig.from_pretrained(output).model_type == f"video_lavit_{name}"
    else:
        component = "keyframe_decoder" if "decoder" in name else "motion_encoder"
        model = type(parts.build(component)).from_pretrained(output)
    count = sum(1 for _ in model.state_dict())
    assert json.loads((output / "conversion.json").read_text())["converted_tensors"].popitem()[1] == count


def test_a_given_configuration_is_not_mixed_with_the_released_one():
    assert parts.build("vae").config.sample_size == 768 and parts.build("keyframe_vae").config.scaling_factor == 0.13025
    vae = parts.build("vae", {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2})
    assert (vae.config.sample_size, vae.config.layers_per_block) == (32, 1)  # the class's defaults
    sizes = {"dim": 16, "num_heads": 2, "depth": 1, "out_channel": 16}
    assert parts.motion_encoder_arguments(sizes)["num_frames"] is None
    assert parts.motion_encoder_arguments({**sizes, "add_temp_pos": True})["num_frames"] == 24
    eva = {
        "vision_cfg": {"image_size": 42, "layers": 1, "width": 16, "head_width": 8, "mlp_ratio": 2, "patch_size": 14}
    }
    original = {"eva": {**eva, "embed_dim": 8}, "layers": 1, "heads": 2, "n_code": 8, "code_dim": 4}
    arguments = parts.visual_tokenizer_arguments(original)
    # The merger's ratio is written into the original's code.
    assert (arguments["intermediate_size"], arguments["merger_intermediate_size"]) == (32, int(16 * 4.3637))


@torch.no_grad()
def test_an_image_detokenizer_converts_with_its_original_configuration(tmp_path):
    golden = GOLDENS / "image_detokenizer"
    config = json.loads((golden / "config.json").read_text())
    weights = plain_file(golden / "weights.safetensors", tmp_path)
    output = convert_quietly(weights, tmp_path / "out", original_config=golden / "config.json")
    report = json.loads((output / "conversion.json").read_text())
    assert report["left_out"] == {"visual_tokenizer.quantize.embedding.weight": 1}
    card = (output / "README.md").read_text()
    assert "the codebook of a visual tokenizer" in card and "reconstruct_images" in card
    loaded = VideoLavitReconstructionPipeline.from_pretrained(output)
    assert type(loaded.keyframe_scheduler).__name__ == "DDIMScheduler" and loaded.visual_tokenizer is None
    recorded = {k: v.float() for k, v in load_tensors(golden / "weights.safetensors.xz").items()}
    for part, prefix in (
        ("keyframe_decoder", "tokenizer_decoder."),
        ("keyframe_unet", "unet."),
        ("keyframe_vae", "vae."),
    ):
        state = getattr(loaded, part).state_dict()
        assert state and all(torch.equal(value.float(), recorded[prefix + name]) for name, value in state.items())

    # With a tokenizer in the checkpoint and its configuration the folder is whole, and runs.
    decoder = config["decoder"]
    vision = {
        "image_size": decoder["img_size"] // decoder["patch_size"] * 14,
        "layers": 1,
        "width": 16,
        "head_width": 8,
        "mlp_ratio": 2.0,
        "patch_size": 14,
    }
    eva = {"embed_dim": 4, "vision_cfg": vision}
    config["visual_tokenizer"] = {"eva": eva, "layers": 1, "heads": 2, "n_code": 50, "code_dim": decoder["in_chans"]}
    config["scheduler"] = {"_class_name": "EulerAncestralDiscreteScheduler", **config["scheduler_euler_ancestral"]}
    visual = cases.tiny("visual_tokenizer", parts.visual_tokenizer_arguments(config["visual_tokenizer"])).state_dict()
    save_file(
        {**load_tensors(weights), **{f"visual_tokenizer.{k}": v for k, v in visual.items()}}, tmp_path / "w.safetensors"
    )
    output = convert_quietly(tmp_path / "w.safetensors", tmp_path / "whole", original_config=config)
    loaded = VideoLavitReconstructionPipeline.from_pretrained(output)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.keyframe_scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    options = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "pt"}
    assert loaded.reconstruct_images(cases.images(1), **options).images.shape == (1, 3, 32, 32)
    del config["visual_tokenizer"]
    with pytest.raises(CheckpointError, match="configuration .* is missing"):
        convert_quietly(tmp_path / "w.safetensors", tmp_path / "no", original_config=config)
    save_file({**load_tensors(weights), "more": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="no part of the keyframe de-tokenizer takes: more"):
        convert_quietly(tmp_path / "w.safetensors", tmp_path / "no", original_config=config)


def test_an_encoder_alone_is_refused_with_what_is_missing(tmp_path):
    weights = plain_file(GOLDENS / "eva_encoder/weights.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match="no model by itself.*tokenizer_encoder.bin"):
        convert_quietly(weights, tmp_path / "out", original_config=GOLDENS / "eva_encoder/config.json")


def test_image_processor_is_found_by_the_auto_class(tmp_path):
    cases.tiny("visual_tokenizer", cases.VISUAL).save_pretrained(tmp_path)
    VideoLavitImageProcessor(28).save_pretrained(tmp_path)
    picture = PIL.Image.fromarray(np.arange(30 * 40 * 3, dtype=np.uint8).reshape(30, 40, 3))
    expected = VideoLavitImageProcessor(28)(picture)["pixel_values"]
    for options in ({}, {"backend": "pil"}):
        processor = AutoImageProcessor.from_pretrained(tmp_path, **options)
        assert type(processor) is VideoLavitImageProcessor
        assert torch.equal(processor(picture)["pixel_values"], expected)


def test_unknown_original_configuration_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="none of Video-LaVIT's"):
        weights = plain_file(GOLDENS / "motion_tokenizer/weights.safetensors", tmp_path)
        convert_quietly(weights, tmp_path / "out", original_config={"a": 1})


def test_names_map_both_ways():
    encoder = cases.tiny("visual_tokenizer", cases.VISUAL).encoder.state_dict()
    mapping = state_dict_names("video_lavit", "eva_encoder", None)
    ours = mapping.to_hf(dict(encoder))
    assert all(name.startswith("encoder.") for name in ours) and set(mapping.from_hf(ours)) == set(encoder)
