"""Configurations of Video-LaVIT's two tokenizers. The language model's is in `configuration_video_lavit_llm.py`."""

from transformers import PreTrainedConfig

from ..configuration import strict_config


@strict_config
class VideoLavitVisualTokenizerConfig(PreTrainedConfig):
    r"""Configuration of [`VideoLavitVisualTokenizer`]: LaVIT's dynamic visual tokenizer ([LaVIT](https://arxiv.org/abs/2309.04669)).

    Defaults are the released sizes: EVA-CLIP ViT-g/14 at 224 pixels, 12 merger layers, 16,384 codes of 32 numbers.

    Args:
        image_size: side of the square input in pixels.
        patch_size: side of a patch in pixels.
        num_channels: colours of the input.
        hidden_size: width of the encoder, the token selector and the token merger.
        num_hidden_layers: blocks of the EVA encoder.
        num_attention_heads: attention heads of the EVA encoder.
        intermediate_size: hidden width of the encoder's MLPs.
        layer_norm_eps: of the EVA encoder (the selector and the merger use 1e-5).
        clip_embedding_size: outputs of the encoder's CLIP head, which Video-LaVIT never uses but the files contain.
        merger_num_hidden_layers: blocks of the token merger.
        merger_num_attention_heads: attention heads of the token merger.
        merger_intermediate_size: hidden width of the token merger's MLPs; None for `intermediate_size`.
        codebook_size: number of codes.
        codebook_dim: numbers per code.
        projection_dim: width of the language model that the continuous features are projected to; None for a tokenizer
            without that projection (only the weights for understanding have it).

    Raises:
        ValueError: sizes that do not divide, or are not positive.
        TypeError: values of another type.
    """

    model_type = "video_lavit_visual_tokenizer"
    base_config_key = "visual_tokenizer_config"

    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    hidden_size: int = 1408
    num_hidden_layers: int = 40
    num_attention_heads: int = 16
    intermediate_size: int = 6144
    layer_norm_eps: float | int = 1e-6
    clip_embedding_size: int = 1024
    merger_num_hidden_layers: int = 12
    merger_num_attention_heads: int = 16
    merger_intermediate_size: int | None = None
    codebook_size: int = 16384
    codebook_dim: int = 32
    projection_dim: int | None = None
    initializer_range: float | int = 0.02

    @property
    def num_positions(self):
        """Patches of an image: the largest number of tokens it can become."""
        return (self.image_size // self.patch_size) ** 2

    def validate_sizes(self):
        """Sizes are positive and divide where they must."""
        for name in ("image_size", "patch_size", "hidden_size", "codebook_size", "codebook_dim", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        for name in ("num_attention_heads", "merger_num_attention_heads"):
            if self.hidden_size % getattr(self, name):
                raise ValueError(f"hidden_size {self.hidden_size} is no multiple of {name} {getattr(self, name)}")
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size {self.hidden_size} must be even (the token selector splits it in two)")
        if self.merger_intermediate_size is not None and self.merger_intermediate_size < 1:
            raise ValueError(f"merger_intermediate_size must be positive or None, got {self.merger_intermediate_size}")
        if self.projection_dim is not None and self.projection_dim < 1:
            raise ValueError(f"projection_dim must be positive or None, got {self.projection_dim}")


@strict_config
class VideoLavitMotionTokenizerConfig(PreTrainedConfig):
    r"""Configuration of [`VideoLavitMotionTokenizer`] ([Video-LaVIT](https://arxiv.org/abs/2402.03161)).

    Defaults are the released sizes: maps of 24 x 20 x 36 become 3 x 5 x 9 = 135 codes out of 1,024.

    Args:
        num_frames: motion maps per clip.
        height, width: size of a map in cells.
        num_channels: components of a motion vector.
        hidden_size: width of the transformer.
        num_attention_heads: heads of its spatial and temporal attention.
        mlp_ratio: hidden width of the MLPs in multiples of `hidden_size`.
        layers_per_stage: blocks between two changes of resolution.
        strides: (time, height, width) step of each down-sampling, outermost first; the decoder goes back through them.
        layer_norm_eps: of every normalisation.
        codebook_size: number of codes.
        codebook_dim: numbers per code.
        output_scale: what decoded maps are divided by for the video de-tokenizer; the tokenizer works on maps that were
            scaled by ten.
        commitment_weight: weight of the commitment term in the training loss.

    Raises:
        ValueError: sizes that do not divide, strides other than 1 and 2.
        TypeError: values of another type.
    """

    model_type = "video_lavit_motion_tokenizer"
    base_config_key = "motion_tokenizer_config"

    num_frames: int = 24
    height: int = 20
    width: int = 36
    num_channels: int = 2
    hidden_size: int = 512
    num_attention_heads: int = 8
    mlp_ratio: int = 4
    layers_per_stage: int = 3
    strides: list[list[int]] | None = None
    layer_norm_eps: float | int = 1e-5
    codebook_size: int = 1024
    codebook_dim: int = 32
    output_scale: float | int = 10.0
    commitment_weight: float | int = 1.0
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        if self.strides is None:
            self.strides = [[1, 2, 2], [2, 1, 1], [2, 1, 1], [2, 2, 2]]
        super().__post_init__(**kwargs)

    @property
    def latent_shape(self):
        """(num_latent_frames, latent_height, latent_width) of the grid of codes."""
        size = [self.num_frames, self.height, self.width]
        for stride in self.strides:
            # Kernel 3; one cell of padding at the far side where the step is 2, at both sides where it is 1.
            size = [n if step == 1 else (n - 2) // 2 + 1 for n, step in zip(size, stride)]
        return tuple(size)

    @property
    def num_tokens(self):
        """Codes per clip."""
        frames, height, width = self.latent_shape
        return frames * height * width

    def validate_sizes(self):
        """Sizes are positive and divide where they must."""
        for name in ("num_frames", "height", "width", "hidden_size", "codebook_size", "codebook_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}"
            )
        for stride in self.strides or []:
            if len(stride) != 3 or any(step not in (1, 2) for step in stride):
                raise ValueError(f"strides are triples of 1 and 2 (time, height, width), got {stride}")
        if self.strides and min(self.latent_shape) < 1:
            raise ValueError(
                f"maps of {self.num_frames}x{self.height}x{self.width} are too small for strides {self.strides}"
            )


__all__ = ["VideoLavitMotionTokenizerConfig", "VideoLavitVisualTokenizerConfig"]
