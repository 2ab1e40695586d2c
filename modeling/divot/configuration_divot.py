"""Configuration of Divot's video tokenizer (arXiv:2412.04432). Defaults are the released ones."""

from typing import Any

from transformers import CLIPVisionConfig, PreTrainedConfig

from ..configuration import strict_config

# The vision tower of CLIP ViT-H/14 as trained on LAION-2B; it stays frozen.
CLIP_VIT_H_14 = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1024,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}


@strict_config
class DivotTokenizerConfig(PreTrainedConfig):
    r"""Configuration of `DivotTokenizerModel`.

    Args:
        vision_config: `CLIPVisionConfig` (or a dict of its fields) of the frozen image encoder; default ViT-H/14.
        num_frames: frames per clip. Fixed by learned positions.
        temporal_hidden_size, temporal_num_layers, temporal_num_heads: the encoder that looks at one patch over time.
        hidden_size, num_hidden_layers, num_attention_heads: the encoder over all pooled tokens.
        pool_size: tokens per frame after pooling, along each axis.
        normalize_pooled: layer norm between pooling and the encoder over all tokens.
        resampler_num_layers, resampler_num_heads, resampler_head_dim: the perceiver resampler.
        num_features, feature_dim: the result, (batch, num_features, feature_dim).
        image_mean, image_std: what the image encoder's pixels in [0, 1] are normalised with.

    Raises:
        ValueError: widths that do not divide into heads, or numbers that are not positive.
    """

    model_type = "divot_tokenizer"
    sub_configs_defaults = {"vision_config": CLIPVisionConfig}

    vision_config: CLIPVisionConfig | dict[str, Any] | None = None
    num_frames: int = 5
    temporal_hidden_size: int = 768
    temporal_num_layers: int = 6
    temporal_num_heads: int = 12
    hidden_size: int = 1024
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    pool_size: int = 5
    normalize_pooled: bool = True
    resampler_num_layers: int = 6
    resampler_num_heads: int = 16
    resampler_head_dim: int = 64
    num_features: int = 64
    feature_dim: int = 256
    image_mean: list[float] | tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: list[float] | tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self, **kwargs):
        if self.vision_config is None:
            self.vision_config = CLIPVisionConfig(**CLIP_VIT_H_14)
        elif isinstance(self.vision_config, dict):
            self.vision_config = CLIPVisionConfig(**self.vision_config)
        super().__post_init__(**kwargs)

    def validate_sizes(self):
        """Part of `@strict` validation."""
        for width, heads in (
            ("temporal_hidden_size", "temporal_num_heads"),
            ("hidden_size", "num_attention_heads"),
        ):
            if getattr(self, heads) < 1 or getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f"{width}={getattr(self, width)} does not divide into {heads}={getattr(self, heads)} heads"
                )
        for name in ("num_frames", "pool_size", "num_features", "feature_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


__all__ = ["CLIP_VIT_H_14", "DivotTokenizerConfig"]
