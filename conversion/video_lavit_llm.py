"""Video-LaVIT's language model: releases, configurations, and the conversion of the authors' checkpoints.

The generation weights are a stock LLaMA. The weights for understanding also hold tuned copies of both tokenizers, below
`model.visual_tokenizer.` and `model.motion_tokenizer.`, where we keep them; LLaMA's own tensors move below
`model.language_model.`.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import CheckpointError
from .checkpoints import load_strict, read_checkpoint, write_report
from .mapping import ManifestPart, Rename, StateDictMapping
from .releases import License, Metric, Release
from .sentencepiece_llama import llama_tokenizer_from_sentencepiece
from .video_lavit_parts import (
    OriginalFolder,
    keyframe_decoder_arguments,
    motion_encoder_arguments,
    motion_tokenizer_arguments,
    visual_tokenizer_arguments,
)

# ---------------------------------------------------------------------------------------------------------- releases

_LICENSE = License(
    "other",
    "LaVIT Community License",
    "https://github.com/jy0205/LaVIT/blob/main/LICENSE",
    "The licence restricts use; read it before building on these weights. The language model derives from LLaMA-2, "
    "whose licence applies to it as well.",
)
_PAPER = "Video-LaVIT, arXiv 2402.03161 (https://arxiv.org/abs/2402.03161)"
_QA = "answers in the style of LLaVA-1.5"
_VIDEO_QA = "zero-shot, judged by GPT-3.5, 16 key frames with motion"

_LLAMA = {
    "vocab_size": 49412,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_UNDERSTANDING_METRICS = (
    *(
        Metric(name, value, name, _QA, _PAPER)
        for name, value in (
            ("VQAv2", 80.3),
            ("GQA", 64.4),
            ("VizWiz", 56.0),
            ("ScienceQA-IMG", 70.0),
            ("MME", 1551.8),
            ("MMBench", 67.3),
            ("SEED", 64.0),
            ("MM-Vet", 33.2),
        )
    ),
    *(
        Metric("accuracy", value, name, _VIDEO_QA, _PAPER)
        for name, value in (("MSVD-QA", 73.2), ("MSRVTT-QA", 59.3), ("ActivityNet-QA", 50.1))
    ),
)
_GENERATION_METRICS = (
    Metric("CLIPSIM", 0.3012, "MSR-VTT", "zero-shot text-to-video, 2990 videos", _PAPER),
    Metric("FVD", 188.36, "MSR-VTT", "zero-shot text-to-video, 2990 videos", _PAPER),
    Metric("FID", 11.27, "MSR-VTT", "zero-shot text-to-video, 2990 videos", _PAPER),
    Metric("IS", 44.26, "UCF-101", "zero-shot text-to-video, 2020 prompts", _PAPER),
    Metric("FVD", 280.57, "UCF-101", "zero-shot text-to-video, 2020 prompts", _PAPER),
)
_RANDOM = (
    "Which positions of an image become tokens is drawn at random, also at inference: pass a generator to repeat a "
    "result."
)
_CLIP = "A clip is 24 frames at 6 per second (4 seconds); above three clips the quality of long videos degrades."

PIPELINE, GENERATION, UNDERSTANDING = "video_lavit", "video_lavit_language_model", "video_lavit_language_model_sft"

RELEASES_LLM = (
    Release(
        name=PIPELINE,
        system="video_lavit",
        hub_id="rain1011/Video-LaVIT-v1",
        files=("language_model", "visual_tokenizer", "motion_tokenizer.bin", "video_detokenizer", "image_detokenizer"),
        config={"text_config": _LLAMA},
        card="video_lavit",
        pipeline_tag="text-to-video",
        license=_LICENSE,
        paper="2402.03161",
        title="Video-LaVIT: text-to-image, text-to-video, image-to-video and long video",
        size="25 GB",
        metrics=_GENERATION_METRICS,
        limits=(_CLIP, _RANDOM),
    ),
    Release(
        name=GENERATION,
        system="video_lavit",
        hub_id="rain1011/Video-LaVIT-v1",
        files=("language_model",),
        config={"text_config": _LLAMA},
        card="video_lavit_llm",
        pipeline_tag="text-generation",
        license=_LICENSE,
        paper="2402.03161",
        title="Video-LaVIT language model for generation (LLaMA-2-7B, 49,412 ids)",
        size="13.8 GB",
        limits=(
            "Writes ids of visual and motion codes; pictures need the other networks (release `video_lavit`).",
            "Pre-trained, not tuned to answer questions.",
        ),
    ),
    Release(
        name=UNDERSTANDING,
        system="video_lavit",
        hub_id="rain1011/Video-LaVIT-v1",
        files=("language_model_sft",),
        config={
            "text_config": _LLAMA,
            "visual_tokenizer_config": {"projection_dim": 4096},
            "motion_tokenizer_config": {},
        },
        card="video_lavit_llm",
        pipeline_tag="video-text-to-text",
        license=_LICENSE,
        paper="2402.03161",
        title="Video-LaVIT language model tuned for image and video questions, with its tokenizers",
        size="16.9 GB",
        metrics=_UNDERSTANDING_METRICS,
        limits=(
            _RANDOM,
            "A video becomes at most a few clips of one key frame and 24 motion maps each; what happens between key "
            "frames is only seen as motion.",
            "Tuned on prompts with one image or one video.",
        ),
        notes=("The tokenizer (`tokenizer.model`) lies in the folder `language_model` of the authors' repository.",),
    ),
)


CARDS_LLM = tuple({release.card for release in RELEASES_LLM})


# ------------------------------------------------------------------------------------------------------ configurations

_LLAMA_KEYS = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "bos_token_id", "eos_token_id",
    "pad_token_id", "rope_theta", "rope_scaling", "attention_bias", "attention_dropout", "tie_word_embeddings",
    "pretraining_tp",
}  # fmt: skip


def make_config(arguments):
    """`VideoLavitConfig(**arguments)`."""
    from ..modeling.video_lavit.configuration_video_lavit_llm import VideoLavitConfig

    return VideoLavitConfig(**arguments)


def config_from_original(original):
    """The authors' configuration -> `VideoLavitConfig`.

    Args:
        original: the `config.json` of `language_model` or `language_model_sft` (LLaMA's keys at the top), or a mapping
            with these under `llama` and, for weights with tokenizers, `visual_tokenizer` and `motion_tokenizer`.

    Raises:
        CheckpointError: LLaMA's sizes are missing, or the parts contradict each other.
    """
    llama = original.get("llama", original)
    if not isinstance(llama, Mapping) or "hidden_size" not in llama:
        raise CheckpointError("original configuration: no LLaMA configuration (`hidden_size`, ...) in it")
    arguments = {"text_config": {key: value for key, value in llama.items() if key in _LLAMA_KEYS}}
    arguments["max_sequence_length"] = original.get("tokenizer_model_max_length", llama.get("max_position_embeddings"))
    arguments["padding_side"] = original.get("tokenizer_padding_side", "right")
    try:
        if "visual_tokenizer" in original:
            visual = visual_tokenizer_arguments(original["visual_tokenizer"])
            arguments["visual_tokenizer_config"] = {"projection_dim": llama["hidden_size"], **visual}
            arguments["motion_tokenizer_config"] = motion_tokenizer_arguments(original["motion_tokenizer"])
        elif "VideoLaVITLlamaForCausalLM" in (original.get("architectures") or ()):
            arguments["visual_tokenizer_config"] = {"projection_dim": llama["hidden_size"]}
            arguments["motion_tokenizer_config"] = {}
        return make_config(arguments)
    except KeyError as error:
        raise CheckpointError(f"original configuration: {error} is missing") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"original configuration: {error}") from error


# --------------------------------------------------------------------------------------------------------------- names


def language_model_mapping(config=None):
    """Names of both checkpoints, with or without tokenizers."""
    return StateDictMapping(
        (
            Rename("model.visual_tokenizer.**", "model.visual_tokenizer.**"),
            Rename("model.motion_tokenizer.**", "model.motion_tokenizer.**"),
            Rename("model.**", "model.language_model.**"),
            Rename("lm_head.**", "lm_head.**"),
        ),
        keep_unmatched=False,
    )


COMPONENTS_LLM = {"language_model": language_model_mapping}


def build_language_model(config):
    """The model on the meta device."""
    from ..modeling.video_lavit.modeling_video_lavit import VideoLavitForCausalLM

    with torch.device("meta"):
        return VideoLavitForCausalLM(config).eval()


def manifest_parts_llm(stem, manifest):
    """`ManifestPart`s of a file of the language model, or None if the file is of another network."""
    release = {"language_model": GENERATION, "language_model_sft": UNDERSTANDING}.get(stem)
    if release is None:
        return None
    config = make_config(_find(release).config)
    return [
        ManifestPart(
            "language_model", list(manifest["tensors"]), build_language_model(config), language_model_mapping(config)
        )
    ]


def _find(name):
    return next(release for release in RELEASES_LLM if release.name == name)


def card_facts_llm(release):
    """Computed facts for the model card of one of these releases."""
    config = make_config(release.config)
    model = build_language_model(config)

    def billions(module):
        return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e9:.2f} B"

    size = billions(model.model.language_model)
    facts = [("Language model", f"LLaMA-2-7B, {size} parameters, {config.num_token_ids} ids")]
    if model.model.visual_tokenizer is not None:
        facts.append(("Visual tokenizer", f"{billions(model.model.visual_tokenizer)} parameters, part of the model"))
        facts.append(("Motion tokenizer", f"{billions(model.model.motion_tokenizer)} parameters, part of the model"))
    facts.append(
        (
            "Ids",
            f"text 0 .. {config.text_vocab_size - 1}, visual codes {config.visual_code_offset} .. "
            f"{config.motion_start_token_id - 1}, motion codes {config.motion_code_offset} .. "
            f"{config.num_token_ids - 1}",
        )
    )
    facts.append(("A clip", "1 key frame (about 90 codes), 24 motion maps (135 codes), 6 frames per second"))
    # The rest is what the cards' snippets are run with.
    return {
        "facts": facts,
        "understands": model.model.visual_tokenizer is not None,
        "max_new_tokens": 200,
        "height": 512,
        "width": 896,
        "steps": 25,
        "keyframe_height": 576,
        "keyframe_width": 1024,
        "keyframe_steps": 50,
    }


# ---------------------------------------------------------------------------------------------------------- conversion


def convert_llm(checkpoints, output, *, release=None, original_config=None, keep_training_state=False, tokenizer=None):
    """Converts the language model, or the whole generation system, into the folder `output`.

    Args:
        checkpoints: the authors' folder, or `language_model`/`language_model_sft` in it (for `video_lavit` all the
            folders of that release).
        output: an existing, empty folder.
        release, original_config: what the checkpoint is, one of the two. An original configuration is that of the
            language model (see `config_from_original`), or for a whole generation system one with `llama`,
            `visual_tokenizer`, `motion_tokenizer`, `keyframe_decoder` and `motion_encoder`.
        keep_training_state: not available, the releases hold none.
        tokenizer: path of LLaMA's `tokenizer.model` if it is neither with the checkpoint nor in `language_model`
            beside it.

    Returns:
        The `Release` the model card describes.

    Raises:
        CheckpointError: files that are missing or unreadable, tensors that are missing, unexpected or misshaped.
    """
    if keep_training_state:
        raise CheckpointError("Video-LaVIT's language model checkpoints hold no training state to keep")
    folder = OriginalFolder(checkpoints)
    if release is not None and release.name == PIPELINE:
        return _convert_pipeline(folder, output, release, make_config(release.config), {}, tokenizer)
    if original_config is not None and "keyframe_decoder" in original_config:
        config = config_from_original({"llama": original_config.get("llama")})
        release = _own_release(config, checkpoints, "video_lavit", "text-to-video")
        return _convert_pipeline(folder, output, release, config, _pipeline_arguments(original_config), tokenizer)
    if release is not None:
        config = make_config(release.config)
        weights = folder.find("language_model_sft" if release.name == UNDERSTANDING else "language_model")
    else:
        config = config_from_original(original_config)
        release, weights = _own_release(config, checkpoints), Path(checkpoints[0])
    model, left_out = read_language_model(weights, config)
    processor = read_processor(folder, weights, config, tokenizer)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    write_report(
        output,
        system="video_lavit",
        release=release.name if release in RELEASES_LLM else None,
        checkpoint=[Path(path).name for path in checkpoints],
        converted_tensors=len(model.state_dict()),
        left_out={"rotary_emb.inv_freq": left_out} if left_out else {},
    )
    return release


def read_language_model(weights, config):
    """(model, number of tensors left out) from the authors' shards in a folder (or one file)."""
    from transformers import GenerationConfig

    tensors = read_checkpoint(weights)
    # Older versions of transformers stored these constants of the rotary embedding.
    constants = [name for name in tensors if name.endswith("rotary_emb.inv_freq")]
    for name in constants:
        del tensors[name]
    model = load_strict(build_language_model(config), language_model_mapping(config).to_hf(tensors), str(weights))
    options = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if config.visual_tokenizer_config is not None:
        # Answers are text: the original excludes every other id whenever it generates.
        options["suppress_tokens"] = list(range(config.text_vocab_size, config.num_token_ids))
    model.generation_config = GenerationConfig(**options)
    return model, len(constants)


