"""Divot-LLM: recorded numbers, manifests, attention and loss, text and features, tokenizer, conversion, pipelines, bad
input."""

import json
import shutil
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
from model_cases import divot as parts
from model_cases import divot_llm as cases
from run_goldens import run_case
from run_manifests import check_manifest
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, StaticCache

import cinetok
from cinetok import CheckpointError, DivotConfig, DivotForCausalLM, DivotProcessor, model_cards
from cinetok.conversion import convert_checkpoint, find_release, state_dict_names
from cinetok.conversion.divot_llm import RELEASES_LLM, merge_lora
from cinetok.modeling.divot.generation_divot import DivotFrameTokenLogitsProcessor, GeneratorSamplingLogitsProcessor
from cinetok.modeling.divot.gmm_divot import DivotGaussianMixture
from cinetok.modeling.divot.modeling_divot import create_query_block_mask, positions_from_mask, query_block_ids
from cinetok.modeling.divot.processing_divot import TAGS, build_divot_tokenizer, frame_tokens
from cinetok.pipelines.divot.language import pad_rows

GOLDENS = Path(__file__).parent / "goldens" / "divot"
KINDS = {"attention_masks", "divot_llm", "gmm_head", "lora_merge"}
SIZE, DIM = cases.FEATURES, cases.FEATURE_DIM


def _mine(folder):
    return [path for path in find_cases([folder]) if json.loads((path / "case.json").read_text())["kind"] in KINDS]


def _check_case(path):
    load_runners("divot")
    case = run_case(path)
    assert case.rows
    assert not [f"{row.name}: {row.max_abs:.2e} {row.note}" for row in case.rows if not row.passed]


@pytest.mark.parametrize("path", _mine(GOLDENS), ids=lambda path: path.name)
def test_committed_goldens(path):
    _check_case(path)


@pytest.mark.shared
@pytest.mark.parametrize("path", _mine(SHARED / "goldens" / "divot"), ids=lambda path: path.name)
def test_shared_goldens(path):
    _check_case(path)


@pytest.mark.parametrize("stage", ["pretrain", "sft_comp", "sft_gen"])
@pytest.mark.parametrize("part", ["llm", "agent"])
def test_manifest(tmp_path, stage, part):
    path = tmp_path / "divot" / f"Divot_{stage}_{part}.json"
    path.parent.mkdir()
    path.write_text(json.dumps(load_manifests("divot")[path.stem]))
    problems, _ = check_manifest(path)
    assert not problems


def test_released_size_on_meta():
    with torch.device("meta"):
        model = DivotForCausalLM(DivotConfig())
    # Mistral-7B with 32,262 rows twice, and the two projections of the agent file (475 MB in float32).
    assert sum(p.numel() for p in model.language_model.parameters()) + model.lm_head.weight.numel() == 7_243_878_400
    projections = (*model.model.input_resampler.parameters(), *model.output_resampler.parameters())
    assert sum(p.numel() for p in projections) == 118_841_632


# ---- attention ---------------------------------------------------------------------------------------------------


def _first_row_mask(attention_mask, window=None, size=4):
    config = cases.llm(text_config={"sliding_window": window}).language_model.config
    return create_query_block_mask(config, torch.zeros(*attention_mask.shape, 8), attention_mask, size)[0, 0]


def test_two_adjacent_blocks_stay_apart():
    allowed = _first_row_mask(torch.tensor([[1, -1, -1, -1, -1, -1, -1, -1, -1, 1]]))
    assert allowed[1, :5].all() and not allowed[1, 5:].any()
    assert allowed[5, :9].all() and not allowed[5, 9] and not allowed[0, 1:].any()


def test_window_also_cuts_blocks():
    allowed = _first_row_mask(torch.tensor([[1, -1, -1, -1, -1, 1]]), window=2)
    assert allowed[1].tolist() == [True, True, True, True, True, False]
    assert allowed[4].tolist() == [False, False, False, True, True, False]


@pytest.mark.parametrize("mask", [[1, -1, -1, -1, 1, -1], [1, -1, -1, 1, -1, -1], [1, -1, -1, 1, 1, 1]])
def test_malformed_blocks(mask):
    with pytest.raises(ValueError, match="multiples of 4"):
        query_block_ids(torch.tensor([mask]), 4)


def test_positions_skip_padding_on_the_left_only():
    mask = torch.tensor([[0, 0, 1, -1, 1], [1, 1, 1, 0, 0]])
    assert positions_from_mask(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


def test_flash_attention_is_refused_for_query_blocks():
    config = cases.llm().language_model.config
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="sdpa"):
        create_query_block_mask(config, torch.zeros(1, 5, 8), torch.tensor([[1, -1, -1, -1, -1]]), 4)


@torch.no_grad()
def test_queries_see_each_other_and_are_not_seen_before():
    model, inputs = cases.llm(), cases.llm_inputs(1)
    inputs.pop("labels"), inputs.pop("target_features")
    base = model(**inputs).last_hidden_state[0]
    changed = inputs["input_ids"].clone()
    changed[0, -1] = model.config.frame_end_token_id  # the last query
    other = model(**(inputs | {"input_ids": changed})).last_hidden_state[0]
    difference = (other - base).abs().amax(-1)
    assert difference[:-SIZE].max() == 0 and difference[-SIZE:].min() > 1e-4
    places, _ = model.model.find_clips(inputs["input_ids"], inputs["attention_mask"], reads_video=True)
    causal = inputs | {"attention_mask": inputs["attention_mask"].abs(), "video_token_mask": places}
    assert (model(**causal).last_hidden_state[0] - base)[-SIZE:-1].abs().amax(-1).min() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(implementation, side):
    model, inputs = cases.llm(), cases.llm_inputs(1)
    alone = model(**inputs)
    model.set_attn_implementation(implementation)
    amount = (3, 0) if side == "left" else (0, 3)
    real = slice(3, None) if side == "left" else slice(None, -3)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    padded = {k: torch.nn.functional.pad(v, amount, value=fill[k]) if k in fill else v for k, v in inputs.items()}
    both = model(**padded)
    assert torch.allclose(both.last_hidden_state[:, real], alone.last_hidden_state, atol=1e-5)
    assert torch.allclose(both.loss, alone.loss, atol=1e-5)


