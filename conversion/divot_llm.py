"""Divot-LLM: releases, configurations, LoRA merging and the conversion of the authors' checkpoints.

A released model is a folder with a stock Mistral (`llm/`) and a file with the two projections (`agent/`). What the
authors' training code writes is one state dict with LoRA matrices under peft's names below `llm.`; it is merged here.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import CheckpointError
from .checkpoints import load_strict, read_checkpoint
from .mapping import ManifestPart, Rename, StateDictMapping, shorten
from .releases import License, Release

_LICENSE = License(
    id="apache-2.0",
    link="https://github.com/TencentARC/Divot",
    remark="The authors add that the released models are for academic purposes only.",
)
_BASE = "mistralai/Mistral-7B-Instruct-v0.1"
_TOKENIZER_FOLDER = "cvlm_mistral_instruct_tokenizer"
_TOKENIZER_NOTE = (
    f"The text tokenizer lies in the folder `{_TOKENIZER_FOLDER}` of the authors' repository; the converter looks for "
    "it beside the checkpoints, and takes it as one of them."
)


def _release(name, folder, title, pipeline_tag, card, limits):
    return Release(
        name=name,
        system="divot",
        hub_id="TencentARC/Divot",
        files=(f"{folder}/llm", f"{folder}/agent/pytorch_model.bin", _TOKENIZER_FOLDER),
        config={},
        card=card,
        pipeline_tag=pipeline_tag,
        license=_LICENSE,
        paper="2412.04432",
        title=title,
        size="29.0 GB + 475 MB",
        limits=limits,
        notes=(_TOKENIZER_NOTE,),
        base_models=(_BASE,),
        processor={},
    )


_CLIPS = "Videos are seen as at most 20 clips of two seconds, five frames each."

RELEASES_LLM = (
    _release(
        "divot_llm_pretrain",
        "Divot_pretrain",
        "Divot-LLM, pre-trained: captions of videos and features of captions",
        "video-text-to-text",
        "divot_llm",
        (_CLIPS, "Not tuned on instructions: it continues `<s>` + video with a caption."),
    ),
    _release(
        "divot_llm_sft_comp",
        "Divot_sft_comp",
        "Divot-LLM tuned for questions about videos and images",
        "video-text-to-text",
        "divot_llm",
        (_CLIPS, "Tuned for answers, not for generating video."),
    ),
    _release(
        "divot_llm_sft_gen",
        "Divot_sft_gen",
        "Divot-LLM tuned for text-to-video",
        "text-to-video",
        "divot_llm_gen",
        (
            "A generated clip has 16 frames at 8 fps and 256x256 pixels; frames come from the stage-2 de-tokenizer.",
            "Tuned for generating, not for answering questions. No weights for stories were released.",
        ),
    ),
)


# ---- names -------------------------------------------------------------------------------------------------------


def llm_mapping(config=None):
    """Mistral's names <-> ours."""
    return StateDictMapping(
        [Rename("lm_head.weight", "lm_head.weight"), Rename("model.**", "model.language_model.**")],
        keep_unmatched=False,
    )


def agent_mapping(config=None):
    """Names of the projections <-> ours."""
    return StateDictMapping(
        [
            Rename("input_resampler.proj.0.*", "model.input_resampler.fc1.*"),
            Rename("input_resampler.proj.2.*", "model.input_resampler.fc2.*"),
            Rename("output_resampler.proj.0.*", "output_resampler.fc1.*"),
            Rename("output_resampler.proj.2.*", "output_resampler.fc2.*"),
        ],
        keep_unmatched=False,
    )


COMPONENTS_LLM = {"llm": llm_mapping, "agent": agent_mapping}


# ---- configurations ----------------------------------------------------------------------------------------------

_TEXT_KEYS = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "sliding_window",
    "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip


