"""Video-LaVIT's language model: recorded numbers, splice, writing of codes, processor, pipelines, conversion."""

import copy
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from card_snippets import run_card
from golden_kinds import load_runners
from model_cases import video_lavit_llm as tiny
from PIL import Image
from run_goldens import run_case
from torch.nn.utils.rnn import pad_sequence

from cinetok import (
    CheckpointError,
    VideoLavitConfig,
    VideoLavitForCausalLM,
    VideoLavitMotionTokenizer,
    VideoLavitMotionTokenizerConfig,
    VideoLavitPipeline,
    VideoLavitProcessor,
    VideoLavitUnderstandingPipeline,
    VideoLavitVisualTokenizer,
    VideoLavitVisualTokenizerConfig,
    convert_checkpoint,
    write_video,
)
from cinetok.conversion.sentencepiece_llama import llama_tokenizer_from_sentencepiece
from cinetok.conversion.video_lavit_llm import RELEASES_LLM, language_model_mapping, make_config, manifest_parts_llm
from cinetok.model_cards import render_card
from cinetok.modeling.video_lavit.generation_video_lavit import motion_codes, visual_codes
from cinetok.modeling.video_lavit.processing_video_lavit import StopAtLiteral

TESTS = Path(__file__).resolve().parent
SHARED = TESTS.parents[1] / "shared"
IMAGE, VIDEO = tiny.LAYOUT["image_token_id"], tiny.LAYOUT["video_token_id"]
BOI, EOI, VISUAL = 400, 401, 402
BOM, EOM, MOTION = 434, 435, 436


@pytest.fixture(scope="module")
def model():
    return tiny.language_model()


@pytest.fixture(scope="module")
def writer():
    return tiny.language_model(with_tokenizers=False)


@pytest.fixture(scope="module")
def processor():
    return tiny.processor()


@pytest.fixture(scope="module")
def video_file(tmp_path_factory):
    """A moving square, 20 frames at 6 per second."""
    path = tmp_path_factory.mktemp("video") / "square.mp4"
    frames = np.full((20, 48, 64, 3), 60, np.uint8)
    for index, frame in enumerate(frames):
        frame[10:30, 2 * index : 2 * index + 16] = (250, 40, 40)
    write_video(path, frames, fps=6)
    return path


# ------------------------------------------------------------------------------------------------------------- goldens


@pytest.mark.parametrize("kind", ["llm_generation", "llm_understanding"])
def test_recorded_numbers(kind):
    load_runners("video_lavit")
    case = run_case(TESTS / "goldens" / "video_lavit" / kind)
    assert case.rows and not [row for row in case.rows if not row.passed]


@pytest.mark.shared
@pytest.mark.parametrize("stem", ["language_model", "language_model_sft"])
def test_released_tensors_fit_one_to_one(stem):
    from run_manifests import check_manifest

    problems, _ = check_manifest(SHARED / "manifests" / "video_lavit" / f"{stem}.json")
    assert problems == []


# ------------------------------------------------------------------------------------------------------- configuration


def test_released_id_layout():
    config = VideoLavitConfig()
    assert (config.image_start_token_id, config.image_end_token_id, config.visual_code_offset) == (32000, 32001, 32002)
    assert (config.motion_start_token_id, config.motion_end_token_id, config.motion_code_offset) == (
        48386,
        48387,
        48388,
    )
    assert config.num_token_ids == config.text_config.vocab_size == 49412
    assert (config.image_token_id, config.video_token_id) == (49412, 49413)
    assert config.visual_tokenizer_config is None and config.motion_tokenizer_config is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_visual_codes": 33}, "make 477"),
        ({"image_token_id": 17}, "choose one outside"),
        ({"video_token_id": IMAGE}, "both"),
        ({"padding_side": "middle"}, "left"),
        ({"max_sequence_length": 0}, "positive"),
        ({"motion_tokenizer_config": None}, "both"),
        ({"visual_tokenizer_config": {**tiny.VISUAL, "projection_dim": 8}}, "width 32"),
        ({"visual_tokenizer_config": {**tiny.VISUAL, "projection_dim": 32, "codebook_size": 64}}, "do not fit"),
    ],
)
def test_contradictory_configurations_raise(change, message):
    arguments = {
        "text_config": dict(tiny.LLAMA),
        **tiny.LAYOUT,
        "visual_tokenizer_config": {**tiny.VISUAL, "projection_dim": 32},
        "motion_tokenizer_config": dict(tiny.MOTION),
    }
    with pytest.raises((ValueError, TypeError), match=message):
        VideoLavitConfig(**{**arguments, **change})


# ---------------------------------------------------------------------------------------------------------- the splice