# ---- loss --------------------------------------------------------------------------------------------------------


def test_every_input_matters_to_the_loss():
    model, inputs = cases.llm(), cases.llm_inputs(2)
    with torch.no_grad():
        base = model(**inputs)
        changes = {
            "video_features": (inputs["video_features"].flip(-1), ("lm_loss", "gmm_loss")),
            "target_features": (inputs["target_features"].flip(-1), ("gmm_loss",)),
            "labels": (inputs["labels"].roll(1, 1), ("lm_loss",)),
        }
        for name, (value, losses) in changes.items():
            other = model(**(inputs | {name: value}))
            for loss in ("lm_loss", "gmm_loss"):
                assert ((other[loss] - base[loss]).abs() > 1e-4) == (loss in losses), (name, loss)
        assert torch.allclose(base.loss, base.lm_loss + base.gmm_loss)
        scaled = cases.llm(lm_loss_scale=0.5, gmm_loss_scale=2.0)(**inputs)
        assert torch.allclose(scaled.loss, 0.5 * base.lm_loss + 2 * base.gmm_loss)


@pytest.mark.parametrize(
    "dropped", [(), ("video_features",), ("target_features",), ("video_features", "target_features")]
)
def test_all_parameters_get_gradients(dropped):
    model = cases.llm().train()
    inputs = {k: v for k, v in cases.llm_inputs(2).items() if k not in dropped}
    output = model(**inputs)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    used = {"model.input_resampler": "video_features", "output_resampler": "target_features"}
    for module, needs in used.items():
        moved = model.get_submodule(module).fc1.weight.grad.abs().sum() > 0
        assert moved == (needs not in dropped)
    assert (output.gmm_loss == 0) == ("target_features" in dropped)


def test_gradient_checkpointing_is_exact():
    inputs, gradients = cases.llm_inputs(2), []
    for checkpointing in (False, True):
        model = cases.llm().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_loss_without_text_labels_is_that_of_the_features():
    model, inputs = cases.llm(), cases.llm_inputs(2)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    output = model(**inputs)
    assert output.lm_loss == 0 and torch.equal(output.loss, output.gmm_loss)


def test_features_flat_and_per_sample_are_the_same():
    model, inputs = cases.llm(), cases.llm_inputs(2)
    with torch.no_grad():
        expected = model(**inputs).loss
        flat = {k: inputs[k].flatten(0, 1) for k in ("video_features", "target_features")}
        padded = torch.cat([inputs["video_features"], torch.full((2, 1, SIZE, DIM), float("nan"))], dim=1)
        masked = {"video_features": padded, "video_features_mask": torch.tensor([[1, 0], [1, 0]])}
        assert torch.equal(model(**(inputs | flat)).loss, expected)
        assert torch.equal(model(**(inputs | masked)).loss, expected)


# ---- mixture -----------------------------------------------------------------------------------------------------


def _mixture(count=4000):
    parameters = torch.tensor([-4.0, 4.0, 0.5, -0.5, 0.0, 1.0]).expand(count, -1)  # K=2, D=1
    return DivotGaussianMixture.from_parameters(parameters, 2, 1)


def test_likelihood_agrees_with_torch_distributions():
    parameters, targets = torch.randn(3, 5, 2 * 3 * 4 + 3), torch.randn(3, 5, 4)
    mixture = DivotGaussianMixture.from_parameters(parameters, 3, 4)
    d = torch.distributions
    reference = d.MixtureSameFamily(
        d.Categorical(logits=mixture.weight_logits), d.Independent(d.Normal(mixture.means, mixture.variances.sqrt()), 1)
    )
    assert torch.allclose(mixture.log_prob(targets), reference.log_prob(targets), atol=1e-4)
    assert torch.allclose(mixture.nll(targets), -reference.log_prob(targets).mean() / 4, atol=1e-5)


def test_samples_follow_the_mixture():
    mixture = _mixture()
    draws = mixture.sample(1.0, torch.Generator().manual_seed(0))[:, 0]
    second = draws > 0
    share = torch.tensor([0.0, 1.0]).softmax(0)[1]
    assert abs(second.float().mean() - share) < 0.03
    for chosen, mean, variance in (
        (~second, -4.0, mixture.variances[0, 0, 0]),
        (second, 4.0, mixture.variances[0, 1, 0]),
    ):
        assert abs(draws[chosen].mean() - mean) < 0.1 and abs(draws[chosen].var() / variance - 1) < 0.15
    narrow = mixture.sample(0.01, torch.Generator().manual_seed(0))[:, 0]
    assert (narrow.abs() - 4).abs().max() < 0.5
    weighted = mixture.weighted_sample(0.0)
    assert torch.allclose(weighted, mixture.mean) and torch.allclose(mixture.draw("mean"), mixture.mean)


def test_one_generator_per_sample_makes_samples_independent_of_the_batch():
    mixture = DivotGaussianMixture.from_parameters(torch.randn(3, SIZE, 2 * 2 * DIM + 2), 2, DIM)
    both = mixture.sample(0.5, cases.generators(3))
    for i in range(3):
        one = DivotGaussianMixture(*(v[i : i + 1] for v in vars(mixture).values()))
        assert torch.equal(one.sample(0.5, [torch.Generator().manual_seed(i)])[0], both[i])
    with pytest.raises(ValueError, match="2 generators for 3"):
        mixture.sample(0.5, cases.generators(2))


def test_bad_mixtures():
    with pytest.raises(ValueError, match="need 6"):
        DivotGaussianMixture.from_parameters(torch.zeros(2, 7), 2, 1)
    with pytest.raises(ValueError, match="targets have shape"):
        _mixture().nll(torch.zeros(1))
    with pytest.raises(ValueError, match="unknown sampling method"):
        _mixture().draw("median")
    with pytest.raises(ValueError, match="var_scale"):
        _mixture().draw("mixture", var_scale=-1.0)


