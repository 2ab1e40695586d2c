"""The `cinetok` command, run in this process with tiny random models."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from model_cases import reconstruction as cases
from PIL import Image
from safetensors.torch import load_file, save_file

import cinetok
from cinetok import assets, read_video, write_video
from cinetok.cli import main as cli
from cinetok.cli.models import KINDS

FRAMES, HEIGHT, WIDTH, FPS = 9, 32, 48, 8
VIDTOK = {"v1.1": cases.TINY, "fsq": cases.FSQ, "noncausal": cases.NONCAUSAL}


@pytest.fixture
def run(capsys):
    """Runs a command line: (exit code, stdout, stderr)."""

    def call(*argv):
        capsys.readouterr()  # what preparing the test printed
        code = cli.run([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def ok(run):
    """Runs a command line with --json that has to succeed: the parsed document."""

    def call(*argv):
        code, out, err = run(*argv, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


@pytest.fixture
def fails(run):
    """Runs a command line that has to end in one line of error and exit code 2; returns the line."""

    def call(*argv):
        code, out, err = run(*argv)
        assert code == 2 and out == "", (code, out, err)
        lines = [line for line in err.splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("error: "), err
        assert "Traceback" not in err
        return lines[0]

    return call


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for index, name in enumerate("ab"):
        write_video(folder / f"{name}.mp4", cases.video(index, FRAMES, HEIGHT, WIDTH), FPS)
    return folder


@pytest.fixture(scope="module")
def clip(clips):
    return clips / "a.mp4"


def save_vidtok(folder, arguments, seed=0):
    cases.vidtok(arguments, seed).save_pretrained(folder)
    cinetok.VidTokVideoProcessor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder of every kind of tokenizer model."""
    folder = tmp_path_factory.mktemp("models")
    for name, arguments in VIDTOK.items():
        save_vidtok(folder / name, arguments)
    twin = cases.vidtwin_pipeline()
    twin.tokenizer.save_pretrained(folder / "vidtwin")
    twin.video_processor.save_pretrained(folder / "vidtwin")
    cases.pipeline().save_pretrained(folder / "pipeline")
    return folder


@pytest.fixture
def bundled(models, monkeypatch):
    monkeypatch.setattr(assets, "BUNDLED_MODEL", models / "v1.1")


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# -------------------------------------------------------------------------------------------------- the command itself

FLAGS = {
    "reconstruct": "--branch --chunk-frames --crop --device --dtype --end --fps --guidance-scale --height "
    "--model --motion-fps --offload --only --output --picture --plot --quantize-motion --raw-motion --sample "
    "--seed --size --start --steps --tile-size --width",
    "tokenize": "--chunk-frames --crop --device --dtype --end --fps --model --output --sample --seed "
    "--size --start --tile-size",
    "detokenize": "--branch --device --dtype --fps --guidance-scale --height --model --output --seed "
    "--steps --tile-size --width",
    "reenact": "--device --dtype --end --fps --model --only --output --sample --seed --shortest --start --views",
    "generate": "--detokenizer --device --dtype --guidance-scale --height --image --keyframe-height "
    "--keyframe-width --max-clips --max-new-tokens --model --negative-prompt --num-clips "
    "--offload --output --seed --steps --story --width",
    "chat": "--device --dtype --greedy --image --max-new-tokens --model --offload --seed "
    "--temperature --tokenizer --video",
    "predict": "--device --dtype --fps --guidance-scale --height --image --model --num-frames "
    "--num-reference --offload --output --seed --steps --video --width",
    "motion": "--end --fps --max-displacement --only --output --start",
    "convert": "--base-model --checkpoint --keep-training-state --list --lora-alpha --original-config "
    "--output --push-to-hub --release --store-dtype --tokenizer --version",
    "evaluate": "--chunk-frames --csv --device --dtype --fps --mode --model --output --sample --seed --size",
    "compare": "--end --fps --output --picture --plot --start",
    "train": "--batch-size --bf16 --config --cpu --items --learning-rate --model --num-frames --output "
    "--resume --save-steps --seed --size",
    "push": "--message --private",
    "info": "",
}


def subparsers():
    return cli.build_parser()._subparsers._group_actions[0].choices


def test_commands_and_flags_are_frozen():
    found = {}
    for name, parser in subparsers().items():
        flags = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
        assert flags >= {"--help", "--json", "--quiet", "--debug"}
        found[name] = " ".join(sorted(flags - {"--help", "--json", "--quiet", "--debug"}))
    assert found == FLAGS


