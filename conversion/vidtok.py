"""VidTok: the authors' releases, their configuration files, and the conversion of their checkpoints.

Our modules keep the authors' names below `encoder.` and `decoder.`, so the mapping is the identity. What else the files
hold (`loss.*`: learned log-variance, LPIPS network and discriminator; `model_ema.*`) only serves continued training.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import CheckpointError
from .checkpoints import load_strict, read_checkpoints, save_tensors, write_report
from .mapping import ManifestPart, StateDictMapping
from .releases import License, Metric, Release

TRAINING_STATE_FILE = "training_state.safetensors"
_TRAINING_PREFIXES = {
    "loss.": "log-variance, LPIPS network and discriminator of the training loss; `keep_training_state` keeps them",
    "model_ema.": "exponential moving average of training; no published configuration uses it",
}

# ---------------------------------------------------------------------------------------------------------- releases

_MIT = License("mit", "MIT", "https://github.com/microsoft/VidTok/blob/main/LICENSE")
_README = "README of microsoft/VidTok (https://github.com/microsoft/VidTok)"
_UNPUBLISHED = (
    "The authors published this configuration, but the checkpoint is in neither their results table nor, judging by "
    "its size, their Hub repository: it was probably never released."
)

# layout -> levels that are resampled. The encoder of 41616 halves time at its two deepest levels, the decoder doubles
# it at levels 2 and 1: an asymmetry of the original code's defaults.
_LAYOUTS = {
    "488": {
        "channel_multipliers": [1, 2, 4, 4],
        "spatial_downsample_levels": [0, 1, 2],
        "spatial_upsample_levels": [1, 2, 3],
        "temporal_downsample_levels": [1, 2],
        "temporal_upsample_levels": [1, 2],
        "temporal_compression_ratio": 4,
    },
    "288": {
        "channel_multipliers": [1, 2, 4, 4],
        "spatial_downsample_levels": [0, 1, 2],
        "spatial_upsample_levels": [1, 2, 3],
        "temporal_downsample_levels": [1],
        "temporal_upsample_levels": [2],
        "temporal_compression_ratio": 2,
    },
    "444": {
        "channel_multipliers": [1, 2, 4, 4],
        "spatial_downsample_levels": [1, 2],
        "spatial_upsample_levels": [1, 2],
        "temporal_downsample_levels": [1, 2],
        "temporal_upsample_levels": [1, 2],
        "temporal_compression_ratio": 4,
    },
    "888": {
        "channel_multipliers": [1, 2, 4, 4],
        "spatial_downsample_levels": [0, 1, 2],
        "spatial_upsample_levels": [1, 2, 3],
        "temporal_downsample_levels": [0, 1, 2],
        "temporal_upsample_levels": [1, 2, 3],
        "temporal_compression_ratio": 8,
    },
    "41616": {
        "channel_multipliers": [1, 2, 4, 4, 4],
        "spatial_downsample_levels": [0, 1, 2, 3],
        "spatial_upsample_levels": [1, 2, 3, 4],
        "temporal_downsample_levels": [2, 3],
        "temporal_upsample_levels": [1, 2],
        "temporal_compression_ratio": 4,
    },
}
_CELLS = {"488": "4x8x8", "288": "2x8x8", "444": "4x4x4", "888": "8x8x8", "41616": "4x16x16"}

# name without "vidtok_", size in MB, (PSNR, SSIM, LPIPS, FVD) or None where the authors give none.
_TABLE = (
    ("kl_causal_488_4chn", 700, (29.64, 0.852, 0.114, 194.2)),
    ("kl_causal_488_8chn", 701, (31.83, 0.897, 0.083, 109.3)),
    ("kl_causal_488_16chn", 702, (35.04, 0.942, 0.047, 78.9)),
    ("kl_causal_288_8chn", 665, (33.86, 0.928, 0.057, 80.7)),
    ("kl_causal_444_4chn", 690, (34.78, 0.941, 0.051, 87.2)),
    ("kl_causal_41616_4chn", 866, (25.05, 0.711, 0.228, 549.1)),
    ("kl_noncausal_488_4chn", 700, (30.60, 0.876, 0.098, 157.9)),
    ("kl_noncausal_488_16chn", 702, (36.13, 0.950, 0.044, 60.5)),
    ("kl_noncausal_41616_4chn", 866, (26.06, 0.751, 0.190, 423.2)),
    ("kl_noncausal_41616_16chn", 868, (30.69, 0.878, 0.095, 147.1)),
    ("fsq_causal_488_4096", 700, (28.36, 0.832, 0.133, 218.1)),
    ("fsq_causal_488_32768", 700, (29.16, 0.854, 0.117, 196.9)),
    ("fsq_causal_488_262144", 700, (29.82, 0.867, 0.106, 160.1)),
    ("fsq_causal_41616_262144", 866, (25.38, 0.738, 0.206, 430.1)),
    ("fsq_noncausal_488_262144", 700, (30.78, 0.889, 0.091, 132.1)),
    ("fsq_noncausal_41616_262144", 866, (26.37, 0.771, 0.171, 357.0)),
    ("kl_causal_488_4chn_v1_1", 700, None),
    ("kl_causal_488_16chn_v1_1", 702, (35.13, 0.941, 0.049, 87.4)),
    ("kl_causal_41616_16chn_v1_1", 868, (29.61, 0.854, 0.113, 162.7)),
    ("kl_causal_288_8chn_v1_1", 665, (34.59, 0.935, 0.051, 78.2)),
    ("fsq_causal_488_32768_v1_1", 700, (29.39, 0.856, 0.114, 168.5)),
    ("fsq_causal_888_32768_v1_1", 730, (27.95, 0.817, 0.142, 293.2)),
    ("fsq_causal_41616_262144_v1_1", 866, None),
)


def _release(name, megabytes, numbers):
    regularizer, causality, layout, width = name.removesuffix("_v1_1").split("_")
    is_causal, is_v1_1 = causality == "causal", name.endswith("_v1_1")
    if regularizer == "kl":
        channels, levels = int(width.removesuffix("chn")), None
    else:
        channels = {4096: 4, 32768: 5, 262144: 6}[int(width)]
        levels = [8] * channels
    version = ("1.1" if is_v1_1 else "1.0") if is_causal else None
    num_frames = 17 if is_causal else 16
    setting = "whole videos in chunks, 256x256, 30 fps" if is_v1_1 else f"{num_frames}x256x256, 30 fps"
    metrics = [
        Metric(metric, value, "MCL-JCV", f"30 videos, {setting}", _README)
        for metric, value in zip(("PSNR", "SSIM", "LPIPS", "FVD"), numbers or ())
    ]
    kind = f"KL, {channels} channels" if levels is None else f"FSQ, {width} codes"
    limits = [
        "Trained on natural video at 3 frames per second, first at 128x128, then (the decoder only) at 256x256; other "
        "material is compressed less faithfully."
    ]
    if regularizer == "kl":
        limits.append(
            "The published numbers were measured with a random sample of the posterior; `encode` gives its mean unless "
            "`sample_posterior=True`."
        )
    if version == "1.0":
        limits.append(
            "Version 1.0 pads time with zeros and, unless the number of frames is a multiple of the temporal ratio, "
            "always prepends ratio - 1 copies of the first frame: prefer k * ratio + 1 frames (17)."
        )
    if not is_causal:
        limits.append("Not causal: every latent sees later frames, so long videos are processed clip by clip.")
    return Release(
        name=f"vidtok_{name}",
        system="vidtok",
        hub_id="microsoft/VidTok",
        files=(f"checkpoints/{'vidtok_v1_1/' if is_v1_1 else ''}vidtok_{name}.ckpt",),
        config=dict(
            in_channels=3,
            out_channels=3,
            base_channels=128,
            num_res_blocks=2,
            latent_channels=channels,
            is_causal=is_causal,
            version=version,
            regularizer=regularizer,
            fsq_levels=levels,
            norm_type="layernorm",
            temporal_interpolation="linear" if is_v1_1 else "nearest",
            **_LAYOUTS[layout],
        ),
        card="vidtok",
        pipeline_tag="video-to-video",
        license=_MIT,
        paper="2412.13061",
        title=f"VidTok {_CELLS[layout]}, {kind}, {'causal' if is_causal else 'non-causal'}"
        + (f", v{version}" if version else ""),
        size=f"{megabytes} MB",
        metrics=metrics,
        limits=limits,
        notes=() if numbers else (_UNPUBLISHED,),
        processor={"size": {"shortest_edge": 256}, "crop_size": {"height": 256, "width": 256}},
    )


RELEASES = tuple(_release(*row) for row in _TABLE)


def card_facts(release):
    """Computed facts for the model card."""
    config = make_config(release.config)
    model = build(config)
    encoder = sum(parameter.numel() for parameter in model.encoder.parameters())
    decoder = sum(parameter.numel() for parameter in model.decoder.parameters())
    time, space = config.temporal_compression_ratio, config.spatial_compression_ratio
    num_frames = 17 if config.is_causal else 16
    latent = (config.latent_channels, -(-num_frames // time), 256 // space, 256 // space)
    facts = [
        (
            "Parameters",
            f"{(encoder + decoder) / 1e6:.1f} M (encoder {encoder / 1e6:.1f} M, decoder {decoder / 1e6:.1f} M)",
        ),
        ("Compression", f"{time}x in time, {space}x{space} in space"),
        (
            f"Latents of {num_frames} frames of 256x256",
            " x ".join(map(str, latent)) + " (channels, time, height, width)",
        ),
    ]
    if config.regularizer == "fsq":
        facts.append(("Codebook", f"levels {config.fsq_levels}, {math.prod(config.fsq_levels)} codes"))
    facts.append(("Input", "RGB in [-1, 1], (batch, frames, 3, height, width)"))
    return {"facts": facts, "config": config, "num_frames": num_frames}


# ------------------------------------------------------------------------------------------------------------ models


def make_config(arguments):
    """`VidTokConfig(**arguments)`."""
    from ..modeling.vidtok.configuration_vidtok import VidTokConfig

    return VidTokConfig(**arguments)


def build(config):
    """The model on the meta device."""
    from ..modeling.vidtok.modeling_vidtok import VidTokModel

    with torch.device("meta"):
        return VidTokModel(config)


COMPONENTS = {"model": lambda config: StateDictMapping()}


def manifest_parts(stem, manifest):
    """Parts of a released file: the model, and the training loss that is left out."""
    release = next((release for release in RELEASES if release.name == stem), None)
    if release is None:
        raise CheckpointError(f"{stem}: no VidTok release has this name")
    parts = []
    names = list(manifest["tensors"])
    for prefix, reason in _TRAINING_PREFIXES.items():
        below = [name for name in names if name.startswith(prefix)]
        if below:
            parts.append(ManifestPart(prefix.rstrip("."), below, left_out=reason))
            names = [name for name in names if not name.startswith(prefix)]
    config = make_config(release.config)
    return [ManifestPart("model", names, build(config), COMPONENTS["model"](config)), *parts]


# -------------------------------------------------------------------------------------------- original configurations

# Module (last component of a `target`) -> (is_causal, version).
_NETWORKS = {
    "model_3dcausal": (True, "1.0"),
    "model_3dcausal_v1_1": (True, "1.1"),
    "model_3dnoncausal": (False, None),
}
_ENGINES = {"autoencoder": (None, "1.0"), "autoencoder_v1_1": (True, "1.1")}
_REGULARIZERS = {"DiagonalGaussianRegularizer": "kl", "FSQRegularizer": "fsq"}

_NETWORK_KEYS = {
    "double_z", "z_channels", "in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks", "dropout", "norm_type",
    "spatial_ds", "spatial_us", "tempo_ds", "tempo_us", "time_downsample_factor", "init_pad_mode", "interpolation_mode",
    "resamp_with_conv", "give_pre_end", "tanh_out", "use_checkpoint", "fix_encoder", "fix_decoder",
}  # fmt: skip
# Only these values exist in our model; every published configuration has them.
_NETWORK_CONSTANTS = {"resamp_with_conv": True, "give_pre_end": False, "tanh_out": False, "init_pad_mode": "replicate"}
# The defaults are those of the original class, not of the published configurations.
_FSQ_WEIGHTS = {
    "entropy_loss_weight": 0.0,
    "entropy_loss_annealing_steps": 0,
    "entropy_loss_annealing_factor": 1.0,
    "commitment_loss_weight": 0.0,
}
_FSQ_CONSTANTS = {
    "dim": None,
    "num_codebooks": 1,
    "keep_num_codebooks_dim": None,
    "scale": None,
    "diversity_gamma": 1.0,
}
_ENGINE_KEYS = {
    "encoder_config", "decoder_config", "regularizer_config",
    # how it was trained or is run, not what it is
    "loss_config", "optimizer_config", "monitor", "mode", "input_key", "ckpt_path", "ignore_keys", "verbose",
    "ema_decay", "lr_g_factor", "compile_model", "is_causal", "use_tiling", "use_overlap", "t_chunk_enc", "t_chunk_dec",
}  # fmt: skip


def _unknown(section, given, known):
    unknown = sorted(set(given) - known)
    if unknown:
        raise CheckpointError(f"original configuration, {section}: unknown keys {', '.join(unknown)}")


def _section(parent, key, where="model.params"):
    section = parent.get(key)
    if not isinstance(section, Mapping) or not isinstance(section.get("target"), str):
        raise CheckpointError(f"original configuration: {where}.{key} with a `target` is missing")
    params = section.get("params") or {}
    if not isinstance(params, Mapping):
        raise CheckpointError(f"original configuration: {where}.{key}.params is not a mapping but {params!r}")
    return section["target"], dict(params)


def _module(target):
    return target.split(".")[-2] if "." in target else target


def config_from_original(original, version=None):
    """The authors' configuration (their yaml, or its `model` section) -> `VidTokConfig`.

    Args:
        original: parsed configuration, see `read_original_config`.
        version: "1.0" or "1.1", needed for a causal model whose class paths do not say which of the two it is (a fork
            with other module names). Never guessed: both have the same tensors, but compute different things.

    Raises:
        CheckpointError: sections or keys that are missing, unknown or contradictory (all are listed).
    """
    model = original.get("model", original)
    if not isinstance(model, Mapping) or not isinstance(model.get("params"), Mapping):
        raise CheckpointError("original configuration: no `model` section with `target` and `params`")
    engine, params = model.get("target") or "", model["params"]
    _unknown("model.params", params, _ENGINE_KEYS)
    encoder_target, encoder = _section(params, "encoder_config")
    decoder_target, decoder = _section(params, "decoder_config")
    regularizer_target, regularizer = _section(params, "regularizer_config")
    _unknown("encoder_config.params", encoder, _NETWORK_KEYS)
    _unknown("decoder_config.params", decoder, _NETWORK_KEYS)
    is_causal, version = _version(engine, params, encoder_target, decoder_target, version)

    for name, network in (("encoder", encoder), ("decoder", decoder)):
        for key, value in _NETWORK_CONSTANTS.items():
            if network.get(key, value) != value:
                raise CheckpointError(
                    f"original configuration: {name} {key} = {network[key]!r}; only {value!r} is supported"
                )
        for key in ("ch", "z_channels", "in_channels", "num_res_blocks", "out_ch"):
            if not isinstance(network.get(key), int):
                raise CheckpointError(f"original configuration: {name}_config.params.{key} must be an integer")

    def both(key, default=None):
        values = encoder.get(key, default), decoder.get(key, default)
        if values[0] != values[1]:
            raise CheckpointError(
                f"original configuration: {key} is {values[0]!r} in the encoder, {values[1]!r} in the decoder"
            )
        return values[0]

    # The defaults are those of the original classes.
    multipliers = list(both("ch_mult", (1, 2, 4, 8)))
    levels = _levels(encoder, decoder, len(multipliers), is_causal)
    name = _REGULARIZERS.get(regularizer_target.split(".")[-1])
    if name is None:
        raise CheckpointError(
            f"original configuration: unknown regularizer {regularizer_target!r}; expected {' or '.join(_REGULARIZERS)}"
        )
    double_z = encoder.get("double_z", True)
    if double_z != (name == "kl"):
        raise CheckpointError(
            f"original configuration: double_z = {double_z} contradicts the regularizer {regularizer_target}"
        )
    interpolation = decoder.get("interpolation_mode", "nearest")
    if interpolation not in ("nearest", "trilinear"):
        raise CheckpointError(f"original configuration: unknown interpolation_mode {interpolation!r}")
    arguments = dict(
        in_channels=encoder["in_channels"],
        out_channels=decoder["out_ch"],
        base_channels=both("ch"),
        channel_multipliers=multipliers,
        num_res_blocks=both("num_res_blocks"),
        latent_channels=both("z_channels"),
        is_causal=is_causal,
        version=version,
        regularizer=name,
        norm_type=both("norm_type", "groupnorm"),
        dropout=both("dropout", 0.0),
        temporal_compression_ratio=both("time_downsample_factor", 4),
        # v1.0 and non-causal models repeat frames whatever this says.
        temporal_interpolation="linear" if version == "1.1" and interpolation == "trilinear" else "nearest",
        **levels,
    )
    arguments.update(_regularizer_arguments(name, regularizer, encoder["z_channels"]), **_loss_arguments(params))
    try:
        return make_config(arguments)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"original configuration: {' '.join(str(error).split())}") from error


def _version(engine, params, encoder_target, decoder_target, version):
    """(is_causal, version) from the class paths, or from the argument where they do not say."""
    if version not in (None, "1.0", "1.1"):
        raise ValueError(f'version must be "1.0" or "1.1", got {version!r}')
    networks = {_module(encoder_target), _module(decoder_target)}
    known = {_NETWORKS[name] for name in networks if name in _NETWORKS}
    if len(known) > 1:
        raise CheckpointError(
            f"original configuration: {encoder_target} and {decoder_target} belong to different versions"
        )
    if known:
        is_causal, said = known.pop()
    else:
        is_causal, said = _ENGINES.get(_module(engine), (None, None))
        classes = f"{encoder_target} {decoder_target}".lower()
        if "noncausal" in classes or params.get("is_causal") is False:
            is_causal, said = False, None
        elif "causal" in classes or params.get("is_causal") is True:
            is_causal = True
        if is_causal is None:
            raise CheckpointError(
                f"original configuration: cannot tell from {encoder_target} whether the model is causal; set "
                "`model.params.is_causal`"
            )
    if not is_causal:
        if version is not None:
            raise CheckpointError(f"version={version!r} was given, but the configuration is of a non-causal model")
        return False, None
    if said and _module(engine) in _ENGINES and _ENGINES[_module(engine)][1] != said:
        raise CheckpointError(f"original configuration: {engine} and {encoder_target} belong to different versions")
    if said and version and said != version:
        raise CheckpointError(
            f"version={version!r} was given, but the configuration is of version {said} ({encoder_target})"
        )
    if not (said or version):
        raise CheckpointError(
            f"original configuration: {encoder_target} does not say which version of the causal code it is. Versions "
            '1.0 and 1.1 have the same tensors but compute different things: pass version="1.0" or version="1.1".'
        )
    return True, said or version


def _levels(encoder, decoder, count, is_causal):
    defaults = {
        "spatial_ds": range(count - 1),
        "tempo_ds": (count - 2, count - 3),
        "spatial_us": range(1, count),
        "tempo_us": (1, 2),
    }

    def get(network, key):
        value = network.get(key) if is_causal else None  # the non-causal classes ignore these keys
        return {level for level in (defaults[key] if value is None else value) if 0 <= level < count}

    spatial_ds, spatial_us = get(encoder, "spatial_ds"), get(decoder, "spatial_us")
    return {
        "spatial_downsample_levels": sorted(spatial_ds),
        "spatial_upsample_levels": sorted(spatial_us),
        # Time is only resampled on levels that resample space; the decoder still owns (unused) tensors on the others.
        "temporal_downsample_levels": sorted(get(encoder, "tempo_ds") & spatial_ds),
        "temporal_upsample_levels": sorted(get(decoder, "tempo_us")),
    }


def _regularizer_arguments(name, params, latent_channels):
    if name == "kl":
        _unknown("regularizer_config.params", params, {"sample"})
        return {"sample_posterior": params["sample"]} if "sample" in params else {}
    _unknown("regularizer_config.params", params, {"levels", *_FSQ_WEIGHTS, *_FSQ_CONSTANTS})
    for key, value in _FSQ_CONSTANTS.items():
        if params.get(key, value) != value:
            raise CheckpointError(f"original configuration: FSQ {key} = {params[key]!r}; only {value!r} is supported")
    levels = list(params.get("levels") or ())
    if len(levels) != latent_channels:
        raise CheckpointError(
            f"original configuration: z_channels is {latent_channels}, but FSQ has the levels {levels}"
        )
    return {"fsq_levels": levels, **{key: params.get(key, default) for key, default in _FSQ_WEIGHTS.items()}}


def _loss_arguments(params):
    """Weights of the regularizer's terms, where the training loss is described."""
    loss = params.get("loss_config")
    weights = (loss.get("params") or {}).get("regularization_weights") if isinstance(loss, Mapping) else None
    if not isinstance(weights, Mapping):
        return {}
    names = {"kl_loss": "kl_loss_weight", "aux_loss": "aux_loss_weight"}
    # A term without a weight is not part of the original's loss.
    return {ours: weights.get(original, 0.0) for original, ours in names.items()}


