"""Divot-LLM: Mistral that reads and predicts continuous video features (arXiv:2412.04432, section 3.3).

Notable:
- a clip is 64 positions holding `<frame_00000>` ... `<frame_00063>`; for a clip that is read their embeddings are
  replaced by projected features, for a clip that is written they are the queries
- positions whose attention mask is -1 form blocks of 64 inside which attention is bidirectional; everything else is
  causal. Before a block nothing sees it, after it everything does, and Mistral's sliding window still applies
- the hidden states *at* the queries (no shift) parameterise a Gaussian mixture per feature; the loss is its negative
  log likelihood, generation draws from it
- every forward is one pass of transformers' Mistral; both "resamplers" of the checkpoints are plain MLPs
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, MistralModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    blockwise_overlay,
    create_causal_mask,
    create_masks_for_generate,
    create_sliding_window_causal_mask,
    maybe_pad_block_sequence_ids,
    sliding_window_overlay,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from .configuration_divot_llm import DivotConfig
from .gmm_divot import DivotGaussianMixture

QUERY = -1  # value of the attention mask at a generation query that attends bidirectionally


@dataclass
class DivotCausalLMOutput(ModelOutput):
    """What `DivotForCausalLM` returns.

    Attributes:
        loss: weighted sum of the two losses below, when labels or target features were given.
        lm_loss: cross entropy of the next token, averaged over labels that are not -100.
        gmm_loss: negative log likelihood of the target features divided by their width, averaged over all of them; 0
            when there are none.
        logits: (batch, sequence_length, vocab_size).
        gmm_parameters: (num_generated_clips, num_query_tokens, gmm_dim), when there were generation queries; see
            `DivotForCausalLM.video_mixture`.
        last_hidden_state: (batch, sequence_length, hidden_size), after the final norm.
        past_key_values: the cache, if one is used.
        hidden_states, attentions: of all layers, when asked for.
    """

    loss: torch.FloatTensor | None = None
    lm_loss: torch.FloatTensor | None = None
    gmm_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    gmm_parameters: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def query_block_ids(attention_mask: torch.Tensor, block_size: int) -> torch.Tensor:
    """Numbers the blocks of generation queries.

    Args:
        attention_mask: (batch, length): 1 token, 0 padding, -1 generation query.
        block_size: queries per block.

    Returns:
        (batch, length): number of the block a position belongs to, -1 outside.

    Raises:
        ValueError: a run of queries is not a multiple of `block_size` long.
    """
    queries = attention_mask == QUERY
    order = queries.long().cumsum(-1) - 1
    blocks = torch.where(queries, order.div(block_size, rounding_mode="floor"), -1)
    # A block must not be torn apart: all but its first member directly follow another query.
    torn = queries[:, 1:] & ~queries[:, :-1] & (order[:, 1:] % block_size != 0)
    if bool(torn.any()) or bool((queries.sum(-1) % block_size != 0).any()):
        raise ValueError(
            f"attention_mask marks runs of {queries.sum(-1).tolist()} positions (per row) with -1; runs must be "
            f"multiples of {block_size} (num_query_tokens)"
        )
    return blocks


def create_query_block_mask(config, inputs_embeds, attention_mask, block_size, past_key_values=None, position_ids=None):
    """The attention mask of Divot-LLM in the form the selected attention implementation takes.

    Args:
        config: text configuration (`sliding_window`, attention implementation).
        inputs_embeds: (batch, query_length, ...), for sizes, device and dtype.
        attention_mask: (batch, key_length) of 1, 0 and -1.
        block_size: queries per block.
        past_key_values, position_ids: as in transformers' mask functions.

    Raises:
        ValueError: malformed blocks; FlashAttention, which cannot mix causal and bidirectional attention.
    """
    implementation = config._attn_implementation
    if "flash" in implementation:
        raise ValueError(
            f"attention implementation {implementation!r} cannot attend bidirectionally inside a block of queries; use "
            "'sdpa', 'eager' or 'flex_attention' for generating or training on video features"
        )
    blocks = query_block_ids(attention_mask, block_size)
    if past_key_values is not None:
        length, offset = past_key_values.get_mask_sizes(inputs_embeds.shape[1], 0)
        blocks = maybe_pad_block_sequence_ids(blocks, None, length, offset)
    arguments = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask != 0,
        "past_key_values": past_key_values,
        "position_ids": position_ids,
        "or_mask_function": blockwise_overlay(blocks),
        "layer_idx": 0,
    }
    if config.sliding_window is None:
        return create_causal_mask(**arguments)
    # The window also limits attention inside a block, as in the original.
    window = sliding_window_overlay(config.sliding_window)
    return create_sliding_window_causal_mask(**arguments, and_mask_function=window)


class DivotProjection(nn.Module):
    """Two linear layers with GELU between them. The checkpoints call them resamplers; they change no lengths."""

    def __init__(self, in_dim, hidden_dim, out_dim):
        super().__init__()
        self.fc1 = nn.Linear(in_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, hidden_states):
        return self.fc2(F.gelu(self.fc1(hidden_states)))


class DivotPreTrainedModel(PreTrainedModel):
    config: DivotConfig
    base_model_prefix = "model"
    input_modalities = ("video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MistralDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False


class DivotModel(DivotPreTrainedModel):
    """Mistral whose clip positions are filled with projected video features; returns hidden states."""

    def __init__(self, config: DivotConfig):
        super().__init__(config)
        self.language_model = MistralModel._from_config(config.text_config)
        hidden_size = config.text_config.hidden_size
        self.input_resampler = DivotProjection(config.feature_dim, hidden_size, hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value):
        self.language_model.embed_tokens = value

    def find_clips(self, input_ids, attention_mask=None, reads_video=False, writes_video=False):
        """Tells clips to read from clips to write.

        Every position with a frame token belongs to a clip. Those marked -1 are queries. Without marks they are queries
        when there are only targets, and inputs when there are only features to read.

        Args:
            input_ids: (batch, length).
            attention_mask: (batch, at least length), see the module's docstring.
            reads_video, writes_video: whether features to read, and targets, are given.

        Returns:
            Two (batch, length) bool masks: positions of features that are read, positions of generation queries.

        Raises:
            ValueError: both kinds of clips without marks.
        """
        ids = torch.tensor(self.config.query_token_ids, device=input_ids.device, dtype=input_ids.dtype)
        clips = torch.isin(input_ids, ids)
        if attention_mask is not None and attention_mask.ndim == 2:
            queries = attention_mask[:, -input_ids.shape[1] :] == QUERY
        else:
            queries = torch.zeros_like(clips)
        if writes_video and not bool(queries.any()):
            if reads_video:
                raise ValueError(
                    "the batch has clips to read and clips to write; mark the latter with -1 in attention_mask or pass "
                    "query_token_mask"
                )
            queries = clips
        return (clips & ~queries if reads_video else torch.zeros_like(clips)), queries

    def check_clips_have_features(self, input_ids, attention_mask=None, query_token_mask=None):
        """Raises ValueError when the text holds a whole clip that nothing fills: without features, its frame tokens
        would be read as they are.

        Args:
            input_ids, attention_mask: as in `forward`.
            query_token_mask: (batch, length), positions that are generation queries although they are not marked -1.
        """
        length, size = input_ids.shape[1], self.config.num_query_tokens + 2
        if length < size or input_ids.is_meta or torch.compiler.is_compiling():
            return
        clip = [self.config.frame_start_token_id, *self.config.query_token_ids, self.config.frame_end_token_id]
        found = (input_ids.unfold(1, size, 1) == input_ids.new_tensor(clip)).all(-1)
        if not bool(found.any()):
            return
        queries = torch.zeros_like(input_ids, dtype=torch.bool)
        if attention_mask is not None and attention_mask.ndim == 2:
            queries |= attention_mask[:, -length:].to(queries.device) == QUERY
        if query_token_mask is not None:
            queries |= query_token_mask.to(queries.device, torch.bool)
        counts = (found & ~queries.unfold(1, size, 1).any(-1)).sum(-1).tolist()
        if any(counts):
            raise ValueError(
                f"the rows of the text hold {counts} clips to read, but no video_features were given for them"
            )

    def get_video_features(self, video_features, video_features_mask=None):
        """Features (num_clips, num_query_tokens, feature_dim), or (batch, clips per sample, ...) with a mask (batch,
        clips per sample) of the real ones -> (all real features in reading order, hidden_size).

        Raises:
            ValueError: another shape, or NaN.
        """
        features = check_features(self.config, video_features, "video_features", video_features_mask)
        weight = self.input_resampler.fc1.weight
        return self.input_resampler(features.to(weight.device, weight.dtype)).flatten(0, 1)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        video_features: torch.FloatTensor | None = None,
        video_features_mask: torch.Tensor | None = None,
        video_token_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Arguments as for `DivotForCausalLM.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            if video_features is None and video_token_mask is None:
                self.check_clips_have_features(input_ids, attention_mask)
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if inputs_embeds.shape[1] == 0:
            raise ValueError("the text is empty; it needs at least one token")
        if video_features is not None:
            if video_token_mask is None:
                if input_ids is None:
                    raise ValueError("video_features together with inputs_embeds need video_token_mask")
                video_token_mask, _ = self.find_clips(input_ids, attention_mask, reads_video=True)
            projected = self.get_video_features(video_features, video_features_mask)
            video_token_mask = video_token_mask.to(inputs_embeds.device, torch.bool)
            places = int(video_token_mask.sum())
            if places != len(projected):
                raise ValueError(
                    f"the text has room for {places} video features ({places / self.config.num_query_tokens:g} clips), "
                    f"but {len(projected)} were given ({len(projected) / self.config.num_query_tokens:g} clips)"
                )
            # Not in place: the embeddings may be a leaf that needs gradients.
            inputs_embeds = inputs_embeds.masked_scatter(
                video_token_mask.unsqueeze(-1), projected.to(inputs_embeds.device, inputs_embeds.dtype)
            )
        elif self.training:
            # All parameters get gradients in every step, as distributed training wants; the term is zero.
            dummy = inputs_embeds.new_zeros(1, self.config.feature_dim)
            inputs_embeds = inputs_embeds + 0.0 * self.input_resampler(dummy)

        length = inputs_embeds.shape[1]
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask.to(inputs_embeds.device)
            if position_ids is None:
                position_ids = positions_from_mask(attention_mask)[:, -length:]
            # A single new token is never a block, so cached decoding is plain causal attention.
            if length > 1 and bool((attention_mask == QUERY).any()):
                if use_cache and past_key_values is None:
                    past_key_values = self._new_cache()
                attention_mask = create_query_block_mask(
                    self.language_model.config,
                    inputs_embeds,
                    attention_mask,
                    self.config.num_query_tokens,
                    past_key_values,
                    position_ids,
                )
            else:
                attention_mask = attention_mask != 0
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )

    def _new_cache(self):
        from transformers import DynamicCache

        return DynamicCache(config=self.language_model.config)


def positions_from_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions 0, 1, 2, ... that start at the first token of every row, so that padding on the left changes nothing:
    (batch, length) of 1, 0 and -1 -> (batch, length)."""
    left_padding = (attention_mask != 0).long().cumsum(-1).eq(0).sum(-1, keepdim=True)
    positions = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
    return (positions - left_padding).clamp(min=0)