@pytest.mark.parametrize("command", FLAGS)
def test_help_has_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0 and f"cinetok {command}" in out.split("example:")[1]


@pytest.mark.parametrize("command", FLAGS)
def test_examples_parse(command):
    import shlex

    parser = cli.build_parser()
    examples = [line for line in subparsers()[command].epilog.splitlines() if line.strip().startswith("cinetok")]
    assert examples
    for line in examples:
        assert parser.parse_args(shlex.split(line)[1:]).command in FLAGS


def test_every_command_of_the_model_table_exists():
    assert {command for kind in KINDS.values() for command in kind.commands} < set(FLAGS)


def test_model_table_knows_every_model_and_pipeline():
    from cinetok._exports import AUTO_CLASSES, PIPELINES

    assert set(KINDS) >= {*AUTO_CLASSES, *PIPELINES}
    for name in KINDS:
        assert name in AUTO_CLASSES or hasattr(cinetok, name)


def test_console_script(clip, models, tmp_path):
    script = Path(sys.executable).with_name("cinetok")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "cinetok.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = ["info", str(models / "fsq"), "--json"]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["class"] == "vidtok"
    result = subprocess.run([*command, "info", str(clip)], capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from cinetok.cli.main import run; run(['reconstruct', '--help']);"
        "print(sorted({'torch', 'numpy', 'transformers', 'diffusers', 'av'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.splitlines()[-1] == "[]", result.stdout


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "COMMAND"),
        (["transmogrify"], "invalid choice"),
        (["reconstruct"], "video"),
        (["reconstruct", "a.mp4", "--size", "0"], "--size"),
        (["reconstruct", "a.mp4", "--fps", "nan"], "--fps"),
        (["tokenize", "a.mp4", "--what"], "-o"),
    ],
)
def test_wrong_usage(fails, argv, message):
    assert message in fails(*argv)


def test_unexpected_errors_are_one_line_too(run, monkeypatch):
    from cinetok.cli import info

    def broken(args):
        raise RuntimeError("a bug\nof two lines")

    monkeypatch.setattr(info, "run", broken)
    code, out, err = run("info", "x")
    assert code == 1 and out == "" and err == "error: RuntimeError: a bug of two lines (--debug shows where)\n"
    with pytest.raises(RuntimeError):
        cli.run(["info", "x", "--debug"])


# --------------------------------------------------------------------------------------------------------- reconstruct


@pytest.mark.parametrize("model", [*VIDTOK, "vidtwin", "pipeline"])
def test_reconstruct(ok, clip, models, tmp_path, model):
    data = ok("reconstruct", clip, "-o", tmp_path / "out.mp4", "--model", models / model)
    video = read_video(tmp_path / "out.mp4")
    assert data["num_frames"] == len(video) == FRAMES and video.fps == data["fps"] == FPS
    size = (32, 32) if model == "vidtwin" else (HEIGHT, WIDTH)
    assert video.frames.shape[1:3] == (size[0], 2 * size[1])
    assert len(data["per_frame"]["psnr"]) == FRAMES and data["psnr"] == pytest.approx(
        np.mean(data["per_frame"]["psnr"])
    )
    assert names(tmp_path) == ["out.mp4"]


def test_reconstruct_equals_the_pipeline(ok, clip, models, tmp_path):
    data = ok("reconstruct", clip, "-o", tmp_path / "frames", "--only", "--model", models / "v1.1")
    pipe = cases.pipeline()
    output = pipe(clip, keep_size=True, compute_quality=True)
    assert data["psnr"] == pytest.approx(output.quality[0]["psnr"], abs=1e-3)
    assert data["ssim"] == pytest.approx(output.quality[0]["ssim"], abs=1e-4)
    written = read_video(tmp_path / "frames").frames.astype(int)
    expected = np.stack([np.asarray(image) for image in output.frames[0]]).astype(int)
    assert np.abs(written - expected).max() <= 1  # truncation of values that differ in the last bit


def test_reconstruct_shows_input_left(ok, clip, models, tmp_path):
    ok("reconstruct", clip, "-o", tmp_path / "both", "--model", models / "fsq", "--fps", 4, "--end", 0.8)
    both = read_video(tmp_path / "both")
    expected = read_video(clip, fps=4, end=0.8)
    assert both.fps == 4 and len(both) == len(expected)
    assert np.abs(both.frames[:, :, :WIDTH].astype(int) - expected.frames.astype(int)).max() <= 1


