"""Runners of Video-LaVIT's golden cases about the language model: reading images and videos, writing codes."""

import re

import torch
from torch.nn.utils.rnn import pad_sequence

from cinetok import VideoLavitForCausalLM
from cinetok.conversion.video_lavit_llm import config_from_original, language_model_mapping
from golden_kinds import golden

_MASKED = -1e30  # how the cases store minus infinity


def _model(config, weights, what):
    state_dict = language_model_mapping(config).to_hf(weights)
    model, report = VideoLavitForCausalLM.from_pretrained(
        None, config=config, state_dict=state_dict, output_loading_info=True
    )
    wrong = [report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[key]]
    if wrong:
        raise ValueError(f"{what}: weights do not fit: {wrong}")
    return model.eval()


def _check_scores(case, values_name, ids_name, scores, tolerance):
    """Compares the best processed scores of every step, and the ids they belong to.

    Ids may swap places only where our scores tie within the tolerance; excluded ids (minus infinity) have no order.
    """
    scores = scores.clamp(min=_MASKED)
    recorded_ids = case.recorded[ids_name]
    best = scores.topk(recorded_ids.shape[-1], dim=-1)
    case.check(values_name, best.values, tolerance=tolerance)
    at_recorded = scores.gather(-1, recorded_ids)
    limit = tolerance.atol + tolerance.rtol * best.values.abs()
    case.check(ids_name, torch.where((at_recorded - best.values).abs() <= limit, recorded_ids, best.indices))


# ------------------------------------------------------------------------------------------------------ understanding


@golden("video_lavit", "llm_understanding")
def run_understanding(case):
    config = config_from_original(case.config)
    # The original's placeholders, so that recorded ids can be compared as they are.
    config.image_token_id, config.video_token_id = -200, -201
    model = _model(config, case.weights(), case.path)
    case.input("in.gumbel")
    input_ids, mask = case.input("in.input_ids"), case.input("in.attention_mask")
    labels, gumbel = case.input("in.labels"), case.recorded["in.gumbel"]
    image, frames, motion = case.input("in.image"), case.input("in.video_frames"), case.input("in.video_motion")
    visuals = {"pixel_values": image, "pixel_values_videos": frames, "motion_values": motion, "gumbel_noise": gumbel}
    probe = torch.tensor(case.spec["probe_ids"])
    tolerance = case.tolerance()

    with torch.no_grad():
        for side in ("left", "right"):
            merged = model.model.merge_inputs(input_ids, mask, labels=labels, padding_side=side, **visuals)
            for name in ("position_ids", "attention_mask", "inputs_embeds", "labels"):
                case.check(f"out.{side}.{name}", merged[name])
            model.config.padding_side = side
            output = model(input_ids, mask, labels=labels, **visuals)
            logits = (output.logits * output.attention_mask[..., None])[..., probe]
            case.check(f"out.{side}.logits_probe", logits)
            if f"out.{side}.loss" in case.recorded:
                case.check(f"out.{side}.loss", output.loss.reshape(1))
        case.check("out.motion_token_ids", model.model.get_motion_codes(motion))
        case.check("out.text_logits_probe", model(case.input("in.text_ids")).logits[..., probe])
        _check_generation(case, model, input_ids, mask, frames, motion, gumbel, tolerance)
    for name in case.names("out.margin"):
        case.ignore(name, "the margin of a decision, for information")


