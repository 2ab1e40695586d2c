"""Conversion of Video-LaVIT's language models and of the whole system from the authors' files, and the cards."""

import json
import re

import pytest
import torch
from card_snippets import run_card
from model_cases import video_lavit_llm as tiny
from python_process import PRELUDE, run_python
from video_lavit_llm_runs import call, video_file_fixture  # noqa: F401 (fixture)

from cinetok import (
    CheckpointError,
    VideoLavitForCausalLM,
    VideoLavitMotionTokenizer,
    VideoLavitMotionTokenizerConfig,
    VideoLavitPipeline,
    VideoLavitUnderstandingPipeline,
    VideoLavitVisualTokenizer,
    VideoLavitVisualTokenizerConfig,
    convert_checkpoint,
    read_video,
)
from cinetok.cli import main as cli
from cinetok.conversion.sentencepiece_llama import llama_tokenizer_from_sentencepiece
from cinetok.conversion.video_lavit_llm import (
    RELEASES_LLM,
    config_from_original,
    language_model_mapping,
    make_config,
    manifest_parts_llm,
)
from cinetok.conversion.video_lavit_parts import motion_tokenizer_arguments
from cinetok.model_cards import render_card

ORIGINAL = {
    "llama": tiny.LLAMA | {"vocab_size": 32000 + 4 + 16384 + 1024},
    "tokenizer_model_max_length": 512,
    "visual_tokenizer": {
        "eva": {
            "embed_dim": 8,
            "vision_cfg": {
                "image_size": 42, "layers": 2, "width": 16, "head_width": 8, "mlp_ratio": 2.0, "patch_size": 14,
            },
        },
        "layers": 1, "heads": 2, "n_code": 32, "code_dim": 6, "llm_embed_dim": 32,
    },
    "motion_tokenizer": {
        "dim": 16, "num_heads": 2, "img_size": [36, 20], "num_frames": 24, "n_code": 40, "code_dim": 6,
    },
}  # fmt: skip


def _original_folder(folder, config, changes=None):
    """A folder as the authors', with shards and an index, under their names."""
    folder.mkdir(parents=True)
    model = tiny.randomize(VideoLavitForCausalLM(config), 11)
    tensors = language_model_mapping().from_hf(model.state_dict())
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors.update(changes or {})
    tensors = {name: value for name, value in tensors.items() if value is not None}
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"pytorch_model-0000{number + 1}-of-00002.bin"
        torch.save({name: tensors[name].clone() for name in part}, folder / file)
        index.update(dict.fromkeys(part, file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return model


@pytest.fixture
def llama_tokenizer(tmp_path):
    """A sentencepiece model of 32,000 pieces is too large to make here; the check of the size is met by padding."""
    sentencepiece_model = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    proto = sentencepiece_model.ModelProto()
    proto.ParseFromString(tiny.sentencepiece_model())
    lowest = min(piece.score for piece in proto.pieces if piece.score > -1e8)
    for number in range(len(proto.pieces), 32000):
        proto.pieces.add(piece=f"filler{number}", score=lowest - number)
    path = tmp_path / "language_model" / "tokenizer.model"
    path.parent.mkdir()
    path.write_bytes(proto.SerializeToString())
    return path


def test_tuned_weights_convert_and_load_in_a_fresh_process(tmp_path, llama_tokenizer):
    config = config_from_original(ORIGINAL)
    model = _original_folder(tmp_path / "language_model_sft", config)
    output = convert_checkpoint(
        "video_lavit", tmp_path / "language_model_sft", tmp_path / "converted", original_config=ORIGINAL
    )
    report = json.loads((output / "conversion.json").read_text())
    assert report["left_out"] == {"rotary_emb.inv_freq": 1}
    ids = torch.tensor([[1, 20, 32002, 48388, 30]])
    with torch.no_grad():
        expected = model(ids).logits[0, -1, ::5000]
    code = """
    import json, sys, torch, cinetok
    from transformers import AutoModelForCausalLM, AutoProcessor, AutoModel
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
    processor = AutoProcessor.from_pretrained(sys.argv[1])
    inner = AutoModel.from_pretrained(sys.argv[1])
    image = torch.zeros(3, 30, 40, dtype=torch.uint8)
    inputs = processor(text="USER: <image>\\nwhat? ASSISTANT:", images=image)
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(torch.tensor([[1, 20, 32002, 48388, 30]])).logits[0, -1, ::5000]
    print(json.dumps([logits.tolist(), answer[0, -3:].tolist(), type(processor).__name__, type(inner).__name__]))
    """
    logits, answer, processor_name, inner_name = json.loads(run_python(code, output))
    assert torch.allclose(torch.tensor(logits), expected, atol=1e-6)
    assert all(token < 32000 for token in answer)  # answers are text: the saved generation settings say so
    assert (processor_name, inner_name) == ("VideoLavitProcessor", "VideoLavitModel")
    pipeline = VideoLavitUnderstandingPipeline.from_model(output)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline("what?", image=tiny.picture(), max_new_tokens=9).answers[0], str)


def test_generation_weights_convert(tmp_path, llama_tokenizer):
    original = dict(ORIGINAL["llama"].items()) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "rope_theta": 10000.0,
    }
    model = _original_folder(tmp_path / "weights", config_from_original(original))
    output = convert_checkpoint(
        "video_lavit", tmp_path / "weights", tmp_path / "converted", original_config=original, tokenizer=llama_tokenizer
    )
    loaded = VideoLavitForCausalLM.from_pretrained(output)
    assert loaded.model.visual_tokenizer is None
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


