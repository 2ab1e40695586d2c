"""Seer's images and pipeline: what reaches the frames, windows, batches, callbacks, saving, and bad input."""

import json
import logging

import numpy as np
import pytest
import torch
from model_cases import seer as tiny
from PIL import Image
from seer_runs import arguments_of_run, fresh_process_frames, pipe_fixture, run  # noqa: F401 (fixture)

from cinetok import VideoClip
from cinetok.modeling.seer.image_processing_seer import preprocess_image, preview_frames, resample_frames

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
        (torch.full((3, 8, 8), float("nan")), ValueError),
        (np.where(np.arange(192).reshape(8, 8, 3) == 5, np.nan, 0.5), ValueError),
        (torch.full((3, 8, 8), float("inf")), ValueError),
        (torch.zeros(3, 0, 8), ValueError),
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


def test_long_prompts_are_warned_of_once(pipe, caplog, monkeypatch):
    # a tokenizer that has not warned yet: it does so once in its life
    monkeypatch.setattr(pipe, "tokenizer", tiny.tokenizer())
    for name in ("diffusers", "cinetok", "transformers"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    with caplog.at_level(logging.WARNING):
        pipe.encode_prompt(["abcdefghijkl"])
    assert len(caplog.records) == 1, caplog.text


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
        ({"height": 40}, ValueError, "frames of 40x32 pixels.*square sizes near: 32x32 or 64x64 pixels$"),
        ({"height": 0}, ValueError, "height must be positive"),
        ({"width": -32}, ValueError, "width must be positive"),
        ({"height": 32.0}, TypeError, "height must be a whole number"),
        ({"num_frames": 4.0}, TypeError, "num_frames must be a whole number"),
        ({"num_frames_per_window": 0}, ValueError, "num_frames_per_window must be positive"),
        ({"negative_prompt_embeds": torch.zeros(1, 5, 24)}, ValueError, r"prompts' \(1, 12, 24\), got \(1, 5, 24\)"),
        ({"negative_prompt_embeds": torch.zeros(2, 12, 24)}, ValueError, r"got \(2, 12, 24\)"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 24)}, ValueError, "must be .batch, tokens, width."),
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


def test_save_and_load_in_a_fresh_process(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["unet"] == ["cinetok", "SeerUNet3DConditionModel"]
    assert index["text_decomposer"] == ["cinetok", "SeerTextDecomposer"]
    assert index["scheduler"] == ["cinetok", "SeerDDIMScheduler"]
    assert (index["num_frames"], index["num_cond_frames"], index["resolution"]) == (tiny.FRAMES, 1, tiny.SIZE)
    torch.testing.assert_close(fresh_process_frames(tmp_path / "pipe", tmp_path), run(pipe), atol=1e-5, rtol=1e-4)
