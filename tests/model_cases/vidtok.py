"""Tiny models of VidTok."""

import functools

import torch

from cinetok import VidTokConfig, VidTokModel

from . import ModelCase

# Not narrower: normalising over four channels magnifies rounding errors beyond every tolerance.
TINY = {"base_channels": 8, "num_res_blocks": 1, "channel_multipliers": [1, 2, 2, 2], "latent_channels": 3}
FSQ = {"regularizer": "fsq", "fsq_levels": [8, 5, 6], "entropy_loss_annealing_steps": 10}
# One temporal level and groups of one channel: 32 is the narrowest width with 32 groups.
GROUPNORM = {
    "norm_type": "groupnorm",
    "base_channels": 32,
    "channel_multipliers": [1, 1],
    "temporal_downsample_levels": [0],
    "temporal_upsample_levels": [1],
    "temporal_compression_ratio": 2,
}


def build(**changes):
    """A model whose parameters are all random: the temporal blocks' last convolutions start as zeros, which hides them."""
    torch.manual_seed(0)
    model = VidTokModel(VidTokConfig(**{**TINY, **changes}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                is_scale = "norm" in name and name.endswith("weight")
                parameter.copy_(0.1 * noise + (1.0 if is_scale else 0.0))
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


def clip(index, num_frames, height, width):
    """Clip number `index`, (num_frames, 3, height, width) in [-1, 1]."""
    return torch.rand(num_frames, 3, height, width, generator=torch.Generator().manual_seed(index)) * 2 - 1


def _inputs(num_frames, height=24, width=16):
    # the posterior's mean: in training mode the default is a random sample
    return lambda batch_size: {
        "pixel_values_videos": torch.stack([clip(i, num_frames, height, width) for i in range(batch_size)]),
        "sample_posterior": False,
    }


def _case(name, num_frames, **changes):
    return ModelCase(f"vidtok-{name}", functools.partial(build, **changes), _inputs(num_frames), "reconstruction")


MODELS = [
    _case("causal-v1.0-kl", 5, version="1.0"),
    _case("causal-v1.1-kl", 6, version="1.1"),
    _case("causal-v1.1-fsq", 5, version="1.1", **FSQ),
    _case("noncausal-kl", 8, is_causal=False),
    _case("causal-v1.1-kl-groupnorm", 3, version="1.1", **GROUPNORM),
]
PIPELINES = []  # in reconstruction.py: the pipeline takes the tokenizers of two systems
