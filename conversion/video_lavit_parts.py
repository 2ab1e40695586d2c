"""Video-LaVIT's networks other than the language model: configurations, names, and how the released files fill them.

Every network keeps the authors' names, so most mappings are identities; what differs is how the files split and
prefix them.
"""

import json
from pathlib import Path

import torch

from ..errors import CheckpointError
from .checkpoints import load_strict, read_checkpoint, take_prefix
from .mapping import ManifestPart, Rename, StateDictMapping

# Sizes of the released networks, where they are not our classes' defaults.
KEYFRAME_UNET = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_VAE_BLOCKS = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
KEYFRAME_VAE = {
    **_VAE_BLOCKS,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
VIDEO_VAE = {**_VAE_BLOCKS, "sample_size": 768, "scaling_factor": 0.18215, "force_upcast": True}
VIDEO_UNET = {"sample_size": 96, "num_frames": 25}
_MERGER_MLP_RATIO = 4.3637
_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
# SDXL base's numbers under DDIM: what the released code makes of a scheduler file that is not ancestral Euler.
KEYFRAME_SCHEDULER = {
    **_DIFFUSION,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
}
VIDEO_SCHEDULER = {
    **_DIFFUSION,
    "prediction_type": "v_prediction",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
    "sigma_min": 0.002,
    "sigma_max": 700.0,
}


# --------------------------------------------------------------------------------- the original's own configurations


def visual_tokenizer_arguments(original):
    """Our configuration's arguments from the original's `{"eva": {"vision_cfg": ...}, "layers", "heads", ...}`."""
    eva = original["eva"]
    arguments = _eva_arguments(eva)
    arguments.update(
        merger_num_hidden_layers=original["layers"],
        merger_num_attention_heads=original["heads"],
        # Written into the original's code, whatever the encoder's ratio.
        merger_intermediate_size=int(arguments["hidden_size"] * _MERGER_MLP_RATIO),
        codebook_size=original["n_code"],
        codebook_dim=original["code_dim"],
    )
    if original.get("llm_embed_dim") is not None:
        arguments["projection_dim"] = original["llm_embed_dim"]
    return arguments


def _eva_arguments(eva):
    vision = eva["vision_cfg"]
    return {
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "hidden_size": vision["width"],
        "num_hidden_layers": vision["layers"],
        "num_attention_heads": vision["width"] // vision["head_width"],
        "intermediate_size": int(vision["width"] * vision["mlp_ratio"]),
        "clip_embedding_size": eva["embed_dim"],
    }


def motion_tokenizer_arguments(original):
    """Our configuration's arguments from the original's; its `img_size` is (width, height)."""
    width, height = original["img_size"]
    return {
        "num_frames": original["num_frames"],
        "height": height,
        "width": width,
        "hidden_size": original["dim"],
        "num_attention_heads": original["num_heads"],
        "codebook_size": original["n_code"],
        "codebook_dim": original["code_dim"],
    }


def keyframe_decoder_arguments(original):
    """Our arguments from the original's; the three sizes it has in its code come under `hard_coded_in_original`."""
    coded = original.get("hard_coded_in_original", {})
    width = original["embed_dim"]
    return {
        "in_channels": original["in_chans"],
        "num_queries": (original["img_size"] // original["patch_size"]) ** 2,
        "hidden_size": width,
        "num_layers": original["depth"],
        "num_attention_heads": original["num_heads"],
        "intermediate_size": int(width * original["mlp_ratio"]),
        "feature_dim": coded.get("decoder_out_dim", 1408),
        "prompt_dim": coded.get("unet_dim_1", 768),
        "pooled_dim": coded.get("unet_dim_2", 1280),
    }


def motion_encoder_arguments(original):
    """Our arguments from the original's."""
    return {
        "hidden_size": original["dim"],
        "num_layers": original["depth"],
        "num_attention_heads": original["num_heads"],
        "out_channels": original["out_channel"],
        "num_frames": original.get("num_frames", 24) if original.get("add_temp_pos") else None,
    }


# ------------------------------------------------------------------------------------------------------------- building
# Without arguments a component has its released size; what a given configuration leaves out are the class's defaults.


def build(component, arguments=None):
    """A component on the meta device with the given (default: the released) configuration."""
    with torch.device("meta"):
        return _BUILDERS[component](**(arguments or {}))


def _visual_tokenizer(**arguments):
    from ..modeling.video_lavit.configuration_video_lavit import VideoLavitVisualTokenizerConfig
    from ..modeling.video_lavit.modeling_visual_tokenizer import VideoLavitVisualTokenizer

    return VideoLavitVisualTokenizer(VideoLavitVisualTokenizerConfig(**arguments)).eval()


def _motion_tokenizer(**arguments):
    from ..modeling.video_lavit.configuration_video_lavit import VideoLavitMotionTokenizerConfig
    from ..modeling.video_lavit.modeling_motion_tokenizer import VideoLavitMotionTokenizer

    return VideoLavitMotionTokenizer(VideoLavitMotionTokenizerConfig(**arguments)).eval()


def _keyframe_decoder(**arguments):
    from ..modeling.video_lavit.keyframe_decoder import VideoLavitKeyframeDecoder

    return VideoLavitKeyframeDecoder(**arguments).eval()


def _motion_encoder(**arguments):
    from ..modeling.video_lavit.motion_encoder import VideoLavitMotionEncoder

    return VideoLavitMotionEncoder(**arguments).eval()


def _unet(**arguments):
    from ..modeling.video_lavit.unet_video_lavit import VideoLavitUNetSpatioTemporalConditionModel

    return VideoLavitUNetSpatioTemporalConditionModel(**(arguments or VIDEO_UNET)).eval()


def _vae(**arguments):
    from diffusers import AutoencoderKLTemporalDecoder

    return AutoencoderKLTemporalDecoder(**(arguments or VIDEO_VAE)).eval()


def _keyframe_unet(**arguments):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**(arguments or KEYFRAME_UNET)).eval()


def _keyframe_vae(**arguments):
    from diffusers import AutoencoderKL

    return AutoencoderKL(**(arguments or KEYFRAME_VAE)).eval()


_BUILDERS = {
    "visual_tokenizer": _visual_tokenizer,
    "motion_tokenizer": _motion_tokenizer,
    "keyframe_decoder": _keyframe_decoder,
    "keyframe_unet": _keyframe_unet,
    "keyframe_vae": _keyframe_vae,
    "unet": _unet,
    "motion_encoder": _motion_encoder,
    "vae": _vae,
}

# ---------------------------------------------------------------------------------------------------------------- names

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def prefixed(prefix):
    """Names of a file that holds one part of a network: `prefix` is what our names have in front."""
    return StateDictMapping((Rename("**", f"{prefix}**"),), keep_unmatched=False)


def _identity(config=None):
    return StateDictMapping()


COMPONENTS_PARTS = dict.fromkeys(_BUILDERS, _identity)
COMPONENTS_PARTS["eva_encoder"] = lambda config=None: prefixed("encoder.")
COMPONENTS_PARTS["prefixed_unet"] = lambda config=None: StateDictMapping(
    (Rename("unet.**", "**"),), keep_unmatched=False
)
COMPONENTS_PARTS["prefixed_motion_encoder"] = lambda config=None: StateDictMapping(
    (Rename("motion_encoder.**", "**"),), keep_unmatched=False
)


def _only(module, *kept):
    """The part of a (meta) network that one file fills."""
    for name in [name for name, _ in module.named_children() if name not in kept]:
        setattr(module, name, None)
    return module


def manifest_parts_parts(stem, manifest):
    """`ManifestPart`s of a file of these networks, or None if the file is of the language model."""
    tensors = list(manifest["tensors"])
    if stem == "visual_tokenizer__eva_vitg_psz14":
        return [
            ManifestPart(
                "visual_tokenizer.encoder",
                tensors,
                _only(build("visual_tokenizer"), "encoder"),
                COMPONENTS_PARTS["eva_encoder"](),
            )
        ]
    if stem == "visual_tokenizer__tokenizer_encoder":
        rest = _only(build("visual_tokenizer"), "token_predictor", "causal_encoder", "quantize", "encode_task_layer")
        return [ManifestPart("visual_tokenizer", tensors, rest)]
    if stem == "language_model__visual_weight":
        module = _only(build("visual_tokenizer", {"projection_dim": 4096}), "causal_encoder", "vit_proj")
        return [ManifestPart("visual_tokenizer (merger and projection)", tensors, module)]
    if stem in ("video_3d_unet", "video_detokenizer__unet__diffusion_pytorch_model"):
        encoder = [name for name in tensors if name.startswith("motion_encoder.")]
        unet = [name for name in tensors if not name.startswith("motion_encoder.")]
        names = "prefixed_unet" if stem == "video_3d_unet" else "unet"
        return [
            ManifestPart("unet", unet, build("unet"), COMPONENTS_PARTS[names]()),
            ManifestPart(
                "motion_encoder", encoder, build("motion_encoder"), COMPONENTS_PARTS["prefixed_motion_encoder"]()
            ),
        ]
    single = {
        "visual_tokenizer__highres_tokenizer_decoder": "keyframe_decoder",
        "motion_tokenizer": "motion_tokenizer",
        "image_detokenizer__unet__diffusion_pytorch_model": "keyframe_unet",
        "image_detokenizer__vae__diffusion_pytorch_model": "keyframe_vae",
        "video_detokenizer__vae__diffusion_pytorch_model": "vae",
    }.get(stem)
    return [ManifestPart(single, tensors, build(single))] if single else None


# ------------------------------------------------------------------------------------------------- the authors' folder


# Names that several of the folders use: such a file is only recognised with its folders' names.
_COMMON_NAMES = ("diffusion_pytorch_model", "pytorch_model", "config.json", "scheduler_config.json")


class OriginalFolder:
    """The authors' Hub folder, or the single files of it that were given, read one network at a time.

    Args:
        checkpoints: paths: the folder, sub-folders of it, or files.
    """

    def __init__(self, checkpoints):
        self.paths = [Path(path) for path in checkpoints]
        for path in self.paths:
            if not path.exists():
                raise CheckpointError(f"{path}: no such checkpoint file or folder")

    def find(self, relative, required=True):
        """The file or folder `relative` of the Hub folder among what was given; None if absent and not required."""
        wanted = Path(relative)
        for path in self.paths:
            # `path` may be the whole folder, a sub-folder on the way, or the thing itself.
            for skip in range(len(wanted.parts)):
                candidate = path.joinpath(*wanted.parts[skip:])
                on_the_way = skip == 0 or path.parts[-skip:] == wanted.parts[:skip]
                if path.is_dir() and on_the_way and candidate.exists():
                    return candidate
            named = path.name == wanted.name and not path.name.startswith(_COMMON_NAMES)
            if path.parts[-len(wanted.parts) :] == wanted.parts or (path.is_file() and named):
                return path
        if required:
            given = ", ".join(str(path) for path in self.paths)
            raise CheckpointError(f"{given}: {relative} is missing; give the authors' folder, or this file as well")
        return None

    def _weights(self, folder, required=True):
        for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
            found = self.find(f"{folder}/{name}", required=False)
            if found is not None:
                return found
        return self.find(f"{folder}/diffusion_pytorch_model.bin", required=required)

    def _config(self, folder):
        """The arguments in the folder's own config.json, {} if it was not given."""
        path = self.find(f"{folder}/config.json", required=False)
        if path is None:
            return {}
        try:
            return {k: v for k, v in json.loads(path.read_text()).items() if not k.startswith("_")}
        except ValueError as error:
            raise CheckpointError(f"{path}: not valid JSON ({error})") from error

    def visual_tokenizer(self, arguments=None):
        """The visual tokenizer from its two files. A projection in the second file is accepted and left out: generation
        does not use it, and the released listing does not say whether it is there."""
        encoder_file = self.find("visual_tokenizer/eva_vitg_psz14.bin")
        rest_file = self.find("visual_tokenizer/tokenizer_encoder.bin")
        tensors = COMPONENTS_PARTS["eva_encoder"]().to_hf(read_checkpoint(encoder_file))
        rest = read_checkpoint(rest_file)
        take_prefix(rest, "vit_proj.")
        return load_strict(build("visual_tokenizer", arguments), {**tensors, **rest}, f"{encoder_file}, {rest_file}")

    def motion_tokenizer(self, arguments=None):
        path = self.find("motion_tokenizer.bin")
        return load_strict(build("motion_tokenizer", arguments), read_checkpoint(path), str(path))

    def keyframe_decoder(self, arguments=None):
        path = self.find("visual_tokenizer/highres_tokenizer_decoder.bin")
        return load_strict(build("keyframe_decoder", arguments), read_checkpoint(path), str(path))

    def keyframe_unet(self, arguments=None):
        return self._diffusers("keyframe_unet", "image_detokenizer/unet", arguments)

    def keyframe_vae(self, arguments=None):
        return self._diffusers("keyframe_vae", "image_detokenizer/vae", arguments)

    def vae(self, arguments=None):
        return self._diffusers("vae", "video_detokenizer/vae", arguments)

    def _diffusers(self, component, folder, arguments):
        path = self._weights(folder)
        module = build(component, arguments or self._config(folder))
        return load_strict(module, _current_vae_names(read_checkpoint(path)), str(path))

    def video_unet(self, reconstruction=False, arguments=None, encoder_arguments=None):
        """(U-Net, motion encoder): of `video_3d_unet.bin` for reconstruction from raw motion, else of
        `video_detokenizer/unet`. Both prefix spellings, `unet.X` and `X`, are accepted in either."""
        path = self.find("video_3d_unet.bin") if reconstruction else self._weights("video_detokenizer/unet")
        tensors = read_checkpoint(path)
        encoder = take_prefix(tensors, "motion_encoder.")
        tensors = {name.removeprefix("unet."): value for name, value in tensors.items()}
        unet = build("unet", arguments or self._config("video_detokenizer/unet"))
        return (
            load_strict(unet, tensors, f"{path} (U-Net)"),
            load_strict(build("motion_encoder", encoder_arguments), encoder, f"{path} (motion encoder)"),
        )

    def keyframe_scheduler(self):
        """Ancestral Euler if the authors' file says so, otherwise DDIM over the file's numbers, as their code does."""
        from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler

        config = self._scheduler_config("image_detokenizer/scheduler")
        if config is None:
            return DDIMScheduler(**KEYFRAME_SCHEDULER)
        if config.get("_class_name") == "EulerAncestralDiscreteScheduler":
            return EulerAncestralDiscreteScheduler.from_config(config)
        return DDIMScheduler.from_config(config)

    def scheduler(self):
        from diffusers import EulerDiscreteScheduler

        config = self._scheduler_config("video_detokenizer/scheduler")
        return EulerDiscreteScheduler.from_config(config or VIDEO_SCHEDULER)

    def _scheduler_config(self, folder):
        path = self.find(f"{folder}/scheduler_config.json", required=False)
        if path is None:
            return None
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise CheckpointError(f"{path}: not valid JSON ({error})") from error


def _current_vae_names(tensors):
    """Attention of VAEs saved before diffusers 0.12 under today's names; anything else unchanged."""
    renamed = {}
    for name, value in tensors.items():
        parts = name.split(".")
        if (
            "attentions" in parts
            and len(parts) > 2
            and parts[-2] in _OLD_ATTENTION
            and "transformer_blocks" not in parts
        ):
            name = ".".join([*parts[:-2], _OLD_ATTENTION[parts[-2]], parts[-1]])
            value = value.reshape(value.shape[:2]) if value.ndim == 4 else value
        renamed[name] = value
    return renamed
