"""Divot's golden runners on cases laid out in other ways than the recorded ones: other options, keys left out."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_kinds import GoldenCase, plain_file
from PIL import Image
from run_goldens import run_case
from safetensors.torch import load_file, save_file

from cinetok import DivotTokenizerConfig

GOLDENS = Path(__file__).parent / "goldens" / "divot"


@pytest.fixture
def copied(tmp_path):
    """Copies a committed case, unpacked, to be changed."""

    def copy(name):
        folder = tmp_path / name
        folder.mkdir()
        for file in (GOLDENS / name).iterdir():
            if file.suffix == ".xz":
                plain_file(file.with_suffix(""), folder)
            else:
                shutil.copy(file, folder)
        return folder

    return copy


def _edit(folder, name, change):
    path = folder / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _failures(folder):
    case = run_case(folder)
    assert case.rows
    return [f"{row.name}: {row.max_abs:.1e} {row.note}" for row in case.rows if not row.passed]


def _write(folder, kind, config, tensors, meanings=None, **files):
    folder.mkdir()
    described = {name: {"meaning": meaning} for name, meaning in (meanings or {}).items()}
    spec = {"system": "divot", "kind": kind, "tolerance": {"atol": 2e-5, "rtol": 1e-4}, "tensors": described}
    (folder / "case.json").write_text(json.dumps(spec))
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "io.safetensors")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_pixels_for_clip_and_other_steps(tmp_path):
    tokenizer = DivotTokenizerConfig()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (tokenizer.image_mean, tokenizer.image_std))
    generator = torch.Generator().manual_seed(0)
    frame = torch.randint(0, 256, (1, 3, 224, 224), generator=generator, dtype=torch.uint8)
    pixels = (frame[0].float() / 255 - mean) / std
    image = torch.randint(0, 256, (20, 20, 3), generator=generator, dtype=torch.uint8)
    resized = np.array(Image.fromarray(image.numpy()).resize((10, 10), Image.Resampling.BILINEAR))
    resized = torch.from_numpy(resized).permute(2, 0, 1)
    tensors = {
        "in.clip0_224x224": frame,
        "out.clip0_224x224.pixels_sub": pixels[None, :, ::110, ::110],  # 3 rows, which 75 gives as well
        "out.clip0_224x224.corner": pixels[None, :, -4:, -4:],
        "out.clip0_224x224.sum": pixels.sum((-2, -1))[None],
        "in.pil0_20x20": image,
        "out.pil0_20x20.keep_ratio_False": resized,
        "out.pil0_20x20.keep_ratio_False.float_row0": ((resized / 255 - mean) / std)[:, 0],
    }
    meanings = {"out.clip0_224x224.pixels_sub": "CLIP pixels, every 110th row/col"}
    config = {"kwargs": {"type": "clip", "image_size": 10}}
    folder = _write(tmp_path / "case", "pixel_preprocessing", config, tensors, meanings)
    _edit(folder, "case.json", lambda spec: spec.update(tolerance={"atol": 2e-2, "rtol": 1e-4}))
    assert not _failures(folder)


def test_frames_without_a_stride(tmp_path):
    config = {"kwargs": {"fps": 8, "clip_frames": 16, "stride": 0}}
    row = {"video_frames": 20, "video_fps": 8.0, "max_clips": 20, "clips": 2}
    row["indices"] = [*range(16), *(int(16 + 0.25 * i) for i in range(16))]
    table = {"comprehension": [row], "reconstruction": []}
    assert not _failures(_write(tmp_path / "case", "frame_sampling", config, {}, table=table))


def test_a_tokenizer_without_the_norm(copied, tmp_path):
    """A case made of the de-tokenizer's tokenizer; the recorded results are this implementation's."""
    from golden_kinds.divot import build_tokenizer

    source = GoldenCase(copied("detokenizer_ddim"))
    config = source.config["video_tokenizer"]
    config["kwargs"]["use_norm"] = False
    weights = {n: v for n, v in source.weights("tokenizer.safetensors").items() if not n.startswith("norm.")}
    frames = torch.randint(0, 256, (2, 5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model, inside = build_tokenizer(config, weights), []
    model.joint_encoder.register_forward_pre_hook(lambda m, inputs: inside.append(inputs[0]))
    with torch.no_grad():
        features = model((frames.float() / 255 - 0.5) / 0.5).features
    tensors = {"in.frames_uint8": frames, "out.features": features, "out.pooled_normed": inside[0]}
    folder = _write(tmp_path / "case", "tokenizer", config, tensors)
    save_file({n: v.contiguous() for n, v in weights.items()}, folder / "weights.safetensors")
    assert not _failures(folder)


def test_a_detokenizer_with_default_options(copied):
    folder = copied("detokenizer_ddim")
    usual = {"unconditional_guidance_scale", "num_frames", "fs", "ddim_eta", "timestep_spacing", "guidance_rescale"}
    _edit(folder, "config.json", lambda config: [config["kwargs"].pop(name, None) for name in usual])

    def shorten(config):
        for run in config.get("sampling", {}).values():
            if run["timestep_spacing"] == "uniform":
                del run["timestep_spacing"]
            for name, default in (("eta", 0.0), ("unconditional_guidance_scale", 1.0), ("guidance_rescale", 0.0)):
                if run[name] == default:
                    del run[name]

    _edit(folder, "config.json", shorten)
    assert not _failures(folder)


def test_lora_with_other_options(copied):
    """Whole copies of the embeddings too, and keys that are left out."""
    folder = copied("lora_merge")
    weights = load_file(folder / "weights.safetensors")
    for name in ("llm.base_model.model.lm_head", "llm.base_model.model.model.embed_tokens"):
        trained = weights.pop(f"{name}.weight")
        weights[f"{name}.original_module.weight"] = torch.zeros_like(trained)
        weights[f"{name}.modules_to_save.default.weight"] = trained
    save_file(weights, folder / "weights.safetensors")

    def change(config):
        config["lora"]["modules_to_save"] += ["lm_head", "embed_tokens"]
        config["lora"].pop("lora_dropout", None)

    _edit(folder, "config.json", change)
    assert not _failures(folder)


def test_padding_is_not_compared_under_sdpa(copied):
    from golden_kinds import divot_llm

    case = GoldenCase(copied("divot_llm"))
    name, key = next(
        (n, f"out.{n}.logits_every9")
        for n in ("cmp", "gen", "gencausal")
        if case.has(f"out.{n}.logits_every9") and bool((case.recorded[f"in.{n}.attention_mask"][:, ::9] == 0).any())
    )
    model = divot_llm.build_llm(case.weights("llm.safetensors"), case.weights(), divot_llm._model_config(case.config))
    case.recorded[key][case.recorded[f"in.{name}.attention_mask"][:, ::9] == 0] = 1e3
    for implementation, passes in (("sdpa", True), ("eager", False)):
        case.rows.clear()
        model.set_attn_implementation(implementation)
        divot_llm._check_forward(case, model, name, name)
        assert next(row for row in case.rows if row.name == key).passed == passes