# -------------------------------------------------------------------------------------------------------- conversion


def convert(checkpoints, output, *, release=None, original_config=None, keep_training_state=False, version=None):
    """Converts a VidTok checkpoint into the folder `output`: model, processor and `conversion.json`.

    Args:
        checkpoints: paths of the file, or of its shards.
        output: an existing, empty folder.
        release, original_config: what the checkpoint is, one of the two (see `config_from_original`).
        keep_training_state: also write everything that only training needs (discriminator, log-variance, LPIPS network,
            moving averages) to `training_state.safetensors`, under the original names.
        version: see `config_from_original`; not allowed with `release`, which has it.

    Returns:
        The `Release` the model card describes.

    Raises:
        CheckpointError: unreadable, missing, unexpected, wrongly shaped or NaN tensors; no training state to keep.
    """
    from ..modeling.vidtok.video_processing_vidtok import VidTokVideoProcessor

    if release is not None:
        if version is not None:
            raise ValueError(f"{release.name} is of a known version; `version` is only for original configurations")
        config = make_config(release.config)
    else:
        config = config_from_original(original_config, version)
        release = _own_release(config, checkpoints)
    other_entries = []
    tensors = read_checkpoints(checkpoints, other_entries)
    # torch.compile wraps modules, which shows in the names.
    tensors = {name.replace("._orig_mod.", "."): value for name, value in tensors.items()}
    training = {name: value for name, value in tensors.items() if name.startswith(tuple(_TRAINING_PREFIXES))}
    weights = {name: value for name, value in tensors.items() if name not in training}
    source = ", ".join(str(path) for path in checkpoints)
    if keep_training_state and not training:
        raise CheckpointError(f"{source}: holds no training state ({', '.join(_TRAINING_PREFIXES)}*) to keep")
    model = load_strict(build(config), COMPONENTS["model"](config).to_hf(weights), f"{source} as {release.name}")
    model.save_pretrained(output)
    VidTokVideoProcessor(**release.processor).save_pretrained(output)
    if keep_training_state:
        save_tensors(training, Path(output) / TRAINING_STATE_FILE)
    write_report(
        output,
        system="vidtok",
        release=release.name if release in RELEASES else None,
        version=config.version,
        checkpoint=[Path(path).name for path in checkpoints],
        converted_tensors=len(weights),
        training_state=TRAINING_STATE_FILE if keep_training_state else None,
        left_out={} if keep_training_state else _count(training),
        left_out_entries=sorted(set(other_entries)),
    )
    return release


def _count(training):
    counts = {prefix + "*": sum(name.startswith(prefix) for name in training) for prefix in _TRAINING_PREFIXES}
    return {prefix: count for prefix, count in counts.items() if count}


def _own_release(config, checkpoints):
    """A release entry for weights that are nobody's release (fine-tuned with the original code)."""
    arguments = {key: getattr(config, key) for key in RELEASES[0].config}
    name = Path(checkpoints[0]).stem
    return Release(
        name=name,
        system="vidtok",
        hub_id="",
        files=[Path(path).name for path in checkpoints],
        config=arguments,
        card="vidtok",
        pipeline_tag="video-to-video",
        license=License(
            "other", "not stated", remark="State the licence of these weights here before publishing them."
        ),
        paper="2412.13061",
        title=f"VidTok, converted from {name}",
        limits=("Converted from a checkpoint that is not one of the published releases; its quality is not known.",),
    )
