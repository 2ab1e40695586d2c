"""Video-LaVIT (arXiv 2402.03161): releases, and the conversion of everything in the authors' folder.

One command per target; each takes the authors' whole folder, or just the files and sub-folders its release names. The
language model's side is in `video_lavit_llm.py`, the networks' names and sizes are in `video_lavit_parts.py`.
"""

from pathlib import Path

from ..errors import CheckpointError
from .checkpoints import load_strict, read_checkpoints, take_prefix, write_report
from .mapping import shorten
from .releases import License, Release
from .video_lavit_llm import CARDS_LLM, COMPONENTS_LLM, RELEASES_LLM, card_facts_llm, convert_llm, manifest_parts_llm
from .video_lavit_parts import (
    COMPONENTS_PARTS,
    KEYFRAME_SCHEDULER,
    OriginalFolder,
    build,
    keyframe_decoder_arguments,
    manifest_parts_parts,
    motion_encoder_arguments,
    motion_tokenizer_arguments,
    visual_tokenizer_arguments,
)

LICENSE = License(
    "other",
    "LaVIT Community License",
    "https://github.com/jy0205/LaVIT/blob/main/LICENSE",
    "The licence restricts use; read it before building on these weights.",
)
_HUB_ID, _PAPER = "rain1011/Video-LaVIT-v1", "2402.03161"
_RANDOM = "Which positions of an image become codes is drawn at random: pass a generator to repeat a result."
_CLIP = "A clip is 24 frames: one keyframe and the motion of the 23 that follow, as 16x16 blocks of an MPEG-4 encoder."

VISUAL, MOTION = "video_lavit_visual_tokenizer", "video_lavit_motion_tokenizer"
IMAGE_DETOKENIZER, VIDEO_DETOKENIZER = "video_lavit_image_detokenizer", "video_lavit_video_detokenizer"
RAW_MOTION = "video_lavit_video_3d_unet"


def _release(name, files, title, size, card, pipeline_tag, limits, notes=(), base_models=(), config=None):
    return Release(
        name=name,
        system="video_lavit",
        hub_id=_HUB_ID,
        files=files,
        config=config or {},
        card=card,
        pipeline_tag=pipeline_tag,
        license=LICENSE,
        paper=_PAPER,
        title=title,
        size=size,
        limits=limits,
        notes=notes,
        base_models=base_models,
    )


RELEASES_TOKENIZERS = (
    _release(
        VISUAL,
        ("visual_tokenizer/eva_vitg_psz14.bin", "visual_tokenizer/tokenizer_encoder.bin"),
        "Video-LaVIT visual tokenizer: an image to about 90 codes out of 16,384",
        "2.8 GB",
        "video_lavit_visual_tokenizer",
        "image-feature-extraction",
        (
            _RANDOM,
            "Pictures are squashed to 224x224; text and small objects are lost.",
            "The codes keep meaning, not pixels: the keyframe de-tokenizer draws a similar picture, not the same.",
        ),
        notes=("The list of tensors of `tokenizer_encoder.bin` was inferred from its size and the authors' code.",),
    ),
    _release(
        MOTION,
        ("motion_tokenizer.bin",),
        "Video-LaVIT motion tokenizer: 24 motion maps to 135 codes out of 1,024",
        "634 MB",
        "video_lavit_motion_tokenizer",
        "video-classification",
        (
            _CLIP,
            "Vectors come from re-encoding at 6 frames per second; what the encoder's search misses is not seen.",
        ),
    ),
    _release(
        IMAGE_DETOKENIZER,
        ("visual_tokenizer", "image_detokenizer"),
        "Video-LaVIT keyframe de-tokenizer: visual codes to images",
        "9.1 GB",
        "video_lavit_detokenizer",
        "image-to-image",
        (_RANDOM, "Draws a picture with the same content, not the same pixels."),
        notes=(
            "The configurations of this U-Net, VAE and scheduler are read from the files where they are given, and are "
            "SDXL's otherwise.",
        ),
    ),
    _release(
        VIDEO_DETOKENIZER,
        ("video_detokenizer", "motion_tokenizer.bin"),
        "Video-LaVIT video de-tokenizer for motion codes: keyframe and motion to 24 frames",
        "4.2 GB",
        "video_lavit_detokenizer",
        "image-to-video",
        (_CLIP, "For motion that went through its codes; raw motion is served better by `video_lavit_video_3d_unet`."),
        base_models=("stabilityai/stable-video-diffusion-img2vid-xt",),
    ),
    _release(
        RAW_MOTION,
        ("video_3d_unet.bin", "video_detokenizer"),
        "Video-LaVIT video de-tokenizer for raw motion: reconstructs a clip from keyframe and motion vectors",
        "3.5 GB",
        "video_lavit_detokenizer",
        "image-to-video",
        (_CLIP, "Trained at 320 pixels height, from scratch, on motion that did not go through codes."),
        notes=("`video_detokenizer` is needed for its VAE and scheduler; its U-Net is not used.",),
    ),
)
RELEASES = (*RELEASES_TOKENIZERS, *RELEASES_LLM)
COMPONENTS = {**COMPONENTS_PARTS, **COMPONENTS_LLM}


