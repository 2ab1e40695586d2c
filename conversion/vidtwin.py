"""VidTwin: the authors' release, their configuration files, and the conversion of their checkpoints.

Our modules keep the authors' names. Position tables, which the original stores, are rebuilt from the configuration; the
mapping checks them on the way in and writes them on the way back. What else the files hold (`loss.*`: learned
log-variance, LPIPS network and discriminator) only serves continued training.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import CheckpointError
from .checkpoints import load_strict, read_checkpoints, save_tensors, write_report
from .mapping import Convert, ManifestPart, StateDictMapping
from .releases import License, Metric, Release

TRAINING_STATE_FILE = "training_state.safetensors"
_TRAINING_PREFIXES = {
    "loss.": "log-variance, LPIPS network and discriminator of the training loss; `keep_training_state` keeps them",
    "model_ema.": "exponential moving average of training; no published configuration uses it",
}
# Stored tables may have been rounded to half precision by whoever re-saved them, but not be other tables.
_TABLE_TOLERANCE = 1e-2

# ---------------------------------------------------------------------------------------------------------- releases

_README = "README of microsoft/VidTok (https://github.com/microsoft/VidTok)"

RELEASES = (
    Release(
        name="vidtwin_structure_7_7_8_dynamics_7_8",
        system="vidtwin",
        hub_id="microsoft/vidtwin",
        files=("checkpoints/vidtwin_structure_7_7_8_dynamics_7_8.ckpt",),
        config={
            "num_frames": 16,
            "height": 224,
            "width": 224,
            "num_channels": 3,
            "patch_size": 16,
            "hidden_size": 768,
            "num_encoder_layers": 16,
            "num_decoder_layers": 16,
            "num_encoder_attention_heads": 12,
            "num_decoder_attention_heads": 12,
            "mlp_ratio": 4.0,
            "temporal_causal": True,
            "num_query_tokens": 16,
            "query_hidden_size": 64,
            "num_query_layers": 6,
            "num_query_attention_heads": 8,
            "query_intermediate_size": 768,
            "structure_channels": 8,
            "structure_base_channels": 128,
            "cont_num_blocks": 1,
            "dynamics_channels": 8,
            "downsample_motion": True,
            "motion_num_blocks": 1,
            "kl_loss_weight": 0.001,
        },
        card="vidtwin",
        pipeline_tag="video-to-video",
        license=License("mit", link="https://github.com/microsoft/VidTok/blob/main/LICENSE"),
        paper="2412.17726",
        title="VidTwin, structure 7x7x8, dynamics 7x8",
        size="1.3 GB",
        metrics=(Metric("PSNR", 28.14, "MCL-JCV", "16x224x224, 25 fps", _README),),
        limits=(
            "Frames are exactly 224x224 and windows exactly 16 frames: the size is part of the architecture. Longer "
            "clips are cut into windows that know nothing of each other, so a seam can show every 16 frames.",
            "The published number was measured with a random sample of the posterior; `encode` gives its mean unless "
            "`sample_posterior=True`.",
            "The authors ran it with half-precision matrix products under CUDA; in float32 outputs differ from theirs "
            "in the third digit.",
            "Trained on 16-frame clips of natural video at 8 frames per second; text, faces and small or fast objects "
            "lose detail first.",
        ),
        processor={"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "num_frames": 16},
    ),
)


def card_facts(release):
    """Computed facts for the model card. Compression is counted from the configuration, never quoted."""
    config = make_config(release.config)
    model = build(config)

    def millions(module):
        return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f} M"

    compression = config.compression()
    shapes = {name: " x ".join(map(str, shape)) for name, shape in config.latent_shapes._asdict().items()}
    facts = [
        (
            "Parameters",
            f"{millions(model)} (encoder {millions(model.encoder)}, decoder {millions(model.decoder)})",
        ),
        (
            "Input",
            f"RGB in [-1, 1], (batch, {config.num_frames}, {config.num_channels}, {config.height}, {config.width})",
        ),
        ("Structure latents", f"{shapes['structure']} (queries, rows, columns, channels)"),
        ("Dynamics latents", f"x: {shapes['dynamics_x']}, y: {shapes['dynamics_y']} (channels, frames, length)"),
        (
            "Compression",
            f"{compression['latent_values']} latent numbers for {compression['input_values']} input values: "
            f"{100 * compression['latent_fraction']:.2f} %, 1 : {compression['ratio']:.0f}",
        ),
    ]
    return {"facts": facts, "config": config, "compression": compression}


# ------------------------------------------------------------------------------------------------------------ models


def make_config(arguments):
    """`VidTwinConfig(**arguments)`."""
    from ..modeling.vidtwin.configuration_vidtwin import VidTwinConfig

    return VidTwinConfig(**arguments)


def build(config):
    """The model on the meta device."""
    from ..modeling.vidtwin.modeling_vidtwin import VidTwinModel

    with torch.device("meta"):
        return VidTwinModel(config)


def _position_tables(config):
    from ..modeling.vidtwin.modeling_vidtwin import sinusoidal_table, spatial_position_table

    spatial = spatial_position_table(*config.grid_size, config.hidden_size)
    return spatial, sinusoidal_table(config.num_frames, config.hidden_size)[None]


def _rebuilt_tables(config, side):
    """Drops the stored position tables of a trunk, and restores them.

    The bias of the patch embedding goes along unchanged: it ties the group to a tensor that both formats have.
    """
    bias = f"{side}.x_embedder.proj.bias"

    def forward(tensors):
        for name, stored, table in zip(("pos_embed", "pos_embed_temporal"), tensors, _position_tables(config)):
            if tuple(stored.shape) != tuple(table.shape):
                raise CheckpointError(
                    f"{side}.{name} has shape {tuple(stored.shape)}, the configuration's is {tuple(table.shape)}: the "
                    "checkpoint was made for another input size, patch size or width"
                )
            if not stored.is_meta and not torch.allclose(stored.double(), table, rtol=0, atol=_TABLE_TOLERANCE):
                raise CheckpointError(
                    f"{side}.{name} is not the sinusoidal table of its shape; learned tables are not supported"
                )
        return [tensors[2]]

    def backward(tensors):
        return [*(table.to(tensors[0].device) for table in _position_tables(config)), tensors[0]]

    return Convert((f"{side}.pos_embed", f"{side}.pos_embed_temporal", bias), (bias,), forward, backward)


COMPONENTS = {
    "model": lambda config: StateDictMapping([_rebuilt_tables(config, side) for side in ("encoder", "decoder")])
}


def manifest_parts(stem, manifest):
    """Parts of a released file: the model, and the training loss that is left out."""
    release = next((release for release in RELEASES if release.name == stem), None)
    if release is None:
        raise CheckpointError(f"{stem}: no VidTwin release has this name")
    config = make_config(release.config)
    names = list(manifest["tensors"])
    weights = [name for name in names if not name.startswith(tuple(_TRAINING_PREFIXES))]
    parts = [ManifestPart("model", weights, build(config), COMPONENTS["model"](config))]
    for prefix, reason in _TRAINING_PREFIXES.items():
        if below := [name for name in names if name.startswith(prefix)]:
            parts.append(ManifestPart(prefix.rstrip("."), below, left_out=reason))
    return parts


# -------------------------------------------------------------------------------------------- original configurations

_MODEL_CLASS = "VidAutoEncoderQformerCompactSymVidVAE"
# Required keys, in the original too; its classes have defaults for all others, which are not those of the release.
_REQUIRED_TRUNK_KEYS = {"input_size", "patch_size", "hidden_size"}
_REQUIRED_QFORMER_KEYS = {"num_query_tokens", "query_hidden_size"}
_TRUNK_DEFAULTS = {"in_channels": 3, "depth": 12, "mlp_ratio": 4.0, "temporal_casual": True, "enable_flashattn": True}
_ENCODER_DEFAULTS = {**_TRUNK_DEFAULTS, "num_heads": 8}
_DECODER_DEFAULTS = {**_TRUNK_DEFAULTS, "num_heads": 16}
_QFORMER_DEFAULTS = {
    "encoder_hidden_size": 768, "num_hidden_layers": 6, "intermediate_size": 768, "num_attention_heads": 8,
}  # fmt: skip
_MODEL_DEFAULTS = {
    "expect_ch": 4, "init_ch": 128, "cont_num_blocks": 2, "d_dim": 16, "downsample_motion": False,
    "motion_num_blocks": 2,
}  # fmt: skip
# Options that are supported at the value that leaves the model as it is.
_NEUTRAL_TRUNK = {
    "space_scale": 1, "time_scale": 1, "no_temporal": False, "pred_sigma": False, "temporal_group": False,
}  # fmt: skip
_NEUTRAL_MODEL = {"shuffle_content": False}
# Without influence on what the weights compute: training alone, other implementations, or never read by the original.
_INERT_TRUNK_KEYS = {"drop_path", "freeze", "enable_layernorm_kernel", "no_temporal_pos_emb", "group_size"}
_INERT_MODEL_KEYS = {
    "loss_config", "optimizer_config", "lr_scheduler_config", "lr_scheduler_config_d", "lr_scheduler_config_g",
    "base_learning_rate", "monitor", "mode", "input_key", "ckpt_path", "ckpt_path2", "ignore_keys", "verbose",
    "ema_decay", "lr_g_factor", "compile_model", "weight_decay", "trainable_ae_params", "trainable_disc_params",
    "ae_optimizer_args", "disc_optimizer_args", "partial_content_motion", "temporal_down_dim",
}  # fmt: skip
_MODEL_SECTIONS = {"encoder_config", "decoder_config", "temporal_qformer_config", "regularizer_config"}


def _problem(text):
    return CheckpointError(f"original configuration: {text}")


def _params(parent, key, required, defaults, neutral=(), inert=()):
    """`params` of a section, with the original's defaults for what is left out and without what has no influence."""
    section = parent.get(key)
    params = section.get("params", {}) if isinstance(section, Mapping) else None
    if not isinstance(params, Mapping):
        raise _problem(f"model.params.{key} with `params` is missing")
    if missing := sorted(required - set(params)):
        raise _problem(f"{key}: missing keys {', '.join(missing)}")
    return _with_defaults(key, params, required, defaults, neutral, inert)


