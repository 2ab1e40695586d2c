"""Golden runners of Divot-LLM."""

import peft
import torch
from torch import nn

from cinetok import DivotConfig, DivotForCausalLM
from cinetok.conversion.checkpoints import load_strict
from cinetok.conversion.divot_llm import build_llm, llm_config, merge_lora, token_ids
from cinetok.modeling.divot.generation_divot import DivotFrameTokenLogitsProcessor
from cinetok.modeling.divot.gmm_divot import DivotGaussianMixture
from cinetok.modeling.divot.modeling_divot import create_query_block_mask, initialize_new_rows

from . import golden


def _model_config(config):
    arguments = llm_config(config)
    tokens = config.get("special_tokens") or _tokens_from(config["special_base"])
    return arguments | token_ids(tokens, arguments["num_query_tokens"])


def _tokens_from(first):
    """The arbitrary assignment of the cases: tags, then frame tokens, one after another."""
    names = ["<img>", "</img>", "<vid>", "</vid>", "<frame>", "</frame>", "<frame_00000>"]
    return {name: first + i for i, name in enumerate(names)}


@golden("divot", "attention_masks")
def run_attention_masks(case):
    mask = case.input("in.mask2d")
    batch, length = mask.shape
    model = DivotForCausalLM(
        DivotConfig(
            text_config={"vocab_size": 80, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
                         "num_key_value_heads": 1, "intermediate_size": 8, "sliding_window": None},
            image_start_token_id=0, image_end_token_id=1, video_start_token_id=2, video_end_token_id=3,
            frame_start_token_id=4, frame_end_token_id=5, query_token_ids=list(range(6, 70)),
        )
    )  # fmt: skip
    for name, window in (("allowed", None), ("allowed_sliding", case.config["sliding_window"])):
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            config = model.language_model.config
            config.sliding_window = window
            embeds = torch.zeros(batch, length, 8)
            made = create_query_block_mask(config, embeds, mask, case.config["block"])[:, 0]
            # Eager attention takes what is added to the scores: 0, or the dtype's minimum.
            allowed = made if made.dtype == torch.bool else made == 0
            case.check(f"out.mask2d.{name}", allowed.to(torch.uint8))


def _inputs(case, name):
    """Arguments of `forward` for a recorded batch."""
    given = {
        short: case.input(f"in.{name}.{short}")
        for short in (
            "input_ids", "labels", "attention_mask", "ids_cmp_mask", "ids_gen_mask", "embeds_cmp_mask",
            "embeds_gen_mask", "video_embeds",
        )
        if case.has(f"in.{name}.{short}")
    }  # fmt: skip
    arguments = {key: given[key] for key in ("input_ids", "labels", "attention_mask") if key in given}
    for kind, features, tokens in (("cmp", "video_features", "video_token_mask"),
                                   ("gen", "target_features", "query_token_mask")):  # fmt: skip
        real = given.get(f"embeds_{kind}_mask")
        if real is not None and bool(real.any()):
            arguments |= {features: given["video_embeds"], f"{features}_mask": real, tokens: given[f"ids_{kind}_mask"]}
    return arguments, given