def manifest_parts(stem, manifest):
    """See `conversion/__init__.py`."""
    parts = manifest_parts_parts(stem, manifest) or manifest_parts_llm(stem, manifest)
    if parts is None:
        raise CheckpointError(f"Video-LaVIT has no file {stem!r}")
    return parts


def card_facts(release):
    """Computed facts for a release's model card."""
    if release.card in CARDS_LLM:
        return card_facts_llm(release)
    components = {
        VISUAL: ("visual_tokenizer",),
        MOTION: ("motion_tokenizer",),
        IMAGE_DETOKENIZER: ("visual_tokenizer", "keyframe_decoder", "keyframe_unet", "keyframe_vae"),
        VIDEO_DETOKENIZER: ("unet", "motion_encoder", "vae", "motion_tokenizer"),
        RAW_MOTION: ("unet", "motion_encoder", "vae"),
    }.get(release.name, ())
    facts = []
    for name in components:
        count = sum(parameter.numel() for parameter in build(name).parameters())
        facts.append((f"`{name}`" if len(components) > 1 else "Parameters", f"{count / 1e6:,.0f} M parameters"))
    if release.name == VISUAL:
        facts.append(("Input", "224 x 224 pixels, 256 positions of which about 90 are kept"))
        facts.append(("Codebook", "16,384 codes of 32 numbers"))
    if release.name == MOTION:
        facts.append(("Input", "24 maps of 20 x 36 cells, x and y, at 6 frames per second (4 seconds)"))
        facts.append(("Codes", "3 x 5 x 9 = 135 per clip, codebook of 1,024 codes of 32 numbers"))
    images = release.name == IMAGE_DETOKENIZER or release.config.get("kind") == "image_detokenizer"
    height, width = (512, 512) if images else (320, 576)
    return {
        "facts": facts,
        "images": images,
        "raw_motion": release.name == RAW_MOTION,
        # Of the snippet.
        "height": height,
        "width": width,
        "steps": 50 if images else 25,
    }


# ---------------------------------------------------------------------------------------------------------- conversion


def convert(checkpoints, output, *, release=None, original_config=None, keep_training_state=False, **options):
    """Converts one target of the authors' folder into the folder `output`.

    Args:
        checkpoints: the authors' folder, or the files and sub-folders of it that the release names.
        output: an existing, empty folder.
        release, original_config: what the checkpoint is, one of the two. An original configuration is one network's, as
            the authors' constructors take it; which network it is follows from its keys.
        keep_training_state: not available, the releases hold none.
        options: of the language model's conversion (`tokenizer`).

    Returns:
        The `Release` the model card describes.

    Raises:
        CheckpointError: files that are missing or unreadable, tensors that are missing, unexpected or misshaped.
    """
    if release is not None and release in RELEASES_LLM:
        return convert_llm(checkpoints, output, release=release, keep_training_state=keep_training_state, **options)
    kind = None if release is not None else _kind_of(original_config)
    if kind == "language_model":
        return convert_llm(
            checkpoints, output, original_config=original_config, keep_training_state=keep_training_state, **options
        )
    if options:
        raise ValueError(f"{', '.join(options)}: only for Video-LaVIT's language model")
    if keep_training_state:
        raise CheckpointError("Video-LaVIT's checkpoints hold no training state to keep")
    left_out = {}
    if release is not None:
        converted = _CONVERTERS[release.name](OriginalFolder(checkpoints), output)
    else:
        converted, left_out = _convert_own(kind, checkpoints, output, original_config)
        release = _own_release(kind, checkpoints, left_out)
    write_report(
        output,
        system="video_lavit",
        release=release.name if release in RELEASES else None,
        checkpoint=[Path(path).name for path in checkpoints],
        converted_tensors={name: len(module.state_dict()) for name, module in converted.items()},
        **({"left_out": left_out} if left_out else {}),
    )
    return release


