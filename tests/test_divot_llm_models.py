"""Divot-LLM: recorded numbers, manifests, attention, loss, mixture, text and features, and bad input."""

import json
from pathlib import Path

import pytest
import torch
from conftest import SHARED
from golden_kinds import find_cases, load_runners
from manifest_files import load as load_manifests
from model_cases import divot_llm as cases
from run_goldens import run_case
from run_manifests import check_manifest
from transformers import StaticCache

from cinetok import DivotConfig, DivotForCausalLM
from cinetok.modeling.divot.generation_divot import DivotFrameTokenLogitsProcessor, GeneratorSamplingLogitsProcessor
from cinetok.modeling.divot.gmm_divot import DivotGaussianMixture
from cinetok.modeling.divot.modeling_divot import create_query_block_mask, positions_from_mask, query_block_ids
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
    if "video_features" in dropped:  # no clip to read either
        inputs["input_ids"][inputs["input_ids"] == model.config.frame_end_token_id] = 7
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


def test_a_clip_without_its_features():
    model, processor = cases.llm(), cases.processor()
    inputs = dict(processor(["[INST] a [/INST]\n", "[INST] <video>a [/INST]\n"], num_clips=[1]))
    for call in (model, model.model, lambda **k: model.generate(**k, max_new_tokens=2)):
        with pytest.raises(ValueError, match=r"hold \[0, 1\] clips to read"):
            call(**inputs)
    tag = processor.token_ids()["video_start_token_id"]
    ids, mask = (
        torch.cat([inputs[k], torch.full((2, 1), v)], 1) for k, v in (("input_ids", tag), ("attention_mask", 1))
    )
    asked = processor.with_queries(ids, mask)
    with pytest.raises(ValueError, match=r"hold \[0, 1\] clips to read"):
        model.generate_video_features(**asked)
    with pytest.raises(ValueError, match="empty"):
        model(input_ids=torch.zeros(1, 0, dtype=torch.long))
    # Clips that are written are no clips to read, whether they are marked or not; nor is one that the text itself wrote.
    written = processor(["[INST] <video>a [/INST]\n"], num_clips=[1])
    assert model(**written, target_features=torch.zeros(1, SIZE, DIM)).loss > 0
    queries = torch.isin(written["input_ids"], torch.tensor(model.config.query_token_ids))
    written["attention_mask"] = written["attention_mask"].masked_fill(queries, -1)
    assert torch.isfinite(model(**written).logits).all()
    forced = DivotFrameTokenLogitsProcessor.from_config(model.config)
    start = torch.tensor([[1, 7, model.config.frame_start_token_id]])
    for use_cache in (True, False):
        options = {"max_new_tokens": SIZE + 3, "do_sample": False, "use_cache": use_cache}
        made = model.generate(start, attention_mask=torch.ones_like(start), logits_processor=[forced], **options)
        assert made[0, 3 : 3 + SIZE].tolist() == list(model.config.query_token_ids)


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