def _check_forward(case, model, name, prefix):
    arguments, given = _inputs(case, name)
    # Rows of padding see nothing, and attention over nothing is whatever an implementation makes of it.
    mask, tokens = (
        given.get("attention_mask"),
        {"last_hidden_state": slice(None), "logits_every9": slice(None, None, 9)},
    )
    padded = mask is not None and model.config._attn_implementation == "sdpa" and bool((mask == 0).any())
    # The masks of positions are worked out from ids and attention mask; the recorded ones must agree.
    marked = {k: arguments.pop(k) for k in ("video_token_mask", "query_token_mask") if k in arguments}
    found = model.model.find_clips(
        given["input_ids"], given["attention_mask"], "video_features" in arguments, "target_features" in arguments
    )
    for mask, key in zip(found, ("video_token_mask", "query_token_mask")):
        if key in marked:
            case.check_value(f"in.{name} {key}", mask.tolist(), marked[key].bool().tolist())
    with torch.no_grad():
        output = model(**arguments)
    results = {
        "last_hidden_state": output.last_hidden_state,
        "gmm_params": output.gmm_parameters,
        "total_loss": output.loss,
        "lm_loss": output.lm_loss,
        "gmm_loss": output.gmm_loss,
        "logits_every9": output.logits[:, ::9],
    }
    if case.has(f"out.{prefix}.video_embeds_in"):
        results["video_embeds_in"] = model.model.input_resampler(given["video_embeds"]).flatten(1, 2)
    if output.gmm_parameters is not None:
        mixture = model.video_mixture(output.gmm_parameters)
        results |= {
            "gmm_means": mixture.means,
            "gmm_variances": mixture.variances,
            "gmm_weight_logits": mixture.weight_logits,
        }
    for key, value in results.items():
        if not case.has(f"out.{prefix}.{key}"):
            continue
        if padded and key in tokens:
            value = torch.where(mask[:, tokens[key], None] != 0, value, case.recorded[f"out.{prefix}.{key}"])
        case.check(f"out.{prefix}.{key}", value)


def _processor(config, num_frame_tokens):
    first = config.query_token_ids[0]
    return DivotFrameTokenLogitsProcessor(
        config.frame_start_token_id,
        range(first, first + num_frame_tokens),
        config.frame_end_token_id,
        suppressed_score=0.0,
    )


@golden("divot", "divot_llm")
def run_divot_llm(case):
    model = build_llm(case.weights("llm.safetensors"), case.weights(), _model_config(case.config))
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        for name in ("cmp", "gen", "gencausal"):
            if case.has(f"in.{name}.input_ids"):
                _check_forward(case, model, name, name)

    if case.has("in.feat.input_ids"):
        given = {
            k: case.input(f"in.feat.{k}") for k in ("input_ids", "attention_mask", "ids_gen_mask", "component", "eps")
        }
        case.check_value(
            "in.feat queries", (given["attention_mask"] == -1).int().tolist(), given["ids_gen_mask"].tolist()
        )
        for mask in (given["attention_mask"], None):  # the queries are found without being marked as well
            mixture = model.get_video_mixture(given["input_ids"], mask)
            shape = mixture.weight_logits.shape[:2]
            component = given["component"].view(shape)
            noise = given["eps"].view(*shape, -1)
            case.check("out.feat.features", mixture.sample(case.config["var_scale"], component=component, noise=noise))

    for name in ("text", "text_forced"):
        if not case.has(f"in.{name}.input_ids"):
            continue
        ids, extra = case.input(f"in.{name}.input_ids"), {}
        if case.has(f"in.{name}.video_embeds"):
            extra = {
                "video_features": case.input(f"in.{name}.video_embeds"),
                "video_features_mask": case.input(f"in.{name}.embeds_cmp_mask"),
                "video_token_mask": case.input(f"in.{name}.ids_cmp_mask"),
            }
        for use_cache in (True, False):
            generated = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                logits_processor=[_processor(model.config, case.config[f"{name}_num_vid_out_tokens"])],
                do_sample=False,
                max_new_tokens=case.config["max_new_tokens"],
                eos_token_id={"</s>": 2}.get(case.config["text_eos"])
                or case.config["special_tokens"][case.config["text_eos"]],
                pad_token_id=0,
                use_cache=use_cache,
                **extra,
            )
            case.check(f"out.{name}.generated_ids", generated[0, ids.shape[1] :])

    if case.has("in.proc.scores"):
        case.check(
            "out.proc.scores_out",
            _processor(model.config, _proc_frame_tokens(case))(
                case.input("in.proc.input_ids"), case.input("in.proc.scores")
            ),
        )


