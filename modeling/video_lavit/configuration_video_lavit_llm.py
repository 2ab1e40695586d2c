"""Configuration of the Video-LaVIT language model: LLaMA, the id layout, and (for the tuned weights) both
tokenizers."""

from transformers import LlamaConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from ..configuration import strict_config
from .configuration_video_lavit import VideoLavitMotionTokenizerConfig, VideoLavitVisualTokenizerConfig


@strict_config
class VideoLavitConfig(PreTrainedConfig):
    r"""Configuration of [`VideoLavitForCausalLM`] ([Video-LaVIT](https://arxiv.org/abs/2402.03161)).

    One vocabulary holds text, visual codes and motion codes. With the released sizes:

    | ids | meaning |
    |---|---|
    | 0 .. 31999 | LLaMA's sentencepiece pieces (0 unk, 1 bos, 2 eos) |
    | 32000, 32001 | begin and end of an image |
    | 32002 .. 48385 | visual codes |
    | 48386, 48387 | begin and end of motion |
    | 48388 .. 49411 | motion codes |

    Args:
        text_config: the LLaMA configuration (default: LLaMA-2-7B with 49,412 ids).
        visual_tokenizer_config: configuration of the visual tokenizer that is part of the model, or None. The weights
            for understanding contain tuned copies of both tokenizers; the weights for generation contain neither.
        motion_tokenizer_config: the same for the motion tokenizer.
        text_vocab_size: number of text ids.
        num_visual_codes: number of ids set aside for visual codes.
        num_motion_codes: number of ids set aside for motion codes.
        image_token_id: id of the placeholder in `input_ids` that an image replaces; it lies outside the vocabulary.
        video_token_id: the same for a video (all its clips replace one placeholder).
        max_sequence_length: longest sequence after images and videos are spliced in; None for no limit.
        padding_side: side on which sequences of unequal length are padded after the splice ("right" or "left");
            generation always pads on the left.

    Raises:
        ValueError: the layout does not add up to the language model's vocabulary, a placeholder lies inside
            it, a codebook is larger than the ids set aside, or the visual tokenizer does not project to the model's
            width.
    """

    model_type = "video_lavit"
    keys_to_ignore_at_inference = ["past_key_values"]
    sub_configs_defaults = {
        "text_config": SubConfigSpec(
            config_class=LlamaConfig,
            init_kwargs={"vocab_size": 49412, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        ),
        "visual_tokenizer_config": SubConfigSpec(config_class=VideoLavitVisualTokenizerConfig, optional=True),
        "motion_tokenizer_config": SubConfigSpec(config_class=VideoLavitMotionTokenizerConfig, optional=True),
    }

    text_config: LlamaConfig | dict | None = None
    visual_tokenizer_config: VideoLavitVisualTokenizerConfig | dict | None = None
    motion_tokenizer_config: VideoLavitMotionTokenizerConfig | dict | None = None
    text_vocab_size: int = 32000
    num_visual_codes: int = 16384
    num_motion_codes: int = 1024
    image_token_id: int = 49412
    video_token_id: int = 49413
    max_sequence_length: int | None = 4096
    padding_side: str = "right"
    tie_word_embeddings: bool = False

    @property
    def image_start_token_id(self):
        """Id that opens an image."""
        return self.text_vocab_size

    @property
    def image_end_token_id(self):
        """Id that closes an image."""
        return self.text_vocab_size + 1

    @property
    def visual_code_offset(self):
        """Id of visual code 0."""
        return self.text_vocab_size + 2

    @property
    def motion_start_token_id(self):
        """Id that opens the motion of a clip."""
        return self.visual_code_offset + self.num_visual_codes

    @property
    def motion_end_token_id(self):
        """Id that closes the motion of a clip."""
        return self.motion_start_token_id + 1

    @property
    def motion_code_offset(self):
        """Id of motion code 0."""
        return self.motion_start_token_id + 2

    @property
    def num_token_ids(self):
        """Number of ids of the layout."""
        return self.motion_code_offset + self.num_motion_codes

    def validate_layout(self):
        """The layout, the placeholders and the sub-models agree."""
        if not isinstance(self.text_config, PreTrainedConfig):
            return  # called by @strict before `__post_init__` has made the sub-configs
        vocab_size = self.text_config.vocab_size
        if vocab_size != self.num_token_ids:
            raise ValueError(
                f"text_config.vocab_size is {vocab_size}, but {self.text_vocab_size} text ids, {self.num_visual_codes} "
                f"visual codes, {self.num_motion_codes} motion codes and 4 marks make {self.num_token_ids}"
            )
        for name in ("image_token_id", "video_token_id"):
            if 0 <= getattr(self, name) < vocab_size:
                raise ValueError(f"{name} {getattr(self, name)} is an id of the vocabulary; choose one outside it")
        if self.image_token_id == self.video_token_id:
            raise ValueError(f"image_token_id and video_token_id are both {self.image_token_id}")
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"padding_side {self.padding_side!r}: choose 'left' or 'right'")
        if self.max_sequence_length is not None and self.max_sequence_length < 1:
            raise ValueError(f"max_sequence_length {self.max_sequence_length}: must be positive or None")
        visual, motion = self.visual_tokenizer_config, self.motion_tokenizer_config
        if (visual is None) != (motion is None):
            raise ValueError("give both visual_tokenizer_config and motion_tokenizer_config, or neither")
        if visual is None:
            return
        if visual.projection_dim != self.text_config.hidden_size:
            raise ValueError(
                f"visual_tokenizer_config.projection_dim is {visual.projection_dim}, but the language model reads "
                f"features of width {self.text_config.hidden_size}"
            )
        if visual.codebook_size > self.num_visual_codes or motion.codebook_size > self.num_motion_codes:
            raise ValueError(
                f"codebooks of {visual.codebook_size} visual and {motion.codebook_size} motion codes do not fit the "
                f"{self.num_visual_codes} and {self.num_motion_codes} ids set aside for them"
            )


__all__ = ["VideoLavitConfig"]
