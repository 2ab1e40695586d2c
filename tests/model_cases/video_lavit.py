"""Tiny models and pipelines of Video-LaVIT; the language model's are beside it."""

import importlib.util

import torch

from cinetok import VideoLavitImageProcessor, VideoLavitMotionProcessor
from cinetok.conversion import video_lavit_parts as parts

from . import ModelCase, PipelineCase

VISUAL = {
    "image_size": 56,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "clip_embedding_size": 8,
    "merger_num_hidden_layers": 2,
    "merger_num_attention_heads": 4,
    "codebook_size": 64,
    "codebook_dim": 8,
}
MOTION = {
    "num_frames": 24,
    "height": 4,
    "width": 8,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "layers_per_stage": 1,
    "codebook_size": 32,
    "codebook_dim": 4,
}
KEYFRAME_DECODER = {
    "in_channels": 8,
    "num_queries": 16,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "feature_dim": 24,
    "prompt_dim": 8,
    "pooled_dim": 16,
}
MOTION_ENCODER = {"grid_size": 4, "hidden_size": 16, "num_layers": 2, "num_attention_heads": 2, "out_channels": 16}
UNET = {
    "block_out_channels": (32, 32),
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "num_attention_heads": (2, 4),
    "cross_attention_dim": 16,
    "layers_per_block": 1,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24,
}
VAE = {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2, "layers_per_block": 1}
KEYFRAME_UNET = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}
KEYFRAME_VAE = {
    "block_out_channels": (16, 16),
    "norm_num_groups": 8,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "scaling_factor": 0.13025,
}
# Pixels per latent cell of both tiny VAEs, and the size of the pictures below.
SCALE, HEIGHT, WIDTH, FRAMES = 2, 16, 24, 5


def tiny(component, arguments, seed=0):
    """A component with random weights in which nothing is degenerate (no zeros, no ones)."""
    module = parts._BUILDERS[component](**arguments)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.5 if "embed" in name or name.endswith("bias") else 1.0
            fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 4
            noise = torch.randn(parameter.shape, generator=generator) * scale * fan_in**-0.5
            parameter.copy_(noise + 1.0 if parameter.ndim == 1 and name.endswith("weight") else noise)
    return module.eval()


def rows(shape, batch, seed=0):
    """Standard normal rows; row i does not depend on the batch size."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(batch)])


def visual_inputs(batch):
    noise = -torch.log(-torch.log(rows((16, 2), batch, 50).sigmoid()))
    return {"pixel_values": rows((3, 56, 56), batch), "gumbel_noise": noise}


def unet_inputs(batch):
    return {
        "sample": rows((FRAMES, 10, 8, 12), batch),
        "timestep": torch.tensor(0.7),
        "encoder_hidden_states": rows((FRAMES, 16, 16), batch, 20),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).expand(batch, -1),
    }


MODELS = [
    ModelCase(
        "video_lavit-visual_tokenizer",
        lambda: tiny("visual_tokenizer", {**VISUAL, "projection_dim": 40}),
        visual_inputs,
        "merged_features",
        has_loss=False,
        without_gradient={
            r"encoder\.(norm|head)\..*": "features come from the last block; it is in the files",
            r"vit_proj\..*": "the language model's projection, which it applies itself",
        },
    ),
    ModelCase(
        "video_lavit-motion_tokenizer",
        lambda: tiny("motion_tokenizer", MOTION),
        lambda batch: {"motion_values": rows((2, 24, 4, 8), batch)},
        "reconstruction",
        exceptions={"attention_choice": "a few positions at a time: always torch's fused attention"},
    ),
    ModelCase(
        "video_lavit-keyframe_decoder",
        lambda: tiny("keyframe_decoder", KEYFRAME_DECODER),
        lambda batch: {"hidden_states": rows((9, 8), batch), "num_tokens": torch.tensor([7, 9, 4][:batch])},
        "prompt_embeds",
        has_loss=False,
    ),
    ModelCase(
        "video_lavit-motion_encoder",
        lambda: tiny("motion_encoder", MOTION_ENCODER),
        lambda batch: {"motion": rows((2, FRAMES, 8, 12), batch)},
        "sample",
        has_loss=False,
    ),
    ModelCase("video_lavit-unet", lambda: tiny("unet", UNET), unet_inputs, "sample", has_loss=False),
]


def components(images=True, videos=True):
    """Components of the reconstruction pipeline."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    parts_ = {"visual_tokenizer": tiny("visual_tokenizer", VISUAL), "image_processor": VideoLavitImageProcessor(56)}
    if images:
        parts_.update(
            keyframe_decoder=tiny("keyframe_decoder", KEYFRAME_DECODER),
            keyframe_unet=tiny("keyframe_unet", KEYFRAME_UNET),
            keyframe_vae=tiny("keyframe_vae", KEYFRAME_VAE),
            keyframe_scheduler=DDIMScheduler(**parts.KEYFRAME_SCHEDULER),
        )
    if videos:
        parts_.update(
            unet=tiny("unet", UNET),
            vae=tiny("vae", VAE),
            scheduler=EulerDiscreteScheduler(**parts.VIDEO_SCHEDULER),
            motion_encoder=tiny("motion_encoder", MOTION_ENCODER),
            motion_tokenizer=tiny("motion_tokenizer", MOTION),
            motion_processor=VideoLavitMotionProcessor(height=4, width=8),
        )
    return parts_


def reconstruction_pipeline():
    from cinetok import VideoLavitReconstructionPipeline

    pipeline = VideoLavitReconstructionPipeline(**components())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(batch, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(batch)]


def images(batch):
    return list(rows((3, HEIGHT, WIDTH), batch, 70).sigmoid())


def raw_inputs(batch):
    return {
        "image": images(batch),
        "motion": rows((2, FRAMES, HEIGHT // SCALE, WIDTH // SCALE), batch, 30),
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": 2,
        "generator": generators(batch),
        "output_type": "pt",
    }


def token_inputs(batch):
    codes = [torch.arange(3 + i) for i in range(batch)]
    grid = torch.stack([torch.arange(6).reshape(3, 1, 2) + i for i in range(batch)])
    inputs = {**raw_inputs(batch), "image_indices": codes, "motion_indices": grid, "keyframe_num_inference_steps": 2}
    del inputs["image"], inputs["motion"]
    return inputs


PIPELINES = [
    PipelineCase("video_lavit-reconstruction", reconstruction_pipeline, raw_inputs, lambda output: output.frames),
    PipelineCase("video_lavit-detokenize", reconstruction_pipeline, token_inputs, lambda output: output.frames),
]

if importlib.util.find_spec("model_cases.video_lavit_llm"):
    from . import video_lavit_llm

    MODELS += video_lavit_llm.MODELS
    PIPELINES += video_lavit_llm.PIPELINES