# ---- generation --------------------------------------------------------------------------------------------------


def _prompts():
    processor = cases.processor()
    inputs = processor(
        ["[INST] <video>what is it [/INST]\n", "[INST] <image>who [/INST]\n<video>", "[INST] hello [/INST]\n"],
        num_clips=[2, 1, 1],
    )
    return inputs, cases.random((4, SIZE, DIM), 3), [slice(0, 2), slice(2, 4), slice(4, 4)]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_generate_in_batches_with_and_without_cache(options):
    model, (inputs, features, rows) = cases.talkative(cases.llm()), _prompts()
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0} | options
    length = inputs["input_ids"].shape[1]
    batch = model.generate(**inputs, video_features=features, **options)[:, length:]
    if "cache_implementation" not in options:
        uncached = model.generate(**inputs, video_features=features, use_cache=False, **options)[:, length:]
        assert torch.equal(batch, uncached)
    for i, clips in enumerate(rows):
        real = inputs["attention_mask"][i] != 0
        ids = inputs["input_ids"][i, real][None]
        given = features[clips] if clips.stop > clips.start else None
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), video_features=given, **options)
        assert torch.equal(alone[0, ids.shape[1] :], batch[i])
    other = model.generate(**inputs, video_features=features.flip(-1), **options)[:, length:]
    assert (
        not torch.equal(other[0], batch[0]) and not torch.equal(other[1], batch[1]) and torch.equal(other[2], batch[2])
    )


