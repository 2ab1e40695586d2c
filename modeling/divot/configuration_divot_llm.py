"""Configuration of Divot-LLM (arXiv:2412.04432). Defaults are the released sizes."""

from typing import Any

from transformers import MistralConfig, PreTrainedConfig

from ..configuration import strict_config

# Mistral-7B-Instruct-v0.1 with 262 added tokens.
MISTRAL_7B_DIVOT = {
    "vocab_size": 32262,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}


@strict_config
class DivotConfig(PreTrainedConfig):
    r"""Configuration of `DivotForCausalLM`.

    The numeric ids of the added tokens are decided by the tokenizer, not by the model: `DivotProcessor.token_ids()`
    gives the arguments `*_token_id(s)` for a tokenizer, and the converter fills them in.

    Args:
        text_config: `MistralConfig` (or a dict of its fields); default: Mistral-7B with 32,262 tokens.
        feature_dim: width of the video features the model reads and predicts.
        num_query_tokens: features per clip, and the length of a block of generation queries.
        num_gmm_components: components of the Gaussian mixture predicted for every feature.
        gmm_min_variance: lower bound of the predicted variances.
        var_scale: the variances are multiplied by this when features are sampled (not in the loss).
        lm_loss_scale, gmm_loss_scale: weights of the two losses in `loss`.
        query_token_ids: ids of `<frame_00000>`, `<frame_00001>`, ...: `num_query_tokens` of them, in order.
        frame_start_token_id, frame_end_token_id: ids of `<frame>` and `</frame>`.
        video_start_token_id, video_end_token_id: ids of `<vid>` and `</vid>`.
        image_start_token_id, image_end_token_id: ids of `<img>` and `</img>`.

    Raises:
        ValueError: ids that are missing, repeated or outside the vocabulary; numbers out of range.
    """

    model_type = "divot"
    sub_configs_defaults = {"text_config": MistralConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    text_config: MistralConfig | dict[str, Any] | None = None
    feature_dim: int = 256
    num_query_tokens: int = 64
    num_gmm_components: int = 16
    gmm_min_variance: float | int = 1e-5
    var_scale: float | int = 0.1
    lm_loss_scale: float | int = 1.0
    gmm_loss_scale: float | int = 1.0
    image_start_token_id: int = 32000
    image_end_token_id: int = 32001
    video_start_token_id: int = 32002
    video_end_token_id: int = 32003
    frame_start_token_id: int = 32004
    frame_end_token_id: int = 32005
    query_token_ids: list[int] | tuple[int, ...] = tuple(range(32006, 32070))
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.text_config is None:
            self.text_config = MistralConfig(**MISTRAL_7B_DIVOT)
        elif isinstance(self.text_config, dict):
            self.text_config = MistralConfig(**self.text_config)
        super().__post_init__(**kwargs)

    @property
    def gmm_dim(self):
        """Width of the mixture head's output: means, variances and weights of all components."""
        return 2 * self.num_gmm_components * self.feature_dim + self.num_gmm_components

    def validate_numbers(self):
        """Part of `@strict` validation."""
        for name in ("feature_dim", "num_query_tokens", "num_gmm_components"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.gmm_min_variance <= 0:
            raise ValueError(f"gmm_min_variance={self.gmm_min_variance} must be positive")
        for name in ("var_scale", "lm_loss_scale", "gmm_loss_scale"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")

    def validate_token_ids(self):
        """Part of `@strict` validation."""
        if len(self.query_token_ids) != self.num_query_tokens:
            raise ValueError(
                f"query_token_ids holds {len(self.query_token_ids)} ids for num_query_tokens={self.num_query_tokens}"
            )
        tags = ("image_start", "image_end", "video_start", "video_end", "frame_start", "frame_end")
        ids = [*self.query_token_ids, *(getattr(self, f"{tag}_token_id") for tag in tags)]
        if len(set(ids)) != len(ids):
            raise ValueError("query_token_ids and the ids of the tags must all differ")
        size = getattr(self.text_config, "vocab_size", None)
        if size is not None and not all(0 <= i < size for i in ids):
            outside = sorted(i for i in ids if not 0 <= i < size)
            raise ValueError(f"token ids outside the vocabulary of {size}: {outside[:8]}")


__all__ = ["MISTRAL_7B_DIVOT", "DivotConfig"]