def test_reconstruct_with_the_bundled_model_and_pictures(run, clip, bundled, tmp_path):
    options = ["--plot", tmp_path / "plot.png", "--picture", tmp_path / "strip.png", "--size", 24, "--crop"]
    code, out, err = run("reconstruct", clip, "-o", tmp_path / "out.mp4", *options)
    assert code == 0, err
    assert out.startswith("PSNR ") and "SSIM" in out and f"over {FRAMES} frames" in out
    assert out.count("wrote ") == 3 and names(tmp_path) == ["out.mp4", "plot.png", "strip.png"]
    assert Image.open(tmp_path / "strip.png").size == (4 * 24, 2 * 24)
    assert Image.open(tmp_path / "plot.png").size[0] > 300


def test_reconstruct_only_measures_without_output(run, clip, bundled):
    code, out, _ = run("reconstruct", clip)
    assert code == 0 and out.startswith("PSNR") and "wrote" not in out


def test_branches_differ(ok, clip, models, tmp_path):
    frames = []
    for branch in ("all", "structure", "dynamics"):
        ok("reconstruct", clip, "-o", tmp_path / branch, "--only", "--model", models / "vidtwin", "--branch", branch)
        frames.append(read_video(tmp_path / branch).frames.astype(int))
    assert np.abs(frames[0] - frames[1]).max() > 5 and np.abs(frames[1] - frames[2]).max() > 5