def check_features(config, features, name, mask=None):
    """Features in any accepted layout -> (num_clips, num_query_tokens, feature_dim). ValueError for wrong lengths, a
    mask that does not fit, or NaN."""
    expected = (config.num_query_tokens, config.feature_dim)
    if features.ndim not in (3, 4) or tuple(features.shape[-2:]) != expected:
        raise ValueError(
            f"{name} has shape {tuple(features.shape)}; expected (num_clips, {expected[0]}, {expected[1]}) or (batch, "
            f"clips per sample, {expected[0]}, {expected[1]}), as `DivotTokenizerModel` gives them"
        )
    if mask is not None:
        if features.ndim != 4 or tuple(mask.shape) != tuple(features.shape[:2]):
            raise ValueError(
                f"a mask of shape {tuple(mask.shape)} does not fit {name} of shape {tuple(features.shape)}"
            )
        features = features[mask.to(features.device, torch.bool)]
    elif features.ndim == 4:
        features = features.flatten(0, 1)
    if not bool(torch.isfinite(features).all()):
        raise ValueError(f"{name} holds NaN or infinite values")
    return features


@torch.no_grad()
def initialize_new_rows(input_weight: torch.Tensor, output_weight: torch.Tensor, old_vocab_size: int) -> None:
    """Gives rows of new tokens the values Divot's training starts from: the mean of the old input rows, and three times
    the mean of the old output rows. Both weights (vocab_size, hidden_size) are changed in place."""
    input_weight[old_vocab_size:] = input_weight[:old_vocab_size].mean(0, keepdim=True)
    output_weight[old_vocab_size:] = 3 * output_weight[:old_vocab_size].mean(0, keepdim=True)


