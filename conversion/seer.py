"""Seer: the authors' releases, and the conversion of their checkpoints and of stock Stable Diffusion 1.x.

The authors' files hold only what they trained (U-Net and text decomposer); tokenizer, text encoder and VAE come from
Stable Diffusion 1.5, which has to be given beside them. All names are kept, so the mappings are identities.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import CheckpointError
from . import stable_diffusion
from .checkpoints import load_strict, read_checkpoint, write_report
from .mapping import ManifestPart, StateDictMapping, shorten
from .releases import License, Metric, Release

COMPONENTS = {
    "unet": lambda config: StateDictMapping(),
    "text_decomposer": lambda config: StateDictMapping(),
    "image_unet": lambda config: StateDictMapping(),
    "image_unet_original": lambda config: stable_diffusion.unet_mapping(config),
    "vae": lambda config: stable_diffusion.old_vae_mapping(config),
    "vae_original": lambda config: stable_diffusion.vae_mapping(config),
    "text_encoder": lambda config: stable_diffusion.text_encoder_mapping(config),
}

DEFERRED_MANIFESTS = {
    "i3d_pretrained_400": "a network of the evaluation, not of the model",
    "conv3d_deepnetA_ucf": "a network of the evaluation, not of the model",
}

# ---------------------------------------------------------------------------------------------------------- releases

_HUB_ID = "xianfang/SeerVideo"
_SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
_MIT = License("mit", link=f"https://huggingface.co/{_HUB_ID}")
_OPENRAIL = License("creativeml-openrail-m", link=f"https://huggingface.co/{_SD15}")
_PAPER = "paper, as quoted by later work: https://arxiv.org/abs/2303.14897"
_SETTING = "256x256, 30 DDIM steps, guidance 7.5, float16, one sample a clip"
# Trained and sampled under float16 autocast, which rounded the rotary angles.
_UNET = {"rotary_angle_dtype": "float16"}
_TEXT_DECOMPOSER = {"rotary_angle_dtype": "float16"}

_LIMITS = (
    "Made for 256x256 and for as many frames as it was trained with: group norms pool over frames, so quality changes "
    "with their number. Longer results are made window by window, and errors add up.",
    "Only the frames given and a short sentence decide; there is no control over camera or speed.",
    "The authors sample with another noise schedule than they train with, and pass reference frames through temporal "
    "feed-forwards that training skipped. Both are the defaults here, both can be changed.",
)
_NOTES = (
    "The rotary angles are rounded to half precision (`rotary_angle_dtype`), as under the authors' float16 autocast; "
    'load the U-Net with `rotary_angle_dtype="float32"` to compare.',
)


def _fine_tuned(name, folder, title, data, num_frames, num_cond_frames, fvd=None, notes=()):
    metrics = () if fvd is None else (Metric("FVD", fvd, data, _SETTING, _PAPER),)
    return Release(
        name=name,
        system="seer",
        hub_id=_HUB_ID,
        files=(f"{folder}/pytorch_model.bin", f"{folder}/pytorch_model_1.bin"),
        config={
            "unet": _UNET,
            "text_decomposer": _TEXT_DECOMPOSER,
            "pipeline": {"num_frames": num_frames, "num_cond_frames": num_cond_frames, "resolution": 256},
        },
        card="seer",
        pipeline_tag="image-text-to-video",
        license=_MIT,
        paper="2303.14897",
        title=title,
        size="4.33 GB + 731 MB",
        metrics=metrics,
        limits=_LIMITS,
        notes=(*_NOTES, *notes),
        base_models=(_SD15,),
    )


_INFERRED = ("The name of the step folder is inferred from the number of training steps.",)

RELEASES = (
    _fine_tuned(
        "sthv2_seer",
        "sthv2_seer/learned_sdunet-steps-200000",
        "Seer, Something-Something V2",
        "Something-Something V2",
        num_frames=12,
        num_cond_frames=2,
        fvd=112.9,
    ),
    _fine_tuned(
        "bridge_seer",
        "bridge_seer/learned_sdunet-steps-80000",
        "Seer, BridgeData",
        "BridgeData",
        num_frames=16,
        num_cond_frames=1,
        fvd=246.3,
        notes=_INFERRED,
    ),
    _fine_tuned(
        "epickitchen_seer",
        "epickitchen_seer/learned_sdunet-steps-80000",
        "Seer, Epic-Kitchens-100",
        "Epic-Kitchens-100",
        num_frames=16,
        num_cond_frames=1,
        fvd=271.4,
        notes=_INFERRED,
    ),
    _fine_tuned(
        "sthv2bridge_seer",
        "sthv2bridge_seer/learned_sdunet-steps-80000",
        "Seer, Something-Something V2 then BridgeData",
        "Something-Something V2 and BridgeData",
        num_frames=16,
        num_cond_frames=1,
        notes=("The authors recommend this one for pictures of one's own.",),
    ),
    Release(
        name="fstext_init",
        system="seer",
        hub_id=_HUB_ID,
        files=("fstext_init/pytorch_model.bin",),
        config={"text_decomposer": _TEXT_DECOMPOSER},
        card="seer_text_decomposer",
        pipeline_tag="feature-extraction",
        license=_MIT,
        paper="2303.14897",
        title="Seer's text decomposer before fine-tuning",
        size="731 MB",
        limits=(
            "A starting point for fine-tuning: by itself it repeats the text embedding over frames, more or less.",
        ),
        notes=(
            "According to a comment in the authors' code it was trained to give the text embedding back in the mean "
            "over frames.",
        ),
    ),
    Release(
        name="seer_sd15_init",
        system="seer",
        hub_id="",
        files=(),
        config={"unet": {}, "text_decomposer": {}, "pipeline": {"num_frames": 16, "num_cond_frames": 1}},
        card="seer_init",
        pipeline_tag="image-text-to-video",
        license=_OPENRAIL,
        paper="2303.14897",
        title="Stable Diffusion 1.5 inflated to a Seer to be trained",
        size="6 GB",
        limits=("Not trained in time: its frames have nothing to do with each other until it is fine-tuned.",),
        base_models=(_SD15,),
    ),
)


def card_facts(release):
    """Computed facts for the model card."""
    facts = []
    for name, build in (("unet", _build_unet), ("text_decomposer", _build_text_decomposer)):
        if name in release.config:
            count = sum(parameter.numel() for parameter in build(release.config[name]).parameters())
            label = {"unet": "U-Net", "text_decomposer": "text decomposer"}[name]
            facts.append((f"Parameters, {label}", f"{count / 1e6:.1f} M"))
    pipeline = release.config.get("pipeline")
    if pipeline:
        facts.append(("Frames of a window", f"{pipeline['num_frames']}, {pipeline['num_cond_frames']} of them given"))
        facts.append(("Frame size", "256x256; also 64x64, 128x128, 512x512, 768x768 and some others"))
    return {"facts": facts, "pipeline": pipeline}


# ------------------------------------------------------------------------------------------------------------ models


def _build_unet(config):
    from ..modeling.seer.unet_seer import SeerUNet3DConditionModel

    with torch.device("meta"):
        return SeerUNet3DConditionModel(**config)


def _build_text_decomposer(config):
    from ..modeling.seer.text_decomposer_seer import SeerTextDecomposer

    with torch.device("meta"):
        return SeerTextDecomposer(**config)


def manifest_parts(stem, manifest):
    """Parts of a released file."""
    names = list(manifest["tensors"])
    if stem == "sd15_unet__diffusion_pytorch_model":
        config = stable_diffusion.UNET_CONFIG
        return [
            ManifestPart("image U-Net", names, stable_diffusion.build_unet(config), COMPONENTS["image_unet"](config))
        ]
    if stem == "sd15_vae__diffusion_pytorch_model":
        config = stable_diffusion.VAE_CONFIG
        return [ManifestPart("autoencoder", names, stable_diffusion.build_vae(config), COMPONENTS["vae"](config))]
    if stem == "sd15_text_encoder__pytorch_model":
        config = stable_diffusion.TEXT_ENCODER_CONFIG
        constants = [name for name in names if name.endswith("embeddings.position_ids")]
        rest = [name for name in names if name not in constants]
        with torch.device("meta"):
            module = stable_diffusion.build_text_encoder(config)
        return [
            ManifestPart("text encoder", rest, module, COMPONENTS["text_encoder"](config)),
            ManifestPart("position ids", constants, left_out="0, 1, 2, ...: a constant of old transformers versions"),
        ]
    release, _, file = stem.partition("__")
    known = next((r for r in RELEASES if r.name == release), None)
    if known is None or file not in {Path(name).stem for name in known.files}:
        raise CheckpointError(f"{stem}: no file of a Seer release has this name")
    if file == "pytorch_model" and "unet" in known.config:
        config = known.config["unet"]
        return [ManifestPart("unet", names, _build_unet(config), COMPONENTS["unet"](config))]
    config = known.config["text_decomposer"]
    module = _build_text_decomposer(config)
    return [ManifestPart("text_decomposer", names, module, COMPONENTS["text_decomposer"](config))]


# -------------------------------------------------------------------------------------------- original configurations


def unet_config(original):
    """Constructor arguments of the authors' video U-Net (a mapping) -> those of `SeerUNet3DConditionModel`.

    Raises:
        CheckpointError: settings that no Seer has.
    """
    from ..modeling.seer.unet_seer import unet_config_from_2d

    # Block types and the padding are fixed whatever the configuration says; the number of norm groups reaches few norms.
    fixed = ("down_block_types", "up_block_types", "norm_num_groups", "mid_block_type", "downsample_padding")
    rest = {name: value for name, value in original.items() if name not in fixed}
    if rest.get("act_fn") == "swish":
        rest["act_fn"] = "silu"  # two names of one function
    try:
        return unet_config_from_2d(rest) | {"norm_num_groups": original.get("norm_num_groups", 32)}
    except ValueError as error:
        raise CheckpointError(f"original configuration, U-Net: {error}") from error


def text_decomposer_config(original):
    """Constructor arguments of the authors' FSText (a mapping) -> those of `SeerTextDecomposer`.

    Raises:
        CheckpointError: arguments that are missing, or that the authors' model cannot work with.
    """
    names = {
        "num_frames": "num_frames",
        "in_channels": "hidden_size",
        "n_heads": "num_attention_heads",
        "num_layers": "num_layers",
        "cross_attention_dim": "cross_attention_dim",
        "max_length": "max_length",
    }
    config = {ours: original[theirs] for theirs, ours in names.items() if theirs in original}
    missing = {"hidden_size", "num_attention_heads", "num_layers"} - set(config)
    if missing:
        raise CheckpointError(
            f"original configuration, FSText: no {shorten([n for n, o in names.items() if o in missing])}"
        )
    if original.get("out_channels", config["hidden_size"]) != config["hidden_size"]:
        raise CheckpointError("original configuration, FSText: in_channels and out_channels must be equal")
    return config


# Keys of the authors' yaml files, which describe a run (and whose models are those of the releases).
_RUN_KEYS = ("num_frames", "cond_frames", "resolution", "mixed_precision")
# Of the authors' precisions those whose rotary angles the models can reproduce.
_ANGLE_DTYPES = {"fp16": "float16", "no": "float32"}


def _config_from_original(original):
    """The parts an original configuration describes: component -> our constructor arguments, and its Stable Diffusion
    parts as they are.

    It is the authors' yaml, with a section for every model that differs from the releases; or the arguments of a single
    model, also as the only section.
    """
    if "image_unet_config" in original:
        return {"image_unet": dict(original["image_unet_config"])}, {}
    if "n_heads" in original:
        return {"text_decomposer": text_decomposer_config(original)}, {}
    if "block_out_channels" in original:
        return {"unet": unet_config(original)}, {}
    sections = {name: _section(original, name) for name in ("unet", "fstext", "vae", "text_encoder")}
    unet, fstext = sections["unet"], sections["fstext"]
    is_run = any(name in original for name in _RUN_KEYS)
    if not is_run and unet is not None and fstext is None:
        return {"unet": unet_config(unet)}, {}
    if not is_run and unet is None:
        if fstext is not None:
            return {"text_decomposer": text_decomposer_config(fstext)}, {}
        raise CheckpointError(
            "original configuration: expected the arguments of the U-Net (block_out_channels, ...), those of FSText "
            "(n_heads, ...), the authors' yaml (num_frames, cond_frames, ...), or sections `unet` and `fstext`"
        )
    # The scripts run under float16 autocast unless told otherwise. Models described by themselves have no such default.
    angles = {"rotary_angle_dtype": _angle_dtype(original.get("mixed_precision", "fp16" if is_run else "no"))}
    pipeline = {"num_frames": original.get("num_frames", 16), "num_cond_frames": original.get("cond_frames", 1)}
    if "resolution" in original:
        pipeline["resolution"] = original["resolution"]
    config = {
        "unet": ({} if unet is None else unet_config(unet)) | angles,
        "text_decomposer": ({} if fstext is None else text_decomposer_config(fstext)) | angles,
        "pipeline": pipeline,
    }
    parts = {"image_unet": unet, "vae": sections["vae"], "text_encoder": sections["text_encoder"]}
    return config, {name: part for name, part in parts.items() if part is not None}


def _section(original, name):
    section = original.get(name)
    if section is not None and not isinstance(section, Mapping):
        raise CheckpointError(f"original configuration: `{name}` must be a section with arguments, got {section!r}")
    return None if section is None else dict(section)


def _angle_dtype(precision):
    # YAML reads a bare `no` as false.
    name = "no" if precision is False or precision is None else precision
    if name not in _ANGLE_DTYPES:
        raise CheckpointError(
            f"original configuration: mixed_precision {precision!r} is not supported, because rotary angles cannot be "
            'rounded that way; write "fp16" for angles rounded to float16, or "no" for exact ones'
        )
    return _ANGLE_DTYPES[name]


# -------------------------------------------------------------------------------------------------------- conversion

# Training folders also hold optimizer, scheduler and random states.
_MODEL_FILE = re.compile(r"(pytorch_model|model)(_\d+)?\.(bin|safetensors)\Z")


def _sources(paths):
    """What the given files and folders are: "unet", "text_decomposer", "image_unet" and "stable_diffusion" tensors as
    (path, tensors), "stable_diffusion_folder" and "tokenizer" as paths."""
    found = {}

    def add(kind, path, value):
        if kind in found:
            raise CheckpointError(f"{path}: holds the same part ({kind.replace('_', ' ')}) as {found[kind][0]}")
        found[kind] = (path, value)

    def add_file(path):
        tensors = read_checkpoint(path)
        if any(".temporal_attentions." in name for name in tensors):
            add("unet", path, tensors)
        elif "learnable_query" in tensors:
            add("text_decomposer", path, tensors)
        elif stable_diffusion.is_single_file(tensors):
            add("stable_diffusion", path, tensors)
        elif "time_embedding.linear_1.weight" in tensors:
            add("image_unet", path, tensors)
        else:
            raise CheckpointError(
                f"{path}: neither a U-Net nor a text decomposer of Seer nor Stable Diffusion 1.x; it holds "
                f"{shorten(list(tensors))}"
            )

    for path in map(Path, paths):
        if not path.is_dir():
            add_file(path)
        elif (path / "model_index.json").is_file():
            add("stable_diffusion_folder", path, path)
        elif (path / "vocab.json").is_file() or (path / "tokenizer.json").is_file():
            add("tokenizer", path, path)
        else:
            files = sorted(file for file in path.iterdir() if _MODEL_FILE.match(file.name))
            if not files:
                raise CheckpointError(f"{path}: no pytorch_model.bin or the like, no model_index.json and no tokenizer")
            for file in files:
                add_file(file)
    if "stable_diffusion" in found and "stable_diffusion_folder" in found:
        raise CheckpointError(f"{found['stable_diffusion'][0]}: Stable Diffusion was given twice")
    return found


def _stable_diffusion(found, configs):
    """Text encoder, VAE, image U-Net and tokenizer."""
    if "stable_diffusion_folder" in found:
        parts = stable_diffusion.read_folder(found["stable_diffusion_folder"][0])
    elif "stable_diffusion" in found:
        path, tensors = found["stable_diffusion"]
        parts = stable_diffusion.read_single_file(
            tensors, path, configs.get("image_unet"), configs.get("vae"), configs.get("text_encoder")
        )
    else:
        raise CheckpointError(
            "the authors' files hold neither text encoder nor VAE: give Stable Diffusion 1.5 as one more checkpoint "
            f"(its folder in diffusers' layout, as {_SD15} on the Hub, or the original .ckpt/.safetensors file)"
        )
    if "tokenizer" in found:
        parts.tokenizer = stable_diffusion.read_tokenizer(found["tokenizer"][0])
    elif parts.tokenizer is None:
        parts.tokenizer = stable_diffusion.read_tokenizer()
    return parts


def _load(found, kind, build, config):
    path, tensors = found[kind]
    tensors = COMPONENTS[kind](config).to_hf(tensors)
    _check_frequencies(path, tensors)
    return load_strict(build(config), tensors, f"{path}: the {kind.replace('_', ' ')}").eval()


def _check_frequencies(path, tensors):
    """The models compute their rotary frequencies; a file with others belongs to another model."""
    from ..modeling.seer.attention_seer import SeerRotaryEmbedding

    for name, value in tensors.items():
        if name.endswith("rotary_emb.freqs") and not torch.allclose(
            value.float(), SeerRotaryEmbedding(2 * value.numel()).freqs, rtol=1e-3
        ):
            raise CheckpointError(f"{path}: {name} does not hold the frequencies 10000^(-2j/{2 * value.numel()})")


def _require(found, kinds, name):
    missing = [kind for kind in kinds if kind not in found]
    if missing:
        raise CheckpointError(
            f"{name} needs {' and '.join(kind.replace('_', ' ') for kind in kinds)}; nothing given holds the "
            f"{' and the '.join(kind.replace('_', ' ') for kind in missing)}"
        )


def convert(
    checkpoints,
    output,
    *,
    release=None,
    original_config=None,
    keep_training_state=False,
    base_model=None,
    tokenizer=None,
):
    """Writes a Seer pipeline, or a single model where only one is described, into `output`.

    Args:
        checkpoints: the authors' folder or its files, and Stable Diffusion 1.5 (folder in diffusers' layout, or
            original single file; the latter with the folder of a CLIP tokenizer), in any order.
        base_model, tokenizer: Stable Diffusion and the tokenizer, if not among `checkpoints`.
        keep_training_state: there is none in these files; must be False.

    Raises:
        CheckpointError: parts missing, given twice, or not fitting.
    """
    if keep_training_state:
        raise CheckpointError("Seer's files hold no training state; leave keep_training_state out")
    found = _sources([*checkpoints, *(path for path in (base_model, tokenizer) if path is not None)])
    if release is not None:
        config, sd_configs, name = dict(release.config), {}, release.name
    else:
        config, sd_configs = _config_from_original(original_config)
        name = "this configuration"
    if "pipeline" in config:
        used = _convert_pipeline(found, output, config, sd_configs, name, fresh=name == "seer_sd15_init")
    else:
        used = _convert_model(found, output, config, name)
    unused = sorted(set(found) - set(used))
    if unused:
        raise CheckpointError(f"{found[unused[0]][0]}: given, but {name} has no use for it")
    return release


def _convert_model(found, output, config, name):
    """One model, written at the top of the folder."""
    (kind,) = config
    _require(found, [kind], name)
    if kind == "image_unet":
        from ..modeling.seer.unet_seer import SeerUNet3DConditionModel

        image_unet = _load(found, kind, stable_diffusion.build_unet, config[kind])
        model = SeerUNet3DConditionModel.from_unet2d(image_unet)
    else:
        model = _load(found, kind, _build_unet if kind == "unet" else _build_text_decomposer, config[kind])
    model.save_pretrained(output)
    write_report(output, source=[found[kind][0].name], kind=kind)
    return [kind]


def _convert_pipeline(found, output, config, sd_configs, name, fresh):
    from ..modeling.seer.scheduling_seer import SeerDDIMScheduler
    from ..modeling.seer.text_decomposer_seer import SeerTextDecomposer
    from ..modeling.seer.unet_seer import SeerUNet3DConditionModel
    from ..pipelines.seer.pipeline_seer import SeerPipeline

    used = [] if fresh else ["unet", "text_decomposer"]
    _require(found, used, name)
    base = _stable_diffusion(found, sd_configs)
    used += [kind for kind in ("stable_diffusion", "stable_diffusion_folder", "tokenizer") if kind in found]
    if fresh:
        unet = SeerUNet3DConditionModel.from_unet2d(base.unet, **config["unet"])
    else:
        unet = _load(found, "unet", _build_unet, config["unet"])
    base.unet = None  # frees the memory of the image U-Net before the rest is loaded
    if "text_decomposer" in found:
        text_decomposer = _load(found, "text_decomposer", _build_text_decomposer, config["text_decomposer"])
        used.append("text_decomposer")
    else:
        text_decomposer = SeerTextDecomposer(**config["text_decomposer"])
    pipeline = SeerPipeline(
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        vae=base.vae,
        unet=unet,
        text_decomposer=text_decomposer,
        scheduler=SeerDDIMScheduler(),
        **config["pipeline"],
    )
    pipeline.save_pretrained(output)
    write_report(
        output, source=sorted(found[kind][0].name for kind in set(used)), kind="pipeline", left_out=base.left_out or {}
    )
    return used
