"""Divot (arXiv:2412.04432): releases, converters and name tables of the tokenizer, the de-tokenizer and Divot-LLM.

The tokenizer file does not hold the image encoder (it comes from the LAION CLIP file), and the de-tokenizer files do
not hold the tokenizer, which the de-tokenizer needs for its unconditional condition. So a tokenizer is converted from
two files and a de-tokenizer from three; which file is which is read off the tensor names.
"""

import warnings

import torch

from ..errors import CheckpointError
from .checkpoints import load_strict, read_checkpoint, take_prefix, write_report
from .divot_llm import COMPONENTS_LLM, RELEASES_LLM, card_facts_llm, convert_llm, manifest_parts_llm
from .divot_names import (
    clip_vision_mapping,
    prefixed,
    resampler_mapping,
    tokenizer_mapping,
    unet_mapping,
    vae_mapping,
)
from .mapping import ManifestPart, shorten
from .releases import License, Release

CLIP_FILE = "open_clip_pytorch_model.bin"
CLIP_HUB_ID = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

# Sizes that the original writes into its code instead of its configuration files.
_TEMPORAL_HEADS, _JOINT_HEADS, _RESAMPLER_HEADS, _RESAMPLER_HEAD_DIM = 12, 8, 16, 64
_MLP_RATIO = 4

# Options of the original U-Net that make another network, as its code has them where a configuration is silent.
_UNET_OPTIONS = {
    "conv_resample": True,
    "dims": 2,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "use_linear": False,
    "temporal_conv": False,
    "tempspatial_aware": False,
    "temporal_attention": True,
    "use_relative_position": True,
    "use_causal_attention": False,
    "addition_attention": False,
    "temporal_selfatt_only": True,
    "image_cross_attention": False,
    "image_cross_attention_scale_learnable": False,
}

# Keys of the original's configurations. What is not listed is an error, because it might change what is computed.
_SECTIONS = {
    "unet": ("diffusion_model", "unet_config"),
    "vae": ("first_stage_model", "first_stage_config"),
    "resampler": ("image_proj_model", "image_proj_stage_config"),
    "tokenizer": ("video_tokenizer", "video_tokenizer_config"),
}
_SCHEDULE_KEYS = {"beta_schedule", "timesteps", "linear_start", "linear_end", "cosine_s", "given_betas"} | {
    "parameterization",
    "zero_terminal_snr",
    "rescale_betas_zero_snr",
}
_SAMPLING = {
    "ddim_steps": ("num_inference_steps", 50),
    "ddim_eta": ("eta", 1.0),
    "unconditional_guidance_scale": ("guidance_scale", 7.5),
    "guidance_rescale": ("guidance_rescale", 0.7),
}
_KEYS = {
    "de-tokenizer": {name for names in _SECTIONS.values() for name in names}
    | {"num_frames", "image_size", "fs", "timestep_spacing", "v_posterior", "channels", "scale_factor"}
    | {*_SAMPLING, *_SCHEDULE_KEYS, "pretrained_model_path", "sampling"},
    "U-Net": {"in_channels", "out_channels", "model_channels", "num_res_blocks", "attention_resolutions", "dropout"}
    | {"channel_mult", "context_dim", "num_heads", "num_head_channels", "transformer_depth", "default_fs"}
    | {"fs_condition", "temporal_length", "use_checkpoint", "use_fp16", *_UNET_OPTIONS},
    "VAE": {"embed_dim", "ddconfig", "lossconfig", "monitor", "ckpt_path", "ignore_keys", "image_key", "test"}
    | {"colorize_nlabels", "logdir", "input_dim", "test_args"},
    "VAE's ddconfig": {"double_z", "z_channels", "resolution", "in_channels", "out_ch", "ch", "ch_mult", "dropout"}
    | {"num_res_blocks", "attn_resolutions", "resamp_with_conv", "tanh_out", "use_linear_attn", "attn_type"}
    | {"give_pre_end"},
    "resampler": {"dim", "depth", "dim_head", "heads", "num_queries", "embedding_dim", "output_dim", "norm_out"}
    | {"ff_mult"},
    "tokenizer": {"num_frames", "input_dim", "hidden_size", "width", "temporal_depth", "pool_size", "use_norm"}
    | {"transformer_depth", "resampler_depth", "st_num_tokens", "down_num_tokens", "resampler_dim"}
    | {"pretrained_model_path", "clip"},
}

