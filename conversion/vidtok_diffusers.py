"""VidTok configurations to and from diffusers' `AutoencoderVidTok`.

The state dicts have the same names and shapes, so weights need no conversion. That class computes version 1.1 for
causal models (and has no field that says so) and the non-causal model; it cannot represent version 1.0, group norm, or
FSQ levels other than 8.
"""

from collections.abc import Mapping

from ..errors import CheckpointError


def config_from_diffusers(config, version=None):
    """`AutoencoderVidTok.config` (or its dict) -> `VidTokConfig`.

    Args:
        config: the diffusers configuration.
        version: of causal models (ignored for others). By default "1.1", which is what the diffusers class computes;
            "1.0" if the weights are of the first release (they load into that class without a complaint, and give
            wrong output there).

    Raises:
        ValueError: `version` is neither of them. CheckpointError: the configuration is contradictory.
    """
    from ..modeling.vidtok.configuration_vidtok import VidTokConfig

    given = dict(config) if isinstance(config, Mapping) else dict(vars(config))
    defaults = _defaults()
    get = lambda key: given.get(key, defaults[key])  # noqa: E731
    is_causal, regularizer = get("is_causal"), get("regularizer")
    if version not in (None, "1.0", "1.1"):
        raise ValueError(f'version must be "1.0" or "1.1", got {version!r}')
    if regularizer not in ("kl", "fsq") or get("double_z") != (regularizer == "kl"):
        raise CheckpointError(
            f"diffusers configuration: regularizer {regularizer!r} contradicts double_z = {get('double_z')}"
        )
    if is_causal and version is None:
        version = "1.1"
    multipliers, channels = list(get("ch_mult")), get("z_channels")
    count = len(multipliers)

    def levels(key, default):
        value = default if get(key) is None else get(key)
        return {level for level in value if 0 <= level < count}

    spatial_down = levels("spatial_ds", range(count - 1))
    spatial_up = levels("spatial_us", range(1, count))
    temporal_down = levels("tempo_ds", (count - 2, count - 3)) & spatial_down
    temporal_up = levels("tempo_us", (1, 2))  # the class owns tensors, if unused, on levels that keep their size too
    doublings = len(temporal_up & spatial_up)
    if len(temporal_down) != doublings or len(spatial_down) != len(spatial_up):
        raise CheckpointError(
            f"diffusers configuration: the encoder halves space {len(spatial_down)} and time {len(temporal_down)} "
            f"times, the decoder doubles them {len(spatial_up)} and {doublings} times"
        )
    return VidTokConfig(
        in_channels=get("in_channels"),
        out_channels=get("out_channels"),
        base_channels=get("ch"),
        channel_multipliers=multipliers,
        num_res_blocks=get("num_res_blocks"),
        latent_channels=channels,
        is_causal=is_causal,
        version=version,
        regularizer=regularizer,
        fsq_levels=[8] * channels if regularizer == "fsq" else None,
        norm_type="layernorm",
        dropout=get("dropout"),
        spatial_downsample_levels=sorted(spatial_down),
        spatial_upsample_levels=sorted(spatial_up),
        temporal_downsample_levels=sorted(temporal_down),
        temporal_upsample_levels=sorted(temporal_up),
        temporal_compression_ratio=2 ** len(temporal_down),
        temporal_interpolation="linear" if version == "1.1" else "nearest",
    )


def config_to_diffusers(config):
    """`VidTokConfig` -> keyword arguments of `AutoencoderVidTok`.

    Raises:
        CheckpointError: the diffusers class cannot represent the model (all reasons are listed).
    """
    problems = []
    if config.version == "1.0":
        problems.append("version 1.0 of the causal code (it would load, and compute version 1.1: wrong output)")
    if config.norm_type != "layernorm":
        problems.append(f"norm_type {config.norm_type!r}")
    if config.version == "1.1" and config.temporal_interpolation != "linear":
        problems.append(f"temporal_interpolation {config.temporal_interpolation!r}")
    if config.regularizer == "fsq" and set(config.fsq_levels) != {8}:
        problems.append(f"FSQ levels {list(config.fsq_levels)}; it only has levels of 8")
    if config.temporal_compression_ratio != 2 ** len(config.temporal_downsample_levels):
        problems.append(f"temporal_compression_ratio {config.temporal_compression_ratio} beside its levels")
    if problems:
        raise CheckpointError(f"diffusers' AutoencoderVidTok cannot represent this model: {'; '.join(problems)}")
    is_fsq = config.regularizer == "fsq"
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "ch": config.base_channels,
        "ch_mult": list(config.channel_multipliers),
        "z_channels": config.latent_channels,
        "double_z": not is_fsq,
        "num_res_blocks": config.num_res_blocks,
        "spatial_ds": list(config.spatial_downsample_levels),
        "spatial_us": list(config.spatial_upsample_levels),
        "tempo_ds": list(config.temporal_downsample_levels),
        "tempo_us": list(config.temporal_upsample_levels),
        "dropout": config.dropout,
        "regularizer": config.regularizer,
        "codebook_size": 8**config.latent_channels if is_fsq else _defaults()["codebook_size"],
        "is_causal": config.is_causal,
    }


def _defaults():
    import inspect

    from diffusers import AutoencoderVidTok

    parameters = inspect.signature(AutoencoderVidTok.__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}