def _with_defaults(what, params, required, defaults, neutral, inert):
    known = {*required, *defaults}
    if unknown := sorted(set(params) - known - set(neutral) - set(inert)):
        raise _problem(f"{what}: unknown keys {', '.join(unknown)}; known ones are {', '.join(sorted(known))}")
    for name in neutral:
        if params.get(name, neutral[name]) != neutral[name]:
            raise _problem(f"{what}: {name} is {params[name]!r}; only {neutral[name]!r} is supported")
    return {**defaults, **{name: value for name, value in params.items() if name in known}}


def config_from_original(original):
    """The authors' configuration (their yaml, or its `model` section) -> `VidTwinConfig`.

    What the configuration leaves out is what the original class makes of it, not what the release has. Options that do
    not change what the weights compute are accepted and dropped.

    Whether latents are sampled (`regularizer_config.params.sample`) is not part of our configuration: `encode` and the
    model take it as an argument, and training always samples.

    Raises:
        CheckpointError: sections or keys that are missing, unknown or contradictory; options that are not supported.
    """
    model = original.get("model", original)
    if not isinstance(model, Mapping) or not isinstance(model.get("params"), Mapping):
        raise _problem("no `model` section with `target` and `params`")
    target, params = str(model.get("target", "")), model["params"]
    if target.split(".")[-1] != _MODEL_CLASS:
        raise _problem(f"model.target is {target!r}; only {_MODEL_CLASS} is supported, the class of the release")
    options = _with_defaults(
        "model.params", params, _MODEL_SECTIONS, _MODEL_DEFAULTS, _NEUTRAL_MODEL, _INERT_MODEL_KEYS
    )
    regularizer = params.get("regularizer_config")
    kind = str(regularizer.get("target", "")) if isinstance(regularizer, Mapping) else "missing"
    if kind.split(".")[-1] != "DiagonalGaussianRegularizer":
        raise _problem(f"regularizer_config is {kind}; only DiagonalGaussianRegularizer is supported")

    trunk_keys = _NEUTRAL_TRUNK, _INERT_TRUNK_KEYS
    encoder = _params(params, "encoder_config", _REQUIRED_TRUNK_KEYS, _ENCODER_DEFAULTS, *trunk_keys)
    decoder = _params(params, "decoder_config", _REQUIRED_TRUNK_KEYS, _DECODER_DEFAULTS, *trunk_keys)
    qformer = _params(params, "temporal_qformer_config", _REQUIRED_QFORMER_KEYS, _QFORMER_DEFAULTS)
    for name, trunk in (("encoder_config", encoder), ("decoder_config", decoder)):
        # Without flash attention the original ignores the causal flag, so it does not say what the weights expect.
        if trunk["temporal_casual"] and not trunk["enable_flashattn"]:
            raise _problem(
                f"{name} asks for causal attention and switches flash attention off, which makes the original ignore "
                "the former; remove enable_flashattn and set temporal_casual to what the weights were trained with"
            )

    def both(key):
        values = [trunk[key] for trunk in (encoder, decoder)]
        if values[0] != values[1]:
            raise _problem(f"{key} is {values[0]!r} in the encoder, {values[1]!r} in the decoder")
        return values[0]

    sizes = {"input_size": both("input_size"), "patch_size": both("patch_size")}
    for key, value in sizes.items():
        if not isinstance(value, (list, tuple)) or len(value) != 3 or not all(isinstance(v, int) for v in value):
            raise _problem(f"{key} must be [frames, height, width], got {value!r}")
    num_frames, height, width = sizes["input_size"]
    patch_frames, patch_height, patch_width = sizes["patch_size"]
    if patch_frames != 1:
        raise _problem(f"patches span {patch_frames} frames; only 1 is supported")
    hidden_size = both("hidden_size")
    if qformer["encoder_hidden_size"] != hidden_size:
        raise _problem(
            f"the Q-Former's encoder_hidden_size {qformer['encoder_hidden_size']} is not the trunk's hidden_size "
            f"{hidden_size}"
        )
    arguments = {
        "num_frames": num_frames,
        "height": height,
        "width": width,
        "num_channels": both("in_channels"),
        "patch_size": patch_height if patch_height == patch_width else [patch_height, patch_width],
        "hidden_size": hidden_size,
        "num_encoder_layers": encoder["depth"],
        "num_decoder_layers": decoder["depth"],
        "num_encoder_attention_heads": encoder["num_heads"],
        "num_decoder_attention_heads": decoder["num_heads"],
        "mlp_ratio": both("mlp_ratio"),
        "temporal_causal": both("temporal_casual"),
        "num_query_tokens": qformer["num_query_tokens"],
        "query_hidden_size": qformer["query_hidden_size"],
        "num_query_layers": qformer["num_hidden_layers"],
        "num_query_attention_heads": qformer["num_attention_heads"],
        "query_intermediate_size": qformer["intermediate_size"],
        "structure_channels": options["expect_ch"],
        "structure_base_channels": options["init_ch"],
        "cont_num_blocks": options["cont_num_blocks"],
        "dynamics_channels": options["d_dim"],
        "downsample_motion": options["downsample_motion"],
        "motion_num_blocks": options["motion_num_blocks"],
        "kl_loss_weight": _kl_loss_weight(params),
    }
    try:
        return make_config(arguments)
    except Exception as error:  # @strict has its own error classes for wrong types
        raise _problem(str(error)) from error