def test_generate_several_sequences_per_prompt_repeats_the_clips():
    model, (inputs, features, _) = cases.talkative(cases.llm()), _prompts()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    single = model.generate(**inputs, video_features=features, **options)
    beams = model.generate(**inputs, video_features=features, num_beams=3, num_return_sequences=3, **options)
    assert beams.shape[0] == 9 and torch.equal(beams[::3, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert single.shape[0] == 3


@torch.no_grad()
def test_a_query_block_in_the_prompt_with_caches():
    model = cases.llm()
    inputs = {k: v for k, v in cases.llm_inputs(2).items() if k not in ("labels", "target_features")}
    ids = torch.cat([inputs["input_ids"], inputs["input_ids"][:, :3]], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], dim=1)
    features = inputs["video_features"]
    whole = model(ids, attention_mask=mask, video_features=features).logits[:, -3:]
    start = model(**inputs, use_cache=True)
    steps, cache = [], start.past_key_values
    for i in range(3):
        end = inputs["input_ids"].shape[1] + i + 1
        step = model(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        steps.append(step.logits)
        cache = step.past_key_values
    assert torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-5)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    dynamic = model.generate(**inputs, **options)
    static = model.generate(
        **inputs, **options, past_key_values=StaticCache(config=model.config.text_config, max_cache_len=80)
    )
    assert torch.equal(dynamic, static)


def test_generate_video_features():
    model, processor = cases.llm(), cases.processor()
    tag = processor.token_ids()["video_start_token_id"]
    rows = [[1, 7, 8, 9, 10, tag], [1, 9, tag], [1, 12, 6, 7, tag]]
    inputs = processor.with_queries(*pad_rows(rows, 0))
    assert (inputs["attention_mask"] == -1).sum(-1).tolist() == [SIZE] * 3
    batch = model.generate_video_features(**inputs, generator=cases.generators(3))
    assert batch.shape == (3, SIZE, DIM) and batch.dtype == torch.float32
    for i, row in enumerate(rows):
        one = processor.with_queries(torch.tensor([row]))
        alone = model.generate_video_features(**one, generator=[torch.Generator().manual_seed(i)])
        assert torch.allclose(alone[0], batch[i], atol=1e-5)
        # The mask is worked out when it marks nothing.
        unmarked = model.generate_video_features(one["input_ids"], generator=[torch.Generator().manual_seed(i)])
        assert torch.equal(unmarked, alone)
    assert (batch[0] - batch[1]).abs().max() > 1e-2
    mean = model.generate_video_features(**inputs, method="mean")
    assert torch.equal(mean, model.generate_video_features(**inputs, method="mean"))
    assert not torch.allclose(mean, batch)


def test_clips_seen_before_matter_to_generated_features():
    model = cases.llm()
    inputs = {k: v for k, v in cases.llm_inputs(2).items() if k in ("input_ids", "attention_mask", "video_features")}
    first = model.generate_video_features(**inputs, method="mean")
    other = model.generate_video_features(
        **(inputs | {"video_features": inputs["video_features"].flip(-1)}), method="mean"
    )
    assert (first - other).abs().max() > 1e-3


def test_frame_token_processor():
    process = DivotFrameTokenLogitsProcessor(3, [4, 5], 6)
    scores = process(torch.tensor([[0, 3], [0, 5], [0, 6]]), torch.arange(8.0).repeat(3, 1))
    assert scores.argmax(-1).tolist() == [4, 6, 7]
    assert scores[2, 4:7].tolist() == [float("-inf")] * 3 and scores[2, 3] == 3


def test_sampling_with_generators_follows_the_scores_and_stops_drawing():
    scores = torch.tensor([[0.0, 1.0, 2.0]]).expand(2000, -1)
    process = GeneratorSamplingLogitsProcessor(torch.Generator().manual_seed(0), 1, [9])
    picked = process(torch.zeros(2000, 1, dtype=torch.long), scores).argmax(-1)
    shares = torch.bincount(picked, minlength=3) / 2000
    assert torch.allclose(shares, scores[0].softmax(0), atol=0.03)
    generators = cases.generators(2)
    before = generators[0].get_state()
    process = GeneratorSamplingLogitsProcessor(generators, 1, [9])
    process(torch.tensor([[1, 9], [9, 1]]), scores[:2])
    assert torch.equal(generators[0].get_state(), before)
    assert not torch.equal(generators[1].get_state(), torch.Generator().manual_seed(1).get_state())


# ---- bad input to the model --------------------------------------------------------------------------------------


def test_bad_features():
    model, inputs = cases.llm(), cases.llm_inputs(2)
    features = inputs["video_features"]
    for changed, message in (
        ({"video_features": features[:, :, :-1]}, "expected"),
        ({"video_features": features[:1]}, "has room for 16 video features"),
        ({"video_features": features.clone().index_fill_(3, torch.tensor(0), float("nan"))}, "NaN"),
        ({"target_features": inputs["target_features"] / 0}, "NaN or infinite"),
        ({"target_features": inputs["target_features"][:1]}, "1 clips of target_features for 2"),
        ({"target_features": inputs["target_features"][..., :-1]}, "target_features has shape"),
        ({"video_features_mask": torch.ones(2, 2)}, "does not fit"),
        ({"attention_mask": inputs["attention_mask"].abs()}, "mark the latter with -1"),
        ({"logits_to_keep": 1}, "need all logits"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**(inputs | changed))
    with pytest.raises(ValueError, match="exactly one"):
        model(labels=inputs["labels"])


def test_bad_generation():
    model, (inputs, features, _) = cases.llm(), _prompts()
    with pytest.raises(ValueError, match="5 clips were given|room for"):
        model.generate(**inputs, video_features=cases.random((5, SIZE, DIM), 0), max_new_tokens=1)
    with pytest.raises(ValueError, match="does not end with the 8 frame tokens"):
        model.generate_video_features(inputs["input_ids"], inputs["attention_mask"], features)
    with pytest.raises(ValueError, match="must end with <vid>"):
        cases.processor().with_queries(inputs["input_ids"])
    ids = torch.tensor([[1, *model.config.query_token_ids]])
    with pytest.raises(ValueError, match="one clip"):
        model.generate_video_features(torch.cat([ids, ids]), torch.tensor([[1] + [-1] * SIZE, [1] * (SIZE + 1)]))


def test_bad_configurations():
    good = cases.llm().config.to_dict()
    for changed, message in (
        ({"query_token_ids": [5, 6]}, "holds 2 ids"),
        ({"frame_end_token_id": good["frame_start_token_id"]}, "must all differ"),
        ({"video_start_token_id": 10_000}, "outside the vocabulary"),
        ({"num_gmm_components": 0}, "at least 1"),
        ({"gmm_min_variance": 0.0}, "must be positive"),
        ({"var_scale": -0.1}, "must not be negative"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            DivotConfig(**(good | changed))


def test_vocabulary_extension():
    model = cases.llm()
    rows, old = (model.get_input_embeddings().weight.mean(0), model.lm_head.weight.mean(0)), len(model.lm_head.weight)
    model.extend_vocabulary(old + 3)
    assert model.config.text_config.vocab_size == old + 3
    assert torch.allclose(model.get_input_embeddings().weight[old:], rows[0].expand(3, -1), atol=1e-6)
    assert torch.allclose(model.lm_head.weight[old:], 3 * rows[1].expand(3, -1), atol=1e-6)
    with pytest.raises(ValueError, match="smaller"):
        model.extend_vocabulary(5)


# ---- tokenizer and prompts ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """A folder with the real sentencepiece model of Mistral-7B-Instruct-v0.1."""
    import mistral_common as package  # in the dev extra

    folder = tmp_path_factory.mktemp("mistral")
    shutil.copy(Path(package.__file__).parent / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    return folder


def _expected_ids(package_folder, text):
    """The ids of the original's slow tokenizer: sentencepiece on every piece between the added tokens."""
    import re

    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(str(package_folder / "tokenizer.model"))
    added = [*TAGS.values(), *frame_tokens(256)]
    ids = []
    for piece in re.split(r"(</?(?:img|vid|frame)>|<frame_\d{5}>)", text):
        ids += [32000 + added.index(piece)] if piece in added else model.EncodeAsIds(piece) if piece else []
    return ids


def test_ids_of_the_real_tokenizer_before_and_after_saving(mistral, tmp_path):
    processor = DivotProcessor.from_base_tokenizer(mistral)
    prompts = [
        processor.comprehension_prompt("What does this video describe?").replace("<video>", processor.clip_text(2)),
        processor.clip_text(1, "image") + "  two spaces, and\nlines",
        processor.generation_prompt("A gorgeous girl is smiling") + "<vid>" + processor.query_text(),
        "I move <vid> <frame> on",
    ]
    assert prompts[0].startswith("[INST] <vid><frame><frame_00000>") and prompts[0].count("</frame>") == 2
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, DivotProcessor) and loaded.num_query_tokens == 64
    for one in (processor, loaded):
        assert len(one.tokenizer) == 32262 and one.tokenizer.pad_token_id == 0
        for prompt in prompts:
            assert one.tokenizer(prompt, add_special_tokens=False)["input_ids"] == _expected_ids(mistral, prompt)
        batch = one(["hi", "a longer prompt"])
        assert batch["input_ids"][:, -1].ne(0).all() and batch["input_ids"][0].tolist()[-2:] == [1, 12014]
    # "[INST]", the clips and "What" as the original encodes them: 733, 16289, 28793 is "_[", "INST", "]".
    ids = processor(prompts[0])["input_ids"][0].tolist()
    assert ids[:6] == [1, 733, 16289, 28793, 28705, 32002] and ids[-6:-4] != [32003, 1824]
    assert ids[ids.index(32003) + 1] == 1824
    assert processor.token_ids()["query_token_ids"] == list(range(32006, 32070))
    processor.check_model(DivotConfig())


def test_stored_ids_of_added_tokens_are_kept(mistral, tmp_path):
    shutil.copy(mistral / "tokenizer.model", tmp_path)
    order = [*reversed(frame_tokens(256)), *TAGS.values()]
    (tmp_path / "added_tokens.json").write_text(json.dumps({token: 32000 + i for i, token in enumerate(order)}))
    ids = DivotProcessor.from_base_tokenizer(tmp_path).token_ids()
    assert ids["query_token_ids"][:2] == [32255, 32254] and ids["image_start_token_id"] == 32256
    entries = {str(32000 + i): {"content": token} for i, token in enumerate(order)} | {"1": {"content": "<s>"}}
    (tmp_path / "added_tokens.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries}))
    assert DivotProcessor.from_base_tokenizer(tmp_path).token_ids() == ids
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<vid>": 32005}))
    with pytest.raises(CheckpointError, match="do not follow"):
        build_divot_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<vid>": 32000}))
    with pytest.raises(CheckpointError, match="lacks"):
        build_divot_tokenizer(tmp_path)


def test_chat_template():
    processor = cases.processor()
    user = {"role": "user", "content": [{"type": "video", "video": parts.video(0)}, {"type": "text", "text": "What?"}]}
    turns = [user, {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Where?"}]
    assert (
        processor.apply_chat_template([user])
        == processor.comprehension_prompt("What?")
        == "[INST] <video>What? [/INST]\n"
    )
    expected = "[INST] <video>What? [/INST]\nA cat.\n[INST] Where? [/INST]\n"
    assert processor.apply_chat_template(turns) == expected
    answered = [*turns, {"role": "assistant", "content": [{"type": "text", "text": "Here."}, {"type": "image"}]}]
    assert processor.apply_chat_template(answered) == expected + "Here.<image></s>"
    assert processor.apply_chat_template(answered, continue_final_message=True) == expected + "Here.<image>"
    assert processor.apply_chat_template([{"role": "user", "content": "Generate a video of rain"}]) == (
        processor.generation_prompt("rain")
    )
    assert processor.story_prompt("Generate a story.") == "[INST] Generate a story. [/INST]\n"
    batch = processor.apply_chat_template([turns, turns[-1:]], tokenize=True)
    assert batch["pixel_values_videos"].shape == (2, 5, 3, 32, 32) and batch["num_clips"].tolist() == [2]
    assert batch["attention_mask"][1, 0] == 0
    with pytest.raises(Exception, match="turns alternate"):
        processor.apply_chat_template(turns[1:])
    with pytest.raises(ValueError, match='lacks its "video"'):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], tokenize=True)


def test_videos_and_images_keep_their_order():
    processor = cases.processor()
    image = np.full((20, 20, 3), 255, np.uint8)
    inputs = processor(
        ["[INST] <image>a<video>b [/INST]\n", "[INST] <video>c [/INST]\n"],
        videos=[parts.video(0, num_frames=20), parts.video(1, num_frames=8)],
        images=[image],
    )
    assert inputs["num_clips"].tolist() == [1, 2, 1]
    assert (inputs["pixel_values_videos"][0] == 1).all() and not (inputs["pixel_values_videos"][1] == 1).all()
    for text, given, message in (
        ("[INST] <video>a [/INST]\n", {}, "1 <video>, but 0 videos"),
        ("[INST] a [/INST]\n", {"videos": parts.video(0)}, "0 <video>, but 1 videos"),
        ("[INST] <image>a [/INST]\n", {"videos": parts.video(0)}, "<video>|<image>"),
        ("<video>", {"num_clips": [1, 1]}, "does not fit 1"),
        ("<video>", {"num_clips": [0]}, "does not fit 1"),
        ("<video>", {"num_clips": [1], "videos": parts.video(0)}, "not both"),
        (None, {}, "give text"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(text, **given)


def test_text_is_cleaned():
    processor = cases.processor()
    ids = processor.tokenizer("ab cd", add_special_tokens=False)["input_ids"]
    tags = list(processor.token_ids()["query_token_ids"][:2]) + [processor.token_ids()["video_start_token_id"]]
    assert processor.post_process_text([[*ids, *tags, 2, 0]]) == ["ab cd"]


def test_a_tokenizer_that_does_not_match():
    processor = cases.processor()
    with pytest.raises(ValueError, match="tokens, the model"):
        processor.check_model(DivotConfig())
    config = cases.llm().config
    config.query_token_ids = config.query_token_ids[::-1]
    with pytest.raises(ValueError, match="disagree on query_token_ids"):
        processor.check_model(config)
    with pytest.raises(ValueError, match="disagree"):
        cinetok.DivotComprehensionPipeline(processor, parts.tokenizer(), DivotForCausalLM(config))
    plain = build_divot_tokenizer(cases._tokenizer_file(), num_frame_tokens=2)
    with pytest.raises(ValueError, match="lacks <frame_00002>"):
        DivotProcessor(plain, num_query_tokens=8)


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        build_divot_tokenizer(tmp_path)


# ---- conversion --------------------------------------------------------------------------------------------------


def _original(model):
    """Released form of a model: (Mistral's tensors, the projections')."""
    tensors = model.state_dict()
    agent = {name: value for name, value in tensors.items() if "resampler" in name}
    llm = {name: value for name, value in tensors.items() if name not in agent}
    return state_dict_names("divot", "llm", None).from_hf(llm), state_dict_names("divot", "agent", None).from_hf(agent)


def _original_config(model):
    text = model.config.text_config.to_dict()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "sliding_window")  # fmt: skip
    return {
        "llm": {key: text[key] for key in keys} | {"rope_theta": 10000.0},
        "input_resampler": {"input_dim": DIM, "num_queries": SIZE},
        "agent": {"num_gmm_kernel": model.config.num_gmm_components},
    }


@pytest.fixture
def release_folder(tmp_path):
    """A folder laid out like the authors' repository: llm/ in two shards, agent/, and a tokenizer beside them."""
    model = cases.llm()
    llm, agent = _original(model)
    folder = tmp_path / "Divot_tiny"
    (folder / "llm").mkdir(parents=True)
    (folder / "agent").mkdir()
    names = sorted(llm)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, own in shards.items():
        save_file({name: llm[name].contiguous() for name in own}, folder / "llm" / file)
    index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
    (folder / "llm" / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(agent, folder / "agent" / "pytorch_model.bin")
    shutil.copytree(cases._tokenizer_file(), tmp_path / "cvlm_mistral_instruct_tokenizer")
    cases.processor().tokenizer.save_pretrained(tmp_path / "cvlm_mistral_instruct_tokenizer")
    return model, folder


def _outputs(model):
    with torch.no_grad():
        return model(**cases.llm_inputs(2)).logits


def test_conversion_of_a_release(release_folder, tmp_path):
    model, folder = release_folder
    for checkpoints in ([folder], [folder / "llm", folder / "agent" / "pytorch_model.bin"]):
        output = tmp_path / f"converted{len(checkpoints)}"
        convert_checkpoint("divot", checkpoints, output, original_config=_original_config(model))
        loaded = AutoModelForCausalLM.from_pretrained(output).eval()
        assert isinstance(loaded, DivotForCausalLM) and torch.equal(_outputs(loaded), _outputs(model))
        assert loaded.generation_config.top_p == 0.5 and loaded.generation_config.eos_token_id == 2
        assert AutoConfig.from_pretrained(output).query_token_ids == loaded.config.query_token_ids
        AutoProcessor.from_pretrained(output).check_model(loaded.config)
    half = tmp_path / "half"
    convert_checkpoint("divot", folder, half, original_config=_original_config(model), dtype="bfloat16")
    assert DivotForCausalLM.from_pretrained(half).dtype == torch.bfloat16


def test_conversion_of_a_training_output(release_folder, tmp_path):
    """peft's names with LoRA and trained norms, complete or with the frozen weights elsewhere."""
    model, folder = release_folder
    llm, agent = _original(model)
    wrapped, expected = {}, dict(llm)
    for i, (name, value) in enumerate(sorted(llm.items())):
        base = "llm.base_model.model." + name
        if name.endswith("_proj.weight"):
            low, high = cases.random((2, value.shape[1]), i), cases.random((value.shape[0], 2), 100 + i)
            wrapped[base] = value
            stem = base.removesuffix(".weight")
            wrapped[f"{stem}.lora_A.default.weight"], wrapped[f"{stem}.lora_B.default.weight"] = low, high
            expected[name] = value + (6 / 2) * high @ low
        elif "norm" in name:
            stem = base.removesuffix(".weight")
            wrapped[f"{stem}.original_module.weight"] = value
            wrapped[f"{stem}.modules_to_save.default.weight"] = expected[name] = value + 0.5
        else:
            wrapped[base] = value
    training = tmp_path / "run"
    training.mkdir()
    torch.save({"module": wrapped | agent}, training / "pytorch_model.bin")
    frozen = [n for n in wrapped if n.endswith("_proj.weight") or "original_module" in n]
    torch.save({k: v for k, v in (wrapped | agent).items() if k not in frozen}, training / "trained.bin")
    config = _original_config(model) | {"lora": {"r": 2, "lora_alpha": 6}}
    results = []
    for i, files in enumerate(([training / "pytorch_model.bin"], [training / "trained.bin", folder / "llm"])):
        convert_checkpoint("divot", files, tmp_path / f"merged{i}", original_config=config)
        loaded = DivotForCausalLM.from_pretrained(tmp_path / f"merged{i}")
        got, _ = _original(loaded)
        assert all(torch.allclose(got[name], value, atol=1e-5) for name, value in expected.items())
        results.append(got)
    assert all(torch.equal(results[0][name], results[1][name]) for name in expected)
    with pytest.raises(CheckpointError, match="language model it started from"):
        convert_checkpoint("divot", training / "trained.bin", tmp_path / "none", original_config=config)
    assert not (tmp_path / "none").exists()
    # Later versions of peft keep frozen weights below base_layer, and leave the adapter's name out of their own files.
    newer = {
        n.replace("_proj.weight", "_proj.base_layer.weight").replace(".default.", "."): v for n, v in wrapped.items()
    }
    merged = merge_lora({n.removeprefix("llm."): v for n, v in newer.items()}, 6)
    assert all(torch.allclose(merged[name], value, atol=1e-5) for name, value in expected.items())


def test_conversion_refuses(release_folder, tmp_path):
    model, folder = release_folder
    config, output = _original_config(model), tmp_path / "out"
    agent = torch.load(folder / "agent" / "pytorch_model.bin", weights_only=True)
    tokenizer = tmp_path / "cvlm_mistral_instruct_tokenizer"

    def refused(match, checkpoints=(folder,), error=CheckpointError, **options):
        options = {"original_config": config} | options
        with pytest.raises(error, match=match):
            convert_checkpoint("divot", list(checkpoints), output, **options)
        assert not output.exists()

    refused("projections are missing", [folder / "llm"])
    refused("language model are missing", [folder / "agent" / "pytorch_model.bin"])
    refused("second checkpoint", [folder, folder / "agent" / "pytorch_model.bin"])
    refused("is a 'llama'", original_config={**config, "llm": {**config["llm"], "model_type": "llama"}})
    refused("ties its embeddings", original_config={**config, "llm": {**config["llm"], "tie_word_embeddings": True}})
    refused("the language model 80", original_config={**config, "vocab_size": 80})
    refused("of another shape", original_config={**config, "agent": {"num_gmm_kernel": 5}})
    refused("training state", error=ValueError, keep_training_state=True)
    refused("dtype", error=ValueError, dtype="int8")
    other = tmp_path / "other.bin"
    for tensors, match in (
        ({"weight": torch.zeros(2)}, "neither a Mistral"),
        ({k: v for k, v in agent.items() if not k.endswith("2.bias")}, "2 missing"),
        (agent | {"input_resampler.extra": torch.zeros(2)}, "does not know"),
        ({k: v * float("nan") for k, v in agent.items()}, "NaN"),
    ):
        torch.save(tensors, other)
        refused(match, [folder / "llm", other])
    shutil.rmtree(tokenizer)
    refused("no tokenizer found")
    small = tmp_path / "small"
    shutil.copytree(cases._tokenizer_file(), small)
    refused("belongs to another model", tokenizer=small)


def test_merge_needs_pairs():
    good = {"q_proj.weight": torch.zeros(4, 3), "q_proj.lora_A.default.weight": torch.zeros(2, 3)}
    with pytest.raises(CheckpointError, match="lora_B missing"):
        merge_lora(good, 1)
    with pytest.raises(CheckpointError, match="do not fit"):
        merge_lora(good | {"q_proj.lora_B.default.weight": torch.zeros(5, 2)}, 1)


# ---- pipelines ---------------------------------------------------------------------------------------------------

_FRESH = """
import sys; sys.path.insert(0, {tests!r})
from torchvision_shim import install; install()
import torch
from diffusers import DiffusionPipeline
import cinetok
from model_cases import divot
case = {{case.name: case for case in divot.PIPELINES}}[{name!r}]
pipe = DiffusionPipeline.from_pretrained({folder!r})
pipe.set_progress_bar_config(disable=True)
assert type(pipe).__name__ == {cls!r}
torch.save(case.result(pipe(**case.inputs(2))), {result!r})
"""


@pytest.mark.parametrize("case", cases.PIPELINES, ids=lambda case: case.name)
def test_pipeline_saved_loaded_in_a_fresh_process_and_in_batches(case, tmp_path):
    pipe = case.build()
    both = case.result(pipe(**case.inputs(2)))
    single = case.result(pipe(**case.inputs(1)))
    if isinstance(both, list):
        assert single[0] == both[0] and all(both) and both[0] != both[1]
    else:
        assert torch.allclose(single[0], both[0], atol=1e-4) and (both[0] - both[1]).abs().max() > 1e-2
    pipe.save_pretrained(tmp_path / "saved")
    script = _FRESH.format(
        tests=str(Path(__file__).parent), name=case.name, folder=str(tmp_path / "saved"), cls=type(pipe).__name__,
        result=str(tmp_path / "result.pt"),
    )  # fmt: skip
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=300)
    loaded = torch.load(tmp_path / "result.pt", weights_only=True)
    assert loaded == both if isinstance(both, list) else torch.equal(loaded, both)


def test_comprehension_depends_on_everything():
    pipe = cases.comprehension()
    options = {"max_new_tokens": 12, "do_sample": False}
    clip = parts.video(0, num_frames=40)
    base = pipe("What is it?", clip, **options)
    assert base.num_clips == [3] and base.features.shape == (3, SIZE, DIM) and len(base.texts[0]) > 5
    assert pipe("What is it?", clip, **options).texts == base.texts
    assert pipe("What is it?", 255 - clip, **options).texts != base.texts
    assert pipe("Who is it?", clip, **options).texts != base.texts
    assert pipe(["What is it?", "Who?"], clip, **options).texts[0] == base.texts[0]
    messages = [
        {"role": "user", "content": [{"type": "video", "video": clip}, {"type": "text", "text": "What is it?"}]}
    ]
    assert pipe(messages=messages, **options).texts == base.texts
    features, num_clips = pipe.encode_video(clip)
    assert pipe("What is it?", features=features, num_clips=num_clips, **options).texts == base.texts
    assert "".join(pipe.stream("What is it?", clip, **options)).strip() == base.texts[0]
    again = [*messages, {"role": "assistant", "content": base.texts[0]}, {"role": "user", "content": "And?"}]
    assert pipe(messages=again, features=features, num_clips=num_clips, **options).texts[0]
    still = pipe("What is it?", image=clip[0].numpy(), **options)
    assert still.num_clips == [1] and still.texts != base.texts
    assert pipe(video=clip, instruct=False, **options).texts != base.texts
    # A token that is not mapped: the features would be put in too few places.
    pipe.llm.config.query_token_ids = [*pipe.llm.config.query_token_ids[:-1], 5]
    with pytest.raises(ValueError, match="room for"):
        pipe("What is it?", clip, **options)


def test_bad_input_to_comprehension():
    pipe, clip = cases.comprehension(), parts.video(0)
    features = torch.zeros(1, SIZE, DIM)
    for arguments, message in (
        ({"question": "What?"}, "needs a video"),
        ({"video": clip}, "no question"),
        ({"question": "What?", "video": clip, "instruct": False}, "takes no question"),
        ({"question": "What?", "video": clip, "image": clip[0]}, "needs a video"),
        ({"question": "What?", "features": features}, "num_clips"),
        ({"question": "What?", "features": features, "num_clips": [2]}, "room for"),
        ({"question": "What?", "features": features[:, :-1], "num_clips": [1]}, "expected"),
        ({"question": ["a", "b"], "video": [clip] * 3}, "3 videos for 2 questions"),
        ({"messages": [], "question": None}, "empty"),
        ({"messages": [{"role": "user", "content": "a"}], "question": "b"}, "themselves"),
        ({"question": "What?", "video": clip[:0]}, "(?i)shape|frames"),
        ({"question": "What?", "video": clip.double() / 0}, "NaN|infinite"),
        ({"question": "What?", "video": clip, "temperature": 0}, "temperature"),
        ({"question": "What?", "video": clip, "top_p": 0}, "top_p"),
        ({"question": "What?", "video": clip, "max_new_tokens": 0}, "max_new_tokens"),
        ({"question": ["a", "b"], "video": clip, "generator": cases.generators(3)}, "3 generators for 2"),
        ({"question": ["a", "b"], "video": clip, "streamer": object()}, "one text at a time"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**arguments)
    with pytest.raises(ValueError, match="needs a video"):
        list(pipe.stream("What?"))


def test_text_to_video_depends_on_everything():
    pipe = cases.text_to_video()
    options = cases._video_inputs(1) | {"generator": None}

    def make(seed=0, **changes):
        return pipe(**(options | {"generator": torch.Generator().manual_seed(seed)} | changes))

    base = make()
    assert base.frames.shape == (1, 4, 3, 16, 16) and base.features.shape == (1, SIZE, DIM) and base.fps == 8.0
    assert base.frames.min() >= 0 and base.frames.max() <= 1
    assert torch.equal(make().frames, base.frames)
    for changes in ({"seed": 1}, {"prompt": "a cat"}, {"kind": "image"}, {"var_scale": 1.0}, {"guidance_scale": 1.0},
                    {"feature_sampling": "mean"}, {"guidance_rescale": 0.0}, {"fs": 20}):  # fmt: skip
        assert (make(**changes).frames - base.frames).abs().max() > 1e-4, changes
    two = make(num_videos_per_prompt=2)
    assert len(two.frames) == 2 and (two.frames[0] - two.frames[1]).abs().max() > 1e-3
    images = make(output_type="pil").frames
    assert len(images) == 1 and len(images[0]) == 4 and images[0][0].size == (16, 16)
    assert make(output_type="np").frames.shape == (1, 4, 16, 16, 3)
    seen = []
    make(callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(step))
    assert seen == [0, 1]
    frames, features, texts = make(return_dict=False)
    assert torch.equal(features, base.features) and texts == base.texts


def test_text_before_a_clip_and_a_missing_tag():
    pipe = cases.text_to_video()
    tag = pipe.processor.token_ids()["video_start_token_id"]
    rows = [[1, 7, 8], [1, 9]]
    opened, written = pipe.open_clips(rows, max_new_tokens=2, do_sample=False)
    assert [row[-1] for row in opened] == [tag, tag]
    assert [row[: len(start)] for row, start in zip(opened, rows)] == rows
    with torch.no_grad():  # the next token after anything is </s>
        hidden = pipe.llm.model(torch.tensor([[1, 7, 8]])).last_hidden_state[0, -1]
        pipe.llm.lm_head.weight.zero_()[2] = hidden
    opened, written = pipe.open_clips(rows[:1], max_new_tokens=5, do_sample=False, force=[False])
    assert opened == [None] and written == [[2]]
    opened, _ = pipe.open_clips(rows[:1], max_new_tokens=5, do_sample=False)
    assert opened == [[1, 7, 8, tag]]
    with torch.no_grad():
        pipe.llm.lm_head.weight.zero_()[tag] = hidden
    opened, written = pipe.open_clips(rows[:1], max_new_tokens=5, do_sample=False)
    assert opened == [[1, 7, 8, tag]] and written == [[tag]]


def test_stories_feed_clips_back():
    pipe = cases.story()
    calls, write = [], pipe.write_clips

    def spy(rows, features=None, **options):
        calls.append((len(rows[0]), None if features is None else len(features)))
        return write(rows, features, **options)

    pipe.write_clips = spy
    options = cases._story_inputs(1) | {"max_clips": 3, "min_clips": 3}
    result = pipe(**(options | {"generator": torch.Generator().manual_seed(0)}))
    assert [seen for _, seen in calls] == [None, 1, 2] and result.endings == [""]
    assert calls[1][0] > calls[0][0] + SIZE + 2
    clips = result.stories[0]
    assert len(clips) == 3 and clips[0].frames.shape == (4, 3, 16, 16) and clips[0].features.shape == (SIZE, DIM)
    assert (clips[0].features - clips[1].features).abs().max() > 1e-2
    # Ends at once; the first clip is written all the same.
    bias = pipe.llm.lm_head.register_forward_hook(lambda m, i, out: out.index_fill(-1, torch.tensor(2), 9.0))
    short = pipe(**(options | {"min_clips": 1, "generator": torch.Generator().manual_seed(0)}))
    bias.remove()
    assert len(short.stories[0]) == 1
    with pytest.raises(ValueError, match="min_clips"):
        pipe("Generate a story.", min_clips=3, max_clips=2)


def test_bad_input_to_generation():
    pipe = cases.text_to_video()
    for arguments, message in (
        ({"prompt": ""}, "not empty"),
        ({"prompt": []}, "not empty"),
        ({"prompt": "a <video> of rain"}, "plain text"),
        ({"prompt": "<vid> rain"}, "plain text"),
        ({"prompt": "rain", "kind": "gif"}, "kind"),
        ({"prompt": "rain", "generator": cases.generators(2)}, "2 generators for 1"),
        ({"prompt": "rain", "feature_sampling": "best"}, "feature_sampling"),
        ({"prompt": "rain", "var_scale": -1.0}, "var_scale"),
        ({"prompt": "rain", "num_videos_per_prompt": 0}, "num_videos_per_prompt"),
        ({"prompt": "rain", "clip_batch_size": 0}, "clip_batch_size"),
        ({"prompt": "rain", "num_inference_steps": 0}, "num_inference_steps"),
        ({"prompt": "rain", "output_type": "mp4"}, "output_type"),
        ({"prompt": "rain", "temperature": -1}, "temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**arguments)
    components = dict(pipe.components) | {"llm": cases.llm(feature_dim=10)}
    with pytest.raises(ValueError, match="de-tokenizer reads"):
        cinetok.DivotTextToVideoPipeline(**components)


def test_half_precision_parts_next_to_full():
    pipe = cases.text_to_video()
    pipe.llm.to(torch.bfloat16)
    pipe.vae.to(torch.bfloat16)
    frames = pipe(**cases._video_inputs(2)).frames
    assert torch.isfinite(frames).all()
    pipe = cases.comprehension()
    pipe.llm.to(torch.bfloat16)
    assert all(pipe(**cases._comprehension_inputs(2)).texts)


# ---- cards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", RELEASES_LLM, ids=lambda release: release.name)
def test_card_snippets_run(release, tmp_path):
    """The snippet of every card, over tiny folders with the names it uses."""
    text = model_cards.card_path(release).read_text(encoding="utf-8")
    assert find_release(release.name).files == release.files
    cases.llm().save_pretrained(tmp_path / release.name)
    cases.processor().save_pretrained(tmp_path / release.name)
    if release.card == "divot_llm_gen":
        parts.pipeline().save_pretrained(tmp_path / "divot_detokenizer_stage2")
        text = text.replace('output_type="np"', 'output_type="np", num_inference_steps=2, max_new_tokens=2')
    else:
        parts.tokenizer().save_pretrained(tmp_path / "divot_tokenizer")
        cinetok.write_video(tmp_path / "clip.mp4", parts.video(0), fps=8)
    run_card(text, tmp_path)
    assert release.card != "divot_llm_gen" or (tmp_path / "fireworks.mp4").stat().st_size > 0
