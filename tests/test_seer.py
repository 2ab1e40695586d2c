"""Seer: what is special to it, and every kind of bad input. The parametrised suites cover the rest."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import run_goldens
import run_manifests
import torch
from card_snippets import python_blocks, run_card
from conftest import SHARED
from golden_kinds import load_runners
from model_cases import seer as tiny
from PIL import Image
from safetensors.torch import save_file

from cinetok import (
    CheckpointError,
    SeerDDIMScheduler,
    SeerPipeline,
    SeerTextDecomposer,
    SeerUNet3DConditionModel,
    VideoClip,
    convert_checkpoint,
)
from cinetok.conversion import seer as conversion
from cinetok.conversion import stable_diffusion, state_dict_names
from cinetok.model_cards import render_card
from cinetok.modeling.seer.attention_seer import SeerRotaryEmbedding, from_windows, to_windows, window_shape
from cinetok.modeling.seer.image_processing_seer import preprocess_image, preview_frames, resample_frames
from cinetok.modeling.seer.unet_seer import InflatedConv2d, unet_config_from_2d

GOLDENS = Path(__file__).parent / "goldens" / "seer"


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


def run(pipe, seed=0, **changes):
    """Frames (batch, frames, 3, height, width) of a short run."""
    arguments = {
        "prompt": "close book",
        "image": torch.rand(3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(7)),
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "pt",
    } | changes
    return pipe(**arguments).frames


# --- goldens and manifests -------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(p.parent for p in GOLDENS.rglob("case.json")), ids=lambda p: p.name)
def test_golden(path):
    load_runners("seer")
    case = run_goldens.run_case(path)
    assert case.rows
    assert not [row for row in case.rows if not row.passed]


def test_goldens_notice_a_wrong_result():
    load_runners("seer")
    case = run_goldens.GoldenCase(GOLDENS / "cast_num_frames")
    name = next(name for name in case.recorded if name.endswith(".out"))
    case.recorded[name] = case.recorded[name] + 1e-3
    run_goldens.RUNNERS[case.system, case.kind](case)
    assert [row.name for row in case.rows if not row.passed] == [name]


@pytest.mark.shared
def test_released_manifests():
    for path in sorted((SHARED / "manifests" / "seer").glob("*.json")):
        if path.stem not in conversion.DEFERRED_MANIFESTS:
            problems, _ = run_manifests.check_manifest(path)
            assert not problems, path


# --- attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, expected",
    [((4, 6), (4, 6)), ((2, 1), (2, 1)), ((8, 4), (4, 4)), ((16, 12), (4, 4)), ((28, 8), (4, 4)), ((32, 8), (8, 8))],
)
def test_window_rule(size, expected):
    assert window_shape(*size) == expected


def test_windows_round_trip():
    tokens = torch.randn(2, 3, 8, 12, 5)
    windows = to_windows(tokens, (4, 4))
    assert windows.shape == (2 * 2 * 3, 3 * 16, 5)
    # The second window of a sample starts at column 4; its second frame follows after 16 tokens.
    assert torch.equal(windows[1, 16], tokens[0, 1, 0, 4])
    assert torch.equal(from_windows(windows, (4, 4), (2, 3, 8, 12)), tokens)


@torch.no_grad()
def test_temporal_attention_is_causal_over_tokens():
    attention = tiny.unet().down_blocks[0].temporal_attentions[0].transformer_blocks[0].attn1
    tokens = torch.randn(1, 3, 8, 4, 64)
    before = attention(tokens).view_as(tokens)
    tokens[0, 1, 2, 3] += 1.0  # frame 1, row 2, column 3
    changed = (attention(tokens).view_as(tokens) - before).abs().amax(-1)[0] > 1e-6
    assert not changed[0].any()
    assert not changed[1, :2].any() and not changed[1, 2, :3].any()  # earlier in raster order
    assert changed[1, 2, 3] and changed[1, 3].all() and changed[2, :4].all()
    assert not changed[:, 4:].any()  # another window


def test_rounded_rotary_angles():
    positions = torch.tensor([5, 2049, 12287])
    exact, rounded = (SeerRotaryEmbedding(32, dtype).angles(positions) for dtype in ("float32", "float16"))
    assert exact[:, 0].tolist() == [5, 2049, 12287]
    assert rounded[:, 0].tolist() == [5, 2048, 12288]
    with pytest.raises(ValueError, match="angle_dtype"):
        SeerRotaryEmbedding(32, "bfloat16")


@torch.no_grad()
def test_rotary_switch_reaches_the_output():
    inputs = tiny.unet_inputs(1)
    exact = tiny.unet()
    rounded = tiny.unet(rotary_angle_dtype="float16")
    rounded.load_state_dict(exact.state_dict())
    difference = (exact(**inputs).sample - rounded(**inputs).sample).abs().max()
    assert 0 < difference < 0.1


@torch.no_grad()
def test_rotary_angles_survive_half_precision():
    model = tiny.unet()
    before = model.down_blocks[0].temporal_attentions[0].transformer_blocks[0].attn1.rotary_emb.angles(torch.arange(9))
    model.half().float()
    after = model.down_blocks[0].temporal_attentions[0].transformer_blocks[0].attn1.rotary_emb.angles(torch.arange(9))
    assert torch.equal(before, after)


# --- U-Net -----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (4, 6), (16, 16)])
@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (1, 1)])
def test_inflated_convolution(size, kernel, stride):
    conv = InflatedConv2d(5, 7, kernel, stride=stride, padding=kernel // 2)
    clip = torch.randn(2, 5, 3, *size)
    frames = [torch.nn.functional.conv2d(clip[:, :, i], conv.weight, conv.bias, stride, kernel // 2) for i in range(3)]
    torch.testing.assert_close(conv(clip), torch.stack(frames, dim=2), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_unet_uses_every_input():
    model, inputs = tiny.unet(), tiny.unet_inputs(1)
    expected = model(**inputs).sample
    for name, change in (
        ("sample", lambda x: x + torch.tensor([0.0, 0.0, 1.0]).view(1, 1, 3, 1, 1)),
        ("timestep", lambda t: t + 300),
        ("encoder_hidden_states", lambda x: torch.cat((x[:, :1], x[:, 1:] + 1), dim=1)),
        ("num_cond_frames", lambda k: k + 1),
    ):
        changed = model(**{**inputs, name: change(inputs[name])}).sample
        assert (changed - expected).abs().max() > 1e-4, name
    assert torch.equal(model(**inputs, return_dict=False)[0], expected)


@torch.no_grad()
def test_text_of_a_frame_reaches_its_frame_most():
    model, inputs = tiny.unet(), tiny.unet_inputs(1)
    expected = model(**inputs).sample
    text = inputs["encoder_hidden_states"].clone()
    text[:, 1] += 2.0
    change = (model(**{**inputs, "encoder_hidden_states": text}).sample - expected).abs().mean(dim=(0, 1, 3, 4))
    assert change.argmax() == 1


@torch.no_grad()
def test_timestep_forms_agree():
    model, inputs = tiny.unet(), tiny.unet_inputs(2)
    results = [
        model(**{**inputs, "timestep": t}).sample
        for t in (17, torch.tensor(17), torch.tensor([17]), torch.tensor([17, 17]))
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_gradient_checkpointing_gives_the_same_gradients():
    for model, inputs, output in (
        (tiny.unet(), tiny.unet_inputs(1), "sample"),
        (tiny.text_decomposer(), tiny.text_decomposer_inputs(1), "hidden_states"),
    ):
        model.train()
        gradients = []
        for enabled in (False, True):
            if enabled:
                model.enable_gradient_checkpointing()
            model.zero_grad()
            model(**inputs)[output].square().mean().backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 50
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@torch.no_grad()
def test_feed_forward_in_chunks_is_the_same():
    block = tiny.unet().down_blocks[0].attentions[0].transformer_blocks[0].ff
    tokens = torch.randn(2, 1300, 64)  # more than two chunks
    chunked = block(tokens)
    with torch.enable_grad():
        torch.testing.assert_close(block(tokens), chunked)


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_runs_close_to_full(dtype, limit):
    model, inputs = tiny.unet(), tiny.unet_inputs(1)
    with torch.no_grad():
        full = model(**inputs).sample
        half = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
        result = model.to(dtype)(**half).sample
    assert result.dtype == dtype
    assert (result.float() - full).abs().mean() < limit * full.abs().mean()


@pytest.mark.parametrize(
    "height, width, message",
    [(9, 8, "multiples of 8"), (0, 8, "positive"), (24, 24, "tiled by attention windows of 4x4"), (16, 24, None)],
)
def test_latent_sizes(height, width, message):
    model = tiny.unet()
    if message is None:
        model.check_latent_size(height, width)
        return
    with pytest.raises(ValueError, match=message) as error:
        model.check_latent_size(height, width)
    assert "near" in str(error.value)


@pytest.mark.parametrize("size", [8, 16, 32, 64, 96])
def test_published_latent_sizes_work(size):
    tiny.unet().check_latent_size(size, size)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"encoder_hidden_states": torch.zeros(1, 2, 5, 24)}, r"one text sequence per frame.*\(1, 3, tokens, 24\)"),
        ({"encoder_hidden_states": torch.zeros(1, 5, 24)}, "one text sequence per frame"),
        ({"encoder_hidden_states": torch.zeros(1, 3, 5, 25)}, "one text sequence per frame"),
        ({"sample": torch.zeros(1, 3, 3, 16, 8)}, "`sample` must be"),
        ({"sample": torch.zeros(1, 4, 16, 8)}, "`sample` must be"),
        ({"sample": torch.zeros(1, 4, 3, 24, 24)}, "do not fit the U-Net"),
        ({"num_cond_frames": 4}, "num_cond_frames"),
        ({"num_cond_frames": -1}, "num_cond_frames"),
    ],
)
def test_bad_unet_inputs(change, message):
    with pytest.raises(ValueError, match=message):
        tiny.unet()(**{**tiny.unet_inputs(1), **change})


@pytest.mark.parametrize(
    "change", [{"block_out_channels": (48, 48)}, {"num_attention_heads": 3}, {"block_out_channels": (64,)}]
)
def test_bad_unet_configurations(change):
    with pytest.raises(ValueError, match="block_out_channels"):
        tiny.unet(**change)


# --- inflation -------------------------------------------------------------------------------------


def image_unet(**changes):
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 8,
        "block_out_channels": (32, 32, 32, 32),
        "layers_per_block": 1,
        "cross_attention_dim": tiny.TEXT_DIM,
        "attention_head_dim": 4,
    }
    return tiny.scramble(UNet2DConditionModel(**(config | changes)))


@torch.no_grad()
def test_one_frame_reproduces_the_image_unet():
    image = image_unet()
    video = SeerUNet3DConditionModel.from_unet2d(image, rotary_angle_dtype="float16")
    assert video.config.rotary_angle_dtype == "float16" and not video.training
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, tiny.TEXT_DIM)
    expected = image(sample, 30, text).sample
    torch.testing.assert_close(
        video(sample[:, :, None], 30, text[:, None]).sample[:, :, 0], expected, atol=1e-4, rtol=1e-4
    )
    # The image model stays as it was.
    video.conv_in.weight.zero_()
    assert image.conv_in.weight.abs().sum() > 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_linear_projection": True}, "use_linear_projection"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"attention_head_dim": (4, 4, 4, 4)}, "attention_head_dim"),
        ({"down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D")}, "down_block_types"),
    ],
)
def test_only_stable_diffusion_1_is_inflated(change, message):
    with pytest.raises(ValueError, match=message):
        SeerUNet3DConditionModel.from_unet2d(image_unet(**change))


# --- text decomposer -------------------------------------------------------------------------------


@torch.no_grad()
def test_text_decomposer_is_causal_in_frames_and_uses_the_text():
    model, inputs = tiny.text_decomposer(), tiny.text_decomposer_inputs(1)
    expected = model(**inputs).hidden_states
    assert expected.shape == (1, 4, 7, tiny.TEXT_DIM)
    assert (expected[:, 0] - expected[:, 3]).abs().max() > 1e-3
    changed = model(inputs["encoder_hidden_states"] + 1, num_frames=4).hidden_states
    assert (changed - expected).abs().max() > 1e-3
    model.pos_embed[:, 4] += torch.randn(tiny.TEXT_DIM)  # of six; the fourth of four frames reads table entry 4
    changed = model(**inputs).hidden_states
    torch.testing.assert_close(changed[:, :3], expected[:, :3])
    assert (changed[:, 3] - expected[:, 3]).abs().max() > 1e-3


@pytest.mark.parametrize("num_frames, rows", [(12, [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14]), (16, list(range(16)))])
def test_table_of_positions_is_resampled_by_nearest_neighbour(num_frames, rows):
    model = tiny.text_decomposer(num_frames=16, num_layers=0)
    with torch.no_grad():
        model.pos_embed.zero_()
        model.pos_embed += torch.arange(16.0).view(1, 16, 1, 1) * torch.randn(tiny.TEXT_DIM)
        text = torch.zeros(1, 3, tiny.TEXT_DIM)
        expected = model.norm(model.learnable_query + model.pos_embed[:, rows, :3])
        torch.testing.assert_close(model(text, num_frames=num_frames).hidden_states, expected)


@pytest.mark.parametrize(
    "text, num_frames, message",
    [
        (torch.zeros(1, 17, 24), 4, "up to 16 tokens"),
        (torch.zeros(1, 5, 25), 4, "must be"),
        (torch.zeros(5, 24), 4, "must be"),
        (torch.zeros(1, 5, 24), 0, "at least 1"),
    ],
)
def test_bad_text_decomposer_inputs(text, num_frames, message):
    with pytest.raises(ValueError, match=message):
        tiny.text_decomposer()(text, num_frames=num_frames)


# --- scheduler -------------------------------------------------------------------------------------


def test_scheduler_makes_31_steps_of_30():
    scheduler = SeerDDIMScheduler()
    scheduler.set_timesteps(30)
    assert scheduler.timesteps.tolist() == list(range(991, 0, -33))
    assert len(scheduler.timesteps) == 31


@pytest.mark.parametrize("steps", [0, -1, 3, 27, 260, 501, 1001])
def test_impossible_step_counts(steps):
    with pytest.raises(ValueError, match="try"):
        SeerDDIMScheduler().set_timesteps(steps)


def test_scheduler_noise_levels_and_saving(tmp_path):
    scheduler = SeerDDIMScheduler(beta_start=0.00085, beta_end=0.012)
    scheduler.save_pretrained(tmp_path)
    loaded = SeerDDIMScheduler.from_pretrained(tmp_path)
    assert torch.equal(loaded.alphas_cumprod, scheduler.alphas_cumprod)
    # The training schedule of Stable Diffusion, as diffusers computes it.
    from diffusers import DDPMScheduler

    reference = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(loaded.alphas_cumprod, reference.alphas_cumprod, atol=1e-6, rtol=1e-4)
    samples, noise, t = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 4, 3, 8, 8), torch.tensor([3, 800])
    torch.testing.assert_close(
        loaded.add_noise(samples, noise, t), reference.add_noise(samples, noise, t), atol=1e-5, rtol=1e-4
    )
    with pytest.raises(ValueError, match="set_timesteps"):
        loaded.step(noise, 1, samples)
    with pytest.raises(ValueError, match="scaled_linear"):
        SeerDDIMScheduler(beta_schedule="linear")


# --- images ----------------------------------------------------------------------------------------


def test_images_of_every_kind_agree():
    array = np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8)
    expected = preprocess_image(Image.fromarray(array), 32)
    assert expected.shape == (3, 32, 32) and expected.min() >= 0 and expected.max() <= 1
    assert torch.equal(preprocess_image(array, 32), expected)
    assert torch.equal(preprocess_image(torch.from_numpy(array).permute(2, 0, 1), 32), expected)
    floats = preprocess_image(array.astype(np.float32) / 255, 32)
    assert (floats - expected).abs().max() < 1.5 / 255  # the PIL path rounds to bytes


def test_grey_and_transparent_images_are_converted():
    for mode in ("L", "RGBA", "P"):
        assert preprocess_image(Image.new(mode, (9, 7)), 8).shape == (3, 8, 8)


def test_image_of_the_right_size_is_untouched():
    array = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    pixels = preprocess_image(array, 16, 24)
    assert torch.equal((pixels * 255).round().byte().permute(1, 2, 0), torch.from_numpy(array))


@pytest.mark.parametrize(
    "image, error",
    [
        (np.zeros((8, 8), np.uint8), ValueError),
        (np.zeros((8, 8, 4), np.uint8), ValueError),
        (torch.zeros(1, 8, 8), ValueError),
        (torch.full((3, 8, 8), -0.5), ValueError),
        (torch.full((3, 8, 8), 128.0), ValueError),
        (torch.zeros(3, 8, 8, dtype=torch.int64), TypeError),
        ("book.jpg", TypeError),
    ],
)
def test_bad_images(image, error):
    with pytest.raises(error):
        preprocess_image(image, 8)


def test_resampling_blends_neighbours():
    ramp = torch.arange(8.0).view(1, 8, 1, 1).expand(3, 8, 2, 2)
    assert resample_frames(ramp, 4)[0, :, 0, 0].tolist() == [0.5, 2.5, 4.5, 6.5]
    assert resample_frames(ramp, 10)[0, :, 0, 0].tolist() == [*range(8), 0, 0]
    assert resample_frames(ramp, 8) is ramp


def test_preview_has_a_black_border():
    frames = preview_frames(torch.full((2, 3, 4, 6), 0.5))
    assert frames.shape == (2, 8, 10, 3) and frames.dtype == np.uint8
    assert (frames[:, 2:-2, 2:-2] == 127).all() and frames.sum() == 127 * 2 * 4 * 6 * 3


# --- pipeline --------------------------------------------------------------------------------------


def test_reference_frames_come_back_untouched(pipe):
    image = np.random.default_rng(0).integers(0, 256, (tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8)
    frames = run(pipe, image=Image.fromarray(image), output_type="pil")
    assert len(frames) == 1 and len(frames[0]) == tiny.FRAMES
    assert np.array_equal(np.asarray(frames[0][0]), image)
    assert not np.array_equal(np.asarray(frames[0][1]), image)


def test_output_types_agree(pipe):
    tensor, array, images = (run(pipe, output_type=kind) for kind in ("pt", "np", "pil"))
    assert tensor.shape == (1, tiny.FRAMES, 3, tiny.SIZE, tiny.SIZE) and tensor.dtype == torch.float32
    assert tensor.min() >= 0 and tensor.max() <= 1
    assert np.array_equal(array, tensor.permute(0, 1, 3, 4, 2).numpy())
    assert np.array_equal(np.asarray(images[0][1]), (array[0, 1] * 255).round().astype(np.uint8))
    assert torch.equal(pipe(**arguments_of_run(), return_dict=False)[0], tensor)


def arguments_of_run():
    return {
        "prompt": "close book",
        "image": torch.rand(3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(7)),
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "pt",
    }


def test_every_argument_reaches_the_result(pipe):
    expected = run(pipe)
    assert torch.equal(run(pipe), expected)
    other = torch.rand(3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(8))
    for change in (
        {"prompt": "open door"},
        {"image": other},
        {"seed": 1},
        {"guidance_scale": 2.0},
        {"guidance_scale": 1.0},
        {"negative_prompt": "open door"},
        {"num_inference_steps": 4},
        {"eta": 1.0},
        {"skip_reference_feed_forward": True},
    ):
        assert (run(pipe, **change)[:, 1:] - expected[:, 1:]).abs().max() > 1e-3, change


def test_padding_mask_reaches_the_text_encoder(pipe):
    ids = pipe.tokenizer(["close book"], padding="max_length", return_tensors="pt")
    masked = pipe.encode_prompt(["close book"])
    with torch.no_grad():
        unmasked = pipe.text_encoder(ids.input_ids).last_hidden_state
    assert (masked - unmasked).abs().max() > 1e-3  # in the padding, which sees only itself
    with torch.no_grad():
        assert torch.equal(masked, pipe.encode_tokens(ids.input_ids, ids.attention_mask))


def test_several_reference_frames(pipe):
    clip = torch.rand(3, 3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(9))
    frames = run(pipe, image=None, video=clip)
    torch.testing.assert_close(frames[0, :3], clip)
    for same in (list(clip), [clip], clip[None]):
        assert torch.equal(run(pipe, image=None, video=same), frames)
    assert torch.equal(run(pipe, image=list(clip)), frames)  # one prompt: the frames of one clip
    changed = run(pipe, image=None, video=torch.cat((clip[:2], 1 - clip[2:])))
    assert (changed[:, 3] - frames[:, 3]).abs().max() > 1e-3


def test_video_clip_as_reference(pipe):
    array = np.random.default_rng(0).integers(0, 256, (2, tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8)
    clip = VideoClip(frames=array, fps=4.0, timestamps=np.arange(2) / 4, source="clip.mp4")
    assert torch.equal(run(pipe, image=None, video=clip), run(pipe, image=None, video=array))


def test_single_image_is_repeated_for_models_with_two_references():
    pipe = tiny.pipeline(num_cond_frames=2)
    frames = run(pipe)
    assert torch.equal(frames[:, 0], frames[:, 1])
    # Each copy gets noise of its own.
    latents = pipe.encode_reference(frames[:, :2], torch.Generator().manual_seed(0))
    assert (latents[:, :, 0] - latents[:, :, 1]).abs().max() > 1e-3


def test_longer_results_go_on_from_the_last_frames(pipe):
    short, long = run(pipe), run(pipe, num_frames=9)
    assert long.shape[1] == 9
    assert torch.equal(long[:, : tiny.FRAMES], short)
    # Three windows of 1 + 3: frames 4 to 6 follow from frame 3, and so on.
    seen = []
    encode = pipe.encode_reference
    try:
        pipe.encode_reference = lambda frames, *args, **kwargs: seen.append(frames) or encode(frames, *args, **kwargs)
        again = run(pipe, num_frames=9)
    finally:
        del pipe.encode_reference
    assert torch.equal(again, long)
    assert [torch.equal(frames[:, 0], long[:, i]) for frames, i in zip(seen, (0, 3, 6))] == [True] * 3


def test_more_references_than_a_window(pipe):
    clip = torch.rand(6, 3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(9))
    frames = run(pipe, image=None, video=clip, num_frames=8)
    assert frames.shape[1] == 8
    torch.testing.assert_close(frames[0, :6], clip)


def test_frames_of_a_window_can_be_set(pipe):
    assert torch.equal(run(pipe, num_frames=6, num_frames_per_window=6)[:, :1], run(pipe)[:, :1])
    assert run(pipe, num_frames=6, num_frames_per_window=6).shape[1] == 6


def test_other_sizes(pipe):
    assert run(pipe, height=64, width=32).shape[-2:] == (64, 32)


def test_batches_equal_single_runs(pipe):
    batch = pipe(**tiny.pipeline_inputs(2)).frames
    for index in range(2):
        inputs = tiny.pipeline_inputs(2)
        single = {name: inputs[name][index : index + 1] for name in ("prompt", "image", "generator")}
        torch.testing.assert_close(pipe(**{**inputs, **single}).frames[0], batch[index], atol=1e-4, rtol=1e-3)


def test_several_videos_of_a_prompt(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    frames = run(pipe, num_videos_per_prompt=2, generator=generators)
    torch.testing.assert_close(frames[:1], run(pipe), atol=1e-4, rtol=1e-3)
    assert (frames[0] - frames[1]).abs().max() > 1e-3


def test_callback_sees_and_replaces_latents(pipe):
    seen = []

    def note(pipeline, step, timestep, tensors):
        seen.append(
            (step, int(timestep), tuple(tensors["latents"].shape), tuple(tensors["encoder_hidden_states"].shape))
        )
        return {"latents": torch.zeros_like(tensors["latents"])}

    names = ["latents", "encoder_hidden_states"]
    frames = run(pipe, num_frames=7, callback_on_step_end=note, callback_on_step_end_tensor_inputs=names)
    steps = [(0, 501), (1, 1), (2, 501), (3, 1)]
    assert seen == [(*step, (1, 4, 3, 8, 8), (2, 4, tiny.TOKENS, tiny.TEXT_DIM)) for step in steps]
    torch.testing.assert_close(frames[:, 1], frames[:, 2], atol=1e-4, rtol=1e-4)  # all zeros decode alike
    assert pipe.num_timesteps == 4


def test_other_schedulers_of_diffusers_work():
    from diffusers import UniPCMultistepScheduler

    pipe = tiny.pipeline()
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    assert run(pipe, num_inference_steps=3).shape[1] == tiny.FRAMES


def test_long_prompts_are_cut_with_a_warning(pipe, caplog):
    logging.getLogger("diffusers").propagate = True
    logging.getLogger("cinetok").propagate = True
    with caplog.at_level(logging.WARNING):
        pipe.encode_prompt(["abcdefghij"])
        assert "left out" not in caplog.text
        pipe.encode_prompt(["abcdefghijkl"])
    assert "takes 12 tokens" in caplog.text and "kl" in caplog.text


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"image": None}, ValueError, "no reference frame"),
        ({"image": None, "video": []}, ValueError, "no reference frame"),
        ({"image": None, "video": torch.zeros(0, 3, 32, 32)}, ValueError, "no reference frame"),
        ({"video": torch.zeros(2, 3, 32, 32)}, ValueError, "not both"),
        ({"image": None, "video": torch.zeros(4, 3, 32, 32)}, ValueError, "4 reference frames leave nothing"),
        ({"image": None, "video": torch.zeros(9, 3, 32, 32)}, ValueError, "9 reference frames leave nothing"),
        ({"image": None, "video": torch.zeros(3, 32, 32)}, ValueError, "as `image`"),
        ({"num_frames": 1}, ValueError, "leave nothing"),
        ({"num_frames_per_window": 1}, ValueError, "leaves nothing"),
        ({"height": 40}, ValueError, "frames of 40x32 pixels"),
        ({"height": 33}, ValueError, "multiples of 4"),
        ({"width": 72}, ValueError, "frames of 32x72 pixels"),
        ({"prompt": None}, ValueError, "prompt"),
        ({"prompt": []}, TypeError, "prompt"),
        ({"prompt": 3}, TypeError, "prompt"),
        ({"prompt": ["a", "b"], "image": [torch.zeros(3, 32, 32)] * 3}, ValueError, "3 images for 2 prompts"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, ValueError, "1 negative prompts for 2"),
        ({"image": "book.jpg"}, TypeError, "reference frames must be"),
        ({"output_type": "latent"}, ValueError, "output_type"),
        ({"num_videos_per_prompt": 0}, ValueError, "num_videos_per_prompt"),
        ({"num_inference_steps": 3}, ValueError, "inference steps"),
        ({"generator": [torch.Generator()] * 2}, ValueError, "2 generators for 1 samples"),
        ({"latents": torch.zeros(1, 4, 2, 8, 8)}, ValueError, "`latents` must be"),
        ({"reference_latents": torch.zeros(1, 4, 2, 8, 8)}, ValueError, "`reference_latents` must hold 1"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, ValueError, "noise"),
    ],
)
def test_bad_pipeline_arguments(pipe, change, error, message):
    with pytest.raises(error, match=message):
        run(pipe, **change)


def test_clips_of_different_lengths_are_refused(pipe):
    clips = [torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32)]
    with pytest.raises(ValueError, match="same number of reference frames"):
        run(pipe, prompt=["a", "b"], image=None, video=clips)


def test_contradictory_pipeline_configuration():
    with pytest.raises(ValueError, match="num_cond_frames"):
        tiny.pipeline(num_cond_frames=4)


_FRESH = """
import sys, torch, cinetok
from diffusers import DiffusionPipeline
pipes = cinetok.SeerPipeline.from_pretrained(sys.argv[1]), DiffusionPipeline.from_pretrained(sys.argv[1])
assert all(type(pipe) is cinetok.SeerPipeline for pipe in pipes)
assert pipes[0].unet.down_blocks[0].resnets[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(7))
frames = [
    pipe(
        "close book", image, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).frames
    for pipe in pipes
]
assert torch.equal(frames[0], frames[1])
torch.save(frames[0], sys.argv[2])
"""


def fresh_process_frames(folder, tmp_path):
    subprocess.run([sys.executable, "-c", _SHIM + _FRESH, str(folder), str(tmp_path / "frames.pt")], check=True)
    return torch.load(tmp_path / "frames.pt", weights_only=True)


_SHIM = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torchvision_shim
torchvision_shim.install()
"""


def test_save_and_load_in_a_fresh_process(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["unet"] == ["cinetok", "SeerUNet3DConditionModel"]
    assert index["text_decomposer"] == ["cinetok", "SeerTextDecomposer"]
    assert index["scheduler"] == ["cinetok", "SeerDDIMScheduler"]
    assert (index["num_frames"], index["num_cond_frames"], index["resolution"]) == (tiny.FRAMES, 1, tiny.SIZE)
    torch.testing.assert_close(fresh_process_frames(tmp_path / "pipe", tmp_path), run(pipe), atol=1e-5, rtol=1e-4)


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

    image = image_unet(block_out_channels=(64, 64, 64, 64))
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
    image = image_unet()
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
    expected = image_unet(block_out_channels=(64, 64, 64, 64)).state_dict()
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
