"""Video-LaVIT's language model: recorded numbers, configuration, splice, training, writing of codes, and bad input."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED
from golden_kinds import load_runners
from model_cases import video_lavit_llm as tiny
from run_goldens import run_case
from run_manifests import check_manifest
from torch.nn.utils.rnn import pad_sequence
from video_lavit_llm_runs import BOI, BOM, EOI, EOM, IMAGE, MOTION, VIDEO, VISUAL, writer_fixture  # noqa: F401 (fixture)

from cinetok import VideoLavitConfig
from cinetok.modeling.video_lavit.generation_video_lavit import motion_codes, visual_codes

GOLDENS = Path(__file__).parent / "goldens" / "video_lavit"


@pytest.fixture(scope="module")
def model():
    return tiny.language_model()


# ------------------------------------------------------------------------------------------------------------- goldens


@pytest.mark.parametrize("kind", ["llm_generation", "llm_understanding"])
def test_recorded_numbers(kind):
    load_runners("video_lavit")
    case = run_case(GOLDENS / kind)
    assert case.rows and not [row for row in case.rows if not row.passed]


@pytest.mark.shared
@pytest.mark.parametrize("stem", ["language_model", "language_model_sft"])
def test_released_tensors_fit_one_to_one(stem):
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


def test_given_ids_count_unless_they_are_masked(writer):
    options = {"do_sample": False, "min_new_tokens": 3, "max_new_tokens": 3, "output_scores": True}
    plain = writer.generate_image_tokens([[20, 21]], **options)
    with_end = writer.generate_image_tokens([[20, 2, 21]], **options)
    assert not torch.equal(plain.scores, with_end.scores)  # the end of a text is read ...
    assert with_end.sequences[0][:3].tolist() == [20, 21, BOI]  # ... and left out of the result, as in the original
    expected = _two_pass_reference(writer, [20, 2, 21], BOI, EOI, [0, 1, 2, *range(BOI, BOM)], 4.0, 3, 3)
    assert with_end.raw_token_ids[0].tolist() == expected
    ids = torch.tensor([[2, 2, 20, 21], [20, 2, 21, 2]])
    masked = writer.generate_image_tokens(ids, attention_mask=torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]), **options)
    for row, alone in enumerate((plain, with_end)):
        assert torch.allclose(masked.scores[row], alone.scores[0], atol=1e-4)
        assert torch.equal(masked.sequences[row], alone.sequences[0])


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
        ([[1]], {"generator": 5}, TypeError, "not int"),
        ([[1]], {"attention_mask": [[1], [1]]}, ValueError, "2 rows for 1 prompts"),
        ([[1]], {"attention_mask": [[1, 1]]}, ValueError, "prompt 0 has 1 ids"),
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