def test_samples_follow_the_seed(ok, clip, models):
    runs = [
        ok("reconstruct", clip, "--model", models / "v1.1", "--sample", "--seed", seed)["psnr"] for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_tiles(ok, clip, models):
    whole = ok("reconstruct", clip, "--model", models / "v1.1")
    tiled = ok("reconstruct", clip, "--model", models / "v1.1", "--tile-size", 32)
    assert tiled["num_frames"] == FRAMES and tiled["psnr"] != whole["psnr"]


# ------------------------------------------------------------------------------------------------ tokenize, detokenize


@pytest.mark.parametrize("model", [*VIDTOK, "vidtwin"])
def test_tokens_there_and_back(ok, clip, models, tmp_path, model):
    tokens, model = tmp_path / "tokens.safetensors", models / model
    facts = ok("tokenize", clip, "-o", tokens, "--model", model)
    assert facts["num_frames"] == FRAMES and facts["fps"] == FPS and facts["bytes"] == tokens.stat().st_size
    tensors = load_file(tokens)
    assert {name: list(value.shape) for name, value in tensors.items()} == facts["tensors"]
    described = ok("info", tokens)
    assert described["fingerprint"] == facts["fingerprint"] and described["num_frames"] == FRAMES
    result = ok("detokenize", tokens, "-o", tmp_path / "again", "--model", model)
    assert (result["num_frames"], result["fps"]) == (FRAMES, FPS)
    ok("reconstruct", clip, "-o", tmp_path / "direct", "--only", "--model", model)
    again, direct = (read_video(tmp_path / name).frames.astype(int) for name in ("again", "direct"))
    assert again.shape == direct.shape and np.abs(again - direct).max() <= 1


def test_tokens_of_the_bundled_model(ok, clip, bundled, tmp_path):
    facts = ok("tokenize", clip, "-o", tmp_path / "t.safetensors", "--size", 24)
    assert (facts["height"], facts["width"]) == (24, 36)
    ok("detokenize", tmp_path / "t.safetensors", "-o", tmp_path / "out.mp4", "--fps", 4)
    video = read_video(tmp_path / "out.mp4")
    assert video.frames.shape == (FRAMES, 24, 36, 3) and video.fps == 4


def test_indices_are_small_integers(ok, clip, models, tmp_path):
    ok("tokenize", clip, "-o", tmp_path / "t.safetensors", "--model", models / "fsq")
    indices = load_file(tmp_path / "t.safetensors")["indices"]
    assert indices.dtype == torch.int32 and indices.min() >= 0 and indices.max() < 8**4


def test_wrong_tokens(fails, ok, clip, models, tmp_path):
    out = tmp_path / "out.mp4"
    ok("tokenize", clip, "-o", tmp_path / "v11.safetensors", "--model", models / "v1.1")
    ok("tokenize", clip, "-o", tmp_path / "twin.safetensors", "--model", models / "vidtwin")
    save_vidtok(tmp_path / "other", cases.TINY, seed=7)
    assert "another model" in fails(
        "detokenize", tmp_path / "v11.safetensors", "-o", out, "--model", tmp_path / "other"
    )
    assert "another model" in fails("detokenize", tmp_path / "v11.safetensors", "-o", out, "--model", models / "fsq")
    for tokens, model in (("v11", "vidtwin"), ("twin", "v1.1")):
        assert "tokens of" in fails(
            "detokenize", tmp_path / f"{tokens}.safetensors", "-o", out, "--model", models / model
        )
    save_file({"x": torch.zeros(3)}, tmp_path / "x.safetensors")
    assert "not a file of tokens" in fails("detokenize", tmp_path / "x.safetensors", "-o", out)
    data = (tmp_path / "twin.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    assert "not a readable" in fails("detokenize", tmp_path / "cut.safetensors", "-o", out)
    assert "no such file" in fails("detokenize", tmp_path / "none.safetensors", "-o", out)
    assert not out.exists()


# ------------------------------------------------------------------------------------------------------------- reenact


def test_reenact(ok, clips, models, tmp_path):
    a, b, model = clips / "a.mp4", clips / "b.mp4", models / "vidtwin"
    data = ok("reenact", a, b, "-o", tmp_path / "three", "--model", model)
    assert data["num_frames"] == FRAMES and data["fps"] == FPS
    three = read_video(tmp_path / "three").frames
    assert three.shape == (FRAMES, 32, 96, 3)
    ok("reenact", a, b, "-o", tmp_path / "views", "--model", model, "--views")
    ok("reenact", b, a, "-o", tmp_path / "swapped", "--model", model, "--only")
    ok("reenact", a, b, "-o", tmp_path / "only", "--model", model, "--only")
    views, only = (read_video(tmp_path / name).frames for name in ("views", "only"))
    assert views.shape == (FRAMES, 32, 160, 3)
    np.testing.assert_array_equal(views[:, :, :96], three)
    np.testing.assert_array_equal(only, three[:, :, 64:])
    swapped = read_video(tmp_path / "swapped").frames
    assert np.abs(swapped.astype(int) - only.astype(int)).max() > 5


def test_reenact_needs_vidtwin_and_equal_lengths(fails, ok, clips, models, tmp_path):
    a, b = clips / "a.mp4", clips / "b.mp4"
    write_video(tmp_path / "short.mp4", cases.video(2, 6, HEIGHT, WIDTH), FPS)
    out = tmp_path / "out.mp4"
    assert "cannot reenact" in fails("reenact", a, b, "-o", out, "--model", models / "v1.1")
    assert "VidTwin" in fails("reenact", a, b, "-o", out, "--model", models / "pipeline")
    line = fails("reenact", a, tmp_path / "short.mp4", "-o", out, "--model", models / "vidtwin")
    assert "--shortest" in line and not out.exists()
    data = ok("reenact", a, tmp_path / "short.mp4", "-o", out, "--model", models / "vidtwin", "--shortest")
    assert data["num_frames"] == 6 == len(read_video(out))


# ---------------------------------------------------------------------------------------------------- compare, evaluate


def test_compare(ok, fails, clips, tmp_path):
    a, b = clips / "a.mp4", clips / "b.mp4"
    same = ok("compare", a, a)
    assert same["psnr"] == pytest.approx(80) and same["ssim"] == pytest.approx(1)
    data = ok(
        "compare", a, b, "-o", tmp_path / "both.mp4", "--plot", tmp_path / "q.svg", "--picture", tmp_path / "p.png"
    )
    frames = [torch.from_numpy(read_video(x).frames).permute(3, 0, 1, 2)[None] / 255 for x in (b, a)]
    assert data["psnr"] == pytest.approx(cinetok_psnr(*frames), abs=1e-3)
    assert names(tmp_path) == ["both.mp4", "p.png", "q.svg"]
    assert read_video(tmp_path / "both.mp4").frames.shape == (FRAMES, HEIGHT, 2 * WIDTH, 3)
    write_video(tmp_path / "small.mp4", cases.video(0, FRAMES, 16, 16), FPS)
    assert "16x16" in fails("compare", a, tmp_path / "small.mp4")
    write_video(tmp_path / "short.mp4", cases.video(0, 4, HEIGHT, WIDTH), FPS)
    assert "differ in length" in fails("compare", a, tmp_path / "short.mp4", "-o", tmp_path / "no.mp4")
    assert not (tmp_path / "no.mp4").exists()


def cinetok_psnr(video, reference):
    from cinetok.metrics import psnr

    return psnr(video, reference).item()


@pytest.mark.parametrize("model, length", [("fsq", 5), ("noncausal", 4), ("vidtwin", 4)])
def test_evaluate_clips(ok, clips, models, tmp_path, model, length):
    options = ["--size", 32, "--chunk-frames", 4, "--csv", tmp_path / "r.csv", "-o", tmp_path / "r.json"]
    data = ok("evaluate", clips, "--model", models / model, *options)
    assert data["settings"]["mode"] == "clips" and [len(r["per_frame"]["psnr"]) for r in data["results"]]
    expected = -(-FRAMES // length) * length
    assert [result["num_frames"] for result in data["results"]] == [expected] * 2
    pipe = {"fsq": cases.FSQ, "noncausal": cases.NONCAUSAL}
    pipe = cases.pipeline(pipe[model]) if model in pipe else cases.vidtwin_pipeline()
    frames = read_video(clips / "b.mp4").frames
    frames = np.concatenate([frames, np.repeat(frames[-1:], expected - FRAMES, axis=0)])
    quality = [
        pipe(frames[i : i + length], chunk_frames=length, compute_quality=True).quality[0]["psnr"]
        for i in range(0, expected, length)
    ]
    assert data["results"][1]["psnr"] == pytest.approx(np.mean(quality), abs=1e-3)
    assert json.loads((tmp_path / "r.json").read_text())["mean"] == data["mean"]
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert len(rows) == 3 and float(rows[-1]["psnr"]) == pytest.approx(data["mean"]["psnr"], abs=1e-5)


def test_evaluate_whole_with_the_bundled_model(run, ok, clip, bundled):
    data = ok("evaluate", clip, "--size", 32)
    assert data["settings"]["mode"] == "whole" and data["mean"]["num_frames"] == FRAMES
    expected = cases.pipeline()(clip, compute_quality=True).quality[0]
    assert data["mean"]["psnr"] == pytest.approx(expected["psnr"], abs=1e-3)
    assert ok("evaluate", clip, "--size", 32, "--fps", 4)["mean"]["num_frames"] == -(-FRAMES // 2)
    code, out, _ = run("evaluate", clip, "--size", 32)
    assert code == 0 and "mean over frames" in out


def test_evaluate_refuses(fails, models, clip, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no videos" in fails("evaluate", tmp_path / "empty", "--model", models / "fsq")
    assert "no such file" in fails("evaluate", tmp_path / "none", "--model", models / "fsq")
    assert "--mode whole" in fails("evaluate", clip, "--model", models / "noncausal", "--mode", "whole")
    assert ".csv" in fails("evaluate", clip, "--model", models / "fsq", "--csv", tmp_path / "r.txt")


# -------------------------------------------------------------------------------------------------------------- motion


def test_motion(ok, clip, tmp_path):
    data = ok("motion", clip, "-o", tmp_path / "m.mp4", "--fps", 8)
    video = read_video(tmp_path / "m.mp4")
    assert len(video) == data["num_frames"] and video.frames.shape[1:] == (HEIGHT, 2 * WIDTH, 3)
    assert data["num_vectors"] > 0 and data["frame_types"].startswith("I")
    ok("motion", clip, "-o", tmp_path / "only", "--fps", 8, "--only")
    only = read_video(tmp_path / "only").frames
    assert only.shape[1:] == (HEIGHT, WIDTH, 3) and only[0].max() == 0 and only[1:].max() > 50
    ok("motion", clip, "-o", tmp_path / "m.png", "--fps", 8)
    assert Image.open(tmp_path / "m.png").size == (4 * WIDTH, 2 * HEIGHT)


# ------------------------------------------------------------------------------------------------------- convert, info

ORIGINAL = {
    "double_z": True,
    "z_channels": 4,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 8,
    "ch_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "time_downsample_factor": 4,
    "dropout": 0.0,
    "use_checkpoint": False,
    "norm_type": "layernorm",
    "init_pad_mode": "replicate",
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint and its configuration as the authors' code writes them."""
    from cinetok.conversion import state_dict_names

    folder = tmp_path_factory.mktemp("original")
    model = cases.vidtok()
    weights = state_dict_names("vidtok", "model", model.config).from_hf(model.state_dict())
    training = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(2, 3, 4, 4)}
    torch.save({"state_dict": {**weights, **training}, "epoch": 3}, folder / "mine.ckpt")
    coder = {"target": "vidtok.modules.model_3dcausal_v1_1.EncoderCausal3DPadding", "params": ORIGINAL}
    decoder = {
        "target": "vidtok.modules.model_3dcausal_v1_1.DecoderCausal3DPadding",
        "params": {**ORIGINAL, "interpolation_mode": "trilinear"},
    }
    regularizer = {"target": "vidtok.modules.regularizers.DiagonalGaussianRegularizer"}
    params = {"encoder_config": coder, "decoder_config": decoder, "regularizer_config": regularizer}
    config = {"model": {"target": "vidtok.models.autoencoder_v1_1.AutoencodingEngine", "params": params}}
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_convert_then_use(run, ok, original, clip, tmp_path):
    arguments = [
        "convert",
        "vidtok",
        "--checkpoint",
        original / "mine.ckpt",
        "--original-config",
        original / "mine.yaml",
    ]
    code, out, err = run(*arguments, "--output", tmp_path / "mine")
    assert code == 0, err
    assert "left out: loss.*" in out and "epoch" in out and "README.md" in out
    data = ok("info", tmp_path / "mine")
    assert data["version"] == "1.1" and data["compression_ratio"] == 192
    assert data["parameters"] == cases.vidtok().num_parameters()
    ok("reconstruct", clip, "--model", tmp_path / "mine")
    data = ok(*arguments, "--output", tmp_path / "kept", "--keep-training-state")
    assert data["report"]["training_state"] and (tmp_path / "kept" / "training_state.safetensors").is_file()
    assert ok("info", tmp_path / "kept")["parameters"] == cases.vidtok().num_parameters()


def test_convert_list(run, ok):
    from cinetok.conversion import releases

    listed = ok("convert", "--list")["releases"]
    assert [entry["release"] for entry in listed] == [release.name for release in releases()]
    assert {entry["system"] for entry in ok("convert", "seer", "--list")["releases"]} == {"seer"}
    code, out, _ = run("convert", "--list")
    assert code == 0 and len(out.splitlines()) == len(listed) + 1


def test_convert_refuses(fails, original, tmp_path):
    base = ["convert", "vidtok", "--checkpoint", original / "mine.ckpt", "--output", tmp_path / "out"]
    assert "--release" in fails(*base)
    assert "did you mean" in fails(*base, "--release", "vidtok_kl_causal_488_4ch")
    assert "missing" in fails(*base, "--release", "vidtok_kl_causal_488_4chn")
    assert "no such configuration" in fails(*base, "--original-config", tmp_path / "none.yaml")
    assert "--base-model" in fails(*base, "--original-config", original / "mine.yaml", "--base-model", "x")
    assert "SYSTEM" in fails("convert")
    assert "no such checkpoint" in fails("convert", "vidtok", "--checkpoint", "no.ckpt", "--output", tmp_path / "out",
                                         "--release", "vidtok_kl_causal_488_4chn")  # fmt: skip
    assert not (tmp_path / "out").exists() and names(tmp_path) == []


def test_info_counts_from_the_configuration(ok, models):
    fsq = ok("info", models / "fsq")
    assert fsq["compression_ratio"] == pytest.approx(4 * 8 * 8 * 3 * 8 / 12) and fsq["version"] == "1.0"
    assert fsq["parameters"] == cases.vidtok(cases.FSQ).num_parameters()
    twin = ok("info", models / "vidtwin")
    config = cases.vidtwin_pipeline().tokenizer.config
    assert twin["compression_ratio"] == pytest.approx(config.compression()["ratio"]) and "structure" in twin["latents"]
    pipeline = ok("info", models / "pipeline")
    assert pipeline["components"]["tokenizer"]["class"] == "VidTokModel" and pipeline["compression_ratio"] == 192
    assert ok("info", models / "noncausal")["version"] == "non-causal"


def test_info_of_the_bundled_model(run, bundled):
    code, out, _ = run("info")
    assert code == 0 and "192 times fewer numbers" in out and "reconstruct" in out


def test_a_missing_bundled_model_is_said(fails, monkeypatch, tmp_path, clip):
    monkeypatch.setattr(assets, "BUNDLED_MODEL", tmp_path / "nothing")
    assert "name a --model" in fails("reconstruct", clip)


def test_load_bundled(models, monkeypatch):
    half = models / "half"
    cases.vidtok().to(torch.float16).save_pretrained(half)
    cinetok.VidTokVideoProcessor().save_pretrained(half)
    monkeypatch.setattr(assets, "BUNDLED_MODEL", half)
    model, processor = assets.load_bundled()
    assert model.dtype == torch.float32 and not model.training
    assert type(processor) is cinetok.VidTokVideoProcessor


# --------------------------------------------------------------------------------------------------------------- train


def test_train_from_a_configuration_and_on(ok, fails, clips, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**cases.TINY, "model_type": "vidtok"}))
    options = ["--items", 4, "--batch-size", 2, "--num-frames", 5, "--size", 16, "--cpu", "--quiet"]
    data = ok("train", clips, "-o", tmp_path / "new", "--config", tmp_path / "config.json", *options)
    assert data["parameters"] == cases.vidtok().num_parameters() and names(tmp_path) == ["config.json", "new"]
    assert {"config.json", "model.safetensors", "training.json"} <= set(names(tmp_path / "new"))
    before = load_file(tmp_path / "new" / "model.safetensors")
    ok("train", clips, "-o", tmp_path / "more", "--model", tmp_path / "new", *options)
    after = load_file(tmp_path / "more" / "model.safetensors")
    assert before.keys() == after.keys() and any(not torch.equal(before[n], after[n]) for n in before)
    assert "exists already" in fails("train", clips, "-o", tmp_path / "new", *options)
    assert "resume" in fails("train", clips, "-o", tmp_path / "x", "--model", tmp_path / "new", "--resume")


# -------------------------------------------------------------------------------------------------------- bad input


def snapshot(folder):
    return {path: path.stat().st_size for path in Path(folder).rglob("*")}


@pytest.mark.parametrize("command", ["reconstruct", "tokenize", "motion", "reenact", "evaluate", "compare"])
@pytest.mark.parametrize("content", [b"", b"not a video" * 100])
def test_garbage_videos(fails, models, clip, tmp_path, command, content):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(content)
    before = snapshot(tmp_path)
    model = ["--model", models / ("vidtwin" if command == "reenact" else "v1.1")]
    out = ["-o", tmp_path / ("out.safetensors" if command == "tokenize" else "out.mp4")]
    if command == "evaluate":
        out = ["-o", tmp_path / "out.json"]
    inputs = [clip, bad] if command in ("reenact", "compare") else [bad]
    if command in ("motion", "compare"):
        model = []
    assert "bad.mp4" in fails(command, *inputs, *out, *model)
    assert snapshot(tmp_path) == before


def test_cut_off_video_leaves_nothing(fails, models, clip, tmp_path):
    data = clip.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    line = fails("reconstruct", tmp_path / "cut.mp4", "-o", tmp_path / "out.mp4", "--model", models / "v1.1")
    assert "cut.mp4" in line and names(tmp_path) == ["cut.mp4"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["-o", "{tmp}/none/out.mp4"], "does not exist"),
        (["-o", "{tmp}/out.xyz"], "suffix"),
        (["-o", "{tmp}"], "not an empty folder"),
        (["-o", "{clip}"], "is the input"),
        (["--plot", "{tmp}/plot.mp4"], ".png"),
        (["--picture", "{tmp}/none/p.png"], "does not exist"),
        (["--branch", "structure"], "VidTwin"),
        (["--steps", "3"], "--steps"),
        (["--crop"], "--size"),
        (["--start", "3", "--end", "2"], "--start"),
        (["--start", "100"], "a.mp4"),
        (["--tile-size", "12"], "tile_size"),
        (["--device", "quantum"], "quantum"),
    ],
)
def test_options_that_cannot_work(fails, models, clip, tmp_path, options, message):
    (tmp_path / "keep").write_text("")
    options = [option.format(tmp=tmp_path, clip=clip) for option in options]
    before = clip.read_bytes()
    assert message in fails("reconstruct", clip, "--model", models / "v1.1", *options)
    assert names(tmp_path) == ["keep"] and clip.read_bytes() == before


def test_options_that_vidtwin_has_no_use_for(fails, ok, models, clip, tmp_path):
    model, out = ["--model", models / "vidtwin"], tmp_path / "out.mp4"
    tokens = tmp_path / "t.safetensors"
    for options in (["--tile-size", 32], ["--size", 32], ["--chunk-frames", 16], ["--size", 32, "--crop"]):
        for command in (["reconstruct", clip, "-o", out], ["tokenize", clip, "-o", tokens]):
            line = fails(*command, *model, *options)
            assert f"{options[0]} is for VidTok; this VidTwin takes 4 frames of 32x32 pixels" in line
    assert "--crop is for VidTok" in fails("reconstruct", clip, "-o", out, *model, "--crop")
    for options in (["--size", 48], ["--chunk-frames", 16]):
        line = fails("evaluate", clip, *model, *options)
        assert f"{options[0]} {options[1]}: this VidTwin takes 4 frames of 32x32 pixels" in line
    assert names(tmp_path) == []
    ok("tokenize", clip, "-o", tokens, *model)
    assert "--tile-size is for VidTok" in fails("detokenize", tokens, "-o", out, *model, "--tile-size", 32)
    assert not out.exists()


def test_a_write_that_fails_leaves_nothing(fails, models, clip, tmp_path, monkeypatch):
    from cinetok.video import writing

    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing._FileBackend, "finish", full)
    line = fails("reconstruct", clip, "-o", tmp_path / "out.mp4", "--model", models / "v1.1")
    assert "No space left" in line and names(tmp_path) == []