def test_splice_equals_concatenation_by_hand(model):
    frames, maps = tiny.visual_inputs(3)
    noise = tiny.keep_noise([5, 6, 7])
    ids = torch.tensor([[0, 0, 1, 21, IMAGE, 22], [1, VIDEO, 31, 32, 33, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    with torch.no_grad():
        merged = model.model.merge_inputs(
            ids,
            mask,
            pixel_values=frames[:1],
            pixel_values_videos=frames[1:],
            motion_values=maps[1:],
            gumbel_noise=noise,
            labels=ids.clone(),
        )
        embed = model.get_input_embeddings()
        features = model.model.visual_tokenizer.get_image_features(frames, gumbel_noise=noise)
        codes = model.model.motion_tokenizer.encode(maps[1:]).indices.flatten(1) + MOTION

        def marks(*token_ids):
            return embed(torch.tensor(token_ids))

        first = torch.cat([marks(1, 21, BOI), features[0], marks(EOI, 22)])
        clips = [
            part
            for clip in range(2)
            for part in (marks(BOI), features[1 + clip], marks(EOI, BOM), embed(codes[clip]), marks(EOM))
        ]
        second = torch.cat([marks(1), *clips, marks(31, 32, 33)])
    assert torch.equal(merged.attention_mask.sum(1), torch.tensor([len(first), len(second)]))
    assert torch.allclose(merged.inputs_embeds[0, : len(first)], first, atol=1e-6)
    assert torch.allclose(merged.inputs_embeds[1, : len(second)], second, atol=1e-6)
    assert merged.inputs_embeds[0, len(first) :].abs().max() == 0
    assert merged.labels[1, 0] == 1 and merged.labels[1, len(second) - 3 :].tolist()[:3] == [31, 32, 33]
    assert (merged.labels[1, 1 : len(second) - 3] == -100).all()
    assert merged.position_ids[0, : len(first)].tolist() == list(range(len(first)))


def _mixed_batch():
    """Text alone, an image, and a video of two clips with an image, in prompts of different lengths."""
    frames, maps = tiny.visual_inputs(4, first_seed=20)
    noise = tiny.keep_noise([1, 2, 3, 4])
    prompts = [[1, 20, 21, 22, 23, 24, 25], [1, 30, IMAGE, 31], [1, VIDEO, 40, IMAGE, 41, 42]]
    single = [
        {},
        {"pixel_values": frames[:1], "gumbel_noise": noise[:1]},
        {
            "pixel_values": frames[3:],
            "pixel_values_videos": frames[1:3],
            "motion_values": maps[1:3],
            "gumbel_noise": noise[1:],
        },
    ]
    together = {
        "pixel_values": frames[[0, 3]],
        "pixel_values_videos": frames[1:3],
        "motion_values": maps[1:3],
        "num_clips": torch.tensor([2]),
        "gumbel_noise": noise,
    }
    return [torch.tensor(p) for p in prompts], single, together


def _padded(prompts, side):
    reverse = side == "left"
    rows = pad_sequence([p.flip(0) if reverse else p for p in prompts], batch_first=True)
    mask = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True)
    return (rows.flip(1), mask.flip(1)) if reverse else (rows, mask)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_of_different_prompts_equal_single_prompts(model, side):
    prompts, single, together = _mixed_batch()
    ids, mask = _padded(prompts, side)
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [2]}
    batch = model.generate(ids, attention_mask=mask, **together, **options)
    with torch.no_grad():
        logits = model(ids, mask, **together)
    for row, (prompt, visuals) in enumerate(zip(prompts, single)):
        alone = model.generate(prompt[None], **visuals, **options)
        assert batch[row, -6:].tolist() == alone[0, -6:].tolist()
        assert batch[row, -6 - len(prompt) : -6].tolist() == prompt.tolist() == alone[0, :-6].tolist()
        with torch.no_grad():
            expected = model(prompt[None], **visuals).logits[0]
        assert torch.allclose(logits.logits[row][logits.attention_mask[row].bool()], expected, atol=2e-5)


def test_left_padded_text_counts_positions_from_the_first_real_token(model):
    ids = torch.tensor([[1, 20, 21, 22]])
    padded, mask = F.pad(ids, (3, 0)), F.pad(torch.ones_like(ids), (3, 0))
    with torch.no_grad():
        assert torch.allclose(model(padded, mask).logits[:, 3:], model(ids).logits, atol=1e-5)


def test_cache_and_no_cache_agree(model):
    prompts, single, _ = _mixed_batch()
    options = {"max_new_tokens": 5, "do_sample": False, **single[2]}
    with_cache = model.generate(prompts[2][None], use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(prompts[2][None], use_cache=False, **options))


def test_beams_and_several_answers_share_the_image(model):
    prompts, single, _ = _mixed_batch()
    beams = model.generate(
        prompts[1][None], num_beams=3, num_return_sequences=2, max_new_tokens=4, do_sample=False, **single[1]
    )
    assert beams.shape == (2, 8) and beams[:, :4].tolist() == [prompts[1].tolist()] * 2
    blind = model.generate(prompts[0][None], num_beams=3, max_new_tokens=4, do_sample=False)
    assert blind.shape == (1, 11)


@pytest.mark.parametrize("dropped", ["image", "frames", "motion"])
def test_every_visual_input_matters(model, dropped):
    prompts, single, _ = _mixed_batch()
    other = {name: value.clone() for name, value in single[2].items()}
    key = {"image": "pixel_values", "frames": "pixel_values_videos", "motion": "motion_values"}[dropped]
    other[key] = torch.zeros_like(other[key])
    with torch.no_grad():
        change = model(prompts[2][None], **other).logits - model(prompts[2][None], **single[2]).logits
    assert change[:, -1].abs().max() > 1e-3


def test_videos_with_an_axis_of_their_own_equal_flat_clips(model):
    frames, maps = tiny.visual_inputs(4)
    ids = torch.tensor([[1, VIDEO, 20], [1, VIDEO, 30]])
    noise = tiny.keep_noise(range(4))
    with torch.no_grad():
        flat = model(
            ids, pixel_values_videos=frames, motion_values=maps, num_clips=torch.tensor([2, 2]), gumbel_noise=noise
        )
        nested = model(
            ids,
            pixel_values_videos=frames.unflatten(0, (2, 2)),
            motion_values=maps.unflatten(0, (2, 2)),
            gumbel_noise=noise,
        )
    assert torch.equal(flat.logits, nested.logits)


def test_long_sequences_are_cut_with_a_warning_in_training_and_refused_in_generation():
    model = tiny.language_model(max_sequence_length=8)
    frames, _ = tiny.visual_inputs(1)
    ids = torch.tensor([[1, IMAGE, 20, 21, 22, 23, 24]])
    visuals = {"pixel_values": frames, "gumbel_noise": tiny.keep_noise([0])}
    with pytest.warns(UserWarning, match="its end is cut"):
        output = model(ids, labels=ids.clone(), **visuals)
    assert output.logits.shape[1] == output.labels.shape[1] == 8
    with pytest.raises(ValueError, match="12 positions long.*fewer clips"):
        model.generate(ids, max_new_tokens=2, **visuals)


def test_bad_inputs_of_the_model_raise(model, writer):
    frames, maps = tiny.visual_inputs(2)
    image_ids, video_ids = torch.tensor([[1, IMAGE]]), torch.tensor([[1, VIDEO]])
    cases = [
        ({"input_ids": image_ids}, "1 image placeholder.*but 0"),
        ({"input_ids": image_ids, "pixel_values": frames}, "but 2 image"),
        ({"input_ids": image_ids, "pixel_values_videos": frames, "motion_values": maps}, "1 image placeholder"),
        ({"input_ids": video_ids, "pixel_values_videos": frames}, "key frames.*and its motion"),
        ({"input_ids": video_ids, "pixel_values_videos": frames, "motion_values": maps[:1]}, "do not match"),
        ({"input_ids": video_ids, "pixel_values_videos": frames[0], "motion_values": maps[0]}, "expected"),
        (
            {"input_ids": video_ids, "pixel_values_videos": frames, "motion_values": maps, "num_clips": [3]},
            "does not add up",
        ),
        ({"input_ids": torch.tensor([[1, 476]])}, "id 476 is outside"),
        ({"input_ids": torch.tensor([[1, -200]])}, "id -200 is outside"),
        ({"input_ids": image_ids, "attention_mask": torch.zeros(1, 2)}, "1 image|0 image|empty"),
        ({"inputs_embeds": torch.zeros(1, 2, 32), "pixel_values": frames}, "need input_ids"),
        ({}, "exactly one"),
    ]
    for inputs, message in cases:
        if "attention_mask" in inputs:
            inputs["pixel_values"] = frames[:1]
        with pytest.raises(ValueError, match=message):
            model(**inputs)
    with pytest.raises(ValueError, match="holds the language model alone|language model alone"):
        writer(input_ids=image_ids, pixel_values=frames[:1])
    with pytest.raises(ValueError, match="outside"):
        model.generate(torch.tensor([[1, 9999]]), max_new_tokens=2)


# ------------------------------------------------------------------------------------------------------------ training


def test_loss_is_the_next_token_cross_entropy_of_the_answers(model):
    inputs = tiny.MODELS[0].inputs(2)
    with torch.no_grad():
        output = model(**inputs)
    logits, labels = output.logits[:, :-1].flatten(0, 1), output.labels[:, 1:].flatten()
    assert (labels != -100).sum() == 6
    assert torch.allclose(output.loss, F.cross_entropy(logits, labels, ignore_index=-100))


def test_gradients_reach_what_was_tuned_and_nothing_else():
    model = tiny.language_model().freeze_for_tuning().train()
    model(**tiny.MODELS[0].inputs(2)).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    parts = {".".join(name.split(".")[1:3]) for name in with_gradient}
    assert "lm_head.weight" in with_gradient
    assert parts == {
        "language_model.embed_tokens",
        "language_model.layers",
        "language_model.norm",
        "visual_tokenizer.causal_encoder",
        "visual_tokenizer.vit_proj",
        "weight",
    }
    assert all(p.grad is None for p in model.model.visual_tokenizer.encoder.parameters())


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny.language_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**tiny.MODELS[0].inputs(2), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])