def _proc_frame_tokens(case):
    """The number of frame tokens is only in the description of the recorded result."""
    import re

    return int(re.search(r"num_vid_gen_tokens=(\d+)", case.spec["tensors"]["out.proc.scores_out"]["meaning"]).group(1))


@golden("divot", "gmm_head")
def run_gmm_head(case):
    k, d = case.config["k"], case.config["d"]
    parameters = case.input("in.params").clone().requires_grad_()
    targets = case.input("in.targets")
    mixture = DivotGaussianMixture.from_parameters(parameters, k, d)
    case.check("out.means", mixture.means)
    case.check("out.variances", mixture.variances)
    case.check("out.weight_logits", mixture.weight_logits)
    nll = mixture.nll(targets)
    case.check("out.nll", nll)
    case.check("out.nll_per_token", mixture.nll_per_feature(targets).mean(0))
    case.check("out.nll_grad_params", torch.autograd.grad(nll, parameters)[0])
    case.check("out.mean_prediction", mixture.mean)
    shape = targets.shape[:2]
    component, noise = case.input("in.component").view(shape), case.input("in.eps").view(*shape, d)
    for name in case.names("out.sample_var"):
        scale = float(name.removeprefix("out.sample_var"))
        case.check(name, mixture.sample(scale, component=component, noise=noise))
    for name in case.names("out.weighted_sample_var"):
        scale = float(name.removeprefix("out.weighted_sample_var"))
        case.check(name, mixture.weighted_sample(scale, noise=case.input("in.eps_all")))


@golden("divot", "lora_merge")
def run_lora_merge(case):
    config, lora = case.config, case.config["lora"]
    base = case.weights("base.safetensors")
    trained = case.weights()
    agent = {name: value for name, value in trained.items() if not name.startswith("llm.")}
    wrapped = {name.removeprefix("llm."): value for name, value in trained.items() if name.startswith("llm.")}

    old, new = config["llm"]["vocab_size"], config["vocab_size"]
    rows = [nn.functional.pad(base[n], (0, 0, 0, new - old)) for n in ("model.embed_tokens.weight", "lm_head.weight")]
    initialize_new_rows(*rows, old)
    count = case.recorded["out.resized_input_rows"].shape[0]
    case.check("out.resized_input_rows", rows[0][old : old + count])
    case.check("out.resized_output_rows", rows[1][old : old + count])
    case.check("out.resized_input_rows_all_equal", torch.tensor(float(bool((rows[0][old:] == rows[0][old]).all()))))

    merged = merge_lora(wrapped, lora["lora_alpha"])
    expected = case.weights("merged_llm.safetensors")
    case.check_value("merged names", sorted(merged), sorted(expected))
    limit = case.tolerance("merged weights")
    worst = max((merged[name] - value).abs().max().item() for name, value in expected.items())
    case.check_value(f"merged weights within {limit.atol:g} (worst {worst:.1e})", worst <= limit.atol, True)

    arguments = _model_config(config)
    model = build_llm(merged, agent, arguments)
    _check_forward(case, model, "gen", "merged")
    _check_forward(case, _adapted(arguments, wrapped, agent, lora), "gen", "adapted")


def _adapted(arguments, wrapped, agent, lora):
    """Our model with peft's adapter around it, filled with the training state dict."""
    from cinetok.conversion.divot_llm import agent_mapping

    model = DivotForCausalLM(DivotConfig(**arguments))
    names = ("r", "lora_alpha", "target_modules", "modules_to_save", "lora_dropout")
    peft.inject_adapter_in_model(peft.LoraConfig(**{k: lora[k] for k in names if k in lora}), model)
    current = set(model.state_dict())
    tensors = agent_mapping().to_hf(agent)
    for name, value in wrapped.items():
        name = name.removeprefix("base_model.model.")
        name = name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)
        frozen = name.removesuffix("weight") + "base_layer.weight"
        tensors[frozen if name not in current and frozen in current else name] = value
    return load_strict(model, tensors, "adapted model").eval()