def test_folders_that_are_no_models(fails, models, clip, tmp_path):
    def attempt(model):
        return fails("reconstruct", clip, "--model", model)

    assert "no such model folder" in attempt(tmp_path / "none")
    assert "no model here" in attempt(tmp_path)
    assert "is a file" in attempt(clip)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "bert" in attempt(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "not a valid configuration" in attempt(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "divot"}')
    assert "cannot reconstruct" in attempt(tmp_path)


def test_damaged_models(fails, models, clip, tmp_path):
    folder = save_vidtok(tmp_path / "model", cases.TINY)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    first = next(iter(tensors))
    save_file({n: t for n, t in tensors.items() if n != first}, folder / "model.safetensors", {"format": "pt"})
    line = fails("reconstruct", clip, "--model", folder)
    assert "1 missing tensors" in line and first in line
    data = (models / "v1.1" / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert str(folder) in fails("reconstruct", clip, "--model", folder)
    (folder / "model.safetensors").unlink()
    assert "cannot be loaded" in fails("reconstruct", clip, "--model", folder)
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_text(json.dumps({**config, "version": None}))
    assert "1.0" in fails("reconstruct", clip, "--model", folder)


@pytest.mark.parametrize("model", ["v1.1", "vidtwin", "pipeline"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(fails, models, clip, tmp_path, model, value):
    shutil.copytree(models / model, tmp_path / "model")
    path = next((tmp_path / "model").rglob("*.safetensors"))
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("conv_in.weight") or name.endswith("conv.weight"))
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, {"format": "pt"})
    line = fails("reconstruct", clip, "-o", tmp_path / "out.mp4", "--model", tmp_path / "model")
    assert "NaN or infinite" in line and name in line and str(tmp_path / "model") in line
    assert names(tmp_path) == ["model"]


def test_push_refuses_early(fails, models, tmp_path):
    assert "no such folder" in fails("push", tmp_path / "none", "me/x")
    assert "README.md" in fails("push", models / "fsq", "me/x")


def test_the_libraries_settings_are_restored(ok, models, clip):
    import diffusers
    import transformers

    libraries = (transformers.logging, diffusers.logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    ok("reconstruct", clip, "--model", models / "fsq")
    assert [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries] == before
    assert ok("info", models / "pipeline")["system"] == "vidtok"


def test_push_then_use_from_the_hub(clip, tmp_path):
    from loopback_hub import serve

    folder = save_vidtok(tmp_path / "model", cases.TINY)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    server = serve()
    environment = {**os.environ, "HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_x"}
    environment.update(HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0", NO_PROXY="127.0.0.1", OMP_NUM_THREADS="1")

    def call(*argv):
        command = [sys.executable, "-m", "cinetok.cli", *map(str, argv)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)

    try:
        result = call("push", folder, "tester/model", "--json")
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["url"] == f"{server.address}/tester/model"
        result = call("reconstruct", clip, "--model", "tester/model")
        assert result.returncode == 0 and result.stdout.startswith("PSNR") and result.stderr == "", result.stderr
        result = call("reconstruct", clip, "--model", "tester/none")
        assert result.returncode == 2 and "tester/none" in result.stderr and len(result.stderr.splitlines()) == 1
    finally:
        server.shutdown()