def test_eager_and_sdpa_agree(model):
    inputs = tiny.MODELS[0].inputs(2)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    assert eager.model.language_model.config._attn_implementation == "eager"
    with torch.no_grad():
        assert torch.allclose(eager(**inputs).logits, model(**inputs).logits, atol=1e-5)


def test_the_inner_model_takes_everything_but_labels(model):
    inputs = tiny.MODELS[0].inputs(2)
    labels = inputs.pop("labels")
    assert model.base_model is model.model
    with torch.no_grad():
        hidden = model.base_model(**inputs).last_hidden_state
        assert torch.equal(model.lm_head(hidden), model(**inputs, labels=labels).logits)


# ---------------------------------------------------------------------------------------------------- writing of codes


def _two_pass_reference(model, prompt, start, end, allowed, scale, steps, minimum, negative=None):
    """Greedy guided decoding the slow way: one sample, no cache, two forwards per step."""
    conditional = [*prompt, start]
    unconditional = list(negative) if negative else [start]
    written = []
    for step in range(steps):
        with torch.no_grad():
            with_prompt = model(torch.tensor([conditional])).logits[0, -1].log_softmax(-1)
            without = model(torch.tensor([unconditional])).logits[0, -1].log_softmax(-1)
        scores = without + scale * (with_prompt - without)
        if step < minimum:
            scores[end] = -torch.inf
        blocked = torch.ones_like(scores, dtype=torch.bool)
        blocked[allowed] = False
        token = int(scores.masked_fill(blocked, -torch.inf).argmax())
        written.append(token)
        if token == end:
            break
        conditional.append(token)
        unconditional.append(token)
    return written


