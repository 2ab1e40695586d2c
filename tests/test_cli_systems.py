"""The `cinetok` command with Divot, Video-LaVIT and Seer: tiny random pipelines, run in this process."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from model_cases import divot, divot_llm, seer, video_lavit, video_lavit_llm
from model_cases import reconstruction as cases
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import fails, names, ok, run  # noqa: F401 (fixtures)

from cinetok import DivotReconstructionPipeline, read_video, write_video

FPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("systems")
    write_video(folder / "a.mp4", cases.video(0, 12, 32, 48), FPS)
    write_video(folder / "b.mp4", cases.video(1, 12, 32, 48), FPS)
    Image.fromarray(cases.video(2, 1)[0]).save(folder / "image.png")
    Image.fromarray(cases.video(3, 1)[0]).save(folder / "other.png")
    return folder


def saved(folder, name, build):
    """Folder of a pipeline or model, made on first use."""
    if not (folder / name).exists():
        built = build()
        for part in built if isinstance(built, tuple) else (built,):
            part.save_pretrained(folder / name)
    return folder / name


@pytest.fixture(scope="module")
def detokenizer(folder):
    return saved(folder, "divot_detokenizer", divot.pipeline)


@pytest.fixture(scope="module")
def lavit(folder):
    return saved(folder, "lavit_detokenizer", video_lavit.reconstruction_pipeline)


@pytest.fixture(scope="module")
def divot_parts(folder):
    llm = saved(folder, "divot_llm", lambda: (divot_llm.talkative(divot_llm.llm()), divot_llm.processor()))
    return llm, saved(folder, "divot_tokenizer", divot.tokenizer)


# -------------------------------------------------------------------------------------------------------------- Divot


def test_divot_reconstruct(ok, fails, folder, detokenizer, tmp_path):  # noqa: F811
    options = ["--model", detokenizer, "--steps", 2, "--guidance-scale", 2]
    data = ok("reconstruct", folder / "a.mp4", "-o", tmp_path / "only", "--only", *options)
    only = read_video(tmp_path / "only")
    assert only.fps == 8 and len(only) == data["num_frames"] and data["fps"] == 8
    ok("reconstruct", folder / "a.mp4", "-o", tmp_path / "both", *options)
    both = read_video(tmp_path / "both").frames
    width = only.frames.shape[2]
    assert both.shape == (len(only), only.height, 2 * width, 3)
    np.testing.assert_array_equal(both[:, :, width:], only.frames)  # the same seed
    ok("reconstruct", folder / "b.mp4", "-o", tmp_path / "other", "--only", *options)
    assert np.abs(read_video(tmp_path / "other").frames.astype(int) - only.frames.astype(int)).max() > 2
    assert "VidTok" in fails("reconstruct", folder / "a.mp4", "-o", tmp_path / "x.mp4", "--size", 32, *options)
    assert "choose frames themselves" in fails(
        "reconstruct", folder / "a.mp4", "-o", tmp_path / "x.mp4", "--fps", 4, *options
    )
    for command in (
        ["reconstruct", folder / "a.mp4", "-o", tmp_path / "x.mp4", *options],
        ["tokenize", folder / "a.mp4", "-o", tmp_path / "x.safetensors", *options[:2]],
    ):
        assert "--chunk-frames is for VidTok" in fails(*command, "--chunk-frames", 4)
    assert "-o" in fails("reconstruct", folder / "a.mp4", *options)
    # Bytes as the pipeline's own images, which are truncated like the original's.
    ok("reconstruct", folder / "a.mp4", "-o", tmp_path.parent / "only3", "--only", "--seed", 3, *options)
    pipeline = DivotReconstructionPipeline.from_pretrained(detokenizer)
    sampling = {"num_inference_steps": 2, "guidance_scale": 2.0, "generator": torch.Generator().manual_seed(3)}
    images = pipeline(folder / "a.mp4", **sampling).frames[0]
    np.testing.assert_array_equal(
        read_video(tmp_path.parent / "only3").frames, np.stack([np.asarray(i) for i in images])
    )
    assert names(tmp_path) == ["both", "only", "other"]


def test_divot_tokens(ok, fails, folder, detokenizer, lavit, tmp_path):  # noqa: F811
    tokens = tmp_path / "t.safetensors"
    facts = ok("tokenize", folder / "a.mp4", "-o", tokens, "--model", detokenizer)
    assert list(load_file(tokens)["features"].shape) == facts["tensors"]["features"] and facts["num_clips"] >= 1
    options = ["--model", detokenizer, "--steps", 2, "--guidance-scale", 2]
    data = ok("detokenize", tokens, "-o", tmp_path / "again", *options)
    ok("reconstruct", folder / "a.mp4", "-o", tmp_path / "direct", "--only", *options)
    again, direct = (read_video(tmp_path / name).frames.astype(int) for name in ("again", "direct"))
    assert data["num_frames"] == len(again) and np.abs(again - direct).max() <= 1
    assert "tokens of divot" in fails("detokenize", tokens, "-o", tmp_path / "no.mp4", "--model", lavit)
    assert not (tmp_path / "no.mp4").exists()


def test_divot_generate(ok, fails, folder, detokenizer, divot_parts, tmp_path):  # noqa: F811
    llm, _ = divot_parts
    whole = saved(folder, "divot_t2v", divot_llm.text_to_video)
    options = ["--steps", 2, "--max-new-tokens", 3]
    data = ok("generate", "a dog runs", "-o", tmp_path / "dog", "--story", "--model", whole, "--max-clips", 2, *options)
    story = json.loads((tmp_path / "dog" / "story.json").read_text())
    assert story["captions"] == data["captions"] and 1 <= len(story["clips"]) <= 2
    assert len(read_video(tmp_path / "dog" / story["clips"][0])) == 16
    data = ok("generate", "a dog runs", "-o", tmp_path / "dog.mp4", "--model", whole, *options)
    assert data["num_frames"] == 16 == len(read_video(tmp_path / "dog.mp4"))
    ok("generate", "a dog runs", "-o", tmp_path / "dog.png", "--model", whole, *options)
    assert Image.open(tmp_path / "dog.png").size == (read_video(tmp_path / "dog.mp4").width,) * 2
    parts = ["--model", llm, "--detokenizer", detokenizer]
    assert ok("generate", "the sea", "-o", tmp_path / "sea.mp4", *parts, *options)["num_frames"] == 16
    bad = ["generate", "the sea", "-o", tmp_path / "x.mp4"]
    assert "--detokenizer" in fails(*bad, "--model", llm)
    assert "whole pipeline" in fails(*bad, "--model", whole, "--detokenizer", detokenizer)
    assert "not a Divot de-tokenizer" in fails(*bad, "--model", llm, "--detokenizer", whole)
    assert "--num-clips is not for Divot" in fails(*bad, "--model", whole, "--num-clips", 2)
    assert "prompt" in fails("generate", "-o", tmp_path / "x.mp4", "--model", whole)
    assert "suffix" in fails("generate", "the sea", "-o", tmp_path / "x", "--model", whole)
    assert not (tmp_path / "x.mp4").exists()


def test_divot_chat(run, ok, fails, folder, divot_parts, tmp_path, monkeypatch):  # noqa: F811
    llm, tokenizer = divot_parts
    model = ["--model", llm, "--tokenizer", tokenizer, "--max-new-tokens", 8, "--greedy"]
    answers = [ok("chat", "What is it?", "--video", folder / f"{n}.mp4", *model)["answer"] for n in "aab"]
    assert answers[0] == answers[1] and answers[0]
    whole = saved(folder, "divot_chat", divot_llm.comprehension)
    options = ["--max-new-tokens", 8, "--greedy", "--model", whole]
    assert ok("chat", "What is it?", "--video", folder / "a.mp4", *options)["answer"] == answers[0]
    assert ok("chat", "What is it?", "--image", folder / "image.png", *options)["answer"]
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\n\nAnd then?\n"))
    code, out, err = run("chat", "--video", folder / "a.mp4", *options)
    assert code == 0 and len(out.splitlines()) == 2 and out.splitlines()[0] == answers[0], err
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\n\nAnd then?\n"))
    turns = ok("chat", "--video", folder / "a.mp4", *options)["turns"]
    assert [turn["question"] for turn in turns] == ["What is it?", "And then?"]
    assert "--tokenizer" in fails("chat", "What?", "--video", folder / "a.mp4", "--model", llm)
    assert "--video or an --image" in fails("chat", "What?", *model)
    assert "not a Divot tokenizer" in fails(
        "chat", "What?", "--video", folder / "a.mp4", "--model", llm, "--tokenizer", llm
    )
    assert "not a readable image" in fails("chat", "What?", "--image", folder / "a.mp4", *options)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "no question" in fails("chat", "--video", folder / "a.mp4", *options)


def test_divot_chat_streams_on_a_terminal(folder, divot_parts, monkeypatch):
    from cinetok.cli import main as cli

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    whole = saved(folder, "divot_chat", divot_llm.comprehension)
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    arguments = [
        "chat",
        "What is it?",
        "--video",
        folder / "a.mp4",
        "--model",
        whole,
        "--max-new-tokens",
        8,
        "--greedy",
    ]
    assert cli.run([str(argument) for argument in arguments]) == 0
    monkeypatch.setattr("sys.stdout", silent := io.StringIO())
    assert cli.run([str(argument) for argument in arguments]) == 0
    assert terminal.getvalue().strip() == silent.getvalue().strip() != ""


# --------------------------------------------------------------------------------------------------------- Video-LaVIT

SIZE = ["--height", video_lavit.HEIGHT, "--width", video_lavit.WIDTH, "--steps", 2]


def test_lavit_reconstruct(ok, fails, folder, lavit, tmp_path):  # noqa: F811
    options = ["--model", lavit, *SIZE]
    data = ok("reconstruct", folder / "a.mp4", "-o", tmp_path / "both", *options)
    both = read_video(tmp_path / "both")
    assert both.frames.shape == (data["num_frames"], video_lavit.HEIGHT, 2 * video_lavit.WIDTH, 3) and both.fps == 6
    ok("reconstruct", folder / "b.mp4", "-o", tmp_path / "other", *options)
    other = read_video(tmp_path / "other").frames
    assert np.abs(other[:, :, video_lavit.WIDTH :].astype(int) - both.frames[:, :, video_lavit.WIDTH :]).max() > 2
    assert "--branch" in fails(
        "reconstruct", folder / "a.mp4", "-o", tmp_path / "x.mp4", "--branch", "structure", *options
    )


def test_lavit_motion_is_raw_or_from_codes(ok, fails, folder, lavit, tmp_path):  # noqa: F811
    def frames(name, *flags, model=lavit):
        target = tmp_path / f"{name}.mkv"
        data = ok("reconstruct", folder / "a.mp4", "-o", target, "--only", "--model", model, *SIZE, *flags)
        return data["fps"], read_video(target).frames.astype(int)

    bare = saved(folder, "lavit_raw", lambda: without_motion_tokenizer(video_lavit.reconstruction_pipeline()))
    by_default, raw = frames("default"), frames("raw", "--raw-motion", "--motion-fps", 6)
    assert by_default[0] == raw[0] == 6 and np.abs(by_default[1] - raw[1]).max() > 2
    np.testing.assert_array_equal(frames("codes", "--quantize-motion")[1], by_default[1])
    assert frames("fast", "--raw-motion")[0] == frames("bare", model=bare)[0] == 12
    np.testing.assert_array_equal(frames("bare_6", "--motion-fps", 6, model=bare)[1], raw[1])
    bad = ["reconstruct", folder / "a.mp4", "-o", tmp_path / "x.mp4"]
    assert "motion tokenizer" in fails(*bad, "--model", bare, "--quantize-motion")
    assert "for Divot and Video-LaVIT" in fails(*bad, "--raw-motion")


def without_motion_tokenizer(pipeline):
    pipeline.register_modules(motion_tokenizer=None)
    return pipeline


def test_lavit_generation_folders_also_read_and_make_videos(ok, folder, tmp_path):  # noqa: F811
    model = saved(folder, "lavit", video_lavit_llm.generation_pipeline)
    options = ["--model", model, "--height", 16, "--width", 24, "--steps", 2]
    facts = ok("tokenize", folder / "a.mp4", "-o", tmp_path / "t.safetensors", "--model", model)
    assert facts["num_frames"] == len(facts["clip_starts"]) * video_lavit_llm.NUM_FRAMES
    ok("detokenize", tmp_path / "t.safetensors", "-o", tmp_path / "again.mp4", *options)
    assert len(read_video(tmp_path / "again.mp4")) == facts["num_frames"]
    ok("reconstruct", folder / "a.mp4", "-o", tmp_path / "r.mp4", "--only", *options)
    assert read_video(tmp_path / "r.mp4").frames.shape == (video_lavit_llm.NUM_FRAMES, 16, 24, 3)


def test_lavit_tokens(ok, folder, lavit, tmp_path):  # noqa: F811
    tokens = tmp_path / "t.safetensors"
    facts = ok("tokenize", folder / "a.mp4", "-o", tokens, "--model", lavit)
    tensors = load_file(tokens)
    assert len(tensors["visual_indices"]) == sum(facts["visual_lengths"])
    assert len(tensors["motion_indices"]) == len(facts["clip_starts"])
    data = ok("detokenize", tokens, "-o", tmp_path / "again.mp4", "--model", lavit, *SIZE)
    assert data["num_frames"] == len(read_video(tmp_path / "again.mp4")) and data["fps"] == 6


def test_lavit_generate(ok, fails, folder, tmp_path):  # noqa: F811
    model = saved(folder, "lavit", video_lavit_llm.generation_pipeline)
    options = ["--model", model, "--height", 16, "--width", 24, "--steps", 2, "--max-new-tokens", 24]
    keyframe = ["--keyframe-height", 16, "--keyframe-width", 16]
    outputs = {}
    for name, image in (("a", "image.png"), ("b", "other.png")):
        target = tmp_path / name
        arguments = ["a red ball rolls", "--image", folder / image, "-o", f"{target}.mp4", *options, *keyframe]
        data = ok("generate", *arguments)
        outputs[name] = read_video(f"{target}.mp4").frames.astype(int)
        assert data["num_frames"] == len(outputs[name]) and outputs[name].shape[1:] == (16, 24, 3)
    assert np.abs(outputs["a"] - outputs["b"]).max() > 2
    bad = ["generate", "-o", tmp_path / "x.mp4", *options]
    assert "prompt" in fails(*bad)
    assert "--story" in fails(*bad, "a ball", "--story")
    assert "not a readable image" in fails(*bad, "a ball", "--image", folder / "a.mp4")
    assert "no such file" in fails(*bad, "a ball", "--image", tmp_path / "none.png")
    assert not (tmp_path / "x.mp4").exists()


def test_lavit_generate_image(ok, folder, tmp_path):  # noqa: F811
    model = saved(folder, "lavit_image", lambda: video_lavit_llm.generation_pipeline(ancestral=True))
    options = ["--model", model, "--height", 16, "--width", 24, "--steps", 2, "--max-new-tokens", 24]
    ok("generate", "a red ball", "-o", tmp_path / "ball.png", *options)
    assert Image.open(tmp_path / "ball.png").size == (24, 16)


def test_lavit_chat(ok, fails, folder):  # noqa: F811
    parts = lambda: (video_lavit_llm.language_model(), video_lavit_llm.processor())  # noqa: E731
    model = saved(folder, "lavit_llm", parts)
    whole = saved(folder, "lavit_chat", video_lavit_llm.understanding_pipeline)
    options = ["--max-new-tokens", 10]
    answers = [
        ok("chat", "what is in the picture?", "--image", folder / "image.png", "--model", path, *options)["answer"]
        for path in (model, whole)
    ]
    assert answers[0] == answers[1] and answers[0]
    assert "--tokenizer" in fails(
        "chat", "what?", "--image", folder / "image.png", "--model", model, "--tokenizer", "x"
    )


# ---------------------------------------------------------------------------------------------------------------- Seer


def test_seer_predict(ok, fails, folder, tmp_path):  # noqa: F811
    model = ["--model", saved(folder, "seer", seer.pipeline), "--steps", 2]
    data = ok("predict", "close book", "--image", folder / "image.png", "-o", tmp_path / "out.gif", *model)
    video = read_video(tmp_path / "out.gif")
    assert data["num_frames"] == len(video) == seer.FRAMES and data["fps"] == 4
    outputs = {}
    for name, prompt in (("a", "close book"), ("b", "open")):
        ok("predict", prompt, "--image", folder / "image.png", "-o", f"{tmp_path / name}.mkv", *model)
        outputs[name] = read_video(f"{tmp_path / name}.mkv").frames.astype(int)
    assert np.abs(outputs["a"][1:] - outputs["b"][1:]).max() > 2
    two = ["--video", folder / "a.mp4", "--num-reference", 2, "--num-frames", 6]
    assert ok("predict", "go", *two, "-o", tmp_path / "v.mp4", *model)["num_frames"] == 6
    several = ["--image", folder / "image.png", folder / "other.png"]
    assert ok("predict", "go", *several, "-o", tmp_path / "i.mp4", *model)["num_frames"] == seer.FRAMES
    bad = ["predict", "go", "-o", tmp_path / "x.mp4", *model]
    assert "--image or --video" in fails(*bad)
    assert "reference frames" in fails(*bad, "--video", folder / "a.mp4", "--num-reference", 4)
    assert "multiples" in fails(*bad, "--image", folder / "image.png", "--height", 30)
    assert "not a readable image" in fails(*bad, "--image", folder / "a.mp4")
    assert not (tmp_path / "x.mp4").exists()


def test_seer_prompt_before_or_behind_the_images(ok, fails, folder, tmp_path):  # noqa: F811
    model = ["--model", saved(folder, "seer", seer.pipeline), "--steps", 2]
    images, output = [folder / "image.png", folder / "other.png"], ["-o", tmp_path / "out.mkv"]

    def frames(*arguments):
        ok("predict", *arguments)
        return read_video(tmp_path / "out.mkv").frames

    for given in (images[:1], images):
        expected = frames("close book", *model, "--image", *given, *output)
        np.testing.assert_array_equal(frames(*model, "--image", *given, "close book", *output), expected)
        np.testing.assert_array_equal(frames(*model, "--image", *given, *output, "close book"), expected)
        assert "no prompt" in fails("predict", *model, "--image", *given, *output)
    assert "no prompt" in fails("predict", *model, "--video", folder / "a.mp4", *output)
    assert "no such file" in fails("predict", *model, "--image", tmp_path / "none.png", "close book", *output)
    assert "no prompt" in fails("predict", *model, "--image", images[0], tmp_path / "none.png", *output)


@pytest.mark.parametrize("part", ["unet", "text_decomposer", "vae", "text_encoder"])
def test_pipelines_with_weights_that_are_not_finite(fails, folder, tmp_path, part):  # noqa: F811
    shutil.copytree(saved(folder, "seer", seer.pipeline), tmp_path / "seer")
    path = next((tmp_path / "seer" / part).glob("*.safetensors"))
    tensors = load_file(path)
    name = sorted(name for name in tensors if name.endswith("weight"))[-1]
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    arguments = ["predict", "go", "--image", folder / "image.png", "-o", tmp_path / "x.mp4"]
    line = fails(*arguments, "--model", tmp_path / "seer")
    assert "1 tensors hold NaN or infinite values" in line and f": {part}.{name}" in line
    assert not (tmp_path / "x.mp4").exists()


def test_info_of_pipelines(ok, folder, detokenizer, lavit):  # noqa: F811
    for path in (detokenizer, lavit):
        data = ok("info", path)
        parts = json.loads(Path(path, "model_index.json").read_text())
        assert set(data["components"]) == {n for n, v in parts.items() if isinstance(v, list) and v[1]}
        assert data["parameters"] == sum(part["parameters"] for part in data["components"].values()) > 0
        assert data["commands"] == ["reconstruct", "tokenize", "detokenize"]