def text_config(section):
    """The original's Mistral configuration (its `config.json`) -> arguments of `MistralConfig`."""
    if section.get("model_type", "mistral") != "mistral":
        raise CheckpointError(f"the language model is a {section['model_type']!r}; Divot-LLM is built on Mistral")
    if section.get("rope_scaling") is not None:
        raise CheckpointError(f"the language model has rope_scaling={section['rope_scaling']}; Divot-LLM's has none")
    if section.get("tie_word_embeddings", False):
        raise CheckpointError("the language model ties its embeddings; Divot-LLM has separate ones")
    result = {key: section[key] for key in _TEXT_KEYS if key in section}
    result["tie_word_embeddings"] = False
    if "rope_parameters" in section:
        result["rope_parameters"] = section["rope_parameters"]
    elif "rope_theta" in section:
        result["rope_parameters"] = {"rope_type": "default", "rope_theta": float(section["rope_theta"])}
    return result


_AGENT_KEYS = {
    "num_gmm_kernel", "num_frames", "lm_loss_scale", "gmm_loss_scale", "rec_loss_scale", "l1_loss_scale",
    "freeze_input_resampler", "freeze_output_resampler", "pretrained_model_path", "_target_", "class",
}  # fmt: skip
_ROOT_KEYS = {"llm", "lora", "vocab_size", "var_scale", "input_resampler", "output_resampler"}


def _is_agent(original):
    return not {"input_resampler", "output_resampler", "num_gmm_kernel"}.isdisjoint(original)


def llm_config(original):
    """The original configuration -> arguments of `DivotConfig` (without token ids).

    Args:
        original: a Mistral `config.json`, or a dictionary with the sections "llm" (the same), "output_resampler" or
            "input_resampler" (the projections) and "agent" (mixture and losses), and optionally "vocab_size" (after
            tokens were added) and "lora"; or the authors' yaml of the agent, which has the projections, the mixture and
            the losses at its root. The latter says nothing about the language model: "text_config" is then missing.
    """
    if "llm" not in original and not _is_agent(original):
        return {"text_config": text_config(original)}
    result = {}
    if "llm" in original:
        result["text_config"] = text_config(original["llm"])
        result["text_config"]["vocab_size"] = original.get("vocab_size", original["llm"].get("vocab_size", 32000))
    if "input_resampler" in original:
        result["feature_dim"] = original["input_resampler"]["input_dim"]
        result["num_query_tokens"] = original["input_resampler"].get("num_queries", 64)
    agent = original if "agent" not in original and _is_agent(original) else original.get("agent", {})
    unknown = sorted(set(agent) - (_AGENT_KEYS if agent is not original else _AGENT_KEYS | _ROOT_KEYS))
    if unknown:
        raise CheckpointError(f"the agent's configuration has unknown keys: {', '.join(unknown)}")
    if used := [key for key in ("rec_loss_scale", "l1_loss_scale") if agent.get(key)]:
        raise CheckpointError(f"the agent's configuration uses {' and '.join(used)}; Divot-LLM has no such loss")
    if "num_gmm_kernel" in agent:
        result["num_gmm_components"] = agent["num_gmm_kernel"]
    for key in ("lm_loss_scale", "gmm_loss_scale"):
        if key in agent:
            result[key] = agent[key]
    if "var_scale" in original:
        result["var_scale"] = original["var_scale"]
    return result


def token_ids(special_tokens, num_query_tokens=64):
    """Ids of the tags and frame tokens by string (token -> id) -> arguments of `DivotConfig`. Frame tokens that are not
    listed follow `<frame_00000>` one by one."""
    from ..modeling.divot.processing_divot import TAGS, frame_tokens

    first = special_tokens["<frame_00000>"]
    ids = {f"{name}_token_id": special_tokens[tag] for name, tag in TAGS.items()}
    frames = [special_tokens.get(token, first + i) for i, token in enumerate(frame_tokens(num_query_tokens))]
    return ids | {"query_token_ids": frames}


# ---- LoRA --------------------------------------------------------------------------------------------------------

_PEFT_PREFIX = "base_model.model."