@pytest.mark.parametrize("with_negative", [False, True])
def test_one_guided_forward_equals_two_passes(writer, with_negative):
    prompts = [[20, 21, 22, 23, 24], [30, 31], [40]]
    negative = [[50, 51, BOI], [52, BOI], [53, 54, 55, BOI]] if with_negative else None
    allowed = [0, 1, 2, *range(BOI, BOM)]
    output = writer.generate_image_tokens(
        prompts,
        guidance_scale=3.0,
        negative_prompts=negative,
        min_new_tokens=3,
        max_new_tokens=9,
        do_sample=False,
    )
    for row, prompt in enumerate(prompts):
        expected = _two_pass_reference(
            writer, prompt, BOI, EOI, allowed, 3.0, 9, 3, negative[row] if with_negative else None
        )
        assert output.raw_token_ids[row].tolist()[: len(expected)] == expected
        assert (output.raw_token_ids[row, len(expected) :] == 2).all()
    motion = writer.generate_motion_tokens(
        prompts, guidance_scale=7.0, min_new_tokens=3, max_new_tokens=9, do_sample=False
    )
    for row, prompt in enumerate(prompts):
        expected = _two_pass_reference(writer, prompt, BOM, EOM, [0, 1, 2, *range(BOM, 476)], 7.0, 9, 3)
        assert motion.raw_token_ids[row].tolist()[: len(expected)] == expected


def test_codes_stay_in_their_vocabulary_and_respect_the_minimum(writer):
    generator = torch.Generator().manual_seed(0)
    for method, allowed, end in (
        (writer.generate_image_tokens, {0, 1, 2, *range(BOI, BOM)}, EOI),
        (writer.generate_motion_tokens, {0, 1, 2, *range(BOM, 476)}, EOM),
    ):
        output = method([[20], [21]], min_new_tokens=12, max_new_tokens=14, top_k=0, generator=generator)
        assert set(output.raw_token_ids.flatten().tolist()) <= allowed
        assert end not in output.raw_token_ids[:, :12]
        for prompt, sequence, new in zip((20, 21), output.sequences, output.new_token_ids):
            assert sequence[0] == prompt and torch.equal(sequence[2:], new) and 2 not in sequence


def test_a_row_that_is_done_is_filled_and_the_loop_ends_early(writer):
    model = copy.deepcopy(writer)
    with torch.no_grad():
        model.lm_head.weight[EOI] = 0
        model.lm_head.weight[BOI:BOM] *= 0.01
        model.lm_head.weight[[0, 1, 2]] = 0
        model.lm_head.weight[EOI] = (
            5 * model(torch.tensor([[20, BOI]]), output_hidden_states=True).hidden_states[-1][0, -1]
        )
    output = model.generate_image_tokens(
        [[20]], guidance_scale=1.0, min_new_tokens=0, max_new_tokens=30, do_sample=False
    )
    assert output.raw_token_ids.shape[1] < 30 and output.raw_token_ids[0, -1] == EOI
    assert output.sequences[0][-1] == EOI


def test_draws_of_a_sample_do_not_depend_on_the_batch(writer):
    def draw(prompts, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return writer.generate_image_tokens(prompts, min_new_tokens=2, max_new_tokens=12, generator=generators)

    together = draw([[20, 21, 22], [30]], [7, 8])
    for row, (prompt, seed) in enumerate((([20, 21, 22], 7), ([30], 8))):
        assert torch.equal(together.sequences[row], draw([prompt], [seed]).sequences[0])
    assert not torch.equal(together.sequences[0], draw([[20, 21, 22]], [9]).sequences[0])


def test_guidance_and_prompt_matter_and_forced_ids_are_scored(writer):
    options = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4, "output_scores": True}
    plain = writer.generate_image_tokens([[20, 21]], guidance_scale=1.0, **options)
    guided = writer.generate_image_tokens([[20, 21]], guidance_scale=4.0, **options)
    other = writer.generate_image_tokens([[90, 80]], guidance_scale=4.0, **options)
    assert (plain.scores - guided.scores).nan_to_num(0, 0, 0).abs().max() > 0.1
    assert (other.scores - guided.scores).nan_to_num(0, 0, 0).abs().max() > 0.1
    forced = writer.generate_image_tokens(
        [[20, 21]], guidance_scale=4.0, forced_token_ids=guided.raw_token_ids, **options
    )
    assert torch.allclose(forced.scores, guided.scores) and torch.equal(forced.raw_token_ids, guided.raw_token_ids)
    steps = []
    writer.generate_image_tokens([[20]], on_step=steps.append, do_sample=False, min_new_tokens=3, max_new_tokens=3)
    assert steps == [1, 2, 3]


