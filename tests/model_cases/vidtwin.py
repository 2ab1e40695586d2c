"""Tiny models of VidTwin."""

import torch

from cinetok import VidTwinConfig, VidTwinModel

from . import ModelCase

TINY = {
    "num_frames": 4,
    "height": 32,
    "width": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_query_tokens": 3,
    "query_hidden_size": 16,
    "num_query_layers": 3,
    "num_query_attention_heads": 4,
    "query_intermediate_size": 24,
    "structure_channels": 3,
    "structure_base_channels": 8,
    "dynamics_channels": 5,
}
# Not square, an odd grid that needs cropping, full-length dynamics.
WIDE = {
    **TINY,
    "num_frames": 3,
    "height": 24,
    "width": 40,
    "patch_size": [8, 4],
    "num_decoder_layers": 1,
    "num_encoder_attention_heads": 2,
    "downsample_motion": False,
}


def build(arguments=TINY, **changes):
    """A model whose parameters are all random and non-zero: zeros would hide a dropped branch."""
    torch.manual_seed(0)
    model = VidTwinModel(VidTwinConfig(**{**arguments, **changes}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("scale_shift_table"):
                parameter.copy_(0.5 * noise)
            elif parameter.ndim < 2:
                is_norm = name.lower().endswith(("layernorm.weight", "norm.weight"))
                parameter.copy_(0.1 * noise + (1.0 if is_norm else 0.0))
            else:
                parameter.copy_(1.4 * noise / parameter[0].numel() ** 0.5)
    return model.eval()


def video(batch_size, config, num_frames=None, seed=2):
    """Random clips in [-1, 1]; clip i does not depend on the batch size."""
    shape = (num_frames or config.num_frames, config.num_channels, config.height, config.width)
    clips = [
        torch.rand(shape, generator=torch.Generator().manual_seed(100 * seed + index)) for index in range(batch_size)
    ]
    return torch.stack(clips) * 2 - 1


def _inputs(arguments, num_frames=None):
    config = VidTwinConfig(**arguments)
    # the posterior's mean: in training mode the default is a random sample
    return lambda batch_size: {
        "pixel_values_videos": video(batch_size, config, num_frames),
        "sample_posterior": False,
    }


WITHOUT_GRADIENT = {
    r"decoder\.x_embedder\.proj\..*|encoder\.final_layer\..*": "never used; the released files hold them",
}
MODELS = [
    ModelCase(
        "vidtwin-square",
        lambda: build(TINY, query_dropout=0.0),
        _inputs(TINY),
        "reconstruction",
        without_gradient=WITHOUT_GRADIENT,
    ),
    ModelCase(
        "vidtwin-wide",
        lambda: build(WIDE, query_dropout=0.0),
        _inputs(WIDE, num_frames=5),
        "reconstruction",
        without_gradient=WITHOUT_GRADIENT,
    ),
]
PIPELINES = []