LICENSE = License(
    id="apache-2.0",
    link="https://github.com/TencentARC/Divot",
    remark="The authors add that the released models are for academic purposes only.",
)

_TOKENIZER_LIMITS = (
    "One clip is two seconds (16 frames at 8 fps, of which 5 are looked at) at 256x256; the number of frames is fixed.",
    "The features are made for generation and understanding by a language model, not for exact reconstruction: faces, "
    "text and small objects change.",
)

RELEASES = (
    Release(
        name="divot_tokenizer",
        system="divot",
        hub_id="TencentARC/Divot",
        files=("Divot_tokenizer_detokenizer/Divot_tokenizer.bin", CLIP_FILE),
        config={},
        card="divot_tokenizer",
        pipeline_tag="feature-extraction",
        license=LICENSE,
        paper="2412.04432",
        title="Divot tokenizer: 2-second clips to 64 continuous features",
        size="805 MB + 3.9 GB (CLIP)",
        limits=_TOKENIZER_LIMITS,
        notes=(f"{CLIP_FILE} comes from {CLIP_HUB_ID}; only its vision tower is used.",),
        base_models=(CLIP_HUB_ID,),
        processor={},
    ),
    *(
        Release(
            name=f"divot_detokenizer_stage{stage}",
            system="divot",
            hub_id="TencentARC/Divot",
            files=(
                f"Divot_tokenizer_detokenizer/Divot_detokenizer_stage{stage}.bin",
                "Divot_tokenizer_detokenizer/Divot_tokenizer.bin",
                CLIP_FILE,
            ),
            config={},
            card="divot_detokenizer",
            pipeline_tag="video-to-video",
            license=LICENSE,
            paper="2412.04432",
            title=f"Divot de-tokenizer, stage {stage}: {purpose}",
            size="6.08 GB + 805 MB + 3.9 GB (CLIP)",
            limits=_TOKENIZER_LIMITS,
            notes=(f"{CLIP_FILE} comes from {CLIP_HUB_ID}; only its vision tower is used.", note),
            base_models=(CLIP_HUB_ID,),
            processor={},
        )
        for stage, purpose, note in (
            (1, "features of real clips back to video", "For features sampled by Divot-LLM use stage 2."),
            (2, "features sampled by a language model to video", "For reconstructing real clips use stage 1."),
        )
    ),
    *RELEASES_LLM,
)

COMPONENTS = {
    "tokenizer": tokenizer_mapping,
    "clip": clip_vision_mapping,
    "unet": unet_mapping,
    "resampler": resampler_mapping,
    "vae": vae_mapping,
    **COMPONENTS_LLM,
}


# ---- original configurations -------------------------------------------------------------------------------------


def _arguments(section):
    """Keyword arguments of a configured class: {"kwargs"}, {"params"} or, beside `_target_`, the section itself."""
    for key in ("kwargs", "params", "init_args"):
        if isinstance(section.get(key), dict):
            return dict(section[key])
    return {k: v for k, v in section.items() if k not in ("_target_", "target", "class")}


def _check_keys(section, what):
    """Raises CheckpointError for keys the original's class does not have."""
    unknown = sorted(set(_arguments(section)) - _KEYS[what])
    if unknown:
        raise CheckpointError(f"the {what} configuration has unknown keys: {', '.join(unknown)}")


def _need(arguments, name, what):
    if name not in arguments:
        raise CheckpointError(f"the {what} configuration lacks {name!r}")
    return arguments[name]


def _expect(arguments, what, **values):
    """Options that the released networks fix and this implementation therefore does not offer."""
    wrong = {k: arguments[k] for k, value in values.items() if k in arguments and arguments[k] != value}
    if wrong:
        expected = {k: values[k] for k in wrong}
        raise CheckpointError(f"the {what} configuration asks for {wrong}; Divot's networks have {expected}")