def test_bad_requests_for_codes_raise(writer):
    for prompts, options, error, message in (
        ("text", {}, TypeError, "ids per sample"),
        ([], {}, TypeError, "non-empty"),
        ([[476]], {}, ValueError, "outside the vocabulary"),
        ([[-1]], {}, ValueError, "outside the vocabulary"),
        ([[[1]]], {}, ValueError, "row of ids"),
        ([[1]], {"max_new_tokens": 0}, ValueError, "1 and 0"),
        ([[1]], {"max_new_tokens": 2000}, ValueError, "more than the language model's 1024"),
        ([[1]], {"generator": [torch.Generator()] * 2}, ValueError, "2 generators"),
        ([[1]], {"negative_prompts": [[3], [4]]}, ValueError, "2 negative"),
        ([[1]], {"forced_token_ids": torch.ones(2, 3, dtype=torch.long)}, ValueError, "forced_token_ids"),
    ):
        with pytest.raises(error, match=message):
            writer.generate_image_tokens(prompts, **options)


def test_ids_to_codes():
    config = tiny.config(with_tokenizers=False)
    assert visual_codes([20, BOI, VISUAL, VISUAL + 31, EOI], config).tolist() == [0, 31]
    with pytest.raises(ValueError, match="no visual code"):
        visual_codes([VISUAL, BOM], config)
    ids = [VISUAL, BOM, MOTION + 3, MOTION + 39, EOM]
    assert motion_codes(ids, config, 4).tolist() == [3, 39, 0, 0]
    assert motion_codes([*ids[:4]] * 3, config, 4).tolist() == [3, 39, 3, 39]
    assert motion_codes([], config).tolist() == [0] * 135
    with pytest.raises(ValueError, match="476 is outside"):
        motion_codes([476], config)


# ----------------------------------------------------------------------------------------------------------- processor

PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\nwhat is it? ASSISTANT:"
)


def _messages(*content):
    return [{"role": "user", "content": list(content)}]


def test_chat_format(processor):
    image, text = {"type": "image", "image": tiny.picture()}, {"type": "text", "text": "what is it?"}
    turns = _messages(image, text)
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == PROMPT
    turns += [{"role": "assistant", "content": "a cat"}, {"role": "user", "content": "sure?"}]
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == (
        PROMPT + " a cat \\n </s>USER: sure? ASSISTANT:"
    )
    system = [{"role": "system", "content": "Be brief."}, *_messages({"type": "video"}, text)]
    assert processor.apply_chat_template(system) == "Be brief. USER: <video>\nwhat is it? "
    with pytest.raises(Exception, match="alternate"):
        processor.apply_chat_template([{"role": "assistant", "content": "a"}])
    with pytest.raises(Exception, match="text, image or video"):
        processor.apply_chat_template(_messages({"type": "audio"}))


def test_pieces_between_placeholders_are_tokenised_on_their_own(processor):
    sentencepiece = pytest.importorskip("sentencepiece")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tiny.sentencepiece_model())
    encoded = processor(text=PROMPT, images=tiny.picture())
    before, after = PROMPT.split("<image>")
    expected = [1, *pieces.EncodeAsIds(before), IMAGE, *pieces.EncodeAsIds(after)]
    assert encoded["input_ids"].tolist() == [expected]
    assert encoded["pixel_values"].shape == (1, 3, 42, 42)
    assert processor.encode_prompt("a red ball") == pieces.EncodeAsIds("a red ball")
    # Every piece between special ids begins a text of its own.
    assert processor.tokenizer("a </s>user", add_special_tokens=False)["input_ids"] == [
        *pieces.EncodeAsIds("a "),
        2,
        *pieces.EncodeAsIds("user"),
    ]


TEXTS = [
    "a red ball",
    "  two  spaces, three   spaces",
    " lead",
    "\nnew\n\nline ",
    "naïve 日本 🎬",
    "x\ty",
    "",
    "a </s>user: b",
]


def test_ids_survive_save_and_load_in_a_fresh_process(processor, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tiny.sentencepiece_model())
    ids = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert ids[:-1] == [pieces.EncodeAsIds(text) for text in TEXTS[:-1]]
    tiny.processor(max_clips=3, image_mean=[0.5, 0.5, 0.5]).save_pretrained(tmp_path)
    code = """
    import json, sys
    from cinetok import VideoLavitProcessor
    p = VideoLavitProcessor.from_pretrained(sys.argv[1])
    ids = [p.tokenizer(t, add_special_tokens=False)["input_ids"] for t in json.loads(sys.argv[2])]
    chat = p.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    print(json.dumps([ids, p.max_clips, p.image_mean, p.motion_width, p.image_token_id, chat]))
    """
    result = json.loads(_fresh(code, str(tmp_path), json.dumps(TEXTS)))
    assert result[0] == ids
    assert result[1:5] == [3, [0.5, 0.5, 0.5], tiny.MAP_WIDTH, IMAGE] and result[5].endswith("USER: hi ASSISTANT:")


def _fresh(code, *arguments):
    prelude = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import torchvision_shim; torchvision_shim.install()\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


def test_training_inputs_learn_the_answers_only(processor):
    conversation = [
        *_messages({"type": "image", "image": tiny.picture()}, {"type": "text", "text": "what is it?"}),
        {"role": "assistant", "content": "a blue cat."},
        {"role": "user", "content": "and the ball?"},
        {"role": "assistant", "content": "red"},
    ]
    batch = processor.training_inputs([conversation, conversation[:2]])
    tokenizer = processor.tokenizer
    learned = [tokenizer.decode([i for i in row.tolist() if i != -100]) for row in batch["labels"]]
    assert [text.strip() for text in learned] == ["a blue cat. \\n </s> red \\n </s>", "a blue cat. \\n </s>"]
    assert ((batch["labels"] == -100) | (batch["labels"] == batch["input_ids"])).all()
    assert batch["attention_mask"][1, -1] == 0 and len(batch["pixel_values"]) == 2
    with pytest.raises(ValueError, match="ends with"):
        processor.training_inputs([conversation[:1]])


