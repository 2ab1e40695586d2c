"""Divot-LLM's tokenizer from Mistral's files, conversion of releases and of training outputs, and the cards."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from card_snippets import run_card
from model_cases import divot as parts
from model_cases import divot_llm as cases
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

import cinetok
from cinetok import CheckpointError, DivotConfig, DivotForCausalLM, DivotProcessor, model_cards
from cinetok.conversion import convert_checkpoint, find_release, state_dict_names
from cinetok.conversion.divot_llm import RELEASES_LLM, merge_lora
from cinetok.modeling.divot.processing_divot import TAGS, build_divot_tokenizer, frame_tokens

SIZE, DIM = cases.FEATURES, cases.FEATURE_DIM


# ---- tokenizer ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """A folder with the real sentencepiece model of Mistral-7B-Instruct-v0.1."""
    import mistral_common as package  # in the dev extra

    folder = tmp_path_factory.mktemp("mistral")
    shutil.copy(Path(package.__file__).parent / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    return folder


def _expected_ids(package_folder, text):
    """The ids of the original's slow tokenizer: sentencepiece on every piece between the added tokens."""
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


_AGENT = {
    "_target_": "src.models_clm.models.ContinuousLVLM_Video_Comp_Gen.from_pretrained",
    "input_resampler": {"num_queries": SIZE, "embed_dim": 32, "input_dim": DIM, "output_dim": 32},
    "output_resampler": {"num_queries": SIZE, "embed_dim": DIM, "input_dim": 32, "output_dim": 75},
    "num_frames": 5,
    "num_gmm_kernel": 3,
    "lm_loss_scale": 0.5,
    "rec_loss_scale": 0.0,
    "l1_loss_scale": 0.0,
    "gmm_loss_scale": 1.0,
}


def test_conversion_with_the_authors_yaml_of_the_agent(release_folder, tmp_path):
    """It does not describe the language model; that is read from `config.json` beside the weights."""
    model, folder = release_folder
    stored = _original_config(model)["llm"] | {"model_type": "mistral", "vocab_size": 7}
    (folder / "llm" / "config.json").write_text(json.dumps(stored))
    for i, checkpoints in enumerate(([folder], [folder / "llm", folder / "agent" / "pytorch_model.bin"])):
        output = tmp_path / f"out{i}"
        convert_checkpoint("divot", checkpoints, output, original_config=_AGENT)
        loaded = DivotForCausalLM.from_pretrained(output).eval()
        assert torch.equal(_outputs(loaded), _outputs(model)) and loaded.config.lm_loss_scale == 0.5
    # Widths of the projections also follow from their tensors. (The number of features per clip does not.)
    shorter = {key: value for key, value in _AGENT.items() if key != "num_gmm_kernel"}
    convert_checkpoint("divot", folder, tmp_path / "shorter", original_config=shorter)
    assert DivotForCausalLM.from_pretrained(tmp_path / "shorter").config.num_gmm_components == 3
    for changed, match in (
        ({"surprise": 1}, "unknown keys: surprise"),
        ({"rec_loss_scale": 1.0}, "rec_loss_scale"),
        ({"num_gmm_kernel": 5}, "of another shape"),
    ):
        with pytest.raises(CheckpointError, match=match):
            convert_checkpoint("divot", folder, tmp_path / "no", original_config=_AGENT | changed)
    agent = torch.load(folder / "agent" / "pytorch_model.bin", weights_only=True)
    agent["output_resampler.proj.2.weight"] = torch.zeros(74, 75)
    torch.save(agent, folder / "agent" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no mixture"):
        convert_checkpoint("divot", folder, tmp_path / "no", original_config=_AGENT)
    (folder / "llm" / "config.json").write_text(json.dumps(stored | {"rope_scaling": {"factor": 2.0}}))
    with pytest.raises(CheckpointError, match="rope_scaling"):
        convert_checkpoint("divot", folder, tmp_path / "no", original_config=_AGENT)


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