def tokenizer_config(section):
    """Original tokenizer configuration -> arguments of `DivotTokenizerConfig`."""
    arguments = _arguments(section)
    clip = section.get("clip")
    result = {
        "num_frames": arguments.get("num_frames", 5),
        "temporal_hidden_size": _need(arguments, "width", "tokenizer"),
        "temporal_num_layers": _need(arguments, "temporal_depth", "tokenizer"),
        "temporal_num_heads": _TEMPORAL_HEADS,
        "hidden_size": _need(arguments, "hidden_size", "tokenizer"),
        "num_hidden_layers": _need(arguments, "transformer_depth", "tokenizer"),
        "num_attention_heads": _JOINT_HEADS,
        "pool_size": arguments.get("pool_size", 5),
        "normalize_pooled": arguments.get("use_norm", True),
        "resampler_num_layers": _need(arguments, "resampler_depth", "tokenizer"),
        "resampler_num_heads": _RESAMPLER_HEADS,
        "resampler_head_dim": _RESAMPLER_HEAD_DIM,
        "num_features": _need(arguments, "down_num_tokens", "tokenizer"),
        "feature_dim": _need(arguments, "resampler_dim", "tokenizer"),
    }
    _expect(arguments, "tokenizer", st_num_tokens=result["num_frames"] * result["pool_size"] ** 2)
    if clip is not None:
        vision = clip["vision_cfg"]
        result["vision_config"] = {
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", _MLP_RATIO)),
            "projection_dim": clip["embed_dim"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_act": "quick_gelu" if clip.get("quick_gelu") else "gelu",
            "layer_norm_eps": 1e-5,
        }
        _expect(arguments, "tokenizer", input_dim=vision["width"])
    return result


def unet_config(section):
    """Original U-Net configuration -> arguments of `DivotUNet3DConditionModel`."""
    arguments = _arguments(section)
    _expect(
        _UNET_OPTIONS | arguments,
        "U-Net",
        use_linear=True,
        temporal_conv=True,
        temporal_attention=True,
        temporal_selfatt_only=True,
        use_relative_position=False,
        use_causal_attention=False,
        addition_attention=True,
        image_cross_attention=True,
        image_cross_attention_scale_learnable=True,
        dims=2,
        conv_resample=True,
        use_scale_shift_norm=False,
        resblock_updown=False,
        tempspatial_aware=False,
    )
    width, factors = _need(arguments, "model_channels", "U-Net"), list(_need(arguments, "channel_mult", "U-Net"))
    resolutions = list(_need(arguments, "attention_resolutions", "U-Net"))
    return {
        "in_channels": arguments.get("in_channels", 4),
        "out_channels": arguments.get("out_channels", 4),
        "block_out_channels": [width * factor for factor in factors],
        "layers_per_block": _need(arguments, "num_res_blocks", "U-Net"),
        "attention_levels": [2**level in resolutions for level in range(len(factors))],
        "attention_head_dim": _need(arguments, "num_head_channels", "U-Net"),
        "transformer_layers_per_block": arguments.get("transformer_depth", 1),
        "cross_attention_dim": _need(arguments, "context_dim", "U-Net"),
        "fs_conditioning": arguments.get("fs_condition", False),
        "default_fs": arguments.get("default_fs", 4),
        "dropout": arguments.get("dropout", 0.0),
    }


def resampler_config(section):
    """Original configuration of the de-tokenizer's resampler -> arguments of `DivotFeatureResampler`."""
    arguments = _arguments(section)
    return {
        "feature_dim": _need(arguments, "embedding_dim", "resampler"),
        "dim": _need(arguments, "dim", "resampler"),
        "cross_attention_dim": _need(arguments, "output_dim", "resampler"),
        "num_queries": _need(arguments, "num_queries", "resampler"),
        "num_layers": _need(arguments, "depth", "resampler"),
        "num_heads": arguments.get("heads", _RESAMPLER_HEADS),
        "head_dim": arguments.get("dim_head", _RESAMPLER_HEAD_DIM),
        "feed_forward_ratio": arguments.get("ff_mult", _MLP_RATIO),
        "normalize_output": arguments.get("norm_out", True),
    }


def vae_config(section=None):
    """Original VAE configuration -> arguments of diffusers' `AutoencoderKL`; without one, the released VAE."""
    if section is None:
        widths, layers, latents, channels = [128, 256, 512, 512], 2, 4, (3, 3)
    else:
        arguments = _arguments(section)
        sizes = _need(arguments, "ddconfig", "VAE")
        _expect(
            sizes,
            "VAE",
            double_z=True,
            attn_resolutions=[],
            resamp_with_conv=True,
            tanh_out=False,
            give_pre_end=False,
            use_linear_attn=False,
            attn_type="vanilla",
        )
        _expect(arguments, "VAE", embed_dim=sizes["z_channels"])
        widths = [sizes["ch"] * factor for factor in sizes["ch_mult"]]
        layers, latents = sizes["num_res_blocks"], sizes["z_channels"]
        channels = sizes["in_channels"], sizes["out_ch"]
    return {
        "in_channels": channels[0],
        "out_channels": channels[1],
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": widths,
        "layers_per_block": layers,
        "latent_channels": latents,
        "norm_num_groups": 32,
        "sample_size": 256 if section is None else sizes.get("resolution", 256),
        "scaling_factor": 0.18215,
    }


def scheduler_config(section=None):
    """Original schedule (the de-tokenizer's own arguments) -> arguments of `DivotDDIMScheduler`."""
    arguments = _arguments(section) if section else {}
    _expect(arguments, "noise schedule", beta_schedule="linear", parameterization="v")
    return {
        "num_train_timesteps": arguments.get("timesteps", 1000),
        "beta_start": arguments.get("linear_start", 0.00085),
        "beta_end": arguments.get("linear_end", 0.012),
        "rescale_betas_zero_snr": arguments.get("zero_terminal_snr", arguments.get("rescale_betas_zero_snr", True)),
    }


def _detokenizer_sections(config):
    """The parts of a de-tokenizer configuration, whatever the file calls them."""
    root = config.get("model", config)
    arguments = {**_arguments(root), **{k: v for k, v in root.items() if isinstance(v, dict)}}
    _check_keys(arguments, "de-tokenizer")
    found = {}
    for part, keys in _SECTIONS.items():
        present = [arguments[key] for key in keys if isinstance(arguments.get(key), dict)]
        if not present and part != "tokenizer":  # the authors' files describe it separately
            raise CheckpointError(f"the de-tokenizer configuration has none of the sections {', '.join(keys)}")
        found[part] = present[0] if present else None
    for part, what in (("unet", "U-Net"), ("vae", "VAE"), ("resampler", "resampler"), ("tokenizer", "tokenizer")):
        if found[part] is not None:
            _check_keys(found[part], what)
    _check_keys(_need(_arguments(found["vae"]), "ddconfig", "VAE"), "VAE's ddconfig")
    return found


def _detokenizer_parts(config):
    """A de-tokenizer configuration -> (arguments of its parts by name, settings of the sampler in the pipeline's words).

    The sampler's settings are arguments of a call, so the pipeline does not store them.
    """
    sections = _detokenizer_sections(config)
    root = _arguments(config.get("model", config))
    if _arguments(sections["vae"])["ddconfig"]["ch_mult"][0] != 1:
        raise CheckpointError("the VAE's first level must have the width of its first convolution (ch_mult[0] = 1)")
    parts = {
        "tokenizer": tokenizer_config(sections["tokenizer"]) if sections["tokenizer"] else {},
        "unet": unet_config(sections["unet"]),
        "vae": vae_config(sections["vae"]),
        "resampler": resampler_config(sections["resampler"]),
        "scheduler": scheduler_config(root) | {"timestep_spacing": root.get("timestep_spacing", "uniform")},
        "processor": {"size": root.get("image_size", 256)},
    }
    size, frames = parts["processor"]["size"], parts["tokenizer"].get("num_frames", 5)
    _expect(root, "de-tokenizer", num_frames=frames, channels=parts["unet"]["in_channels"])
    if size % 8:
        raise CheckpointError(f"the de-tokenizer configuration has image_size={size}, which does not divide by 8")
    # The original passes its own `fs` (3 unless configured) to the U-Net, whose default is never used.
    parts["unet"] |= {"sample_size": size // 8, "default_fs": root.get("fs", 3)}
    parts["vae"]["scaling_factor"] = root.get("scale_factor", 0.18215)
    sampling = {ours: root[name] for name, (ours, usual) in _SAMPLING.items() if root.get(name, usual) != usual}
    return parts, sampling


# ---- files -------------------------------------------------------------------------------------------------------


def drop_unused_tokenizer_tensors(tensors):
    """Removes what a tokenizer file may hold and the tokenizer does not use: CLIP's text tower and image projection."""
    return {
        name: value
        for name, value in tensors.items()
        if not name.startswith("vit_model.")
        or (name.startswith("vit_model.model.visual.") and name != "vit_model.model.visual.proj")
    }


def _drop_unused_detokenizer_tensors(tensors):
    """Removes noise tables, losses, weight averages, and the "model." that fine-tuned checkpoints may have in front of
    the names of the U-Net."""
    for name in [n for n in tensors if n.startswith("model.diffusion_model.")]:
        tensors[name.removeprefix("model.")] = tensors.pop(name)
    tables = ("betas", "alphas_cumprod", "sqrt_", "log_one_minus", "posterior_", "scale_arr", "logvar")
    return {
        name: value
        for name, value in tensors.items()
        if not name.startswith(("loss.", "model_ema.")) and ("." in name or not name.startswith(tables))
    }


_UNUSED = {
    "tokenizer": drop_unused_tokenizer_tensors,
    "clip": lambda tensors: {n: v for n, v in tensors.items() if n.startswith("visual.") and n != "visual.proj"},
    "detokenizer": _drop_unused_detokenizer_tensors,
}


def _read_files(paths):
    """Sorts checkpoint files by what they hold.

    Returns:
        {"tokenizer", "clip", "detokenizer"} -> tensors in float32, and a report of what was left out of each file.
    """
    found, left_out = {}, {}
    for path in paths:
        entries = []
        tensors = read_checkpoint(path, entries)
        if any(n.startswith(("diffusion_model.", "model.diffusion_model.")) for n in tensors):
            kind = "detokenizer"
        elif any(n.startswith("temporal_encoder.") for n in tensors):
            kind = "tokenizer"
        elif any(n.startswith("visual.") for n in tensors):
            kind = "clip"
        else:
            raise CheckpointError(
                f"{path}: neither a Divot tokenizer, a Divot de-tokenizer nor an open_clip checkpoint"
            )
        if kind in found:
            raise CheckpointError(f"{path}: a second {kind} checkpoint; give each once")
        used = _UNUSED[kind](dict(tensors))
        left_out[kind] = {"tensors": len(tensors) - len(used), "entries": sorted(set(entries))}
        found[kind] = {n: value.float() if value.is_floating_point() else value for n, value in used.items()}
    return found, left_out


def _build_tokenizer(files, config):
    from ..modeling.divot.configuration_divot import DivotTokenizerConfig
    from ..modeling.divot.modeling_divot_tokenizer import DivotTokenizerModel

    if "tokenizer" not in files:
        raise CheckpointError("the tokenizer's file (Divot_tokenizer.bin) is missing among the checkpoints")
    tensors = files.pop("tokenizer")
    if "clip" in files:
        # The LAION file is what the image encoder was frozen at; left-overs in the tokenizer file give way.
        tensors = {n: v for n, v in tensors.items() if not n.startswith("vit_model.")}
        tensors |= {f"vit_model.model.{name}": value for name, value in files.pop("clip").items()}
    elif not any(name.startswith("vit_model.model.visual.") for name in tensors):
        raise CheckpointError(
            f"the tokenizer's file does not hold its image encoder; also give {CLIP_FILE} of {CLIP_HUB_ID}"
        )
    mapped = tokenizer_mapping().to_hf(tensors)
    with torch.device("meta"):
        model = DivotTokenizerModel(DivotTokenizerConfig(**config))
    return load_strict(model, mapped, "Divot tokenizer").eval()


def _build_detokenizer(tensors, unet, vae, resampler):
    from diffusers import AutoencoderKL

    from ..modeling.divot.resampler_divot import DivotFeatureResampler
    from ..modeling.divot.unet_divot import DivotUNet3DConditionModel

    parts = (
        ("diffusion_model.", DivotUNet3DConditionModel, unet, unet_mapping),
        ("first_stage_model.", AutoencoderKL, vae, vae_mapping),
        ("image_proj_model.", DivotFeatureResampler, resampler, resampler_mapping),
    )
    built = []
    for prefix, cls, config, mapping in parts:
        with torch.device("meta"):
            module = cls(**config)
        part = take_prefix(tensors, prefix)
        if not part:
            raise CheckpointError(f"the de-tokenizer checkpoint holds no tensors below {prefix}")
        built.append(load_strict(module, mapping(config).to_hf(part), f"de-tokenizer ({prefix[:-1]})").eval())
    if tensors:
        raise CheckpointError(f"the de-tokenizer checkpoint holds tensors nothing takes: {shorten(tensors)}")
    return built


def convert(checkpoints, output, *, release=None, original_config=None, keep_training_state=False, **options):
    """Writes a tokenizer (model and video processor), a de-tokenizer (a `DivotReconstructionPipeline`) or a Divot-LLM
    folder, depending on the release or on the configuration and what the checkpoints hold."""
    if _is_llm(release, original_config):
        return convert_llm(
            checkpoints,
            output,
            release=release,
            original_config=original_config,
            keep_training_state=keep_training_state,
            **options,
        )
    if options:
        raise ValueError(f"unknown options for a Divot tokenizer or de-tokenizer: {', '.join(sorted(options))}")
    from ..modeling.divot.scheduling_divot import DivotDDIMScheduler
    from ..modeling.divot.video_processing_divot import DivotVideoProcessor
    from ..pipelines.divot.pipeline_divot_reconstruction import DivotReconstructionPipeline

    if keep_training_state:
        raise ValueError("keep_training_state: Divot checkpoints hold no training state")
    files, left_out = _read_files(checkpoints)
    wants_pipeline = release.card == "divot_detokenizer" if release is not None else "detokenizer" in files
    if wants_pipeline != ("detokenizer" in files):
        needed = ", ".join(release.files)
        raise CheckpointError(f"the checkpoints do not make release {release.name}; it is made of {needed}")
    parts, sampling = {}, {}
    if original_config and wants_pipeline:
        parts, sampling = _detokenizer_parts(original_config)
    processor = DivotVideoProcessor(**(release.processor if release is not None else parts.get("processor", {})))
    if not wants_pipeline:
        if original_config:
            _check_keys(original_config, "tokenizer")
        model = _build_tokenizer(files, tokenizer_config(original_config) if original_config else {})
        model.save_pretrained(output)
        processor.save_pretrained(output)
    else:
        tokenizer = _build_tokenizer(files, parts.get("tokenizer", {}))
        unet, vae, resampler = _build_detokenizer(
            files.pop("detokenizer"),
            resampler=parts.get("resampler", {}) | {"num_features": tokenizer.config.num_features},
            unet=parts.get("unet", {}),
            vae=parts.get("vae", vae_config()),
        )
        DivotReconstructionPipeline(
            video_processor=processor,
            video_tokenizer=tokenizer,
            resampler=resampler,
            unet=unet,
            vae=vae,
            scheduler=DivotDDIMScheduler(**parts.get("scheduler", {})),
        ).save_pretrained(output)
    if sampling:
        settings = ", ".join(f"{name}={value}" for name, value in sampling.items())
        warnings.warn(f"the sampler's settings are not stored; pass {settings} to the pipeline's call", stacklevel=2)
    write_report(output, source=sorted(path.name for path in checkpoints), left_out=left_out, sampling=sampling)
    if release is not None:
        from ..model_cards import write_card

        write_card(output, release)
    return output


def _is_llm(release, original_config):
    if release is not None:
        return any(release.name == known.name for known in RELEASES_LLM)
    return not {"model_type", "llm", "input_resampler", "output_resampler", "num_gmm_kernel"}.isdisjoint(
        original_config
    )


# ---- manifests and cards -----------------------------------------------------------------------------------------


def _meta(build):
    with torch.device("meta"):
        return build()


def manifest_parts(stem, manifest):
    """Parts of a released file, each with the module it fills (see `ManifestPart`)."""
    from diffusers import AutoencoderKL

    from ..modeling.divot.configuration_divot import DivotTokenizerConfig
    from ..modeling.divot.modeling_divot_tokenizer import DivotTokenizerModel
    from ..modeling.divot.resampler_divot import DivotFeatureResampler
    from ..modeling.divot.unet_divot import DivotUNet3DConditionModel

    names = list(manifest["tensors"])
    if any(n.startswith("diffusion_model.") for n in names):
        parts = []
        for prefix, module, mapping in (
            ("diffusion_model.", _meta(DivotUNet3DConditionModel), unet_mapping),
            ("first_stage_model.", _meta(lambda: AutoencoderKL(**vae_config())), vae_mapping),
            ("image_proj_model.", _meta(DivotFeatureResampler), resampler_mapping),
        ):
            table = prefixed(mapping(module.config), prefix)
            parts.append(ManifestPart(prefix[:-1], [n for n in names if n.startswith(prefix)], module, table))
        return parts
    if not any(n.startswith(("temporal_encoder.", "visual.")) for n in names):
        return manifest_parts_llm(stem, manifest)
    model = _meta(lambda: DivotTokenizerModel(DivotTokenizerConfig()))
    vision = model.vision_model
    if any(n.startswith("visual.") for n in names):
        used = [n for n in names if n.startswith("visual.") and n != "visual.proj"]
        return [
            ManifestPart("vision tower", used, torch.nn.ModuleDict({"vision_model": vision}), clip_vision_mapping()),
            ManifestPart("text tower", [n for n in names if n not in used], left_out="only the vision tower is used"),
        ]
    del model.vision_model
    used = [n for n in names if not n.startswith("vit_model.")]
    return [
        ManifestPart("tokenizer", used, model, tokenizer_mapping()),
        ManifestPart("CLIP left-overs", [n for n in names if n not in used], left_out="never read by the tokenizer"),
    ]


def card_facts(release):
    """Template variables of a release's card, counted on the meta device."""
    if any(release.name == known.name for known in RELEASES_LLM):
        return card_facts_llm(release)
    from ..modeling.divot.configuration_divot import DivotTokenizerConfig
    from ..modeling.divot.modeling_divot_tokenizer import DivotTokenizerModel

    def millions(module):
        return f"{sum(p.numel() for p in module.parameters()) / 1e6:,.1f} M"

    tokenizer = _meta(lambda: DivotTokenizerModel(DivotTokenizerConfig()))
    facts = [
        ("input", "5 frames of a 2-second clip, 256x256 pixels, [-1, 1]"),
        ("features", "64 per clip, 256 wide, continuous"),
        ("parameters, tokenizer", f"{millions(tokenizer)}, of which {millions(tokenizer.vision_model)} frozen CLIP"),
    ]
    if release.card == "divot_detokenizer":
        from diffusers import AutoencoderKL

        from ..modeling.divot.resampler_divot import DivotFeatureResampler
        from ..modeling.divot.unet_divot import DivotUNet3DConditionModel

        facts += [
            ("output", "16 frames at 8 fps, 256x256 pixels"),
            ("parameters, U-Net", millions(_meta(DivotUNet3DConditionModel))),
            ("parameters, resampler", millions(_meta(DivotFeatureResampler))),
            ("parameters, VAE", millions(_meta(lambda: AutoencoderKL(**vae_config())))),
            ("sampling", "DDIM, 50 steps, eta 1, guidance 7.5 rescaled by 0.7, v prediction, zero terminal SNR"),
        ]
    return {"facts": facts}
