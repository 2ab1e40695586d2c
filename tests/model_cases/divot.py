"""Tiny models and pipelines of Divot."""

import torch
from diffusers import AutoencoderKL

from cinetok import (
    DivotDDIMScheduler,
    DivotFeatureResampler,
    DivotReconstructionPipeline,
    DivotTokenizerConfig,
    DivotTokenizerModel,
    DivotUNet3DConditionModel,
    DivotVideoProcessor,
)

from . import ModelCase, PipelineCase, divot_llm

FEATURES, FEATURE_DIM, CONTEXT_DIM = 8, 12, 20


def scramble(module, seed=0):
    """Random, non-zero values everywhere (zero-initialised parameters would hide a dropped input)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            parameter.data = 0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            parameter.data = noise / parameter[0].numel() ** 0.5
    return module.eval()


def tokenizer(**changes):
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 8,
        "hidden_act": "gelu",
        "projection_dim": 8,
    }
    config = {
        "vision_config": vision,
        "temporal_hidden_size": 24,
        "temporal_num_layers": 1,
        "temporal_num_heads": 4,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "resampler_num_layers": 1,
        "resampler_num_heads": 2,
        "resampler_head_dim": 8,
        "num_features": FEATURES,
        "feature_dim": FEATURE_DIM,
    }
    return scramble(DivotTokenizerModel(DivotTokenizerConfig(**(config | changes))))


def unet(**changes):
    config = {
        "sample_size": 8,
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "attention_levels": [True, False],
        "attention_head_dim": 8,
        "transformer_in_num_heads": 2,
        "cross_attention_dim": CONTEXT_DIM,
        "num_text_context_tokens": 4,
        "num_image_frame_tokens": 3,
        "norm_num_groups": 8,
    }
    return scramble(DivotUNet3DConditionModel(**(config | changes)), seed=1)


def resampler():
    model = DivotFeatureResampler(
        feature_dim=FEATURE_DIM,
        num_features=FEATURES,
        dim=16,
        cross_attention_dim=CONTEXT_DIM,
        num_queries=10,
        num_layers=1,
        num_heads=2,
        head_dim=8,
    )
    return scramble(model, seed=2)


def vae():
    model = AutoencoderKL(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    return scramble(model, seed=3)


def pipeline():
    result = DivotReconstructionPipeline(
        video_processor=DivotVideoProcessor(size=32),
        video_tokenizer=tokenizer(),
        resampler=resampler(),
        unet=unet(),
        vae=vae(),
        scheduler=DivotDDIMScheduler(),
    )
    result.set_progress_bar_config(disable=True)
    return result


def video(seed, num_frames=24, height=36, width=48):
    """Bytes (num_frames, height, width, 3) of a picture that moves."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.randint(0, 256, (height // 4, width // 4, 3), generator=generator, dtype=torch.uint8)
    picture = picture.repeat_interleave(4, 0).repeat_interleave(4, 1)
    return torch.stack([picture.roll(i, dims=1) for i in range(num_frames)])


def _random(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _tokenizer_inputs(batch_size):
    clips = [_random((5, 3, 64, 64), i).clamp(-1, 1) for i in range(batch_size)]
    return {"pixel_values_videos": torch.stack(clips)}


def _unet_inputs(batch_size):
    return {
        "sample": torch.stack([_random((4, 4, 8, 8), i) for i in range(batch_size)]),
        "timestep": torch.tensor([100 + 50 * i for i in range(batch_size)]),
        "encoder_hidden_states": torch.stack([_random((10, CONTEXT_DIM), 10 + i) for i in range(batch_size)]),
        "fs": torch.tensor([3 + i for i in range(batch_size)]),
    }


def _resampler_inputs(batch_size):
    return {"features": torch.stack([_random((FEATURES, FEATURE_DIM), i) for i in range(batch_size)])}


def _pipeline_inputs(batch_size):
    return {
        "video": [video(i) for i in range(batch_size)],
        "num_inference_steps": 2,
        "generator": [torch.Generator().manual_seed(i) for i in range(batch_size)],
        "output_type": "pt",
    }


MODELS = [
    ModelCase(
        "divot-tokenizer",
        tokenizer,
        _tokenizer_inputs,
        "features",
        has_loss=False,
        without_gradient={
            r"vision_model\.post_layernorm\..*": "features come from the layer before; it is in the files"
        },
    ),
    ModelCase("divot-unet", unet, _unet_inputs, "sample", has_loss=False),
    ModelCase("divot-resampler", resampler, _resampler_inputs, "encoder_hidden_states", has_loss=False),
]
PIPELINES = [
    PipelineCase("divot-reconstruction", pipeline, _pipeline_inputs, lambda output: output.frames),
]

MODELS += divot_llm.MODELS
PIPELINES += divot_llm.PIPELINES