def test_videos_become_key_frames_and_motion(processor, video_file):
    chat = [_messages({"type": "video", "path": str(video_file)}, {"type": "text", "text": "what moves?"})]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs={"max_clips": 1}
    )
    assert inputs["pixel_values_videos"].shape == (1, 3, 42, 42) and inputs["num_clips"].tolist() == [1]
    assert inputs["motion_values"].shape == (1, 2, tiny.NUM_FRAMES, tiny.MAP_HEIGHT, tiny.MAP_WIDTH)
    assert inputs["motion_values"].abs().max() > 0
    assert (inputs["input_ids"] == VIDEO).sum() == 1


def test_bad_inputs_of_the_processor_raise(processor, video_file, tmp_path):
    text_file = tmp_path / "notes.txt"
    text_file.write_text("no video")
    for options, error, message in (
        ({}, ValueError, "text is needed"),
        ({"text": 3}, TypeError, "not iterable|string"),
        ({"text": ["a", 3]}, TypeError, "strings"),
        ({"text": "<image> a"}, ValueError, r"holds \[1\] <image>"),
        ({"text": "a", "images": tiny.picture()}, ValueError, r"\[1\] image"),
        ({"text": ["<image>", "b"], "images": [[], [tiny.picture()]]}, ValueError, "placeholder"),
        ({"text": "<video>", "videos": tiny.picture()}, TypeError, "video file"),
        ({"text": "<image>", "images": str(video_file)}, ValueError, "not a readable image"),
        ({"text": "<image>", "images": np.zeros((4, 8, 8, 3), np.uint8)}, ValueError, "image array"),
        ({"text": "<video>", "videos": str(text_file)}, ValueError, "not a readable video"),
        ({"text": "<video>", "videos": str(tmp_path / "none.mp4")}, ValueError, "no such file"),
        ({"text": "a", "padding_side": "top"}, ValueError, "left"),
    ):
        with pytest.raises(error, match=message):
            processor(**options)
    with pytest.raises(ValueError, match="choose one outside"):
        VideoLavitProcessor(processor.tokenizer, image_token_id=5)
    with pytest.raises(TypeError, match="string"):
        processor.encode_prompt(5)


def test_answers_end_at_the_literal_stop_string(processor):
    tokenizer = processor.tokenizer
    ids = tokenizer("a red ball, and a cat \\n </s> more", add_special_tokens=False)["input_ids"]
    assert processor.decode_answer([*ids, 450, 9000]) == "a red ball, and a cat"
    assert processor.decode_answer(ids, short=True) == "a red ball"
    assert processor.decode_answer(tokenizer("\nyes! sure", add_special_tokens=False)["input_ids"], short=True) == "yes"
    assert processor.post_process_answers(torch.tensor([ids, ids])) == ["a red ball, and a cat"] * 2

    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a cat \\n", "a cat sits")]
    rows = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    assert StopAtLiteral(tokenizer)(rows, None).tolist() == [True, False]
    assert StopAtLiteral(tokenizer, prompt_length=rows.shape[1])(rows, None).tolist() == [False, False]
    # The stop string also works with transformers' own argument.
    from transformers.generation import StopStringCriteria

    assert StopStringCriteria(tokenizer, ["\\n"])(rows[:, : (rows[0] != 0).sum()], None).tolist()[0]


# ----------------------------------------------------------------------------------------------------------- pipelines


@pytest.fixture(scope="module")
def pipeline():
    return tiny.generation_pipeline()


def _call(pipeline, batch_size=1, **options):
    return pipeline(**tiny._generation_inputs(batch_size, **options))


def test_text_to_video_and_output_types(pipeline):
    tensor = _call(pipeline, 2)
    assert tensor.frames.shape == (2, 8, 3, 16, 24) and tensor.images is None and len(tensor.keyframes) == 1
    assert tensor.frames.min() >= 0 and tensor.frames.max() <= 1
    array = _call(pipeline, 2, output_type="np").frames
    assert np.allclose(array, tensor.frames.permute(0, 1, 3, 4, 2).numpy(), atol=1e-6)
    pictures = _call(pipeline, 2, output_type="pil", return_dict=False)[0]
    assert isinstance(pictures[1][7], Image.Image) and pictures[1][7].size == (24, 16)
    ids = tensor.token_ids[0].tolist()
    prompt = pipeline.processor.encode_prompt("a red ball rolls")
    assert ids[: len(prompt) + 1] == [*prompt, BOI] and BOM in ids


def test_text_matters_and_seeds_repeat(pipeline):
    first, second = _call(pipeline).frames, _call(pipeline).frames
    assert torch.equal(first, second)
    assert (_call(pipeline, prompt="a blue cat sits").frames - first).abs().max() > 1e-3
    assert (_call(pipeline, generator=torch.Generator().manual_seed(5)).frames - first).abs().max() > 1e-3
    changed = _call(pipeline, guidance_scale=2.0, negative_prompt="the mat")
    assert (changed.frames - first).abs().max() > 1e-4


