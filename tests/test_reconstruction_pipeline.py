"""VideoReconstructionPipeline over tiny VidTok and VidTwin models."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from model_cases import reconstruction as cases
from PIL import Image

from cinetok import VideoReconstructionPipeline, read_video, write_video

FRAMES = 7
BRANCHES = ("all", "structure", "dynamics")


@pytest.fixture(scope="module")
def pipelines():
    return {
        "v1.1": cases.pipeline(),
        "fsq": cases.pipeline(cases.FSQ),
        "noncausal": cases.pipeline(cases.NONCAUSAL),
        "vidtwin": cases.vidtwin_pipeline(),
    }


def whole_clip(pipe, pixels):
    """What the model itself makes of a whole clip."""
    with torch.no_grad():
        frames = pipe.tokenizer(pixels, sample_posterior=False, return_loss=False).reconstruction
    return (frames.clamp(-1, 1) + 1) / 2


@pytest.mark.parametrize("name", ["v1.1", "fsq", "vidtwin"])
@pytest.mark.parametrize("chunk_frames", [1, 4, 100])
def test_pieces_make_the_whole_clip(pipelines, name, chunk_frames):
    pipe = pipelines[name]
    pixels, _ = pipe.prepare_video(cases.video(0))
    output = pipe(cases.video(0), chunk_frames=chunk_frames, output_type="pt")
    assert output.frames.shape == pixels.shape == (1, FRAMES, 3, 32, 32)
    torch.testing.assert_close(output.frames, whole_clip(pipe, pixels), atol=1e-5, rtol=0)


def test_noncausal_pieces_are_independent(pipelines):
    pipe = pipelines["noncausal"]
    frames = cases.video(0)
    output = pipe(frames, chunk_frames=4, output_type="pt").frames
    parts = [pipe(part, chunk_frames=4, output_type="pt").frames for part in (frames[:4], frames[4:])]
    torch.testing.assert_close(output, torch.cat(parts, dim=1), atol=1e-5, rtol=0)
    assert (output - pipe(frames, chunk_frames=8, output_type="pt").frames).abs().max() > 1e-3


@pytest.mark.parametrize("num_frames", [1, 2, 5, 16])
@pytest.mark.parametrize("name", ["v1.1", "fsq", "noncausal", "vidtwin"])
def test_any_length(pipelines, name, num_frames):
    output = pipelines[name](cases.video(1, num_frames), chunk_frames=8, output_type="np")
    assert output.frames.shape == (1, num_frames, 32, 32, 3)


def test_any_size_with_keep_size(pipelines):
    output = pipelines["v1.1"](cases.video(0, height=21, width=50), keep_size=True, output_type="pt")
    assert output.frames.shape == (1, FRAMES, 3, 21, 50)


@pytest.mark.parametrize("name", ["v1.1", "vidtwin"])
def test_batch_equals_single_with_samples(pipelines, name):
    pipe = pipelines[name]
    batch = pipe(**cases.inputs(3)).frames
    for index in range(3):
        generator = torch.Generator().manual_seed(50 + index)
        options = {"sample_posterior": True, "generator": generator, "chunk_frames": 4, "output_type": "pt"}
        alone = pipe(cases.video(index), **options).frames
        # sums in another order, which depends on the processor
        torch.testing.assert_close(batch[index : index + 1], alone, atol=1e-4, rtol=0)
    assert not torch.allclose(batch[0], batch[1], atol=1e-3)


def test_kinds_of_input_agree(pipelines, tmp_path):
    pipe = pipelines["v1.1"]
    frames = cases.video(0, height=32, width=32)
    write_video(tmp_path / "frames", frames, 10)  # lossless
    clip = read_video(tmp_path / "frames")
    expected = pipe(frames, output_type="pt").frames
    others = [
        str(tmp_path / "frames"),
        tmp_path / "frames",
        clip,
        torch.from_numpy(frames),
        [Image.fromarray(frame) for frame in frames],
        frames[None],
        frames.astype(np.float32) / 255,
    ]
    for other in others:
        torch.testing.assert_close(pipe(other, output_type="pt").frames, expected, atol=1e-6, rtol=0)
    assert pipe(clip).fps == [10.0] and pipe(frames).fps == [None]


def test_output_types_agree(pipelines):
    pipe = pipelines["v1.1"]
    tensor = pipe(cases.video(0), output_type="pt").frames
    array = pipe(cases.video(0), output_type="np").frames
    images = pipe(cases.video(0)).frames
    np.testing.assert_array_equal(array, tensor.permute(0, 1, 3, 4, 2).numpy())
    assert len(images) == 1 and len(images[0]) == FRAMES and images[0][0].size == (32, 32)
    # bytes are truncated, as the authors' scripts do
    np.testing.assert_array_equal(
        np.stack([np.asarray(image) for image in images[0]]), (array[0] * 255).astype("uint8")
    )
    as_tuple = pipe(cases.video(0), output_type="pt", return_dict=False)
    assert len(as_tuple) == 4 and torch.equal(as_tuple[0], tensor)


def test_quality_is_that_of_the_returned_frames(pipelines):
    from cinetok.metrics import psnr, ssim

    batch = [cases.video(0), cases.video(1)]
    output = pipelines["v1.1"](batch, compute_quality=True, return_inputs=True, output_type="pt")
    assert len(output.quality) == 2
    for index, quality in enumerate(output.quality):
        pair = [x[index : index + 1].transpose(1, 2) for x in (output.frames, output.inputs)]
        assert quality["psnr"] == pytest.approx(psnr(*pair).item(), abs=1e-4)
        assert quality["ssim"] == pytest.approx(ssim(*pair).item(), abs=1e-5)
        assert quality["num_frames"] == FRAMES and len(quality["per_frame"]["psnr"]) == FRAMES
    assert output.quality[0]["psnr"] != output.quality[1]["psnr"]
    tiny = pipelines["v1.1"](cases.video(0, height=8, width=8), keep_size=True, compute_quality=True)
    assert "ssim" not in tiny.quality[0] and tiny.quality[0]["psnr"] > 0


def test_branches_of_vidtwin(pipelines):
    pipe = pipelines["vidtwin"]
    frames = {branch: pipe(cases.video(0), branch=branch, output_type="pt").frames for branch in BRANCHES}
    pixels, _ = pipe.prepare_video(cases.video(0))
    for branch, result in frames.items():
        with torch.no_grad():
            expected = pipe.tokenizer(pixels, branch=branch, return_loss=False).reconstruction
        torch.testing.assert_close(result, (expected.clamp(-1, 1) + 1) / 2, atol=1e-5, rtol=0)
    assert not torch.allclose(frames["structure"], frames["dynamics"], atol=1e-3)


def test_reenact(pipelines):
    pipe = pipelines["vidtwin"]
    one, other = cases.video(0, 10), cases.video(1, 10)
    output = pipe.reenact(one, other, chunk_frames=4, output_type="pt", return_inputs=True)
    pair = [pipe.prepare_video(video)[0] for video in (one, other)]
    expected = (pipe.tokenizer.reenact(*pair).reconstruction.clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(output.frames, expected, atol=1e-5, rtol=0)
    assert [tuple(video.shape) for video in output.inputs] == [(1, 10, 3, 32, 32)] * 2
    swapped = pipe.reenact(other, one, output_type="pt").frames
    assert not torch.allclose(output.frames, swapped, atol=1e-3)


def test_reenact_refuses(pipelines):
    with pytest.raises(ValueError, match="needs VidTwin"):
        pipelines["v1.1"].reenact(cases.video(0), cases.video(1))
    with pytest.raises(ValueError, match="equal numbers"):
        pipelines["vidtwin"].reenact(cases.video(0), cases.video(1, 9))


def test_callback_sees_and_replaces(pipelines):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, tuple(tensors["frames"].shape), tuple(tensors["latents"].shape)))
        return {"frames": torch.zeros_like(tensors["frames"])}

    output = pipelines["fsq"](
        cases.video(0, 9),
        chunk_frames=4,
        output_type="pt",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=("frames", "latents"),
    )
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert sum(shape[1] for _, shape, _ in seen) == 9 and sum(shape[2] for _, _, shape in seen) == 3
    assert torch.equal(output.frames, torch.full_like(output.frames, 0.5))


def test_tiles(pipelines):
    frames = cases.video(0, 5, 48, 48)
    tiled = pipelines["v1.1"](frames, keep_size=True, tile_size=32, tile_overlap=16, output_type="pt").frames
    assert tiled.shape == (1, 5, 3, 48, 48) and tiled.isfinite().all()
    whole = pipelines["v1.1"](frames, keep_size=True, tile_size=48, output_type="pt").frames
    torch.testing.assert_close(whole, pipelines["v1.1"](frames, keep_size=True, output_type="pt").frames)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("v1.1", {"output_type": "jpg"}, "output_type"),
        ("v1.1", {"branch": "structure"}, "VidTwin"),
        ("vidtwin", {"branch": "motion"}, "branch"),
        ("vidtwin", {"tile_size": 16}, "VidTok"),
        ("vidtwin", {"keep_size": True}, "32x32"),
        ("v1.1", {"chunk_frames": 0}, "chunk_frames"),
        ("v1.1", {"tile_size": 12}, "tile_size"),
        ("v1.1", {"generator": [torch.Generator()] * 2}, "2 generators for 1 videos"),
        ("v1.1", {"callback_on_step_end_tensor_inputs": ("noise",)}, "noise"),
    ],
)
def test_arguments_that_do_not_fit(pipelines, name, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipelines[name](cases.video(0), **arguments)


def test_videos_that_do_not_fit(pipelines, tmp_path):
    from cinetok import VideoReadError

    pipe = pipelines["v1.1"]
    with pytest.raises(ValueError, match="one batch"):
        pipe([cases.video(0), cases.video(1, 9)])
    with pytest.raises(VideoReadError, match="missing.mp4"):
        pipe(tmp_path / "missing.mp4")
    (tmp_path / "garbage.mp4").write_bytes(b"not a video" * 50)
    with pytest.raises(VideoReadError, match="garbage.mp4"):
        pipe(tmp_path / "garbage.mp4")
    with pytest.raises(TypeError):
        pipe(7)


LOAD = """
import json, sys
import torch
sys.path.insert(0, sys.argv[3])
from torchvision_shim import install
install()
import cinetok
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
data = load_file(sys.argv[2])
pipe.set_progress_bar_config(disable=True)
frames = pipe(data["video"].numpy(), output_type="pt").frames
print(json.dumps([type(pipe).__name__, (frames - data["frames"]).abs().max().item()]))
"""


@pytest.mark.parametrize("name", ["v1.1", "vidtwin"])
def test_saved_pipeline_loads_in_a_fresh_process(pipelines, name, tmp_path):
    from pathlib import Path

    from safetensors.torch import save_file

    pipe = pipelines[name]
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["_class_name"] == "VideoReconstructionPipeline"
    assert {index[part][0] for part in ("tokenizer", "video_processor")} == {"cinetok"}
    frames = pipe(cases.video(0), output_type="pt").frames
    save_file({"video": torch.from_numpy(cases.video(0)), "frames": frames.contiguous()}, tmp_path / "data.safetensors")
    command = [sys.executable, "-c", LOAD, tmp_path / "pipe", tmp_path / "data.safetensors", Path(__file__).parent]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout.splitlines()[-1]) == ["VideoReconstructionPipeline", 0.0]
    again = VideoReconstructionPipeline.from_pretrained(tmp_path / "pipe")
    assert isinstance(again, DiffusionPipeline) and type(again.tokenizer) is type(pipe.tokenizer)
