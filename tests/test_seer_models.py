"""Seer's models: recorded numbers, released names, attention, U-Net, text decomposer, scheduler, and their bad input.

The parametrised suites cover the rest."""

from pathlib import Path

import pytest
import run_goldens
import run_manifests
import torch
from conftest import SHARED
from golden_kinds import load_runners
from model_cases import seer as tiny

from cinetok import SeerDDIMScheduler, SeerTextDecomposer, SeerUNet3DConditionModel
from cinetok.conversion import seer as conversion
from cinetok.modeling.seer.attention_seer import SeerRotaryEmbedding, from_windows, to_windows, window_shape
from cinetok.modeling.seer.unet_seer import InflatedConv2d

GOLDENS = Path(__file__).parent / "goldens" / "seer"


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
    where = torch.arange(3 * 8 * 4).view(3, 8, 4), (4, 4)
    before = attention(tokens, *where).view_as(tokens)
    tokens[0, 1, 2, 3] += 1.0  # frame 1, row 2, column 3
    changed = (attention(tokens, *where).view_as(tokens) - before).abs().amax(-1)[0] > 1e-6
    assert not changed[0].any()
    assert not changed[1, :2].any() and not changed[1, 2, :3].any()  # earlier in raster order
    assert changed[1, 2, 3] and changed[1, 3].all() and changed[2, :4].all()
    assert not changed[:, 4:].any()  # another window


def test_slabs_change_nothing(monkeypatch):
    unet, inputs = tiny.unet(), tiny.unet_inputs(2)
    with torch.no_grad():
        whole = unet(**inputs).sample
        monkeypatch.setattr("cinetok.modeling.cpu_layers._SLAB_TOKENS", 1)
        monkeypatch.setattr("cinetok.modeling.cpu_layers._SLAB_ELEMENTS", 2**13)
        parts = unet(**inputs).sample
    assert torch.allclose(parts, whole, atol=1e-5)
    assert torch.allclose(unet(**inputs).sample, whole, atol=1e-5)  # recording gradients: in one piece


def test_all_frames_as_reference_frames():
    unet, inputs = tiny.unet(), tiny.unet_inputs(1) | {"num_cond_frames": 3}
    with torch.no_grad():
        fast = unet(**inputs).sample
    assert torch.allclose(fast, unet(**inputs).sample, atol=1e-5)


@pytest.mark.parametrize("heads, width", [(8, 24), (2, 70)])
def test_odd_head_widths(heads, width):
    decomposer = tiny.scramble(
        SeerTextDecomposer(
            num_frames=3, num_layers=1, hidden_size=width, num_attention_heads=heads, cross_attention_dim=width
        )
    )
    context = torch.randn(1, 5, width)
    with torch.no_grad():
        fast = decomposer(context)[0]
    assert torch.allclose(fast, decomposer(context)[0], atol=1e-5) and torch.isfinite(fast).all()


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


@torch.no_grad()
def test_one_frame_reproduces_the_image_unet():
    image = tiny.image_unet()
    video = SeerUNet3DConditionModel.from_unet2d(image, rotary_angle_dtype="float16")
    assert video.config.rotary_angle_dtype == "float16" and not video.training
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, tiny.TEXT_DIM)
    expected = image(sample, 30, text).sample
    torch.testing.assert_close(
        video(sample[:, :, None], 30, text[:, None]).sample[:, :, 0], expected, atol=5e-4, rtol=1e-4
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
        SeerUNet3DConditionModel.from_unet2d(tiny.image_unet(**change))


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
