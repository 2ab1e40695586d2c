"""Stable Diffusion 1.x: configurations of its parts, the two-way table between the original single file's names and
those of diffusers and transformers, and readers of both layouts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .checkpoints import load_strict, read_checkpoint, take_prefix
from .mapping import Rename, StateDictMapping, drop_ones, shorten

UNET_CONFIG = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,  # the number of heads, whatever its name
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
}
VAE_CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
TEXT_ENCODER_CONFIG = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
    "pad_token_id": 1,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
TOKENIZER = "openai/clip-vit-large-patch14"

_UNET_PREFIX = "model.diffusion_model."
_VAE_PREFIX = "first_stage_model."
_TEXT_PREFIX = "cond_stage_model.transformer."

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _both(original, hf):
    """Rules for weight and bias of a layer."""
    return [Rename(f"{original}.{kind}", f"{hf}.{kind}") for kind in ("weight", "bias")]


def unet_mapping(config):
    """Names of the U-Net in an original single file (without `model.diffusion_model.`) <-> diffusers' names."""
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    rules = [
        *_both("time_embed.0", "time_embedding.linear_1"),
        *_both("time_embed.2", "time_embedding.linear_2"),
        *_both("input_blocks.0.0", "conv_in"),
        *_both("out.0", "conv_norm_out"),
        *_both("out.2", "conv_out"),
    ]

    def resnet(original, hf):
        rules.extend(rule for a, b in _RESNET.items() for rule in _both(f"{original}.{a}", f"{hf}.{b}"))

    def attention(original, hf):
        rules.append(Rename(f"{original}.**", f"{hf}.**"))

    for level in range(levels):
        first = level * (layers + 1) + 1  # after conv_in; each level ends with a downsampling block
        for layer in range(layers):
            resnet(f"input_blocks.{first + layer}.0", f"down_blocks.{level}.resnets.{layer}")
            if level < levels - 1:
                attention(f"input_blocks.{first + layer}.1", f"down_blocks.{level}.attentions.{layer}")
        if level < levels - 1:
            rules += _both(f"input_blocks.{first + layers}.0.op", f"down_blocks.{level}.downsamplers.0.conv")
    resnet("middle_block.0", "mid_block.resnets.0")
    attention("middle_block.1", "mid_block.attentions.0")
    resnet("middle_block.2", "mid_block.resnets.1")
    for level in range(levels):
        first = level * (layers + 1)
        if level < levels - 1:  # the upsampling follows the last layer: after a resnet alone, or after its attention
            position = 1 if level == 0 else 2
            rules += _both(f"output_blocks.{first + layers}.{position}.conv", f"up_blocks.{level}.upsamplers.0.conv")
        for layer in range(layers + 1):
            resnet(f"output_blocks.{first + layer}.0", f"up_blocks.{level}.resnets.{layer}")
            if level > 0:
                attention(f"output_blocks.{first + layer}.1", f"up_blocks.{level}.attentions.{layer}")
    return StateDictMapping(rules, keep_unmatched=False)


def vae_mapping(config):
    """Names of the autoencoder in an original single file (without `first_stage_model.`) <-> diffusers' names."""
    levels = len(config["block_out_channels"])
    rules = []
    for part, count in (("encoder", config["layers_per_block"]), ("decoder", config["layers_per_block"] + 1)):
        for name, hf in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
            rules += _both(f"{part}.{name}", f"{part}.{hf}")
        for block in (1, 2):
            original, hf = f"{part}.mid.block_{block}", f"{part}.mid_block.resnets.{block - 1}"
            rules += [*_both(f"{original}.nin_shortcut", f"{hf}.conv_shortcut"), Rename(f"{original}.**", f"{hf}.**")]
        attention, hf = f"{part}.mid.attn_1", f"{part}.mid_block.attentions.0"
        rules += _both(f"{attention}.norm", f"{hf}.group_norm")
        for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            rules += [drop_ones(f"{attention}.{a}.weight", f"{hf}.{b}.weight", 2)]
            rules += [Rename(f"{attention}.{a}.bias", f"{hf}.{b}.bias")]
        short, long = ("down", "down_blocks") if part == "encoder" else ("up", "up_blocks")
        for level in range(levels):
            # The original numbers the decoder's levels from the finest to the coarsest.
            ours = level if part == "encoder" else levels - 1 - level
            original, hf = f"{part}.{short}.{level}", f"{part}.{long}.{ours}"
            for layer in range(count):
                rules += _both(f"{original}.block.{layer}.nin_shortcut", f"{hf}.resnets.{layer}.conv_shortcut")
                rules += [Rename(f"{original}.block.{layer}.**", f"{hf}.resnets.{layer}.**")]
            rules += _both(f"{original}.{short}sample.conv", f"{hf}.{short}samplers.0.conv")
    rules += [*_both("quant_conv", "quant_conv"), *_both("post_quant_conv", "post_quant_conv")]
    return StateDictMapping(rules, keep_unmatched=False)


def text_encoder_mapping(config=None):
    """Names of the CLIP text encoder in Stable Diffusion's files <-> those of the installed transformers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    tiny = CLIPTextConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device("meta"):
        has_prefix = any(name.startswith("text_model.") for name in CLIPTextModel(tiny).state_dict())
    # transformers 5 dropped the prefix.
    return StateDictMapping() if has_prefix else StateDictMapping([Rename("text_model.**", "**")])


def old_vae_mapping(config=None):
    """Names of the autoencoder's attention in early diffusers files <-> current ones; all other names are the same."""
    block = "*.mid_block.attentions.0"
    names = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
    return StateDictMapping([Rename(f"{block}.{a}.*", f"{block}.{b}.*") for a, b in names])