def test_text_to_image(pipeline):
    output = _call(pipeline, 2, modality="image", height=24, width=16)
    assert output.images.shape == (2, 3, 24, 16) and output.frames is None and output.keyframes is None
    assert all(BOM not in ids for ids in output.token_ids)
    with_image = _call(pipeline, modality="image", image=tiny.picture(), image_token_guidance_scale=5.0)
    other_image = _call(pipeline, modality="image", image=tiny.picture(1), image_token_guidance_scale=5.0)
    assert (with_image.images - other_image.images).abs().max() > 1e-3


def test_image_to_video_uses_the_image_as_key_frame(pipeline):
    image = tiny.picture(size=(24, 16))
    output = _call(pipeline, image=image)
    assert np.array_equal(np.asarray(output.keyframes[0][0]), np.asarray(image))
    ids = output.token_ids[0].tolist()
    assert ids.count(BOI) == ids.count(EOI) == 1  # its codes were read, none were written
    assert (_call(pipeline, image=tiny.picture(1, size=(24, 16))).frames - output.frames).abs().max() > 1e-3
    assert (_call(pipeline, prompt="a blue cat", image=image).frames - output.frames).abs().max() > 1e-4
    alone = _call(pipeline, prompt=None, image=[image])
    assert alone.frames.shape == output.frames.shape
    interleaved = _call(pipeline, prompt=[["a red ball", tiny.picture(2), "becomes", image]])
    assert np.array_equal(np.asarray(interleaved.keyframes[0][0]), np.asarray(image))
    assert interleaved.token_ids[0].tolist().count(BOI) == 2


def test_long_videos_continue_from_everything_so_far(pipeline):
    output = _call(pipeline, 2, num_clips=3)
    assert output.frames.shape == (2, 8 + 7 + 7, 3, 16, 24) and len(output.keyframes) == 3
    assert output.token_ids[0].tolist().count(BOI) >= 3  # the mark itself is not excluded when codes are drawn
    single = _call(pipeline, 2)
    assert torch.equal(output.token_ids[0][: len(single.token_ids[0])], single.token_ids[0])
    assert torch.allclose(output.frames[:, :8], single.frames, atol=1e-5)
    assert _call(pipeline, num_clips=2, drop_repeated_frames=False).frames.shape[1] == 16
    linked = _call(pipeline, num_clips=2, inverse_rate=0.5).keyframes[1][0]
    fresh = _call(pipeline, num_clips=2, inverse_rate=0.0).keyframes[1][0]
    assert not np.array_equal(np.asarray(linked), np.asarray(fresh))


def test_callbacks_see_and_change_every_loop(pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(tuple(tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])}

    changed = _call(pipeline, callback_on_step_end=callback).frames
    assert seen == [(1, 4, 8, 8)] * 2 + [(1, 8, 4, 8, 12)] * 2
    assert (changed - _call(pipeline).frames).abs().max() > 1e-3


def test_another_pipeline_can_draw_the_key_frame(tmp_path):
    pipeline = tiny.generation_pipeline(text_to_image=tiny.text_to_image_pipeline())
    output = _call(pipeline, 2, use_text_to_image=True)
    plain = _call(pipeline, 2)
    assert output.token_ids[0].tolist().count(BOI) == 1
    assert (output.frames - plain.frames).abs().max() > 1e-3
    pipeline.save_pretrained(tmp_path)
    again = VideoLavitPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(_call(again, 2, use_text_to_image=True).frames, output.frames)


def test_bad_inputs_of_the_pipeline_raise(pipeline, tmp_path):
    image = tiny.picture()
    for options, error, message in (
        ({"prompt": None}, ValueError, "a prompt, an image"),
        ({"prompt": []}, ValueError, "every prompt"),
        ({"prompt": [[]]}, ValueError, "every prompt"),
        ({"prompt": 5}, TypeError, "prompt must be"),
        ({"prompt": [5]}, TypeError, "an image is"),
        ({"modality": "audio"}, ValueError, "modality"),
        ({"output_type": "gif"}, ValueError, "output_type"),
        ({"num_clips": 0}, ValueError, "num_clips"),
        ({"num_clips": 2, "modality": "image"}, ValueError, "num_clips"),
        ({"height": 15}, ValueError, "multiples"),
        ({"keyframe_width": 18}, ValueError, "multiples"),
        ({"inverse_rate": 1.0}, ValueError, "inverse_rate"),
        ({"generator": [torch.Generator()] * 3}, ValueError, "3 generators"),
        ({"image": [image, image]}, ValueError, "2 images for 1"),
        ({"prompt": ["a", ["b", image]]}, ValueError, "or none"),
        ({"use_text_to_image": True}, ValueError, "component text_to_image"),
        ({"image": str(tmp_path / "none.png")}, ValueError, "not a readable image"),
        ({"image": torch.zeros(8, 3, 16, 16)}, ValueError, "image tensor"),
        ({"negative_prompt": ["a", "b"]}, ValueError, "2 negative"),
        ({"max_image_tokens": 3000}, ValueError, "more than the language model's"),
    ):
        with pytest.raises(error, match=message):
            _call(pipeline, **{"generator": None, **options})
            pytest.fail(f"accepted: {options}")


@pytest.fixture(scope="module")
def answering():
    return tiny.understanding_pipeline()