def read_processor(folder, weights, config, tokenizer=None, visual=None, motion=None):
    """The processor with LLaMA's tokenizer, which the authors store beside the generation weights."""
    from ..modeling.video_lavit.processing_video_lavit import VideoLavitProcessor

    weights = Path(weights)
    inside = weights if weights.is_dir() else weights.parent
    beside = inside.parent / "language_model" / "tokenizer.model"
    candidates = [tokenizer] if tokenizer else [inside / "tokenizer.model", beside]
    path = next((Path(c) for c in candidates if Path(c).is_file()), None)
    path = path or folder.find("language_model/tokenizer.model", required=False)
    if path is None:
        raise CheckpointError(
            f"{weights}: no tokenizer.model in it or in language_model beside it; pass tokenizer= (LLaMA's "
            "sentencepiece model)"
        )
    text_tokenizer = llama_tokenizer_from_sentencepiece(path, pad_token="<unk>", padding_side="left")
    if len(text_tokenizer) != config.text_vocab_size:
        raise CheckpointError(f"{path}: has {len(text_tokenizer)} pieces instead of {config.text_vocab_size}")
    options = {"image_token_id": config.image_token_id, "video_token_id": config.video_token_id}
    visual, motion = visual or config.visual_tokenizer_config, motion or config.motion_tokenizer_config
    if visual is not None:
        options.update(
            image_size=visual.image_size,
            num_motion_frames=motion.num_frames,
            motion_height=motion.height,
            motion_width=motion.width,
        )
    return VideoLavitProcessor(text_tokenizer, **options)


