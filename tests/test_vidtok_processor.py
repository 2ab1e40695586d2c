"""VidTok's video processor: sizes, ranges, inputs of every kind, saving, and the way back to bytes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from golden_kinds import RUNNERS, vidtok_video  # noqa: F401 (registers the runners)
from PIL import Image
from run_goldens import run_case

from cinetok import VideoReadError, VidTokVideoProcessor, read_video, write_video

GOLDENS = ROOT / "tests" / "goldens" / "vidtok"


def frames(num_frames=4, height=20, width=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def small(**options):
    return VidTokVideoProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, **options)


@pytest.mark.parametrize("name", ["preprocess", "frame_sampling", "metrics_psnr_ssim"])
def test_golden(name):
    case = run_case(GOLDENS / name)
    assert case.rows and all(row.passed for row in case.rows), [row for row in case.rows if not row.passed]
    assert (case.system, case.kind) in RUNNERS


# ----------------------------------------------------------------------------------------------------- geometry


def test_shape_and_range():
    out = small()(frames())
    pixels = out["pixel_values_videos"]
    assert pixels.shape == (1, 4, 3, 16, 16) and pixels.dtype == torch.float32
    assert -1 <= pixels.min() < -0.2 and 0.2 < pixels.max() <= 1
    assert set(out.keys()) == {"pixel_values_videos"}


def test_defaults_are_those_of_the_releases():
    pixels = VidTokVideoProcessor()(frames(1, 300, 500))["pixel_values_videos"]
    assert pixels.shape == (1, 1, 3, 256, 256)


def test_exact_values_without_resize():
    video = frames(2, 16, 16)
    pixels = small()(video)["pixel_values_videos"]
    expected = (torch.from_numpy(video).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    assert torch.equal(pixels[0], expected)


def test_keep_aspect_and_keep_size():
    video = frames(2, 20, 33)
    assert small(do_center_crop=False)(video)["pixel_values_videos"].shape == (1, 2, 3, 16, 26)
    assert small(do_center_crop=False)(video.transpose(0, 2, 1, 3))["pixel_values_videos"].shape == (1, 2, 3, 26, 16)
    assert small(do_resize=False, do_center_crop=False)(video)["pixel_values_videos"].shape == (1, 2, 3, 20, 33)
    kept = small(do_resize=False)(video)["pixel_values_videos"]
    full = small(do_resize=False, do_center_crop=False)(video)["pixel_values_videos"]
    assert torch.equal(kept, full[..., 2:18, 8:24])  # (33 - 16) / 2 = 8.5 goes to the even number
    exact = small(do_center_crop=False)(video, size={"height": 8, "width": 40})["pixel_values_videos"]
    assert exact.shape == (1, 2, 3, 8, 40)


def test_small_frames_are_padded_with_black():
    video = np.full((1, 5, 8, 3), 255, np.uint8)
    pixels = small(do_resize=False)(video)["pixel_values_videos"][0, 0, 0]
    assert pixels.shape == (16, 16)
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[5:10, 4:12] = True
    assert (pixels[inside] == 1).all() and (pixels[~inside] == -1).all()


def test_resize_is_antialiased_and_bilinear():
    video = frames(1, 64, 64)
    pixels = small()(video)["pixel_values_videos"][0]
    source = torch.from_numpy(video).permute(0, 3, 1, 2).float() / 255
    expected = F.interpolate(source, size=(16, 16), mode="bilinear", antialias=True)
    assert torch.allclose(pixels, expected * 2 - 1, atol=1e-5)
    plain = F.interpolate(source, size=(16, 16), mode="bilinear")
    assert (expected - plain).abs().max() > 0.1


def test_switches_for_one_call_and_other_statistics():
    processor, video = small(), frames(1, 16, 16)
    raw = processor(video, do_normalize=False)["pixel_values_videos"]
    assert torch.equal(raw[0], torch.from_numpy(video).permute(0, 3, 1, 2).float() / 255)
    unscaled = processor(video, do_normalize=False, do_rescale=False)["pixel_values_videos"]
    assert unscaled.max() > 200
    other = VidTokVideoProcessor(
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        image_mean=[0.1, 0.2, 0.3],
        image_std=[0.5, 0.6, 0.7],
    )
    pixels = other(video)["pixel_values_videos"]
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    assert torch.allclose(pixels, (raw - mean) / std, atol=1e-6)
    assert np.abs(other.postprocess(pixels, rounding="nearest")[0].astype(int) - video).max() == 0
    assert processor.size == {"shortest_edge": 16} and processor.do_normalize


# ------------------------------------------------------------------------------------------------------- inputs


def test_every_kind_of_input_gives_the_same(tmp_path):
    video = frames(3)
    path = tmp_path / "clip.mkv"
    write_video(path, video, 10, codec="ffv1", pixel_format="bgr0")
    clip = read_video(path)
    assert np.array_equal(clip.frames, video)
    write_video(tmp_path / "folder", video, 10)
    variants = {
        "array": video,
        "tensor": torch.from_numpy(video),
        "float array in [0, 1]": video.astype(np.float32) / 255,
        "pictures": [Image.fromarray(frame) for frame in video],
        "list of arrays": list(video),
        "list of tensors": list(torch.from_numpy(video)),
        "path": path,
        "string": str(path),
        "folder": tmp_path / "folder",
        "clip": clip,
        "batch of one": video[None],
        "list of one": [video],
        "list of one path": [path],
        "list of one list of pictures": [[Image.fromarray(frame) for frame in video]],
        "not contiguous": np.ascontiguousarray(video.transpose(2, 1, 0, 3)).transpose(2, 1, 0, 3),
    }
    expected = small()(video)["pixel_values_videos"]
    for name, variant in variants.items():
        pixels = small()(variant)["pixel_values_videos"]
        assert pixels.shape == expected.shape and torch.allclose(pixels, expected, atol=1e-6), name


def test_a_batch_equals_its_members(tmp_path):
    one, two = frames(3, seed=1), frames(3, 40, 24, seed=2)
    path = write_video(tmp_path / "clip.mkv", two, 10, codec="ffv1", pixel_format="bgr0")
    both = small()([one, path])["pixel_values_videos"]
    assert both.shape == (2, 3, 3, 16, 16)
    for index, video in enumerate((one, two)):
        assert torch.equal(both[index], small()(video)["pixel_values_videos"][0])
    stacked = small()(np.stack([one, one]))["pixel_values_videos"]
    assert torch.equal(stacked[0], both[0]) and torch.equal(stacked[1], both[0])


def test_files_are_sampled(tmp_path):
    path = write_video(tmp_path / "clip.mp4", frames(20, 32, 32), 10)
    processor = small(fps=5, num_frames=4)
    out = processor(path, return_metadata=True)
    assert out["pixel_values_videos"].shape[1] == 4
    (facts,) = out["video_metadata"]
    assert facts["fps"] == 5 and facts["num_frames"] == 4 and (facts["height"], facts["width"]) == (32, 32)
    assert facts["timestamps"] == pytest.approx([0, 0.2, 0.4, 0.6]) and facts["source"] == str(path)
    assert processor(path, fps=None, num_frames=None)["pixel_values_videos"].shape[1] == 20
    with pytest.raises(VideoReadError, match="asked for 40 frames at 5 fps"):
        processor(path, num_frames=40)


def test_return_types():
    video = frames(2)
    array = small()(video, return_tensors="np")["pixel_values_videos"]
    assert isinstance(array, np.ndarray) and array.shape == (1, 2, 3, 16, 16)
    ragged = small()([video, frames(3)], return_tensors=None)["pixel_values_videos"]
    assert [tuple(v.shape) for v in ragged] == [(2, 3, 16, 16), (3, 3, 16, 16)]


@pytest.mark.parametrize(
    "video, error, message",
    [
        (frames().transpose(0, 3, 1, 2), ValueError, r"num_frames, height, width, 3"),
        (frames()[0, 0], ValueError, "num_frames, height, width, 3"),
        (np.zeros((2, 8, 8, 4), np.uint8), ValueError, "alpha"),
        (np.zeros((0, 8, 8, 3), np.uint8), ValueError, "no frames"),
        (frames().astype(np.int32), TypeError, "uint8 or floating"),
        (frames().astype(np.float32), ValueError, r"\[0, 1\]"),
        (frames().astype(np.float32) / 127.5 - 1, ValueError, r"\[0, 1\]"),
        (np.full((1, 8, 8, 3), np.nan, np.float32), ValueError, "NaN"),
        ([], ValueError, "empty"),
        ([[]], ValueError, "empty"),
        (None, TypeError, "NoneType"),
        ({"video": 1}, TypeError, "dict"),
        ([frames(2), frames(3)], ValueError, "do not fit one batch"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))], ValueError, "differ in size"),
        ("no/such/file.mp4", VideoReadError, "no/such/file.mp4: no such file"),
    ],
)
def test_bad_videos(video, error, message):
    with pytest.raises(error, match=message):
        small()(video)


def test_bad_settings():
    for options, error, message in (
        ({"resize": True}, TypeError, "unknown arguments"),
        ({"size": 16}, ValueError, "size must be"),
        ({"size": {"shortest_edge": 0}}, ValueError, "size must be"),
        ({"size": {"shortest_edge": 16, "height": 3}}, ValueError, "size must be"),
        ({"crop_size": {"height": 16}}, ValueError, "crop_size must be"),
        ({"return_tensors": "tf"}, ValueError, "return_tensors"),
    ):
        with pytest.raises(error, match=message):
            small()(frames(), **options)


# -------------------------------------------------------------------------------------------------- way back


def test_bytes_survive_the_round_trip():
    video = frames(3, 16, 16)
    processor = small()
    pixels = processor(video)["pixel_values_videos"]
    back = processor.postprocess(pixels)
    assert back.shape == (1, 3, 16, 16, 3) and back.dtype == np.uint8
    assert np.abs(back[0].astype(int) - video).max() <= 1  # truncation: rounding errors may cost one level
    assert np.array_equal(processor.postprocess(pixels, rounding="nearest")[0], video)


def test_truncation_clamping_and_types():
    processor = small()
    values = torch.tensor([-3.0, -1.0, 0.0, 0.999, 1.0, 3.0])
    video = values.view(1, 1, 1, 1, 6).expand(1, 1, 3, 1, 6).clone()
    assert processor.postprocess(video)[0, 0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]
    assert processor.postprocess(video, rounding="nearest")[0, 0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]
    assert values.tolist() == video[0, 0, 0, 0].tolist()  # the input is left alone
    tensor = processor.postprocess(video.half(), output_type="pt")
    assert tensor.dtype == torch.uint8 and tensor.shape == (1, 1, 1, 6, 3)
    pictures = processor.postprocess(video, output_type="pil")
    assert pictures[0][0].size == (6, 1) and np.array_equal(np.asarray(pictures[0][0]), tensor[0, 0].numpy())


def test_postprocess_refuses():
    good = torch.zeros(1, 2, 3, 4, 4)
    for video, options, error, message in (
        (good.numpy(), {}, TypeError, "torch tensor"),
        (good.byte(), {}, TypeError, "floating-point"),
        (good[0], {}, ValueError, "shape"),
        (good.transpose(1, 2), {}, ValueError, "shape"),
        (good / 0 * 0, {}, ValueError, "NaN"),
        (good, {"output_type": "latent"}, ValueError, "output_type"),
        (good, {"rounding": "up"}, ValueError, "rounding"),
    ):
        with pytest.raises(error, match=message):
            small().postprocess(video, **options)


# ------------------------------------------------------------------------------------------------- saving


def test_every_setting_is_saved(tmp_path):
    VidTokVideoProcessor().save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.json")
    saved = json.loads(file.read_text())
    assert saved["video_processor_type"] == "VidTokVideoProcessor"
    for name, value in {
        "do_resize": True,
        "size": {"shortest_edge": 256},
        "do_center_crop": True,
        "crop_size": {"height": 256, "width": 256},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }.items():
        assert saved[name] == value, name
    assert saved.get("fps") is None and saved.get("num_frames") is None


def test_save_and_load(tmp_path):
    small(do_center_crop=False, fps=8, num_frames=17).save_pretrained(tmp_path)
    loaded = VidTokVideoProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == small(do_center_crop=False, fps=8, num_frames=17).to_dict()
    changed = VidTokVideoProcessor.from_pretrained(tmp_path, num_frames=33, size={"shortest_edge": 8})
    assert changed.num_frames == 33 and changed.size == {"shortest_edge": 8} and changed.fps == 8


FRESH = """
import sys
{prelude}
import numpy as np
import cinetok
{load}
video = np.arange(2 * 20 * 30 * 3, dtype=np.uint32).astype(np.uint8).reshape(2, 20, 30, 3)
pixels = processor(video)["pixel_values_videos"]
print(type(processor).__name__, tuple(pixels.shape), f"{{pixels.double().sum().item():.4f}}")
"""


@pytest.mark.parametrize("how", ["auto", "own class", "own class without torchvision"])
def test_load_in_a_fresh_process(tmp_path, how):
    small().save_pretrained(tmp_path)
    prelude = {
        "auto": f"sys.path.insert(0, {str(ROOT / 'tests')!r}); import torchvision_shim; torchvision_shim.install()",
        "own class": "",
        "own class without torchvision": "sys.modules['torchvision'] = None",
    }[how]
    load = f"processor = cinetok.VidTokVideoProcessor.from_pretrained({str(tmp_path)!r})"
    if how == "auto":
        pytest.importorskip("torchvision")
        load = "from transformers import AutoVideoProcessor\n" + load.replace("cinetok.VidTok", "Auto")
    script = FRESH.format(prelude=prelude, load=load)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    video = np.arange(2 * 20 * 30 * 3, dtype=np.uint32).astype(np.uint8).reshape(2, 20, 30, 3)
    total = small()(video)["pixel_values_videos"].double().sum().item()
    assert done.stdout.split("\n")[-2] == f"VidTokVideoProcessor (1, 2, 3, 16, 16) {total:.4f}"