def merge_lora(tensors: Mapping[str, torch.Tensor], lora_alpha: float, base: Mapping[str, torch.Tensor] | None = None):
    """Folds LoRA matrices into the weights: W + alpha / r * B A, and puts trained copies of norms in place.

    Args:
        tensors: state dict of a Mistral under peft's names, with or without its `base_model.model.` prefix; of peft 0.4
            (`q_proj.weight`) or later (`q_proj.base_layer.weight`).
        lora_alpha: peft's `lora_alpha`. The rank is read off the matrices.
        base: weights of the base model, for state dicts that hold only what was trained.

    Returns:
        dict under Mistral's names.

    Raises:
        CheckpointError: matrices without their counterpart or base weight, or of shapes that do not fit.
    """
    plain, low, copies = dict(base or {}), {}, {}
    for name, value in tensors.items():
        name = name.removeprefix(_PEFT_PREFIX)
        for part in ("lora_A", "lora_B"):
            if f".{part}." in name:
                target = name.split(f".{part}.")[0]
                low.setdefault(target, {})[part] = value
                break
        else:
            if ".modules_to_save." in name:
                module, rest = name.split(".modules_to_save.")
                # The adapter's name ("default") is left out of files that peft itself writes.
                copies[f"{module}.{rest.rsplit('.', 1)[-1]}"] = value
            else:
                plain[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = value
    for target, parts in low.items():
        weight = f"{target}.weight"
        missing = [p for p in ("lora_A", "lora_B") if p not in parts] + ([weight] if weight not in plain else [])
        if missing:
            raise CheckpointError(
                f"{target}: {' and '.join(missing)} missing; a training output without the frozen weights also needs "
                "the folder of the language model it started from"
            )
        a, b, frozen = parts["lora_A"], parts["lora_B"], plain[weight]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != tuple(frozen.shape):
            raise CheckpointError(
                f"{target}: LoRA matrices {tuple(a.shape)} and {tuple(b.shape)} do not fit {tuple(frozen.shape)}"
            )
        delta = (lora_alpha / a.shape[0]) * (b.float() @ a.float())
        plain[weight] = frozen.float() + delta
    return plain | copies


# ---- files -------------------------------------------------------------------------------------------------------


def _read_llm_files(paths, lora_alpha):
    """Checkpoint files -> (Mistral's tensors, the projections' tensors)."""
    llm, agent, training = {}, {}, {}
    for path in _expand_folders(paths):
        tensors = {n: v for n, v in read_checkpoint(path).items() if not n.endswith("rotary_emb.inv_freq")}
        if any(name.startswith("llm.") for name in tensors):
            into = training
        elif any(name.startswith(("model.embed_tokens.", "model.layers.")) for name in tensors):
            into = llm
        elif any(name.startswith(("input_resampler.", "output_resampler.")) for name in tensors):
            into = agent
        else:
            raise CheckpointError(
                f"{path}: neither a Mistral, Divot's projections (agent/pytorch_model.bin) nor an output of its "
                f"training; it holds {shorten(tensors, 3)}"
            )
        if into:
            raise CheckpointError(f"{path}: a second checkpoint of the same kind; give each once")
        into.update(tensors)
    if training:
        wrapped = {n.removeprefix("llm."): v for n, v in training.items() if n.startswith("llm.")}
        agent |= {n: v for n, v in training.items() if not n.startswith("llm.")}
        llm = merge_lora(wrapped, lora_alpha, llm)
    for part, tensors, hint in (
        ("language model", llm, "its folder llm/"),
        ("projections", agent, "agent/pytorch_model.bin"),
    ):
        if not tensors:
            raise CheckpointError(f"the {part} are missing among the checkpoints; also give {hint}")
    return llm, agent


def _expand_folders(paths):
    """Folders as released (`llm/` and `agent/` inside) stand for both."""
    result = []
    for path in paths:
        inside = [path / name for name in ("llm", "agent") if path.is_dir() and (path / name).is_dir()]
        result += inside or ([] if _is_tokenizer(path) else [path])
    return result


def _is_tokenizer(path):
    names = ("tokenizer.model", "tokenizer.json")
    weights = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
    return (
        path.is_dir()
        and any((path / name).is_file() for name in names)
        and not any(file.suffix in weights for file in path.iterdir())
    )


def _find_tokenizer(paths):
    """A tokenizer's folder among the checkpoints, in them, or where the authors' repository has it."""
    for path in paths:
        folder = path if path.is_dir() else path.parent
        places = [
            folder,
            folder / "llm",
            *(p / _TOKENIZER_FOLDER for p in (folder, *list(folder.absolute().parents)[:3])),
        ]
        for place in places:
            if (place / "tokenizer.model").is_file() or (place / "tokenizer.json").is_file():
                return place
    raise CheckpointError(
        f"no tokenizer found beside the checkpoints; download {_TOKENIZER_FOLDER} of TencentARC/Divot and give "
        "its folder as another checkpoint: the ids of the added tokens are only written there"
    )


def _find_text_config(paths):
    """The `config.json` of the language model among or beside the checkpoints, or None."""
    for path in paths:
        folder = path if path.is_dir() else path.parent
        for place in (folder, folder / "llm", folder.parent / "llm"):
            if (place / "config.json").is_file():
                stored = json.loads((place / "config.json").read_text(encoding="utf-8"))
                if stored.get("model_type") == "mistral":
                    return stored
    return None


def _agent_sizes(agent):
    """Widths that the tensors of the projections tell, as arguments of `DivotConfig`."""
    first, last = agent.get("input_resampler.proj.0.weight"), agent.get("output_resampler.proj.2.weight")
    if first is None or last is None or first.ndim != 2 or last.ndim != 2:
        return {}  # loading tells what is missing
    width = first.shape[1]
    components, rest = divmod(len(last), 2 * width + 1)
    if rest:
        raise CheckpointError(f"an output projection of width {len(last)} is no mixture over features of width {width}")
    return {"feature_dim": width, "num_gmm_components": components}


def build_llm(llm, agent, config):
    """A `DivotForCausalLM` from tensors under the original names (cast to float32) and its arguments."""
    from ..modeling.divot.configuration_divot_llm import DivotConfig
    from ..modeling.divot.modeling_divot import DivotForCausalLM

    tensors = llm_mapping().to_hf(llm) | agent_mapping().to_hf(agent)
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    with torch.device("meta"):
        model = DivotForCausalLM(DivotConfig(**config))
    model = load_strict(model, tensors, "Divot-LLM")
    # Tables that are computed, not stored, came out of the meta device without values.
    rotary = model.language_model.rotary_emb
    frequencies, _ = rotary.compute_default_rope_parameters(model.config.text_config)
    rotary.inv_freq, rotary.original_inv_freq = frequencies, frequencies.clone()
    return model.eval()


def convert_llm(
    checkpoints,
    output,
    *,
    release=None,
    original_config=None,
    keep_training_state=False,
    tokenizer=None,
    lora_alpha=None,
    dtype=None,
    max_shard_size="5GB",
):
    """Writes a folder with `DivotForCausalLM`, `DivotProcessor` and a model card.

    Args:
        checkpoints: the language model (folder `llm`, or `pytorch_model.bin`) and the projections
            (`agent/pytorch_model.bin`), or the folder that holds both; or what the authors' training wrote (one state
            dict with LoRA matrices, for example gathered by DeepSpeed's `zero_to_fp32`), with the language model it
            started from when frozen weights are not inside.
        output: folder to write to.
        release, original_config: one of them; see `llm_config`.
        keep_training_state: not offered; merged weights hold none.
        tokenizer: folder of the text tokenizer. Default: found beside the checkpoints.
        lora_alpha: of a training output. Default: the configuration's, or the released 32.
        dtype: "float32" (default), "bfloat16" or "float16" for the stored weights.
        max_shard_size: largest file.

    Raises:
        CheckpointError: anything missing, unexpected or of another shape, or a tokenizer with another vocabulary.
    """
    from transformers import GenerationConfig

    from ..modeling.divot.configuration_divot_llm import MISTRAL_7B_DIVOT
    from ..modeling.divot.processing_divot import DivotProcessor, build_divot_tokenizer

    if keep_training_state:
        raise ValueError("keep_training_state: Divot-LLM checkpoints hold no training state")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r}; choose float32, bfloat16 or float16")
    lora = (original_config or {}).get("lora", {})
    alpha = lora_alpha if lora_alpha is not None else lora.get("lora_alpha", 32)
    folder = Path(tokenizer) if tokenizer is not None else _find_tokenizer(checkpoints)
    llm, agent = _read_llm_files(checkpoints, alpha)
    config = llm_config(original_config) if original_config else {"text_config": MISTRAL_7B_DIVOT}
    if "text_config" not in config:
        stored = _find_text_config(checkpoints)
        config["text_config"] = text_config(stored) if stored is not None else dict(MISTRAL_7B_DIVOT)
        # Tokens that were added make the checkpoint's vocabulary larger than the stored one.
        if "lm_head.weight" in llm:
            config["text_config"]["vocab_size"] = len(llm["lm_head.weight"])
    if original_config:
        config = _agent_sizes(agent) | config
    processor = DivotProcessor(build_divot_tokenizer(folder), num_query_tokens=config.get("num_query_tokens", 64))
    size = config["text_config"]["vocab_size"]
    if len(processor.tokenizer) != size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(processor.tokenizer)} tokens, the language model {size}; it belongs to "
            "another model"
        )
    model = build_llm(llm, agent, config | processor.token_ids())
    model.generation_config = GenerationConfig(
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.7,
        top_p=0.5,
        max_new_tokens=256,
    )
    if dtype not in (None, "float32"):
        model = model.to(getattr(torch, dtype))
    model.save_pretrained(output, max_shard_size=max_shard_size)
    processor.save_pretrained(output)
    if release is not None:
        from ..model_cards import write_card

        write_card(output, release)
    return output