@dataclass
class StableDiffusion:
    """The parts of Stable Diffusion 1.x: modules on the CPU, a tokenizer (None where the source has none), and what was
    left out of a single file."""

    text_encoder: Any
    vae: Any
    unet: Any
    tokenizer: Any = None
    left_out: Mapping[str, int] | None = None


def build_unet(config):
    """`UNet2DConditionModel` on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def build_vae(config):
    """`AutoencoderKL` on the meta device."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL(**config)


def build_text_encoder(config):
    """`CLIPTextModel` whose buffers are real and whose weights are still to be loaded."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**config)).eval()


def load_text_encoder(tensors, config, what):
    """The text encoder from tensors of either layout. `position_ids` of old files is a constant and is not loaded."""
    tensors = {name: value for name, value in tensors.items() if not name.endswith("embeddings.position_ids")}
    return load_strict(build_text_encoder(config), text_encoder_mapping().to_hf(tensors), what)


def load_vae(tensors, config, what):
    """The autoencoder from tensors with diffusers' names, early or current."""
    return load_strict(build_vae(config), old_vae_mapping().to_hf(tensors), what).eval()


def is_single_file(names):
    """Whether tensor names are those of an original single file."""
    return any(name.startswith(_UNET_PREFIX) for name in names)


def read_single_file(tensors, path, unet_config=None, vae_config=None, text_encoder_config=None):
    """Stable Diffusion 1.x from the tensors of an original .ckpt or .safetensors file.

    Of a file that holds averaged (`model_ema.*`) weights beside the others, the others are taken.

    Raises:
        CheckpointError: parts missing, or tensors that do not fit the configuration.
    """
    tensors = dict(tensors)
    unet_config, vae_config = unet_config or UNET_CONFIG, vae_config or VAE_CONFIG
    unet = take_prefix(tensors, _UNET_PREFIX)
    vae = take_prefix(tensors, _VAE_PREFIX)
    text = take_prefix(tensors, _TEXT_PREFIX)
    for prefix, part in ((_UNET_PREFIX, unet), (_VAE_PREFIX, vae), (_TEXT_PREFIX, text)):
        if not part:
            raise CheckpointError(f"{path}: holds no tensors below {prefix}; it is no file of Stable Diffusion 1.x")
    left_out = {}
    for name in tensors:  # schedules and averages
        left_out[name.split(".")[0]] = left_out.get(name.split(".")[0], 0) + 1
    return StableDiffusion(
        unet=load_strict(build_unet(unet_config), unet_mapping(unet_config).to_hf(unet), f"{path}: the U-Net").eval(),
        vae=load_strict(build_vae(vae_config), vae_mapping(vae_config).to_hf(vae), f"{path}: the autoencoder").eval(),
        text_encoder=load_text_encoder(text, text_encoder_config or TEXT_ENCODER_CONFIG, f"{path}: the text encoder"),
        left_out=left_out,
    )


def read_folder(path, with_unet=True):
    """Stable Diffusion 1.x from a folder in diffusers' layout.

    Raises:
        CheckpointError: a part is missing or does not fit its configuration.
    """
    path = Path(path)
    text_config = _read_config(path / "text_encoder")
    unet = None
    if with_unet:
        unet = build_unet(_read_config(path / "unet"))
        load_strict(unet, _read_weights(path / "unet"), f"{path / 'unet'}").eval()
    return StableDiffusion(
        unet=unet,
        vae=load_vae(_read_weights(path / "vae"), _read_config(path / "vae"), f"{path / 'vae'}"),
        text_encoder=load_text_encoder(_read_weights(path / "text_encoder"), text_config, f"{path / 'text_encoder'}"),
        tokenizer=read_tokenizer(path / "tokenizer") if (path / "tokenizer").is_dir() else None,
    )


def read_tokenizer(path=None):
    """The CLIP tokenizer of a folder; without one, that of the Hub (or its local cache).

    Raises:
        CheckpointError: there is none.
    """
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(TOKENIZER if path is None else path)
    except Exception as error:
        reason = str(error).split("\n")[0]
        if path is None:
            raise CheckpointError(
                f"a single file has no tokenizer, and {TOKENIZER} could not be read from the Hub ({reason}); give the "
                "folder of a CLIP tokenizer (vocab.json and merges.txt) as one more checkpoint"
            ) from error
        raise CheckpointError(f"{path}: not a readable CLIP tokenizer ({reason})") from error


def _read_config(folder):
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; expected a Stable Diffusion 1.x folder in diffusers' layout")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    not_settings = {"architectures", "model_type", "transformers_version", "torch_dtype", "dtype"}
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in not_settings}


def _read_weights(folder):
    # A folder may hold the same weights several times (float16, .bin beside .safetensors): the plain name is taken.
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
        for suffix in (".safetensors", ".bin"):
            if (folder / f"{stem}{suffix}").is_file():
                return read_checkpoint(folder / f"{stem}{suffix}")
    if any(folder.glob("*.index.json")):
        return read_checkpoint(folder)
    found = shorten([p.name for p in folder.iterdir()]) if folder.is_dir() else "nothing"
    raise CheckpointError(f"{folder}: no diffusion_pytorch_model or model file (.safetensors or .bin); found {found}")
