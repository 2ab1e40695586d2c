"""Tiny reconstruction pipelines over VidTok and VidTwin."""

import torch

from cinetok import (
    VideoReconstructionPipeline,
    VidTokConfig,
    VidTokModel,
    VidTokVideoProcessor,
    VidTwinConfig,
    VidTwinVideoProcessor,
)

from . import PipelineCase, vidtwin

TINY = {
    "version": "1.1",
    "base_channels": 8,
    "channel_multipliers": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "latent_channels": 4,
}
FSQ = {**TINY, "version": "1.0", "regularizer": "fsq", "fsq_levels": [8, 8, 8, 8]}
NONCAUSAL = {**TINY, "version": None, "is_causal": False}


def vidtok(arguments=TINY, seed=0):
    """A model whose parameters are all random and non-zero: zeros would hide a dropped input."""
    torch.manual_seed(seed)
    model = VidTokModel(VidTokConfig(**arguments))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                is_norm = "norm" in name and name.endswith("weight")
                parameter.copy_(0.1 * noise + (1.0 if is_norm else 0.0))
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


def processor(size=32):
    return VidTokVideoProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def pipeline(arguments=TINY):
    return quiet(VideoReconstructionPipeline(vidtok(arguments), processor()))


def vidtwin_pipeline():
    config = VidTwinConfig(**vidtwin.TINY)
    size = {"height": config.height, "width": config.width}
    video_processor = VidTwinVideoProcessor(size={"shortest_edge": config.height}, crop_size=size, num_frames=4)
    return quiet(VideoReconstructionPipeline(vidtwin.build(), video_processor))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def video(index, num_frames=7, height=36, width=44):
    """Frames (num_frames, height, width, 3) of bytes: smooth noise that moves."""
    generator = torch.Generator().manual_seed(index)
    coarse = torch.rand(1, 3, 4 + num_frames, 8, 8, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (num_frames, height, width), mode="trilinear")
    return (fine[0] * 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous().numpy()


def inputs(batch_size):
    return {
        "video": [video(index) for index in range(batch_size)],
        "sample_posterior": True,
        "generator": [torch.Generator().manual_seed(50 + index) for index in range(batch_size)],
        "chunk_frames": 4,
        "output_type": "pt",
    }


def fsq_inputs(batch_size):
    return {**inputs(batch_size), "sample_posterior": False, "generator": None}


MODELS = []
PIPELINES = [
    PipelineCase("reconstruction-vidtok", pipeline, inputs, lambda output: output.frames),
    PipelineCase("reconstruction-vidtok_fsq", lambda: pipeline(FSQ), fsq_inputs, lambda output: output.frames),
    PipelineCase("reconstruction-vidtok_noncausal", lambda: pipeline(NONCAUSAL), inputs, lambda output: output.frames),
    PipelineCase("reconstruction-vidtwin", vidtwin_pipeline, inputs, lambda output: output.frames),
]