def _check_generation(case, model, input_ids, mask, frames, motion, gumbel, tolerance):
    """Greedy answer to the sample with the video, alone."""
    num_steps = case.recorded["out.step_top_values"].shape[0]
    row = int((input_ids == model.config.video_token_id).any(dim=1).nonzero()[0])
    num_images_before = int((input_ids[:row] == model.config.image_token_id).sum())
    prompt = input_ids[row][mask[row].bool()][None]
    # The original cuts what is too long for the model also here; our `generate` refuses it.
    merged = model.model.merge_inputs(
        prompt,
        pixel_values_videos=frames,
        motion_values=motion,
        gumbel_noise=gumbel[num_images_before : num_images_before + len(frames)],
        padding_side="left",
        truncation=True,
    )
    output = model.generate(
        inputs_embeds=merged.inputs_embeds,
        attention_mask=merged.attention_mask,
        suppress_tokens=list(range(model.config.text_vocab_size, model.config.num_token_ids)),
        **_generation_options(case, num_steps),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    case.check("out.generated_ids", torch.cat([prompt, output.sequences], dim=1))
    scores = torch.stack([step[0] for step in output.scores])
    _check_scores(case, "out.step_top_values", "out.step_top_ids", scores, tolerance)


def _generation_options(case, num_steps):
    return {
        "min_new_tokens": int(_option(case, "generated_ids", r"min_new_tokens[ =]+(\d+)", 0)),
        "max_new_tokens": int(_option(case, "generated_ids", r"max_new_tokens[ =]+(\d+)", num_steps)),
    }


def _option(case, call, pattern, default=None):
    """A number from the case's description of the call that begins with `call`."""
    for text in case.spec["calls"]:
        if text.startswith(call):
            found = re.search(pattern, text)
            if found:
                return found.group(1)
    if default is None:
        raise ValueError(f"{case.path}: the calls do not say {pattern!r} of {call}")
    return default


# --------------------------------------------------------------------------------------------------------- generation


@golden("video_lavit", "llm_generation")
def run_generation(case):
    config = config_from_original(case.config)
    kept = {name: value for name, value in case.weights().items() if "_tokenizer." not in name}
    model = _model(config, kept, case.path)
    lengths = case.input("in.prompt_lengths")
    prompts = [row[:length] for row, length in zip(case.input("in.prompts"), lengths)]
    tolerance = case.tolerance("scores")
    min_new = int(case.input("in.min_new"))

    def check(call, result):
        case.check(f"out.{call}.raw_new_ids", result.raw_token_ids)
        _check_scores(case, f"out.{call}.step_top_values", f"out.{call}.step_top_ids", result.scores, tolerance)
        case.check(f"out.{call}.new_ids", pad_sequence(result.new_token_ids, True, -1))
        case.check(f"out.{call}.sequences", pad_sequence(result.sequences, True, -1))
        return result

    def guidance(call):
        return float(_option(case, call, r"guidance (\d+(?:\.\d+)?)"))

    greedy = {"do_sample": False, "output_scores": True}
    images = check(
        "image_greedy",
        model.generate_image_tokens(
            prompts,
            guidance_scale=guidance("image_greedy"),
            min_new_tokens=min_new,
            max_new_tokens=int(case.input("in.max_image")),
            **greedy,
        ),
    )
    check(
        "motion_greedy",
        model.generate_motion_tokens(
            images.sequences,
            guidance_scale=guidance("motion_greedy"),
            min_new_tokens=min_new,
            max_new_tokens=int(case.input("in.max_motion")),
            **greedy,
        ),
    )
    check(
        "image_negative",
        model.generate_image_tokens(
            prompts,
            guidance_scale=guidance("image_negative"),
            negative_prompts=[row[row >= 0] for row in case.input("in.negative_prompt")],
            min_new_tokens=int(_option(case, "image_negative", r"min (\d+)")),
            max_new_tokens=int(_option(case, "image_negative", r"(\d+) tokens")),
            **greedy,
        ),
    )
    sampled = {
        "guidance_scale": guidance("image_sampled"),
        "min_new_tokens": int(_option(case, "image_sampled", r"min (\d+)")),
        "do_sample": True,
        "top_k": int(_option(case, "image_sampled", r"top_k (\d+)")),
        "top_p": float(case.input("in.top_p")),
        "temperature": float(case.input("in.temperature")),
        "output_scores": True,
    }
    # The draws of another version of the sampler cannot be repeated: follow the recorded ids and compare the scores.
    check(
        "image_sampled",
        model.generate_image_tokens(
            prompts, forced_token_ids=case.recorded["out.image_sampled.raw_new_ids"], **sampled
        ),
    )
    case.ignore("in.seed", "seeds draws that other versions of torch make differently")
    case.ignore("out.margin_greedy", "the margin of a decision, for information")