# ---- manifests and cards -----------------------------------------------------------------------------------------


def manifest_parts_llm(stem, manifest):
    """Parts of a released file, each with the module it fills (see `ManifestPart`)."""
    model = _released_on_meta()
    names = list(manifest["tensors"])
    if any(name.startswith("model.layers.") for name in names):
        del model.output_resampler, model.model.input_resampler
        return [ManifestPart("language model", names, model, llm_mapping())]
    projections = torch.nn.ModuleDict(
        {
            "model": torch.nn.ModuleDict({"input_resampler": model.model.input_resampler}),
            "output_resampler": model.output_resampler,
        }
    )
    return [ManifestPart("projections", names, projections, agent_mapping())]


def _released_on_meta():
    from ..modeling.divot.configuration_divot_llm import DivotConfig
    from ..modeling.divot.modeling_divot import DivotForCausalLM

    with torch.device("meta"):
        return DivotForCausalLM(DivotConfig())


def card_facts_llm(release):
    """Template variables of a release's card, counted on the meta device."""
    model = _released_on_meta()

    def billions(module):
        return f"{sum(p.numel() for p in module.parameters()) / 1e9:.2f} B"

    config = model.config
    facts = [
        ("parameters", f"{billions(model)}, of which {billions(model.output_resampler)} mixture head"),
        ("vocabulary", f"{config.text_config.vocab_size:,} (Mistral's 32,000, 6 tags, 256 frame tokens)"),
        ("video features", f"{config.num_query_tokens} per clip, {config.feature_dim} wide, continuous"),
        ("mixture", f"{config.num_gmm_components} diagonal Gaussians per feature, variances times {config.var_scale}"),
    ]
    return {"facts": facts}