def _ask(pipeline, question="what is in the picture?", **options):
    generator = torch.Generator().manual_seed(0)
    return pipeline(question, **{"min_new_tokens": 12, "max_new_tokens": 12, "generator": generator, **options})


def test_answers_depend_on_question_image_and_video(answering, video_file):
    def ids(output):
        return output.token_ids[0].tolist()

    image = _ask(answering, image=tiny.picture())
    assert len(ids(image)) == 12 and all(i < 400 for i in ids(image)) and isinstance(image.answers[0], str)
    assert ids(image) == ids(_ask(answering, image=tiny.picture()))
    assert ids(image) != ids(_ask(answering, image=tiny.picture(3)))
    assert ids(image) != ids(_ask(answering, "a cat", image=tiny.picture()))
    assert ids(image) != ids(_ask(answering))
    video = _ask(answering, video=str(video_file))
    assert ids(video) != ids(image) and ids(video) != ids(_ask(answering, video=str(video_file), end=0.4))
    history = [
        {"role": "user", "content": "what is it?"},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "what is in the picture?"},
    ]
    assert ids(_ask(answering, history, image=tiny.picture())) != ids(image)
    assert ids(_ask(answering, image=tiny.picture(), system_prompt="the mat")) != ids(image)


def test_batches_of_questions_equal_single_questions(answering, video_file):
    questions = ["what is in the picture?", "a cat", "the red ball rolls to the left"]
    images, videos = [tiny.picture(), None, None], [None, str(video_file), None]
    options = {"min_new_tokens": 6, "max_new_tokens": 6}
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    together = answering(questions, image=images, video=videos, generator=generators, **options)
    for row in range(3):
        alone = answering(
            questions[row],
            image=images[row],
            video=videos[row],
            generator=torch.Generator().manual_seed(row),
            **options,
        )
        assert together.answers[row] == alone.answers[0]
        assert together.token_ids[row].tolist() == alone.token_ids[0].tolist()


def test_sampled_answers_repeat_with_a_generator_and_leave_the_global_one_alone(answering):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = _ask(answering, image=tiny.picture(), do_sample=True)
    assert torch.equal(torch.rand(1), expected)
    assert first.answers == _ask(answering, image=tiny.picture(), do_sample=True).answers
    other = _ask(answering, image=tiny.picture(), do_sample=True, generator=torch.Generator().manual_seed(9))
    assert first.token_ids[0].tolist() != other.token_ids[0].tolist()


def test_bad_inputs_of_the_understanding_pipeline_raise(answering, processor, writer, video_file):
    for options, message in (
        ({"question": []}, "no question"),
        ({"question": ["a", "b"], "image": [tiny.picture()]}, "1 entries of image"),
        ({"generator": [torch.Generator()] * 2}, "2 generators"),
        ({"image": str(video_file)}, "not a readable image"),
        ({"question": "is this <image> it?"}, "placeholder"),
    ):
        with pytest.raises(ValueError, match=message):
            answering(**{"question": "a", **options})
    with pytest.raises(TypeError, match="video file"):
        answering("a", video=tiny.picture())
    with pytest.raises(ValueError, match="no tokenizers"):
        VideoLavitUnderstandingPipeline(model=writer, processor=processor)("a")


# ---------------------------------------------------------------------------------------------------------- conversion

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
    from cinetok.conversion.video_lavit_llm import config_from_original

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
    logits, answer, processor_name, inner_name = json.loads(_fresh(code, str(output)))
    assert torch.allclose(torch.tensor(logits), expected, atol=1e-6)
    assert all(token < 32000 for token in answer)  # answers are text: the saved generation settings say so
    assert (processor_name, inner_name) == ("VideoLavitProcessor", "VideoLavitModel")
    pipeline = VideoLavitUnderstandingPipeline.from_model(output)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline("what?", image=tiny.picture(), max_new_tokens=9).answers[0], str)


def test_generation_weights_convert(tmp_path, llama_tokenizer):
    from cinetok.conversion.video_lavit_llm import config_from_original

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


def test_the_whole_generation_system_converts_and_runs(tmp_path, llama_tokenizer):
    from cinetok.conversion.video_lavit_llm import config_from_original
    from cinetok.conversion.video_lavit_parts import motion_tokenizer_arguments

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
    visual_config = VideoLavitVisualTokenizerConfig(**{**tiny.VISUAL, "codebook_size": 16384})
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
    frames = _call(converted, num_inference_steps=1, keyframe_num_inference_steps=1).frames
    assert frames.shape == (1, 24, 3, 16, 24)
    assert torch.equal(frames, _call(by_hand, num_inference_steps=1, keyframe_num_inference_steps=1).frames)


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
    from cinetok.conversion.video_lavit_llm import config_from_original

    original = {"llama": ORIGINAL["llama"]}
    _original_folder(tmp_path / "weights", config_from_original(original), changes)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        convert_checkpoint("video_lavit", tmp_path / "weights", tmp_path / "converted", original_config=original)
    assert not (tmp_path / "converted").exists()


def test_a_missing_or_foreign_tokenizer_is_refused(tmp_path):
    from cinetok.conversion.video_lavit_llm import config_from_original

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
    # A first line for the torchvision of machines without the package's compiled operators.
    shim = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import torchvision_shim; torchvision_shim.install()\n"
    run_card(text.replace("```python\n", f"```python\n{shim}", 1), tmp_path)


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