class DivotForCausalLM(DivotPreTrainedModel, GenerationMixin):
    """Divot-LLM: video understanding and generation in one language model.

    `generate()` writes text about clips given as features; `generate_video_features()` writes the features of a clip.
    `DivotProcessor` prepares text, `DivotTokenizerModel` features, and the Divot pipelines put all of it together.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    # The mixture loss is averaged per batch, so a Trainer has to divide by its accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: DivotConfig):
        super().__init__(config)
        self.model = DivotModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.output_resampler = DivotProjection(text.hidden_size, config.gmm_dim, config.gmm_dim)
        self.post_init()

    @property
    def language_model(self):
        """The `MistralModel` inside."""
        return self.model.language_model

    def extend_vocabulary(self, vocab_size: int):
        """Adds rows for new tokens the way Divot's training starts (see `initialize_new_rows`).

        Raises:
            ValueError: fewer tokens than there are.
        """
        old = self.lm_head.weight.shape[0]
        if vocab_size < old:
            raise ValueError(f"vocab_size={vocab_size} is smaller than the {old} tokens there are")
        self.resize_token_embeddings(vocab_size, mean_resizing=False)
        initialize_new_rows(self.get_input_embeddings().weight, self.lm_head.weight, old)

    def video_mixture(self, gmm_parameters: torch.Tensor) -> DivotGaussianMixture:
        """The output of the mixture head (..., gmm_dim) as a `DivotGaussianMixture`."""
        return DivotGaussianMixture.from_parameters(
            gmm_parameters, self.config.num_gmm_components, self.config.feature_dim, self.config.gmm_min_variance
        )

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        video_features: torch.FloatTensor | None = None,
        video_features_mask: torch.Tensor | None = None,
        video_token_mask: torch.Tensor | None = None,
        target_features: torch.FloatTensor | None = None,
        target_features_mask: torch.Tensor | None = None,
        query_token_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **kwargs,
    ) -> DivotCausalLMOutput:
        """Runs the language model.

        Args:
            input_ids: (batch, length). Clips are runs of the frame tokens (`config.query_token_ids`).
            attention_mask: (batch, length): 1 token, 0 padding, -1 query of a block that attends bidirectionally.
                Queries may also be left at 1 (causal).
            position_ids: default: counted from each row's first token.
            past_key_values, use_cache: as in transformers.
            inputs_embeds: instead of `input_ids`.
            video_features: features to read, (num_clips, num_query_tokens, feature_dim) in the order of the text, or
                (batch, clips per sample, ...) with `video_features_mask` (batch, clips per sample) for the real ones.
            video_token_mask: (batch, length), where features go. Default: all frame tokens that are not queries.
            target_features: features to predict, in the same layouts, with `target_features_mask`.
            query_token_mask: (batch, length), the generation queries. Default, with targets: positions marked -1, or
                all frame tokens when none is marked and nothing is read.
            labels: (batch, length), -100 where ignored; shifted inside.
            logits_to_keep: compute logits for the last so many positions only (0: all), or for these positions.

        Returns:
            `DivotCausalLMOutput`.

        Raises:
            ValueError: features whose number or shape does not fit the text, clips in the text without features, NaN,
                malformed query blocks.
        """
        return_dict = return_dict if return_dict is not None else self.config.return_dict
        if target_features is not None and query_token_mask is None:
            if input_ids is None:
                raise ValueError("target_features together with inputs_embeds need query_token_mask")
            found, query_token_mask = self.model.find_clips(
                input_ids, attention_mask, video_features is not None, writes_video=True
            )
            video_token_mask = found if video_token_mask is None and video_features is not None else video_token_mask
        if video_features is None and video_token_mask is None and input_ids is not None:
            self.model.check_clips_have_features(input_ids, attention_mask, query_token_mask)
            video_token_mask = torch.zeros_like(input_ids, dtype=torch.bool)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            video_features=video_features,
            video_features_mask=video_features_mask,
            video_token_mask=video_token_mask,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept])

        gmm_parameters = None
        if query_token_mask is not None:
            queries = hidden_states[query_token_mask.to(hidden_states.device, torch.bool)]
            if len(queries) % self.config.num_query_tokens:
                raise ValueError(
                    f"{len(queries)} generation queries; clips have {self.config.num_query_tokens} queries each"
                )
            queries = queries.unflatten(0, (-1, self.config.num_query_tokens))
            gmm_parameters = self.output_resampler(queries)

        loss = lm_loss = gmm_loss = None
        if labels is not None or target_features is not None:
            gmm_loss = self._gmm_loss(hidden_states, gmm_parameters, target_features, target_features_mask)
            loss = self.config.gmm_loss_scale * gmm_loss
        if labels is not None:
            lm_loss = self._lm_loss(logits, labels)
            loss = loss + self.config.lm_loss_scale * lm_loss.to(loss.device)

        result = DivotCausalLMOutput(
            loss=loss,
            lm_loss=lm_loss,
            gmm_loss=gmm_loss,
            logits=logits,
            gmm_parameters=gmm_parameters,
            last_hidden_state=hidden_states,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result if return_dict else result.to_tuple()

    def _lm_loss(self, logits, labels):
        if logits.shape[1] != labels.shape[1]:
            raise ValueError(
                f"labels of length {labels.shape[1]} need all logits, but logits_to_keep left {logits.shape[1]}"
            )
        targets = labels[:, 1:].to(logits.device)
        summed = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum")
        # A batch may consist of clips only; its text loss is then 0 instead of NaN.
        return summed / (targets != -100).sum().clamp(min=1)

    def _gmm_loss(self, hidden_states, gmm_parameters, target_features, target_features_mask):
        if target_features is None:
            if not self.training:
                return hidden_states.new_zeros((), dtype=torch.float32)
            return 0.0 * self.output_resampler(hidden_states[:1, :1]).sum().float()
        targets = check_features(self.config, target_features, "target_features", target_features_mask)
        if len(targets) != len(gmm_parameters):
            raise ValueError(f"{len(targets)} clips of target_features for {len(gmm_parameters)} clips of queries")
        return self.video_mixture(gmm_parameters).nll(targets.to(gmm_parameters.device))

    # ---- generation ----------------------------------------------------------------------------------------------

    def generate(self, inputs=None, generation_config=None, **kwargs):
        """Writes text, as transformers' `generate()`.

        Besides its arguments: `video_features` (and `video_features_mask`) as in `forward`. Rows may hold different
        numbers of clips and are padded on the left.

        Raises:
            ValueError: features that do not fit the text, or clips in it without features.
        """
        if kwargs.get("video_features") is not None:
            input_ids = inputs if inputs is not None else kwargs.get("input_ids")
            if input_ids is None:
                raise ValueError("video_features need input_ids, which say where the clips are")
            mask, _ = self.model.find_clips(input_ids, kwargs.get("attention_mask"), reads_video=True)
            mask = kwargs.pop("video_token_mask", None) if kwargs.get("video_token_mask") is not None else mask
            features = check_features(
                self.config, kwargs["video_features"], "video_features", kwargs.pop("video_features_mask", None)
            )
            packed, real = self._clips_per_row(features, mask)
            kwargs |= {"video_features": packed, "video_features_mask": real, "video_token_mask": mask}
        else:
            input_ids = inputs if inputs is not None else kwargs.get("input_ids")
            if input_ids is not None and input_ids.ndim == 2:
                self.model.check_clips_have_features(input_ids, kwargs.get("attention_mask"))
        return super().generate(inputs, generation_config, **kwargs)

    def _clips_per_row(self, features, mask):
        """Clips of a batch in reading order -> (batch, most clips of a row, ...) and which are real. Beams and several
        sequences per prompt repeat rows, so every row needs its own."""
        per_row = mask.sum(-1)
        counts = (per_row // self.config.num_query_tokens).tolist()
        if bool((per_row % self.config.num_query_tokens).any()) or sum(counts) != len(features):
            raise ValueError(
                f"the rows of the text have room for {per_row.tolist()} video features "
                f"({self.config.num_query_tokens} per clip), but {len(features)} clips were given"
            )
        packed = features.new_zeros(len(counts), max(counts), *features.shape[1:])
        real = torch.zeros(packed.shape[:2], dtype=torch.bool, device=features.device)
        for row, (count, clips) in enumerate(zip(counts, features.split(counts))):
            packed[row, :count], real[row, :count] = clips, True
        return packed, real

    def prepare_inputs_for_generation(self, input_ids, *args, is_first_iteration=False, **kwargs):
        video = {name: kwargs.pop(name, None) for name in ("video_features", "video_features_mask", "video_token_mask")}
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, **kwargs
        )
        if video["video_features"] is not None and (is_first_iteration or not kwargs.get("use_cache", True)):
            # Frame tokens written since then stay what they are.
            written = input_ids.shape[1] - video["video_token_mask"].shape[1]
            video["video_token_mask"] = F.pad(video["video_token_mask"], (0, written))
            inputs |= video
        elif inputs.get("input_ids") is not None:
            # `generate` has looked at the prompt; a clip's tokens written since then stay what they are.
            inputs["video_token_mask"] = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        return inputs

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        mask = model_kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2:
            return positions_from_mask(mask)
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values, position_ids=None, **kwargs):
        """Masks for caches of fixed size, which transformers prepares outside `forward`."""
        length = inputs_embeds.shape[1]
        if attention_mask is not None and attention_mask.ndim == 2 and length > 1 and (attention_mask == QUERY).any():
            return create_query_block_mask(
                config.get_text_config(),
                inputs_embeds,
                attention_mask,
                config.num_query_tokens,
                past_key_values,
                position_ids,
            )
        mask = attention_mask != 0 if attention_mask is not None and attention_mask.ndim == 2 else attention_mask
        return create_masks_for_generate(config, inputs_embeds, mask, past_key_values, position_ids)

    def _mark_last_clip(self, input_ids, attention_mask):
        """The attention mask with the last clip of every row marked -1.

        Raises:
            ValueError: a row that does not end with a complete block of frame tokens.
        """
        size = self.config.num_query_tokens
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.clone()
        expected = torch.tensor(self.config.query_token_ids, device=input_ids.device, dtype=input_ids.dtype)
        for row, (ids, real) in enumerate(zip(input_ids, mask != 0)):
            places = real.nonzero().flatten()[-size:]
            if len(places) < size or not torch.equal(ids[places], expected):
                raise ValueError(
                    f"row {row} does not end with the {size} frame tokens that ask for a clip; "
                    "`DivotProcessor.with_queries` appends them"
                )
            mask[row, places] = QUERY
        return mask

    @torch.no_grad()
    def get_video_mixture(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        video_features: torch.FloatTensor | None = None,
        video_features_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> DivotGaussianMixture:
        """The distribution of the clip every row asks for.

        Args:
            input_ids: (batch, length). Rows end with `<frame>` and the frame tokens (`DivotProcessor.with_queries`).
            attention_mask: (batch, length), padding on either side. The queries are marked here if they are not.
            video_features, video_features_mask: clips that earlier parts of the text hold, as in `forward`.

        Returns:
            `DivotGaussianMixture` with means (batch, num_query_tokens, num_components, feature_dim).

        Raises:
            ValueError: a row without queries, or features that do not fit.
        """
        if attention_mask is None or not bool((attention_mask == QUERY).any()):
            attention_mask = self._mark_last_clip(input_ids, attention_mask)
        queries = attention_mask == QUERY
        if not bool((queries.sum(-1) == self.config.num_query_tokens).all()):
            raise ValueError(
                f"rows mark {queries.sum(-1).tolist()} positions with -1; generating needs one clip, so "
                f"{self.config.num_query_tokens}, in every row"
            )
        output = self(
            input_ids=input_ids,
            attention_mask=attention_mask,
            video_features=video_features,
            video_features_mask=video_features_mask,
            query_token_mask=queries,
            use_cache=False,
            logits_to_keep=1,
            return_dict=True,
            **kwargs,
        )
        return self.video_mixture(output.gmm_parameters)

    def generate_video_features(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        video_features: torch.FloatTensor | None = None,
        video_features_mask: torch.Tensor | None = None,
        method: str = "mixture",
        var_scale: float | None = None,
        generator=None,
        **kwargs,
    ) -> torch.FloatTensor:
        """Draws the features of the clip every row asks for (arguments as for `get_video_mixture`).

        Args:
            method: "mixture" (a component per feature, then a draw from it), "weighted" (draws from all components,
                averaged) or "mean".
            var_scale: variances are multiplied by it. Default: `config.var_scale`.
            generator: a `torch.Generator`, or one per row (the result is then independent of the batch).

        Returns:
            (batch, num_query_tokens, feature_dim), float32.
        """
        mixture = self.get_video_mixture(input_ids, attention_mask, video_features, video_features_mask, **kwargs)
        return mixture.draw(method, self.config.var_scale if var_scale is None else var_scale, generator)


__all__ = [
    "DivotCausalLMOutput",
    "DivotForCausalLM",
    "DivotModel",
    "DivotPreTrainedModel",
    "create_query_block_mask",
    "initialize_new_rows",
    "positions_from_mask",
    "query_block_ids",
]
