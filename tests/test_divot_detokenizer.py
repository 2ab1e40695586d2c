"""Divot's tokenizer, de-tokenizer and reconstruction: recorded numbers, manifests, sampling, bad input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from card_snippets import run_card
from conftest import SHARED
from golden_kinds import find_cases, load_runners
from manifest_files import load as load_manifests
from model_cases import divot as cases
from PIL import Image
from run_goldens import run_case
from run_manifests import check_manifest

import cinetok
from cinetok import DivotDDIMScheduler, DivotUNet3DConditionModel
from cinetok.conversion import find_release
from cinetok.model_cards import render_card
from cinetok.modeling.divot.modeling_divot_tokenizer import resize_for_clip
from cinetok.modeling.divot.video_processing_divot import clip_positions, comprehension_indices
from cinetok.pipelines.divot.detokenizing import decode_features, denoise, rescale_guidance

GOLDENS = Path(__file__).parent / "goldens" / "divot"
KINDS = {"tokenizer", "unet", "detokenizer_ddim", "image_proj_resampler", "noise_schedule", "pixel_preprocessing"}
KINDS |= {"frame_sampling", "vae"}


def _mine(folders):
    return [path for path in find_cases(folders) if json.loads((path / "case.json").read_text())["kind"] in KINDS]


def _check_case(path):
    load_runners("divot")
    case = run_case(path)
    assert case.rows
    assert not [f"{row.name}: {row.max_abs:.2e} {row.note}" for row in case.rows if not row.passed]


@pytest.mark.parametrize("path", _mine([GOLDENS]), ids=lambda path: path.name)
def test_committed_goldens(path):
    _check_case(path)


@pytest.mark.shared
@pytest.mark.parametrize("path", _mine([SHARED / "goldens" / "divot"]), ids=lambda path: path.name)
def test_shared_goldens(path):
    _check_case(path)


# ---- released sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["Divot_tokenizer", "CLIP_ViT_H_14_open_clip", "Divot_detokenizer_stage1", "Divot_detokenizer_stage2"]
)
def test_manifest(tmp_path, name):
    path = tmp_path / "divot" / f"{name}.json"
    path.parent.mkdir()
    path.write_text(json.dumps(load_manifests("divot")[name]))
    problems, _ = check_manifest(path)
    assert not problems


def test_released_unet_on_meta():
    with torch.device("meta"):
        unet = DivotUNet3DConditionModel()
        sample, context = torch.empty(1, 4, 16, 32, 32), torch.empty(1, 125, 1024)
        with torch.no_grad():
            prediction = unet(sample, torch.empty(1), context).sample
    assert prediction.shape == sample.shape
    assert sum(parameter.numel() for parameter in unet.parameters()) == 1_438_843_476


def test_released_tokenizer_on_meta():
    with torch.device("meta"):
        model = cinetok.DivotTokenizerModel(cinetok.DivotTokenizerConfig())
        with torch.no_grad():
            features = model(torch.empty(2, 5, 3, 224, 224)).features
    assert features.shape == (2, 64, 256)
    assert sum(parameter.numel() for parameter in model.vision_model.parameters()) == 630_766_080


# ---- U-Net -------------------------------------------------------------------------------------------------------


def _unet_inputs(batch=2):
    return cases._unet_inputs(batch)


@torch.no_grad()
def test_every_input_of_the_unet_matters():
    unet, inputs = cases.unet(), _unet_inputs()
    base = unet(**inputs).sample
    for name, changed in (
        ("sample", inputs["sample"].flip(-1)),
        ("timestep", inputs["timestep"] + 300),
        ("fs", inputs["fs"] + 5),
    ):
        assert (unet(**(inputs | {name: changed})).sample - base).abs().max() > 1e-3, name
    for token in (0, 3, 4, 9):  # on both sides of the split between text and image tokens
        context = inputs["encoder_hidden_states"].clone()
        context[:, token] += 3.0
        assert (unet(**(inputs | {"encoder_hidden_states": context})).sample - base).abs().max() > 1e-4, token
    swapped = inputs["sample"][:, :, [1, 0, 2, 3]]
    assert not torch.allclose(unet(**(inputs | {"sample": swapped})).sample[:, :, [1, 0, 2, 3]], base, atol=1e-3)


@torch.no_grad()
def test_context_projected_once_equals_context_per_call():
    unet, inputs = cases.unet(), _unet_inputs()
    expected = unet(**inputs).sample
    context = inputs.pop("encoder_hidden_states")
    key_values = unet.project_context(context, inputs["sample"].shape[2])
    assert torch.equal(unet(**inputs, context_key_values=key_values).sample, expected)


@torch.no_grad()
def test_per_frame_image_tokens():
    """4 text tokens + 3 per frame: each frame sees its own; a change concerns (before time mixes) that one only."""
    unet = cases.unet()
    attention = unet.down_blocks[0].attentions[0]
    context = torch.randn(1, 4 + 3 * 4, cases.CONTEXT_DIM)
    changed = context.clone()
    changed[:, 4 + 3 * 2 : 4 + 3 * 3] += 1.0  # the tokens of frame 2
    hidden = torch.randn(4, 16, 4, 4)
    first, second = (attention(hidden, attention.project_context(c, 4)) for c in (context, changed))
    difference = (first - second).abs().amax((1, 2, 3))
    assert difference[2] > 1e-3 and difference[[0, 1, 3]].max() < 1e-6


def test_unet_gradient_checkpointing_is_exact():
    unet, inputs = cases.unet().train(), _unet_inputs()
    for module in unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    gradients = []
    for enable in (False, True):
        unet.zero_grad()
        if enable:
            unet.enable_gradient_checkpointing()
        unet(**inputs).sample.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in unet.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients[0].items() if name.endswith("weight"))


def test_unet_bad_input():
    unet, inputs = cases.unet(), _unet_inputs()
    with pytest.raises(ValueError, match="exactly one"):
        unet(inputs["sample"], 1)
    with pytest.raises(ValueError, match="divisible by 2"):
        unet(**(inputs | {"sample": torch.zeros(2, 4, 4, 7, 8)}))
    with pytest.raises(ValueError, match="expected"):
        unet(**(inputs | {"sample": torch.zeros(2, 5, 4, 8, 8)}))
    with pytest.raises(ValueError, match="num_tokens, 20"):
        unet(**(inputs | {"encoder_hidden_states": torch.zeros(2, 10, 21)}))
    with pytest.raises(ValueError, match="1 conditions for a batch of 2"):
        unet(**(inputs | {"encoder_hidden_states": torch.zeros(1, 10, 20)}))
    with pytest.raises(ValueError, match="attention_levels"):
        cases.unet(attention_levels=[True])
    with pytest.raises(ValueError, match="heads"):
        cases.unet(attention_head_dim=5)
    with pytest.raises(ValueError, match="norm_num_groups"):
        cases.unet(norm_num_groups=7)


# ---- tokenizer ---------------------------------------------------------------------------------------------------


def test_blur_before_shrinking():
    """Against a dense product with explicit reflected indices; the axes shrink by different factors."""
    height, width, size = 90, 70, 32
    image = torch.rand(1, 1, height, width)

    def matrix(length):
        sigma = max((length / size - 1) / 2, 0.001)
        taps = int(max(4 * sigma, 3))
        taps += 1 - taps % 2
        result = torch.zeros(length, length)
        for row in range(length):
            weights = torch.exp(-((torch.arange(taps) - taps // 2).float() ** 2) / (2 * sigma**2))
            for offset, weight in zip(range(-(taps // 2), taps // 2 + 1), weights / weights.sum()):
                column = abs(row + offset)
                column = column if column < length else 2 * (length - 1) - column
                result[row, column] += weight
        return result

    blurred = matrix(height) @ image[0, 0] @ matrix(width).T
    expected = torch.nn.functional.interpolate(blurred[None, None], (size, size), mode="bicubic", align_corners=True)
    assert torch.allclose(resize_for_clip(image, size), expected, atol=1e-5)
    assert resize_for_clip(image[..., :32, :32], 32).equal(image[..., :32, :32])


@torch.no_grad()
def test_tokenizer_sees_every_frame_and_its_order():
    model = cases.tokenizer()
    clip = cases._tokenizer_inputs(1)["pixel_values_videos"]
    base = model(clip).features
    for frame in range(5):
        changed = clip.clone()
        changed[:, frame] = changed[:, frame].flip(-1)
        assert (model(changed).features - base).abs().max() > 1e-4, frame
    assert not torch.allclose(model(clip.flip(1)).features, base, atol=1e-4)


def test_tokenizer_bad_input():
    model = cases.tokenizer()
    with pytest.raises(ValueError, match="exactly 5 frames"):
        model(torch.zeros(1, 4, 3, 64, 64))
    with pytest.raises(ValueError, match="expected"):
        model(torch.zeros(5, 3, 64, 64))
    with pytest.raises((ValueError, TypeError), match="heads"):
        cases.tokenizer(num_attention_heads=5)
    clip = torch.zeros(1, 5, 3, 64, 64)
    with pytest.raises(TypeError, match="uint8"):
        model(clip.to(torch.uint8))
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN"):
            model(torch.full_like(clip, wrong))
    with pytest.raises(ValueError, match="no pixel"):
        model(clip[:0])
    with pytest.raises(ValueError, match="1 x 200"):
        model(torch.zeros(1, 5, 3, 1, 200))


# ---- frames ------------------------------------------------------------------------------------------------------


def test_clip_choice():
    assert clip_positions() == [0, 4, 8, 12, 15]
    assert comprehension_indices(16, 8.0) == [[0, 4, 8, 12, 15]]
    whole = comprehension_indices(1000, 8.0, max_clips=None)
    assert len(whole) == 63 and whole[1][0] == 16 and whole[-1][-1] < 1000
    assert clip_positions(4, 0) == [0, 1, 2, 3]
    # Parts are whole numbers of frames; those that are a little shorter than a clip are used entirely.
    assert comprehension_indices(1310, 30.0)[2] == [130, 145, 160, 175, 186]
    assert comprehension_indices(1199, 29.97)[1] == [59, 73, 88, 103, 114]
    assert comprehension_indices(1199, 30.0)[1] == [60, 75, 90, 105, 116]  # not enough for 20: consecutive clips
    with pytest.raises(ValueError, match="no frames"):
        comprehension_indices(0, 8.0)
    with pytest.raises(ValueError, match="video_fps"):
        comprehension_indices(10, 0.0)


def test_processor_reads_files_and_arrays_alike(tmp_path):
    video = cases.video(0, num_frames=40).numpy()
    cinetok.write_video(tmp_path / "clip.mp4", video, fps=16)
    clip = cinetok.read_video(tmp_path / "clip.mp4")
    processor = cinetok.DivotVideoProcessor(size=32, clip_selection="all")
    by_path = processor(tmp_path / "clip.mp4", return_metadata=True)
    by_clip, by_array = processor(clip), processor(clip.frames, video_fps=16)
    assert by_path.pixel_values_videos.shape == (2, 5, 3, 32, 32) and by_path.num_clips.tolist() == [2]
    assert by_path.pixel_values_videos.equal(by_clip.pixel_values_videos)
    assert by_path.pixel_values_videos.equal(by_array.pixel_values_videos)
    assert by_path.video_metadata[0]["num_output_frames"] == 20
    images = [Image.fromarray(frame) for frame in clip.frames]
    assert processor(images, video_fps=16).pixel_values_videos.equal(by_clip.pixel_values_videos)
    still = processor(images=images[0]).pixel_values_videos
    assert still.shape == (1, 5, 3, 32, 32) and still[0, 0].equal(still[0, 4])
    assert still[0, 0].equal(by_clip.pixel_values_videos[0, 0])


def test_processor_bad_input(tmp_path):
    processor, video = cinetok.DivotVideoProcessor(size=32), cases.video(0)
    with pytest.raises(ValueError, match="too few frames: the video has 12"):
        processor(video[:12], clip_selection="first")
    with pytest.raises(ValueError, match="clip_selection"):
        processor(video, clip_selection="some")
    with pytest.raises(ValueError, match="videos or images"):
        processor()
    with pytest.raises(ValueError, match="empty"):
        processor([])
    with pytest.raises(ValueError, match="NaN"):
        processor(torch.full((16, 8, 8, 3), float("nan")))
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        processor(torch.full((16, 8, 8, 3), 2.0))
    with pytest.raises(ValueError, match="expected"):
        processor(torch.zeros(16, 3, 8, 8))
    with pytest.raises(ValueError, match="differ in size"):
        processor([Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))])
    with pytest.raises(TypeError):
        processor(3)
    with pytest.raises(ValueError, match="max_clips"):
        processor(video, max_clips=0)
    with pytest.raises(ValueError, match="video_fps=0"):
        processor(video, video_fps=0)
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    with pytest.raises(cinetok.VideoReadError, match="broken.mp4"):
        processor(tmp_path / "broken.mp4")


# ---- sampling ----------------------------------------------------------------------------------------------------


def test_scheduler_steps():
    scheduler = DivotDDIMScheduler()
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == list(range(981, 0, -20))
    scheduler.set_timesteps(3)  # the original would visit step 1000 of 1000
    assert scheduler.timesteps.tolist() == [667, 334, 1]
    assert scheduler.alphas_cumprod[-1] == 0
    for wrong in (0, 1001):
        with pytest.raises(ValueError, match="num_inference_steps"):
            scheduler.set_timesteps(wrong)
    with pytest.raises(ValueError, match="not an integer"):
        scheduler.set_timesteps(2.5)
    with pytest.raises(ValueError, match="not one of"):
        scheduler.step(torch.zeros(1), 5, torch.zeros(1))
    for wrong in (-0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match="eta="):
            scheduler.step(torch.zeros(1), 1, torch.zeros(1), eta=wrong)
    with pytest.raises(ValueError, match="timestep_spacing"):
        DivotDDIMScheduler(timestep_spacing="leading")
    with pytest.raises(ValueError, match="set_timesteps"):
        DivotDDIMScheduler().step(torch.zeros(1), 1, torch.zeros(1))


def test_scheduler_repeats_timesteps_and_leaves_out_impossible_ones():
    scheduler = DivotDDIMScheduler(timestep_spacing="quad")
    scheduler.set_timesteps(60)  # ..., 2, 1, 1: at the second 1 the table gives alpha_previous of the first step
    assert scheduler.timesteps.tolist()[-4:] == [3, 1, 1, 1]
    first, second = (scheduler.step_coefficients(1, 1.0, index) for index in (57, 58))
    assert first == second and first[0] == first[1] and first[2] == 0
    last = scheduler.step_coefficients(1, 1.0, 59)
    assert last[1] > last[0] and last[2] > 0
    scheduler.set_timesteps(30)
    assert scheduler.timesteps.tolist()[-2:] == [1, 1]
    v, x = torch.ones(1, 1), torch.ones(1, 1)
    scheduler.set_begin_index(28)
    results = [scheduler.step(v, 1, x, variance_noise=torch.ones(1, 1), return_dict=False)[0].item() for _ in range(2)]
    assert results[0] != results[1] and scheduler.step_index == 30 and scheduler.begin_index == 28
    trailing = DivotDDIMScheduler(timestep_spacing="uniform_trailing")
    for steps in (61, 103, 121, 122, 499):  # rounding adds a step -1 in the original
        trailing.set_timesteps(steps)
        assert len(trailing.timesteps) == steps and trailing.timesteps.min() >= 0
        assert trailing.step_coefficients(int(trailing.timesteps[-2]), 1.0)[2] >= 0


def test_scheduler_rounds_as_the_original():
    scheduler = DivotDDIMScheduler(timestep_spacing="uniform_trailing")
    scheduler.set_timesteps(50)
    # At 999 alpha is 0, so everything but the noise cancels: up to float32, in which the original computes.
    step = scheduler.step(torch.zeros(1), 999, torch.ones(1), variance_noise=torch.zeros(1), return_dict=False)[0]
    assert step.item() == pytest.approx(2**-12, rel=1e-6)
    scheduler = DivotDDIMScheduler()
    scheduler.set_timesteps(1)
    assert scheduler.step_coefficients(1, 1.0)[2] == float(np.float16(0.0220947))


def test_scheduler_finds_a_known_sample():
    """With the true v at every step and no noise the sampler ends where it should (up to the rounded table)."""
    scheduler = DivotDDIMScheduler(timestep_spacing="uniform_trailing")
    scheduler.set_timesteps(50)
    generator = torch.Generator().manual_seed(0)
    truth, noise = (torch.randn(2, 4, 3, 4, 4, generator=generator) for _ in range(2))
    x = noise
    for t in scheduler.timesteps:
        alpha = scheduler.alphas_cumprod[t]
        epsilon = (x - alpha.sqrt() * truth) / (1 - alpha).sqrt()
        v = alpha.sqrt() * epsilon - (1 - alpha).sqrt() * truth
        result = scheduler.step(v, t, x, eta=0.0)
        assert torch.allclose(result.pred_original_sample, truth, atol=1e-4)
        x = result.prev_sample
    assert (x - truth).abs().mean() < 0.05


@torch.no_grad()
def test_context_and_unconditional_features_are_computed_once(monkeypatch):
    pipeline = cases.pipeline()
    counts = {"tokenizer": 0, "context": 0}
    forward, project = pipeline.video_tokenizer.forward, pipeline.unet.project_context
    monkeypatch.setattr(
        pipeline.video_tokenizer,
        "forward",
        lambda *a, **k: counts.__setitem__("tokenizer", counts["tokenizer"] + 1) or forward(*a, **k),
    )
    monkeypatch.setattr(
        pipeline.unet,
        "project_context",
        lambda *a, **k: counts.__setitem__("context", counts["context"] + 1) or project(*a, **k),
    )
    pipeline(cases.video(0, num_frames=16), num_inference_steps=5, output_type="latent")
    assert counts == {"tokenizer": 2, "context": 1}


@torch.no_grad()
def test_guidance():
    unet, scheduler = cases.unet(), DivotDDIMScheduler()
    context, uncond, noise = torch.randn(2, 10, 20), torch.randn(1, 10, 20), torch.randn(2, 4, 4, 8, 8)
    options = {"num_inference_steps": 2, "eta": 0.0}
    plain = denoise(unet, scheduler, context, None, noise, **options)
    assert denoise(unet, scheduler, context, uncond, noise, guidance_scale=1.0, **options).equal(plain)
    guided = denoise(unet, scheduler, context, uncond, noise, guidance_scale=3.0, **options)
    assert not torch.allclose(guided, plain, atol=1e-3)
    x, y = torch.randn(2, 4, 3), 5 * torch.randn(2, 4, 3)
    assert torch.allclose(rescale_guidance(y, x, 1.0).std((1, 2)), x.std((1, 2)), atol=1e-5)
    assert rescale_guidance(y, x, 0.0).equal(y)


def test_decode_features_bad_input():
    parts = (cases.unet(), cases.vae(), cases.resampler(), DivotDDIMScheduler())
    good = torch.zeros(1, cases.FEATURES, cases.FEATURE_DIM)
    with pytest.raises(ValueError, match="expected .batch, 8, 12"):
        decode_features(*parts, good[:, :7])
    with pytest.raises(ValueError, match="NaN"):
        decode_features(*parts, good * float("nan"))
    with pytest.raises(ValueError, match="output_type"):
        decode_features(*parts, good, output_type="mp4")
    with pytest.raises(ValueError, match="2 generators for 1"):
        decode_features(*parts, good, generator=[torch.Generator(), torch.Generator()])
    with pytest.raises(ValueError, match="callback"):
        decode_features(*parts, good, callback_on_step_end_tensor_inputs=["prompt"])
    with pytest.raises(ValueError, match="multiples of 2"):
        decode_features(*parts, good, height=17)
    with pytest.raises(ValueError, match="latents"):
        decode_features(*parts, good, latents=torch.zeros(1, 4, 16, 4, 4))
    with pytest.raises(ValueError, match="num_inference_steps"):
        decode_features(*parts, good, num_inference_steps=0)
    with pytest.raises(ValueError, match="expected"):
        parts[2](good[..., :5])
    with pytest.raises(TypeError, match="ndarray"):
        decode_features(*parts, good.numpy())
    with pytest.raises(ValueError, match="expected"):
        decode_features(*parts, good[:0])
    for match, options in (
        ("unconditional_features hold NaN", {"unconditional_features": good * float("nan")}),
        ("unconditional_features have shape", {"unconditional_features": good[:, 1:]}),
        ("eta", {"eta": float("nan")}),
        ("eta", {"eta": -1.0}),
        ("eta", {"eta": 2.0}),
        ("guidance_scale", {"guidance_scale": float("nan")}),
        ("guidance_rescale", {"guidance_rescale": float("nan")}),
        ("guidance_rescale", {"guidance_rescale": -0.1}),
        ("num_frames=0", {"num_frames": 0}),
        ("not an integer", {"num_inference_steps": 2.5}),
        ("at most 1000", {"num_inference_steps": 1001}),
    ):
        with pytest.raises(ValueError, match=match):
            decode_features(*parts, good, **options)


# ---- pipeline ----------------------------------------------------------------------------------------------------


def _run(pipeline, video, seed=0, **options):
    generator = [torch.Generator().manual_seed(seed + i) for i in range(len(video))]
    options = {"num_inference_steps": 2, "output_type": "pt", "clip_batch_size": 2} | options
    return pipeline(video, generator=generator, **options)


def test_whole_videos_of_any_length():
    pipeline = cases.pipeline()
    lengths = [5, 16, 40]
    videos = [cases.video(i, num_frames=n) for i, n in enumerate(lengths)]
    together = _run(pipeline, videos).frames
    assert [len(video) for video in together] == lengths
    for i, video in enumerate(videos):
        alone = _run(pipeline, [video], seed=i, clip_batch_size=3).frames[0]
        assert torch.allclose(alone, together[i], atol=1e-4)
    slow = pipeline(videos[2], video_fps=4.0, num_inference_steps=1, output_type="np").frames
    assert slow.shape == (1, 80, 16, 16, 3) and slow.min() >= 0 and slow.max() <= 1
    first = pipeline(videos[2], clip_selection="first", num_inference_steps=1, output_type="pil").frames
    assert len(first) == 1 and len(first[0]) == 16 and first[0][0].size == (16, 16)


def test_the_video_matters_and_features_can_be_given():
    pipeline = cases.pipeline()
    video = cases.video(0, num_frames=32)
    result = _run(pipeline, [video])
    assert not torch.allclose(result.frames, _run(pipeline, [video.flip(1)]).frames, atol=1e-3)
    again = pipeline(
        features=result.features,
        clips_per_video=[2],
        num_inference_steps=2,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.allclose(again.frames, result.frames, atol=1e-5)
    assert pipeline(features=result.features, num_inference_steps=1, output_type="pt").frames.shape[:2] == (2, 16)
    frames, features = _run(pipeline, [video], return_dict=False)
    assert torch.equal(features, result.features) and torch.equal(frames, result.frames)


def test_callback_and_progress():
    pipeline, seen = cases.pipeline(), []

    def stop_noise(pipe, step, timestep, tensors):
        seen.append((step, timestep, sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else None

    video = [cases.video(0, num_frames=16)]
    plain = _run(pipeline, video, output_type="latent").frames
    changed = _run(pipeline, video, output_type="latent", callback_on_step_end=stop_noise).frames
    assert [entry[0] for entry in seen] == [0, 1] and seen[0][2] == ["latents"] and seen[0][1] == 501
    assert changed.abs().max() == 0 and plain.abs().max() > 0


def test_pipeline_bad_input():
    pipeline, video = cases.pipeline(), cases.video(0)
    features = torch.zeros(2, cases.FEATURES, cases.FEATURE_DIM)
    for match, arguments in (
        ("either a video or features", {}),
        ("either a video or features", {"video": video, "features": features}),
        ("do not add up", {"features": features, "clips_per_video": [3]}),
        ("frames_per_video", {"features": features, "frames_per_video": [16]}),
        ("0 frames", {"features": features, "clips_per_video": [2], "frames_per_video": [0]}),
        ("give 17 to 32", {"features": features, "clips_per_video": [2], "frames_per_video": [1000]}),
        ("guidance_scale", {"features": features, "guidance_scale": float("nan")}),
        ("expected", {"features": features[:, 1:]}),
        ("NaN", {"features": features / 0}),
        ("generators for 2 videos", {"features": features, "generator": [torch.Generator()]}),
        ("too few frames", {"video": video[:7], "clip_selection": "first"}),
        ("clip_batch_size", {"video": video, "clip_batch_size": 0}),
        ("output_type", {"video": video, "output_type": "gif"}),
        ("num_inference_steps", {"video": video, "num_inference_steps": 0}),
    ):
        with pytest.raises(ValueError, match=match):
            pipeline(**arguments)


def test_parts_in_other_dtypes():
    pipeline = cases.pipeline()
    expected = _run(pipeline, [cases.video(0, num_frames=16)], num_inference_steps=1).frames
    pipeline.unet.to(torch.bfloat16)
    pipeline.video_tokenizer.to(torch.bfloat16)
    frames = _run(pipeline, [cases.video(0, num_frames=16)], num_inference_steps=1).frames
    assert frames.dtype == torch.float32 and torch.isfinite(frames).all()
    assert 0 < (frames - expected).abs().mean() < 0.1


_FRESH = """
import sys
sys.path.insert(0, {tests!r})
from torchvision_shim import install
install()
import torch
torch.set_num_threads(1)
from diffusers import DiffusionPipeline
import cinetok
pipeline = DiffusionPipeline.from_pretrained({folder!r})
assert type(pipeline) is cinetok.DivotReconstructionPipeline
video = torch.load({video!r}, weights_only=True)
frames = pipeline(video, num_inference_steps=2, generator=torch.Generator().manual_seed(5), output_type="pt").frames
torch.save(frames, {result!r})
"""


def test_saved_pipeline_in_a_fresh_process(tmp_path):
    pipeline, video = cases.pipeline(), cases.video(3)
    pipeline.save_pretrained(tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["unet"] == ["cinetok", "DivotUNet3DConditionModel"] and index["scheduler"][0] == "cinetok"
    torch.save(video, tmp_path / "video.pt")
    script = _FRESH.format(
        tests=str(Path(__file__).parent),
        folder=str(tmp_path / "pipeline"),
        video=str(tmp_path / "video.pt"),
        result=str(tmp_path / "frames.pt"),
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = pipeline(
        video, num_inference_steps=2, generator=torch.Generator().manual_seed(5), output_type="pt"
    ).frames
    assert torch.allclose(torch.load(tmp_path / "frames.pt", weights_only=True), expected, atol=1e-5)


def test_cards_run(tmp_path):
    """The snippets of the tokenizer's and a de-tokenizer's card, with tiny models in the place of the released ones."""
    pipeline = cases.pipeline()
    pipeline.save_pretrained(tmp_path / "divot_detokenizer_stage1")
    pipeline.video_tokenizer.save_pretrained(tmp_path / "divot_tokenizer")
    pipeline.video_processor.save_pretrained(tmp_path / "divot_tokenizer")
    cinetok.write_video(tmp_path / "clip.mp4", cases.video(0, num_frames=40).numpy(), fps=8)
    texts = [render_card(find_release(name)) for name in ("divot_tokenizer", "divot_detokenizer_stage1")]
    printed = run_card("\n".join(texts), tmp_path)
    assert "torch.Size([3, 8, 12])" in printed
    assert len(cinetok.read_video(tmp_path / "reconstruction.mp4").frames) == 16


def test_images_are_truncated_to_bytes():
    from cinetok.pipelines.divot.detokenizing import to_images

    frame = torch.full((1, 3, 2, 2), 0.999 * 200 / 255)
    assert np.asarray(to_images(frame)[0]).max() == 199