def _save_visual_tokenizer(model, output):
    from ..modeling.video_lavit.image_processing_video_lavit import VideoLavitImageProcessor

    model.save_pretrained(output)
    VideoLavitImageProcessor(model.config.image_size).save_pretrained(output)
    return {"visual_tokenizer": model}


def _motion_processor(config):
    from ..modeling.video_lavit.motion_processing import VideoLavitMotionProcessor

    return VideoLavitMotionProcessor(num_frames=config.num_frames, height=config.height, width=config.width)


def _save_motion_tokenizer(model, output):
    model.save_pretrained(output)
    _motion_processor(model.config).save_pretrained(output)
    return {"motion_tokenizer": model}


def _save_pipeline(output, **components):
    from torch import nn

    from ..pipelines.video_lavit.pipeline_video_lavit_reconstruction import VideoLavitReconstructionPipeline

    VideoLavitReconstructionPipeline(**components).save_pretrained(output)
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


def _convert_image_detokenizer(folder, output):
    from ..modeling.video_lavit.image_processing_video_lavit import VideoLavitImageProcessor

    tokenizer = folder.visual_tokenizer()
    return _save_pipeline(
        output,
        visual_tokenizer=tokenizer,
        image_processor=VideoLavitImageProcessor(tokenizer.config.image_size),
        keyframe_decoder=folder.keyframe_decoder(),
        keyframe_unet=folder.keyframe_unet(),
        keyframe_vae=folder.keyframe_vae(),
        keyframe_scheduler=folder.keyframe_scheduler(),
    )


def _convert_video_detokenizer(folder, output):
    # Small files first, so that a missing one is noticed before gigabytes are read.
    vae, tokenizer = folder.vae(), folder.motion_tokenizer()
    unet, motion_encoder = folder.video_unet()
    return _save_pipeline(
        output,
        unet=unet,
        motion_encoder=motion_encoder,
        vae=vae,
        scheduler=folder.scheduler(),
        motion_tokenizer=tokenizer,
        motion_processor=_motion_processor(tokenizer.config),
    )


def _convert_raw_motion(folder, output):
    from ..modeling.video_lavit.motion_processing import VideoLavitMotionProcessor

    vae = folder.vae()
    unet, motion_encoder = folder.video_unet(reconstruction=True)
    return _save_pipeline(
        output,
        unet=unet,
        motion_encoder=motion_encoder,
        vae=vae,
        scheduler=folder.scheduler(),
        motion_processor=VideoLavitMotionProcessor(),
    )


_CONVERTERS = {
    VISUAL: lambda folder, output: _save_visual_tokenizer(folder.visual_tokenizer(), output),
    MOTION: lambda folder, output: _save_motion_tokenizer(folder.motion_tokenizer(), output),
    IMAGE_DETOKENIZER: _convert_image_detokenizer,
    VIDEO_DETOKENIZER: _convert_video_detokenizer,
    RAW_MOTION: _convert_raw_motion,
}


# ------------------------------------------------------------------------------------- checkpoints of nobody's release

