"""Video-LaVIT's tokenizers, de-tokenizers, reconstruction pipeline and image processor."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from model_cases import video_lavit as cases
from moving_clips import moving_clip
from python_process import run_python
from run_goldens import run_case
from run_manifests import check_manifest

from cinetok import (
    VideoLavitImageProcessor,
    VideoLavitMotionTokenizerConfig,
    VideoLavitReconstructionPipeline,
    VideoLavitVisualTokenizerConfig,
)
from cinetok.modeling.video_lavit.modeling_visual_tokenizer import sample_gumbel, smoothed_softmax
from cinetok.modeling.video_lavit.unet_video_lavit import _nearest_locations
from cinetok.pipelines.video_lavit import detokenizing

GOLDENS = Path(__file__).parent / "goldens" / "video_lavit"
SHARED = Path(__file__).resolve().parents[2] / "shared"
OWN_KINDS = {
    "eva_encoder", "image_detokenizer", "image_preprocess", "keyframe_selection", "keyframe_token_decoder",
    "motion_bitstream", "motion_condition_encoder", "motion_map_demo", "motion_map_table", "motion_tokenizer",
    "unet3d_motion", "video_detokenizer", "visual_tokenizer",
}  # fmt: skip


def own_cases(folder):
    found = {path.parent: json.loads(path.read_text())["kind"] for path in sorted(folder.rglob("case.json"))}
    return [path for path, kind in found.items() if kind in OWN_KINDS]


def assert_passes(case):
    assert case.rows and all(row.passed for row in case.rows), [row for row in case.rows if not row.passed]


@pytest.mark.parametrize("path", own_cases(GOLDENS), ids=lambda path: path.name)
def test_committed_golden(path):
    assert_passes(run_case(path))


def test_every_kind_is_committed():
    assert {json.loads((path / "case.json").read_text())["kind"] for path in own_cases(GOLDENS)} == OWN_KINDS


@pytest.mark.shared
@pytest.mark.parametrize("path", own_cases(SHARED / "goldens/video_lavit"), ids=lambda path: path.name)
def test_original_golden(path):
    assert_passes(run_case(path))


@pytest.mark.shared
@pytest.mark.parametrize("path", sorted((SHARED / "manifests/video_lavit").glob("*.json")), ids=lambda path: path.stem)
def test_manifest(path):
    problems, _ = check_manifest(path)
    assert not problems


@pytest.fixture(scope="module")
def visual():
    return cases.tiny("visual_tokenizer", {**cases.VISUAL, "projection_dim": 40})


@pytest.fixture(scope="module")
def motion():
    return cases.tiny("motion_tokenizer", cases.MOTION)


# ---------------------------------------------------------------------------------------------------- visual tokenizer


@torch.no_grad()
def test_visual_tokens_are_the_kept_positions(visual):
    inputs = cases.visual_inputs(3)
    output = visual.encode(**inputs)
    assert output.indices.shape == (3, 16) and output.quantized.shape == (3, 16, 8)
    counts = output.keep_mask.sum(1)
    assert torch.equal(counts, output.num_tokens) and len(set(counts.tolist())) > 1
    for row, codes, count in zip(output.indices, output.quantized, counts.tolist()):
        assert (row[:count] >= 0).all() and (row[count:] == -1).all()
        assert torch.equal(codes[:count], visual.quantize.embedding.weight[row[:count]])
        assert codes[count:].abs().sum() == 0
    features = visual.get_image_features(**inputs)
    assert [tuple(f.shape) for f in features] == [(n, 40) for n in counts.tolist()]


@torch.no_grad()
def test_generators_make_tokens_repeatable_and_independent_of_the_batch(visual):
    pixels = cases.rows((3, 56, 56), 3)
    first = visual.encode(pixels, generator=cases.generators(3))
    again = visual.encode(pixels, generator=cases.generators(3))
    assert torch.equal(first.indices, again.indices)
    single = visual.encode(pixels[1:2], generator=torch.Generator().manual_seed(1))
    assert torch.equal(single.indices[0], first.indices[1])
    other = visual.encode(pixels, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(other.keep_mask, first.keep_mask)
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        visual.encode(pixels, generator=cases.generators(2))


def test_gumbel_noise_is_standard():
    noise = sample_gumbel(torch.empty(400, 50, 2), torch.Generator().manual_seed(0))
    assert abs(noise.mean().item() - 0.5772) < 0.02 and abs(noise.var().item() - 1.6449) < 0.05


@torch.no_grad()
def test_everything_kept_and_everything_dropped(visual):
    pixels = cases.rows((3, 56, 56), 1)
    keep = torch.zeros(1, 16, 2)
    keep[..., 0] = 100.0
    kept, dropped = visual.encode(pixels, gumbel_noise=keep), visual.encode(pixels, gumbel_noise=-keep)
    assert kept.num_tokens.tolist() == [16] and dropped.num_tokens.tolist() == [0]
    assert (dropped.indices == -1).all() and torch.isfinite(dropped.merged_features).all()
    tie = torch.stack([-kept.keep_log_probs[..., 0], -kept.keep_log_probs[..., 1]], dim=-1)
    assert visual.encode(pixels, gumbel_noise=tie).keep_mask.all()  # a tie keeps


def test_smoothed_softmax_of_nothing_is_the_mean():
    scores = torch.randn(2, 5)
    torch.testing.assert_close(smoothed_softmax(scores, torch.zeros(5)), torch.full((2, 5), 0.2))
    torch.testing.assert_close(smoothed_softmax(scores, torch.ones(5)), scores.softmax(-1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_visual_decode_takes_lists_and_padded_tensors(visual):
    padded = visual.decode(torch.tensor([[3, 4, -1], [1, 2, 3]]))
    listed = visual.decode([[3, 4], [1, 2, 3]])
    assert torch.equal(padded.features, listed.features) and padded.num_tokens.tolist() == [2, 3]
    assert padded.features[0, 2].abs().sum() == 0


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([[64]], "code indices must lie in 0..63"),
        ([[-2, 1]], "code indices must lie in 0..63"),
        ([[1, -1, 2]], "-1 may only follow"),
        ([[-1, -1]], "1 to 16 visual codes"),
        ([list(range(17))], "1 to 16 visual codes"),
        ([1, 2], "must be"),
    ],
)
def test_visual_decode_refuses(visual, indices, message):
    with pytest.raises(ValueError, match=message):
        visual.decode(torch.tensor(indices))


def test_codes_and_generators_of_another_type_are_refused(visual, motion):
    for indices in (torch.zeros(1, 6), torch.zeros(1, 6, dtype=torch.bool)):
        with pytest.raises(TypeError, match="indices are whole numbers"):
            motion.decode(indices)
        for given in (indices, [indices[0]]):
            with pytest.raises(TypeError, match="indices are whole numbers"):
                visual.decode(given)
    for generator in (5, [5]):
        with pytest.raises(TypeError, match="generator must be a torch.Generator .* not int"):
            visual.encode(torch.zeros(1, 3, 56, 56), generator=generator)


def test_visual_encode_refuses(visual):
    for pixels in (torch.zeros(1, 3, 57, 56), torch.zeros(3, 56, 56), torch.zeros(1, 4, 3, 56, 56)):
        with pytest.raises(ValueError, match="pixel_values must be"):
            visual.encode(pixels)
    with pytest.raises(ValueError, match="gumbel_noise must be"):
        visual.encode(torch.zeros(1, 3, 56, 56), gumbel_noise=torch.zeros(1, 15, 2))
    plain = cases.tiny("visual_tokenizer", cases.VISUAL)
    with pytest.raises(ValueError, match="no projection"):
        plain.get_image_features(torch.zeros(1, 3, 56, 56))


@torch.no_grad()
def test_widths_that_halve_once_and_a_merger_of_its_own_width():
    sizes = {"hidden_size": 34, "num_attention_heads": 2, "merger_num_attention_heads": 2}
    model = cases.tiny("visual_tokenizer", {**cases.VISUAL, **sizes, "merger_intermediate_size": 50})
    assert model.causal_encoder.blocks[0].mlp.fc1.out_features == 50
    assert model.encoder.blocks[0].mlp.fc1.out_features == 64
    assert model.encode(**cases.visual_inputs(1)).merged_features.shape == (1, 16, 34)
    plain = cases.tiny("visual_tokenizer", cases.VISUAL)
    assert plain.causal_encoder.blocks[0].mlp.fc1.out_features == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 57}, "no multiple of patch_size"),
        ({"num_attention_heads": 5}, "no multiple of num_attention_heads"),
        ({"merger_num_attention_heads": 3}, "no multiple of merger_num_attention_heads"),
        ({"hidden_size": 33, "num_attention_heads": 3, "merger_num_attention_heads": 3}, "hidden_size 33 must be even"),
        ({"merger_intermediate_size": 0}, "merger_intermediate_size must be positive"),
        ({"codebook_size": 0}, "codebook_size must be positive"),
        ({"projection_dim": 0}, "projection_dim must be positive"),
        ({"hidden_size": "32"}, "hidden_size"),
    ],
)
def test_visual_config_refuses(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        VideoLavitVisualTokenizerConfig(**{**cases.VISUAL, **change})


# ---------------------------------------------------------------------------------------------------- motion tokenizer


@torch.no_grad()
def test_motion_round_trip_shapes_and_agreement(motion):
    maps = cases.rows((2, 24, 4, 8), 2)
    encoded = motion.encode(maps)
    assert encoded.indices.shape == (2, 3, 1, 2) and encoded.quantized.shape == (2, 4, 3, 1, 2)
    flat = motion.decode(encoded.indices.flatten(1)).reconstruction
    assert flat.shape == maps.shape
    torch.testing.assert_close(flat, motion.decode(encoded.indices).reconstruction, atol=0, rtol=0)
    torch.testing.assert_close(flat, motion.decode(quantized=encoded.quantized).reconstruction, atol=0, rtol=0)
    torch.testing.assert_close(flat, motion(maps).reconstruction, atol=0, rtol=0)
    raw = motion.to_raw_motion(flat, 5, 7)
    assert raw.shape == (2, 2, 24, 5, 7)
    torch.testing.assert_close(motion.to_raw_motion(flat, 4, 8), flat / 10)


def test_released_grid_is_135_codes():
    config = VideoLavitMotionTokenizerConfig()
    assert config.latent_shape == (3, 5, 9) and config.num_tokens == 135


def test_motion_training_moves_every_weight(motion):
    model = cases.tiny("motion_tokenizer", cases.MOTION).train()
    output = model(cases.rows((2, 24, 4, 8), 2))
    terms = output.reconstruction_loss + output.codebook_loss + output.commitment_loss
    torch.testing.assert_close(output.loss, terms)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_motion_tokenizer_learns():
    torch.manual_seed(0)
    model = cases.tiny("motion_tokenizer", {**cases.MOTION, "num_frames": 8}).train()
    maps = cases.rows((2, 8, 4, 8), 2) * 0.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        output = model(maps)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.reconstruction_loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"indices": torch.zeros(1, 6, dtype=torch.long), "quantized": torch.zeros(1, 4, 3, 1, 2)}, "exactly one"),
        ({"indices": torch.zeros(1, 5, dtype=torch.long)}, "a clip has 6 motion codes"),
        ({"indices": torch.zeros(1, 3, 2, 1, dtype=torch.long)}, "a clip has 6 motion codes"),
        ({"indices": torch.zeros(6, dtype=torch.long)}, "a clip has 6 motion codes"),
        ({"indices": torch.full((1, 6), 32)}, "code indices must lie in 0..31, got 32..32; ids of the language model"),
        ({"indices": torch.full((1, 6), -1)}, "code indices must lie in 0..31"),
        ({"quantized": torch.zeros(1, 3, 1, 2, 4)}, "quantized must be"),
    ],
)
def test_motion_decode_refuses(motion, options, message):
    with pytest.raises(ValueError, match=message):
        motion.decode(**options)


def test_motion_encode_refuses(motion):
    for shape in ((1, 2, 23, 4, 8), (1, 3, 24, 4, 8), (2, 24, 4, 8), (1, 2, 24, 8, 4)):
        with pytest.raises(ValueError, match="motion_values must be"):
            motion.encode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strides": [[1, 3, 3]]}, "triples of 1 and 2"),
        ({"num_attention_heads": 3}, "no multiple of num_attention_heads"),
        ({"height": 1}, "too small for strides"),
        ({"codebook_dim": 0}, "codebook_dim must be positive"),
    ],
)
def test_motion_config_refuses(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        VideoLavitMotionTokenizerConfig(**{**cases.MOTION, **change})


# ------------------------------------------------------------------------------------------------------ de-tokenizers


@torch.no_grad()
def test_keyframe_decoder_ignores_padding():
    model = cases.tiny("keyframe_decoder", cases.KEYFRAME_DECODER)
    codes = cases.rows((9, 8), 1)
    short = model(codes[:, :5], torch.tensor([5]))
    padded = model(codes, torch.tensor([5]))
    torch.testing.assert_close(short.prompt_embeds, padded.prompt_embeds)
    other = model(codes, torch.tensor([6]))
    assert (other.prompt_embeds - padded.prompt_embeds).abs().max() > 1e-4


def test_keyframe_decoder_refuses():
    model = cases.tiny("keyframe_decoder", cases.KEYFRAME_DECODER)
    for codes, counts, message in (
        (torch.zeros(1, 4, 7), torch.tensor([4]), "hidden_states must be"),
        (torch.zeros(1, 17, 8), torch.tensor([17]), "at most 16 codes"),
        (torch.zeros(2, 4, 8), torch.tensor([4]), "one number per image"),
    ):
        with pytest.raises(ValueError, match=message):
            model(codes, counts)


def test_motion_encoder_refuses():
    model = cases.tiny("motion_encoder", {**cases.MOTION_ENCODER, "num_frames": 4})
    assert model(torch.zeros(1, 2, 3, 8, 8)).sample.shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="positions for 4 frames, got 5"):
        model(torch.zeros(1, 2, 5, 8, 8))
    with pytest.raises(ValueError, match="motion must be"):
        model(torch.zeros(1, 5, 2, 8, 8))


def test_unet_refuses():
    model, inputs = cases.tiny("unet", cases.UNET), cases.unet_inputs(1)
    with pytest.raises(ValueError, match="encoder_hidden_states must be"):
        model(**{**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"][:, :3]})
    with pytest.raises(ValueError, match="multiples of 2"):
        model(**{**inputs, "sample": inputs["sample"][..., :7, :]})
    with pytest.raises(ValueError, match="square grid"):
        model(**{**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"][:, :, :15]})


@pytest.mark.parametrize("size", [(8, 12), (16, 16), (40, 72), (5, 9), (36, 64)])
def test_condition_is_interpolated_by_nearest_neighbour(size):
    condition = torch.arange(256.0).reshape(1, 256, 1)
    location = _nearest_locations(condition, *size)
    picked = torch.arange(256.0) if location is None else condition[0, location, 0]
    scale = (size[0] / 16, size[1] / 16)
    expected = torch.nn.functional.interpolate(condition.reshape(1, 1, 16, 16), scale_factor=scale, mode="nearest")
    assert expected.shape[-2:] == size and torch.equal(picked, expected.flatten())


@torch.no_grad()
def test_unet_checkpointing_gives_equal_gradients():
    model, inputs = cases.tiny("unet", cases.UNET), cases.unet_inputs(1)
    gradients = []
    for checkpointing in (False, True):
        (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
        model.train().zero_grad()
        with torch.enable_grad():
            model(**inputs).sample.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-4)


def test_vae_chunks_stay_inside_a_sample():
    vae = cases.tiny("vae", cases.VAE)
    latents = cases.rows((5, 4, 4, 6), 2)
    with torch.no_grad():
        both = detokenizing.decode_video(vae, latents, 3)
        one = detokenizing.decode_video(vae, latents[1:], 3)
        other = detokenizing.decode_video(vae, latents[1:], 5)
    torch.testing.assert_close(both[1:], one, atol=1e-5, rtol=1e-5)
    assert (one - other).abs().max() > 1e-4


# ----------------------------------------------------------------------------------------------------------- pipeline


@pytest.fixture(scope="module")
def pipeline():
    return cases.reconstruction_pipeline()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return moving_clip(tmp_path_factory.mktemp("clips"), 60)


def video_inputs(clip, **changes):
    inputs = {
        "video": clip,
        "height": cases.HEIGHT,
        "width": cases.WIDTH,
        "num_inference_steps": 1,
        "keyframe_num_inference_steps": 1,
        "motion_fps": 12,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(0),
    }
    return {**inputs, **changes}


@pytest.fixture(scope="module")
def plain_video(pipeline, clip):
    frames = pipeline(**video_inputs(clip)).frames
    assert frames.shape == (1, 24, 3, cases.HEIGHT, cases.WIDTH) and frames.min() >= 0 and frames.max() <= 1
    return frames


@pytest.mark.parametrize("change", [{"quantize_motion": True}, {"quantize_keyframe": True}, {"start": 24}])
def test_every_choice_of_source_matters(pipeline, clip, plain_video, change):
    assert (pipeline(**video_inputs(clip, **change)).frames - plain_video).abs().max() > 1e-3


def test_the_video_s_motion_and_keyframe_matter(pipeline, clip, plain_video):
    still = pipeline.motion_processor.read(clip, fps=12)
    still.vectors = [table[:0] for table in still.vectors]
    assert (pipeline(**video_inputs(still)).frames - plain_video).abs().max() > 1e-3
    assert (pipeline(**video_inputs(clip, image=cases.images(1))).frames - plain_video).abs().max() > 1e-3


@pytest.fixture(scope="module")
def plain_raw(pipeline):
    return pipeline(**cases.raw_inputs(1)).frames


@pytest.mark.parametrize(
    "change",
    [
        {"cond_on_ref_frame": False},
        {"guidance_scale": 6.0},
        {"min_guidance_scale": 2.0},
        {"fps": 12},
        {"motion_bucket_id": 30},
        {"noise_aug_strength": 0.5},
        {"decode_chunk_size": 2},
        {"num_inference_steps": 3},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_number_matters(pipeline, plain_raw, change):
    # One thread and one machine: equal arguments give equal bits, so any difference is the option's.
    assert not torch.equal(pipeline(**{**cases.raw_inputs(1), **change}).frames, plain_raw)


@pytest.mark.parametrize("name", ["image", "motion"])
def test_dropping_an_input_is_noticed(pipeline, name):
    inputs = cases.raw_inputs(1)
    plain = pipeline(**inputs).frames
    inputs = cases.raw_inputs(1)
    if name == "image":
        inputs["image"] = [1 - inputs["image"][0]]
    else:
        inputs["motion"] = inputs["motion"] * 0
    assert (pipeline(**inputs).frames - plain).abs().max() > 1e-2


def test_tokens_there_and_back(pipeline, clip):
    tokens = pipeline.tokenize([clip, clip], max_clips=2, generator=torch.Generator().manual_seed(3))
    clips = sum(tokens.num_clips)
    assert len(tokens.visual_indices) == clips and tokens.motion_indices.shape[0] == clips
    frames = pipeline(
        image_indices=tokens.visual_indices[:1],
        motion_indices=tokens.motion_indices[:1],
        height=cases.HEIGHT,
        width=cases.WIDTH,
        num_inference_steps=1,
        keyframe_num_inference_steps=1,
        output_type="np",
    ).frames
    assert frames.shape == (1, 24, cases.HEIGHT, cases.WIDTH, 3)


def test_output_types_and_callback(pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((pipe is pipeline, step, float(timestep)))
        return {"latents": tensors["latents"] * 0} if step == 1 else tensors

    inputs = {**cases.raw_inputs(1), "output_type": "latent", "callback_on_step_end": callback}
    latents = pipeline(**inputs).frames
    assert latents.shape == (1, cases.FRAMES, 4, 8, 12) and latents.abs().max() == 0
    assert [s[:2] for s in seen] == [(True, 0), (True, 1)]
    pictures = pipeline(**{**cases.raw_inputs(1), "output_type": "pil"}).frames
    assert isinstance(pictures[0][0], PIL.Image.Image) and pictures[0][0].size == (cases.WIDTH, cases.HEIGHT)
    assert isinstance(pipeline(**cases.raw_inputs(1), return_dict=False), tuple)
    images = pipeline.reconstruct_images(cases.images(2), height=16, width=24, num_inference_steps=2, output_type="np")
    assert images.images.shape == (2, 16, 24, 3)


def test_guidance_by_default_is_that_of_the_kind_of_motion(pipeline):
    def run(inputs, **changes):
        return pipeline(**{**inputs(1), "num_inference_steps": 1, "keyframe_num_inference_steps": 1, **changes}).frames

    for inputs, guidance in ((cases.raw_inputs, 3.0), (cases.token_inputs, 4.0)):
        assert torch.equal(run(inputs), run(inputs, guidance_scale=guidance))
        assert not torch.equal(run(inputs), run(inputs, guidance_scale=7.0 - guidance))
    maps = {"motion": cases.rows((2, 24, 4, 8), 1), "quantize_motion": True}
    assert torch.equal(run(cases.raw_inputs, **maps), run(cases.raw_inputs, **maps, guidance_scale=4.0))


def test_processors_follow_the_tokenizers_where_there_are_none(clip):
    parts = {**cases.components(images=False), "image_processor": None, "motion_processor": None}
    whole = VideoLavitReconstructionPipeline(**cases.components(images=False))
    bare = VideoLavitReconstructionPipeline(**parts)
    tokens, expected = (one.tokenize(clip, generator=torch.Generator().manual_seed(0)) for one in (bare, whole))
    assert torch.equal(tokens.motion_indices, expected.motion_indices)
    assert all(torch.equal(a, b) for a, b in zip(tokens.visual_indices, expected.visual_indices))


def test_half_precision_vaes_run_in_float32_without_a_word(caplog):
    import diffusers

    vae = cases.tiny("vae", {**cases.VAE, "force_upcast": True}).half()
    diffusers.logging.enable_propagation()
    try:
        with torch.no_grad(), caplog.at_level("WARNING"):
            frames = detokenizing.decode_video(vae, cases.rows((2, 4, 4, 6), 1).half())
    finally:
        diffusers.logging.disable_propagation()
    assert frames.dtype == torch.float32 and vae.dtype == torch.float16 and not caplog.records


def test_given_noise_replaces_the_draws(pipeline):
    inputs = cases.raw_inputs(1)
    generator = torch.Generator().manual_seed(0)
    image_noise = torch.randn(1, 3, cases.HEIGHT, cases.WIDTH, generator=generator)
    latents = torch.randn(1, cases.FRAMES, 4, 8, 12, generator=generator)
    drawn = pipeline(**inputs).frames
    given = pipeline(**{**inputs, "generator": None, "image_noise": image_noise, "latents": latents}).frames
    torch.testing.assert_close(drawn, given, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 15}, "height and width must be multiples of 4"),
        ({"width": 0}, "height and width must be multiples of 4"),
        ({"motion": None}, "exactly one of video, motion and motion_indices"),
        ({"motion_indices": torch.zeros(1, 6, dtype=torch.long)}, "exactly one of video, motion and motion_indices"),
        ({"image": None}, "exactly one of image and image_indices"),
        ({"image_indices": [[1]]}, "exactly one of image and image_indices"),
        ({"image": [np.zeros((4, 4, 3), np.uint8)] * 2}, "2 entries of image for 1 clips"),
        ({"image": [np.zeros((4, 8, 8, 3), np.uint8)]}, "give a video as a video"),
        ({"image": [torch.zeros(4, 3, 8, 8)]}, "give a video as a video"),
        ({"motion": torch.zeros(1, 2, 5, 20, 36)}, "raw motion must be"),
        (
            {"motion": None, "motion_indices": torch.zeros(1, 6, dtype=torch.long), "quantize_motion": True},
            "codes already",
        ),
        ({"motion": None, "motion_indices": torch.zeros(1, 7, dtype=torch.long)}, "a clip has 6 motion codes"),
        ({"motion": None, "motion_indices": torch.full((1, 6), 48388)}, "code indices must lie in 0..31"),
        ({"latents": torch.zeros(1, 4, 4, 8, 12)}, "latents must be"),
        ({"output_type": "gif"}, "output_type must be one of"),
        ({"generator": 5}, "generator must be a torch.Generator .* not int"),
        ({"generator": cases.generators(2)}, "2 generators for 1 clips"),
    ],
)
def test_pipeline_refuses(pipeline, change, message):
    with pytest.raises(TypeError if change.get("generator") == 5 else ValueError, match=message):
        pipeline(**{**cases.raw_inputs(1), **change})


def test_pipeline_without_parts_says_what_is_missing(clip):
    images = VideoLavitReconstructionPipeline(**cases.components(videos=False))
    with pytest.raises(ValueError, match="making videos needs unet, vae, scheduler, motion_encoder"):
        images(clip)
    with pytest.raises(ValueError, match="tokenizing needs motion_tokenizer"):
        images.tokenize(clip)
    videos = VideoLavitReconstructionPipeline(**cases.components(images=False))
    with pytest.raises(ValueError, match="visual codes to images needs keyframe_decoder"):
        videos.reconstruct_images(cases.images(1))
    with pytest.raises(ValueError, match="exactly one of image and image_indices"):
        cases.reconstruction_pipeline().reconstruct_images()


def test_ancestral_euler_keyframes(pipeline):
    from diffusers import EulerAncestralDiscreteScheduler

    other = VideoLavitReconstructionPipeline(**cases.components(videos=False))
    ddim = dict(other.keyframe_scheduler.config)
    config = {
        k: v
        for k, v in ddim.items()
        if k in ("beta_start", "beta_end", "beta_schedule", "timestep_spacing", "steps_offset")
    }
    other.keyframe_scheduler = EulerAncestralDiscreteScheduler(**config)
    other.set_progress_bar_config(disable=True)
    options = {"height": 16, "width": 24, "num_inference_steps": 2, "output_type": "pt"}
    both = other.reconstruct_images(cases.images(2), generator=cases.generators(2), **options).images
    one = other.reconstruct_images(cases.images(1), generator=cases.generators(1), **options).images
    torch.testing.assert_close(both[:1], one, atol=1e-3, rtol=1e-3)
    # The noise is scaled by the schedule of training, whatever the number of steps.
    assert abs(float(detokenizing.training_noise_sigma(other.keyframe_scheduler)) - 14.65) < 0.01


# ------------------------------------------------------------------------------------------------------ image processor


def test_image_inputs_are_equivalent(tmp_path):
    picture = (np.random.default_rng(0).random((20, 30, 3)) * 255).astype(np.uint8)
    path = tmp_path / "picture.png"
    PIL.Image.fromarray(picture).save(path)
    processor = VideoLavitImageProcessor(28)
    forms = [str(path), PIL.Image.fromarray(picture), picture, torch.from_numpy(picture).permute(2, 0, 1)]
    outputs = [processor(form)["pixel_values"] for form in forms]
    assert outputs[0].shape == (1, 3, 28, 28)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    assert torch.equal(processor(forms)["pixel_values"], torch.cat(outputs))


def test_image_processor_refuses(tmp_path):
    processor = VideoLavitImageProcessor(28)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    for value, error, message in (
        (np.zeros((4, 8, 8, 3), np.uint8), ValueError, "give a video as a video"),
        (np.zeros((8, 8, 3), np.float32), ValueError, "uint8"),
        (torch.zeros(8, 8, 3), ValueError, "an image tensor is"),
        (str(broken), ValueError, "broken.png: not a readable image"),
        (str(tmp_path / "absent.png"), ValueError, "not a readable image"),
        (7, TypeError, "not int"),
        ([], ValueError, "no images"),
    ):
        with pytest.raises(error, match=message):
            processor(value)
    with pytest.raises(ValueError, match="side of the square"):
        VideoLavitImageProcessor(0)


# ------------------------------------------------------------------------------------------------------- fresh process


def test_saved_pipeline_loads_in_a_fresh_process(tmp_path, pipeline):
    pipeline.save_pretrained(tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline/model_index.json").read_text())
    assert index["unet"] == ["cinetok", "VideoLavitUNetSpatioTemporalConditionModel"]
    assert index["motion_tokenizer"] == ["cinetok", "VideoLavitMotionTokenizer"]
    expected = pipeline(**cases.raw_inputs(1)).frames
    code = """
    import sys, torch, cinetok
    from diffusers import DiffusionPipeline
    from model_cases import video_lavit as cases
    torch.set_num_threads(1)
    pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
    pipeline.set_progress_bar_config(disable=True)
    torch.save(pipeline(**cases.raw_inputs(1)).frames, sys.argv[2])
    """
    run_python(code, tmp_path / "pipeline", tmp_path / "out.pt")
    torch.testing.assert_close(torch.load(tmp_path / "out.pt", weights_only=True), expected, atol=1e-3, rtol=0)