def test_the_whole_generation_system_converts_and_runs(tmp_path, llama_tokenizer, video_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = ["--height", "16", "--width", "24", "--steps", "1"]
    original = {
        **ORIGINAL,
        "visual_tokenizer": {**ORIGINAL["visual_tokenizer"], "n_code": 16384},
        "motion_tokenizer": {**ORIGINAL["motion_tokenizer"], "n_code": 1024},
        "keyframe_decoder": {
            "img_size": 42, "patch_size": 14, "in_chans": 6, "embed_dim": 16, "depth": 1, "num_heads": 2,
            "mlp_ratio": 2.0, "hard_coded_in_original": {"decoder_out_dim": 12, "unet_dim_1": 8, "unet_dim_2": 16},
        },
        "motion_encoder": {"dim": 16, "num_heads": 2, "depth": 1, "out_channel": 16, "add_temp_pos": False},
    }  # fmt: skip
    folder = llama_tokenizer.parents[1] / "Video-LaVIT-v1"
    keyframe, video = tiny.keyframe_components(), tiny.video_components()
    visual_config = VideoLavitVisualTokenizerConfig(
        **{**tiny.VISUAL, "codebook_size": 16384, "merger_intermediate_size": 69}
    )
    visual = tiny.randomize(VideoLavitVisualTokenizer(visual_config), 1)
    motion_config = VideoLavitMotionTokenizerConfig(**motion_tokenizer_arguments(original["motion_tokenizer"]))
    motion = tiny.randomize(VideoLavitMotionTokenizer(motion_config), 2)
    language_model = _original_folder(folder / "language_model", config_from_original({"llama": ORIGINAL["llama"]}))
    llama_tokenizer.rename(folder / "language_model" / "tokenizer.model")

    def save(tensors, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(tensors), path)

    tensors = visual.state_dict()
    encoder = {name: value for name, value in tensors.items() if name.startswith("encoder.")}
    rest = {name: value for name, value in tensors.items() if name not in encoder}
    encoder = {name.removeprefix("encoder."): value for name, value in encoder.items()}
    save(encoder, folder / "visual_tokenizer" / "eva_vitg_psz14.bin")
    save(rest, folder / "visual_tokenizer" / "tokenizer_encoder.bin")
    save(keyframe["keyframe_decoder"].state_dict(), folder / "visual_tokenizer" / "highres_tokenizer_decoder.bin")
    save(motion.state_dict(), folder / "motion_tokenizer.bin")
    motion_tensors = {f"motion_encoder.{name}": value for name, value in video["motion_encoder"].state_dict().items()}
    for path, part, extra in (
        ("video_detokenizer/unet", video["unet"], motion_tensors),
        ("video_detokenizer/vae", video["vae"], {}),
        ("image_detokenizer/unet", keyframe["keyframe_unet"], {}),
        ("image_detokenizer/vae", keyframe["keyframe_vae"], {}),
    ):
        part.save_config(folder / path)
        save({**part.state_dict(), **extra}, folder / path / "diffusion_pytorch_model.bin")
    video["scheduler"].save_config(folder / "video_detokenizer" / "scheduler")
    keyframe["keyframe_scheduler"].save_config(folder / "image_detokenizer" / "scheduler")

    output = convert_checkpoint("video_lavit", folder, tmp_path / "converted", original_config=original)
    assert "VideoLavitPipeline" in (output / "README.md").read_text()
    converted = VideoLavitPipeline.from_pretrained(output)
    converted.set_progress_bar_config(disable=True)
    by_hand = VideoLavitPipeline(
        language_model=language_model.eval(),
        processor=converted.processor,
        visual_tokenizer=visual,
        motion_tokenizer=motion,
        **keyframe,
        **video,
    )
    by_hand.set_progress_bar_config(disable=True)
    frames = call(converted, num_inference_steps=1, keyframe_num_inference_steps=1).frames
    assert frames.shape == (1, 24, 3, 16, 24)
    assert torch.equal(frames, call(by_hand, num_inference_steps=1, keyframe_num_inference_steps=1).frames)
    del converted, by_hand, language_model

    # The same folder reads and makes videos from the command line.
    for arguments in (
        ["tokenize", str(video_file), "-o", "codes.safetensors"],
        ["detokenize", "codes.safetensors", "-o", "again.mkv", *sizes],
        ["reconstruct", str(video_file), "-o", "reconstruction.mkv", "--only", *sizes],
    ):
        assert cli.run([*arguments, "--model", str(output)]) == 0
    assert read_video("again.mkv").frames.shape == read_video("reconstruction.mkv").frames.shape == (24, 16, 24, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, "1 missing: model.language_model.norm.weight"),
        ({"model.extra.weight": torch.ones(1)}, "1 unexpected"),
        ({"lm_head.weight": torch.ones(3, 32)}, "of another shape"),
        ({"model.norm.weight": torch.full((32,), torch.nan)}, "NaN"),
        ({"other": torch.ones(1)}, "does not know: other"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(tmp_path, llama_tokenizer, changes, message):
    original = {"llama": ORIGINAL["llama"]}
    _original_folder(tmp_path / "weights", config_from_original(original), changes)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        convert_checkpoint("video_lavit", tmp_path / "weights", tmp_path / "converted", original_config=original)
    assert not (tmp_path / "converted").exists()


def test_a_missing_or_foreign_tokenizer_is_refused(tmp_path):
    original = {"llama": ORIGINAL["llama"]}
    _original_folder(tmp_path / "weights", config_from_original(original))
    arguments = ("video_lavit", tmp_path / "weights", tmp_path / "converted")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.model"):
        convert_checkpoint(*arguments, original_config=original)
    small = tmp_path / "tokenizer.model"
    small.write_bytes(tiny.sentencepiece_model())
    with pytest.raises(CheckpointError, match="400 pieces instead of 32000"):
        convert_checkpoint(*arguments, original_config=original, tokenizer=small)
    small.write_bytes(b"no model")
    with pytest.raises(CheckpointError, match="not a readable sentencepiece"):
        llama_tokenizer_from_sentencepiece(small)
    with pytest.raises(CheckpointError, match="no such file"):
        llama_tokenizer_from_sentencepiece(tmp_path / "none.model")


@pytest.mark.parametrize("name", [release.name for release in RELEASES_LLM])
def test_card_snippets_run(name, tmp_path, video_file):
    release = next(release for release in RELEASES_LLM if release.name == name)
    if name == "video_lavit":
        tiny.generation_pipeline().save_pretrained(tmp_path / "model")
    else:
        tiny.language_model(with_tokenizers=name.endswith("sft")).save_pretrained(tmp_path / "model")
        tiny.processor().save_pretrained(tmp_path / "model")
    (tmp_path / "clip.mp4").write_bytes(video_file.read_bytes())
    sizes = {"height": 16, "width": 24, "keyframe_height": 16, "keyframe_width": 16, "steps": 1, "keyframe_steps": 1}
    text = render_card(release, model_id="model", max_new_tokens=22, **sizes)
    run_card(text.replace("```python\n", f"```python\n{PRELUDE}", 1), tmp_path)


def test_releases_describe_models_that_can_be_built():
    for release in RELEASES_LLM:
        config = make_config(release.config)
        assert config.num_token_ids == config.text_config.vocab_size
    mapping = language_model_mapping()
    names = [
        "model.embed_tokens.weight",
        "model.layers.3.mlp.up_proj.weight",
        "model.visual_tokenizer.encoder.pos_embed",
    ]
    state = {name: torch.zeros(1) for name in [*names, "model.motion_tokenizer.encoder.temp_pos", "lm_head.weight"]}
    assert set(mapping.from_hf(mapping.to_hf(state))) == set(state)
    assert manifest_parts_llm("video_3d_unet", {"tensors": {}}) is None
