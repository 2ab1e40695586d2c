"""Tiny Seer models and pipelines."""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cinetok import SeerDDIMScheduler, SeerPipeline, SeerTextDecomposer, SeerUNet3DConditionModel

from . import ModelCase, PipelineCase

TEXT_DIM, TOKENS, FRAMES, SIZE = 24, 12, 4, 32


def scramble(module, seed=0):
    """Random, non-zero values everywhere (zero-initialised parameters would hide a dropped input)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.copy_(0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return module.eval()


def unet(**changes):
    config = {
        "sample_size": 8,
        "block_out_channels": (64, 64, 64, 64),
        "layers_per_block": 1,
        "num_attention_heads": 4,
        "cross_attention_dim": TEXT_DIM,
    }
    return scramble(SeerUNet3DConditionModel(**(config | changes)))


def image_unet(**changes):
    """A U-Net of Stable Diffusion's kind."""
    config = {
        "sample_size": 8,
        "block_out_channels": (32, 32, 32, 32),
        "layers_per_block": 1,
        "cross_attention_dim": TEXT_DIM,
        "attention_head_dim": 4,
    }
    return scramble(UNet2DConditionModel(**(config | changes)))


def text_decomposer(**changes):
    config = {
        "num_frames": 6,
        "max_length": 16,
        "hidden_size": TEXT_DIM,
        "num_attention_heads": 3,
        "num_layers": 2,
        "cross_attention_dim": TEXT_DIM,
    }
    model = scramble(SeerTextDecomposer(**(config | changes)), seed=1)
    with torch.no_grad():  # large enough that frames differ
        model.pos_embed.normal_(generator=torch.Generator().manual_seed(2))
    return model


def vae():
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (16, 16, 16),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": SIZE,
        "scaling_factor": 0.18215,
    }
    torch.manual_seed(3)
    return AutoencoderKL(**config).eval()


def tokenizer():
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=TOKENS)


def text_encoder():
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=TEXT_DIM,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=TEXT_DIM,
        pad_token_id=1,
        bos_token_id=52,
        eos_token_id=53,
    )
    return scramble(CLIPTextModel(config), seed=4)


def pipeline(**changes):
    config = {"num_frames": FRAMES, "num_cond_frames": 1, "resolution": SIZE}
    pipe = SeerPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=vae(),
        unet=unet(),
        text_decomposer=text_decomposer(),
        scheduler=SeerDDIMScheduler(),
        **(config | changes),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _random(shape, batch_size, seed):
    """Sample i does not depend on the batch size."""
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(batch_size)]
    return torch.stack(draws)


def unet_inputs(batch_size):
    return {
        "sample": _random((4, 3, 16, 8), batch_size, 10),
        "timestep": torch.tensor([250, 700, 1, 999])[:batch_size],
        "encoder_hidden_states": _random((3, 5, TEXT_DIM), batch_size, 20),
        "num_cond_frames": 1,
    }


def text_decomposer_inputs(batch_size):
    return {"encoder_hidden_states": _random((7, TEXT_DIM), batch_size, 30), "num_frames": 4}


def pipeline_inputs(batch_size):
    prompts = ["close book", "open door", "push cup"][:batch_size]
    images = [torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(40 + i)) for i in range(batch_size)]
    return {
        "prompt": prompts,
        "image": images,
        "num_inference_steps": 2,
        "generator": [torch.Generator().manual_seed(50 + i) for i in range(batch_size)],
        "output_type": "pt",
    }


MODELS = [
    ModelCase("seer-unet", unet, unet_inputs, output="sample", has_loss=False),
    ModelCase("seer-text-decomposer", text_decomposer, text_decomposer_inputs, output="hidden_states", has_loss=False),
]

PIPELINES = [
    PipelineCase("seer-one-reference", pipeline, pipeline_inputs, result=lambda output: output.frames),
    PipelineCase(
        "seer-two-references-two-windows",
        lambda: pipeline(num_cond_frames=2),
        lambda batch_size: pipeline_inputs(batch_size) | {"num_frames": 5},
        result=lambda output: output.frames,
    ),
]