def _pipeline_arguments(original):
    """Sizes of the other networks of a generation system that is not of the released size."""
    try:
        return {
            "visual_tokenizer": visual_tokenizer_arguments({**original["visual_tokenizer"], "llm_embed_dim": None}),
            "motion_tokenizer": motion_tokenizer_arguments(original["motion_tokenizer"]),
            "keyframe_decoder": keyframe_decoder_arguments(original["keyframe_decoder"]),
            "motion_encoder": motion_encoder_arguments(original["motion_encoder"]),
        }
    except KeyError as error:
        raise CheckpointError(f"original configuration: {error} is missing") from error


def _convert_pipeline(folder, output, release, config, sizes, tokenizer):
    from ..pipelines.video_lavit.pipeline_video_lavit import VideoLavitPipeline

    weights = folder.find("language_model")
    unet, motion_encoder = folder.video_unet(encoder_arguments=sizes.get("motion_encoder"))
    visual_tokenizer = folder.visual_tokenizer(sizes.get("visual_tokenizer"))
    motion_tokenizer = folder.motion_tokenizer(sizes.get("motion_tokenizer"))
    processor = read_processor(folder, weights, config, tokenizer, visual_tokenizer.config, motion_tokenizer.config)
    pipeline = VideoLavitPipeline(
        language_model=read_language_model(weights, config)[0],
        processor=processor,
        visual_tokenizer=visual_tokenizer,
        motion_tokenizer=motion_tokenizer,
        keyframe_decoder=folder.keyframe_decoder(sizes.get("keyframe_decoder")),
        keyframe_unet=folder.keyframe_unet(),
        keyframe_vae=folder.keyframe_vae(),
        keyframe_scheduler=folder.keyframe_scheduler(),
        unet=unet,
        motion_encoder=motion_encoder,
        vae=folder.vae(),
        scheduler=folder.scheduler(),
    )
    pipeline.save_pretrained(output)
    write_report(
        output,
        system="video_lavit",
        release=release.name if release in RELEASES_LLM else None,
        checkpoint=[path.name for path in folder.paths],
        components=sorted(name for name, part in pipeline.components.items() if part is not None),
    )
    return release


def _own_release(config, checkpoints, card="video_lavit_llm", pipeline_tag=None):
    """A release entry for weights that are nobody's release (fine-tuned with the original layout)."""
    name = Path(checkpoints[0]).stem
    return Release(
        name=name,
        system="video_lavit",
        hub_id="",
        files=[Path(path).name for path in checkpoints],
        config=config.to_diff_dict(),
        card=card,
        pipeline_tag=pipeline_tag
        or ("video-text-to-text" if config.visual_tokenizer_config is not None else "text-generation"),
        license=License(
            "other", "not stated", remark="State the licence of these weights here before publishing them."
        ),
        paper="2402.03161",
        title=f"Video-LaVIT, converted from {name}",
        limits=("Converted from a checkpoint that is not one of the published releases; its quality is not known.",),
    )