# What tells the authors' configurations apart: network -> keys that only its configuration has together.
_KEYS = {
    "language_model": ({"llama"}, {"architectures", "vocab_size"}),
    "visual_tokenizer": ({"eva", "n_code"},),
    "video_detokenizer": ({"motion_encoder", "unet", "vae"},),
    "image_detokenizer": ({"decoder", "unet", "vae"},),
    "eva_encoder": ({"embed_dim", "vision_cfg"},),
    "motion_tokenizer": ({"dim", "n_code", "num_frames"},),
    "motion_encoder": ({"dim", "out_channel"},),
    "keyframe_decoder": ({"in_chans", "embed_dim", "depth"},),
    "unet": ({"addition_time_embed_dim", "cross_attention_dim", "num_frames"},),
}


def _kind_of(original):
    for kind, alternatives in _KEYS.items():
        if any(keys <= set(original) for keys in alternatives):
            return kind
    raise CheckpointError(
        f"the original configuration is none of Video-LaVIT's ({', '.join(_KEYS)})"
        f"; its keys are {', '.join(sorted(original))}"
    )


def _convert_own(kind, checkpoints, output, original):
    """(converted networks, {what was left out: number of tensors})."""
    if kind == "eva_encoder":
        raise CheckpointError(
            "the original configuration is that of the image encoder alone, which is no model by itself. Give the "
            'visual tokenizer\'s configuration, which holds this one: {"eva": {...}, "layers", "heads", "n_code", '
            '"code_dim"}, and its second file, tokenizer_encoder.bin, beside eva_vitg_psz14.bin'
        )
    source = ", ".join(str(path) for path in checkpoints)
    tensors = read_checkpoints(checkpoints)

    def fill(component, arguments, state_dict):
        return load_strict(build(component, arguments), state_dict, f"{source} as {component}")

    try:
        if kind == "visual_tokenizer":
            return _save_visual_tokenizer(_fill_visual_tokenizer(original, tensors, fill), output), {}
        if kind == "motion_tokenizer":
            return _save_motion_tokenizer(fill(kind, motion_tokenizer_arguments(original), tensors), output), {}
        if kind == "video_detokenizer":
            return _convert_own_detokenizer(original, tensors, fill, output), {}
        if kind == "image_detokenizer":
            return _convert_own_image_detokenizer(original, tensors, fill, output)
        arguments = {
            "motion_encoder": motion_encoder_arguments,
            "keyframe_decoder": keyframe_decoder_arguments,
            "unet": _unet_arguments,
        }[kind](original)
    except KeyError as error:
        raise CheckpointError(f"original configuration: {error} is missing") from error
    model = fill(kind, arguments, tensors)
    model.save_pretrained(output)
    return {kind: model}, {}


def _fill_visual_tokenizer(original, tensors, fill):
    # The encoder comes below `encoder.`, or from its own file under bare names.
    bare = COMPONENTS["eva_encoder"]()
    own = ("encoder.", "token_predictor.", "causal_encoder.", "quantize.", "encode_task_layer.", "vit_proj.")
    encoder = {name: value for name, value in tensors.items() if not name.startswith(own)}
    rest = {name: value for name, value in tensors.items() if name.startswith(own)}
    arguments = visual_tokenizer_arguments(original)
    if not any(name.startswith("vit_proj.") for name in rest):
        arguments.pop("projection_dim", None)
    return fill("visual_tokenizer", arguments, {**bare.to_hf(encoder), **rest})


def _unet_arguments(original):
    return {name: value for name, value in original.items() if not name.startswith("_")}


def _convert_own_detokenizer(original, tensors, fill, output):
    from diffusers import EulerDiscreteScheduler

    from .video_lavit_parts import VIDEO_SCHEDULER

    parts = {
        "unet": _unet_arguments(original["unet"]),
        "vae": _unet_arguments(original["vae"]),
        "motion_encoder": motion_encoder_arguments(original["motion_encoder"]),
    }
    if any(name.startswith("motion_tokenizer.") for name in tensors):
        parts["motion_tokenizer"] = motion_tokenizer_arguments(original["motion_tokenizer"])
    modules = {name: fill(name, arguments, take_prefix(tensors, f"{name}.")) for name, arguments in parts.items()}
    if tensors:
        raise CheckpointError(f"tensors that no part of the video de-tokenizer takes: {', '.join(sorted(tensors)[:8])}")
    if "motion_tokenizer" in modules:
        modules["motion_processor"] = _motion_processor(modules["motion_tokenizer"].config)
    scheduler = EulerDiscreteScheduler(**original.get("scheduler", VIDEO_SCHEDULER))
    return _save_pipeline(output, scheduler=scheduler, **modules)