def _kl_loss_weight(params):
    loss = params.get("loss_config")
    weights = (loss.get("params") or {}).get("regularization_weights") if isinstance(loss, Mapping) else None
    # A term without a weight is not part of the original's loss.
    return weights.get("kl_loss", 0.0) if isinstance(weights, Mapping) else 0.001


# -------------------------------------------------------------------------------------------------------- conversion


def convert(checkpoints, output, *, release=None, original_config=None, keep_training_state=False):
    """Converts a VidTwin checkpoint into the folder `output`: model, processor and `conversion.json`.

    Args:
        checkpoints: paths of the file, or of its shards.
        output: an existing, empty folder.
        release, original_config: what the checkpoint is, one of the two (see `config_from_original`).
        keep_training_state: also write everything that only training needs (discriminator, log-variance, LPIPS network)
            to `training_state.safetensors`, under the original names.

    Returns:
        The `Release` the model card describes.

    Raises:
        CheckpointError: unreadable, missing, unexpected, wrongly shaped or NaN tensors; no training state to keep.
    """
    from ..modeling.vidtwin.video_processing_vidtwin import VidTwinVideoProcessor

    if release is not None:
        config = make_config(release.config)
    else:
        config = config_from_original(original_config)
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
    # The original's own loading code turns every tensor into float64; the parameters are float32.
    weights = {
        name: value.float() if value.dtype == torch.float64 and "pos_embed" not in name else value
        for name, value in weights.items()
    }
    what = f"{source} as {release.name}"
    try:
        renamed = COMPONENTS["model"](config).to_hf(weights)
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from error
    model = load_strict(build(config), renamed, what)
    model.save_pretrained(output)
    VidTwinVideoProcessor(**release.processor).save_pretrained(output)
    if keep_training_state:
        save_tensors(training, Path(output) / TRAINING_STATE_FILE)
    counts = {prefix + "*": sum(name.startswith(prefix) for name in training) for prefix in _TRAINING_PREFIXES}
    write_report(
        output,
        system="vidtwin",
        release=release.name if release in RELEASES else None,
        checkpoint=[Path(path).name for path in checkpoints],
        converted_tensors=len(weights),
        training_state=TRAINING_STATE_FILE if keep_training_state else None,
        left_out={} if keep_training_state else {prefix: count for prefix, count in counts.items() if count},
        left_out_entries=sorted(set(other_entries)),
    )
    return release


def _own_release(config, checkpoints):
    """A release entry for weights that are nobody's release (trained with the original code)."""
    name = Path(checkpoints[0]).stem
    return Release(
        name=name,
        system="vidtwin",
        hub_id="",
        files=[Path(path).name for path in checkpoints],
        config={key: getattr(config, key) for key in RELEASES[0].config},
        card="vidtwin",
        pipeline_tag="video-to-video",
        license=License(
            "other", "not stated", remark="State the licence of these weights here before publishing them."
        ),
        paper="2412.17726",
        title=f"VidTwin, converted from {name}",
        limits=(
            "Converted from a checkpoint that is not one of the published releases; its quality is not known.",
            f"Frames are exactly {config.height}x{config.width} and windows exactly {config.num_frames} frames: the "
            "size is part of the architecture.",
        ),
        processor={
            "size": {"shortest_edge": min(config.height, config.width)},
            "crop_size": {"height": config.height, "width": config.width},
            "num_frames": config.num_frames,
        },
    )