_CODEBOOK = "quantize.embedding.weight"
_CODEBOOK_ALONE = (
    "The checkpoint holds the codebook of a visual tokenizer, not the tokenizer, so this folder has none. Load it with "
    "`from_pretrained(folder, visual_tokenizer=...)`."
)


def _convert_own_image_detokenizer(original, tensors, fill, output):
    """Decoder, U-Net, VAE and scheduler, and the visual tokenizer where the checkpoint and the configuration have it.

    What the authors keep beside the decoder may be no more than the tokenizer's codebook: that alone makes no model,
    it is left out.
    """
    from ..modeling.video_lavit.image_processing_video_lavit import VideoLavitImageProcessor

    visual = take_prefix(tensors, "visual_tokenizer.")
    modules = {
        "keyframe_decoder": fill(
            "keyframe_decoder",
            keyframe_decoder_arguments(original["decoder"]),
            take_prefix(tensors, "tokenizer_decoder."),
        ),
        "keyframe_unet": fill("keyframe_unet", _unet_arguments(original["unet"]), take_prefix(tensors, "unet.")),
        "keyframe_vae": fill("keyframe_vae", _unet_arguments(original["vae"]), take_prefix(tensors, "vae.")),
    }
    if tensors:
        raise CheckpointError(f"tensors that no part of the keyframe de-tokenizer takes: {shorten(sorted(tensors))}")
    left_out = {}
    if "visual_tokenizer" in original:
        modules["visual_tokenizer"] = _fill_visual_tokenizer(original["visual_tokenizer"], visual, fill)
        modules["image_processor"] = VideoLavitImageProcessor(modules["visual_tokenizer"].config.image_size)
    elif set(visual) <= {_CODEBOOK}:
        left_out = {f"visual_tokenizer.{name}": 1 for name in visual}
    else:
        raise CheckpointError(
            "the checkpoint holds a visual tokenizer; its configuration (`visual_tokenizer`) is missing from the original "
            "configuration"
        )
    return _save_pipeline(output, keyframe_scheduler=_keyframe_scheduler(original), **modules), left_out


def _keyframe_scheduler(original):
    """The scheduler a configuration names: `scheduler` (with its class, as the authors' file has it), else the one of
    `scheduler_ddim` and `scheduler_euler_ancestral` that is there, DDIM first."""
    from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler

    given = original.get("scheduler", {})
    ancestral = given.get("_class_name", given.get("class")) == "EulerAncestralDiscreteScheduler"
    if not given:
        ancestral = "scheduler_euler_ancestral" in original and "scheduler_ddim" not in original
        given = original.get("scheduler_euler_ancestral" if ancestral else "scheduler_ddim", KEYFRAME_SCHEDULER)
    return (EulerAncestralDiscreteScheduler if ancestral else DDIMScheduler).from_config(given)


def _own_release(kind, checkpoints, left_out=()):
    name = Path(checkpoints[0]).stem
    template = {"visual_tokenizer": VISUAL, "motion_tokenizer": MOTION, "image_detokenizer": IMAGE_DETOKENIZER}.get(
        kind, VIDEO_DETOKENIZER
    )
    card = next(release.card for release in RELEASES_TOKENIZERS if release.name == template)
    return Release(
        name=name,
        system="video_lavit",
        hub_id="",
        files=[Path(path).name for path in checkpoints],
        config={"kind": kind},
        card=card,
        pipeline_tag="image-to-image" if kind == "image_detokenizer" else "video-to-video",
        license=License(
            "other", "not stated", remark="State the licence of these weights here before publishing them."
        ),
        paper=_PAPER,
        title=f"Video-LaVIT {kind.replace('_', ' ')}, converted from {name}",
        limits=("Converted from a checkpoint that is not one of the published releases; its quality is not known.",),
        notes=(_CODEBOOK_ALONE,) if left_out else (),
    )
