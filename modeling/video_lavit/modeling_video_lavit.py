"""Video-LaVIT's language model (https://arxiv.org/abs/2402.03161): LLaMA-2-7B that reads and writes text, visual
codes and motion codes.

Notable about the model:

- one vocabulary of 49,412 ids: text, 16,384 visual codes, 1,024 motion codes and four marks (see `VideoLavitConfig`);
- reading: an image becomes a mark, its kept *continuous* features (about 90 of 256, chosen at random by the visual
  tokenizer) and a mark; a clip becomes the same for its key frame, then its 135 motion codes between marks. A
  sequence's length is therefore known only after the visual tokenizer has run, and the splice happens here;
- writing: images and motion are ids like any other (see `generation_video_lavit.py`);
- the weights for generation hold the language model alone, those for understanding also the tuned tokenizers: one
  class.
"""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from transformers import LlamaModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_video_lavit_llm import VideoLavitConfig
from .generation_video_lavit import VideoLavitGenerationMixin
from .modeling_motion_tokenizer import VideoLavitMotionTokenizer
from .modeling_visual_tokenizer import VideoLavitVisualTokenizer

IGNORE_INDEX = -100


@dataclass
class VideoLavitMergedInputs(ModelOutput):
    """Sequences after images and videos took the place of their placeholders; L is the longest one's length.

    Attributes:
        inputs_embeds: (batch, L, hidden_size); zero where padded.
        attention_mask: (batch, L), int64; 1 for real positions.
        position_ids: (batch, L), int64; 0, 1, ... over the real positions, 0 where padded.
        labels: (batch, L), int64, or None; -100 where padded and at every visual position.
    """

    inputs_embeds: torch.FloatTensor | None = None
    attention_mask: torch.LongTensor | None = None
    position_ids: torch.LongTensor | None = None
    labels: torch.LongTensor | None = None


@dataclass
class VideoLavitModelOutputWithPast(ModelOutput):
    """Output of [`VideoLavitModel`].

    Attributes:
        last_hidden_state: (batch, L, hidden_size), L counted after the splice.
        past_key_values: the cache, if asked for.
        hidden_states, attentions: per layer, if asked for.
        attention_mask: (batch, L); which positions of the spliced sequences are real.
        labels: (batch, L); the given labels, spliced likewise.
    """

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    attention_mask: torch.LongTensor | None = None
    labels: torch.LongTensor | None = None


@dataclass
class VideoLavitCausalLMOutputWithPast(ModelOutput):
    """Output of [`VideoLavitForCausalLM`].

    Attributes:
        loss: next-token cross entropy over the labels, if labels were given.
        logits: (batch, L, vocab_size), L counted after the splice (or the last `logits_to_keep` positions).
        past_key_values: the cache, if asked for.
        hidden_states, attentions: per layer, if asked for.
        attention_mask: (batch, L); which positions of the spliced sequences are real.
        labels: (batch, L); the given labels, spliced likewise.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    attention_mask: torch.LongTensor | None = None
    labels: torch.LongTensor | None = None


class VideoLavitPreTrainedModel(PreTrainedModel):
    config: VideoLavitConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("text", "image", "video")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module):
        # Both tokenizers and LLaMA initialise their own modules; what is left here is the head.
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=self.config.text_config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)


class VideoLavitModel(VideoLavitPreTrainedModel):
    """The language model without its head, with the tokenizers that read images and videos for it.

    `visual_tokenizer` and `motion_tokenizer` are None for weights that hold the language model alone; such a model
    takes text and ids only.
    """

    def __init__(self, config: VideoLavitConfig):
        super().__init__(config)
        self.language_model = LlamaModel._from_config(config.text_config)
        self.visual_tokenizer = self.motion_tokenizer = None
        if config.visual_tokenizer_config is not None:
            self.visual_tokenizer = VideoLavitVisualTokenizer._from_config(config.visual_tokenizer_config)
            self.motion_tokenizer = VideoLavitMotionTokenizer._from_config(config.motion_tokenizer_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_decoder(self):
        return self.language_model

    def freeze_for_tuning(self):
        """Leaves to train what the authors tuned for understanding: the language model with its embeddings (and
        head), the
        token merger and the projection. The image encoder, the token selector and everything that only makes ids (both
        codebooks, the motion tokenizer) are frozen. Returns self."""
        for name in ("encoder", "token_predictor", "quantize", "encode_task_layer"):
            getattr(self.visual_tokenizer, name).requires_grad_(False)
        self.motion_tokenizer.requires_grad_(False)
        return self

    def get_image_features(self, pixel_values, gumbel_noise=None, generator=None):
        """Continuous features of images, as the language model reads them.

        Args:
            pixel_values: (num_images, 3, height, width), normalised by the processor.
            gumbel_noise: (num_images, num_positions, 2) standard Gumbel noise for the choice of positions, or None.
            generator: `torch.Generator` the noise is drawn from when it is not given, or a list with one per image.

        Returns:
            one (num_kept, hidden_size) tensor per image.

        Raises:
            ValueError: this model has no tokenizers.
        """
        if self.visual_tokenizer is None:
            raise ValueError(
                "this model holds the language model alone and cannot read images or videos; load the weights for "
                "understanding, or pass visual and motion codes as ids"
            )
        return self.visual_tokenizer.get_image_features(pixel_values, gumbel_noise=gumbel_noise, generator=generator)

    def get_motion_codes(self, motion_values):
        """Motion codes (num_clips, num_motion_tokens) of motion maps (num_clips, 2, num_frames, height, width)."""
        with torch.no_grad():
            return self.motion_tokenizer.encode(motion_values).indices.flatten(1)

    def merge_inputs(
        self,
        input_ids,
        attention_mask=None,
        *,
        pixel_values=None,
        pixel_values_videos=None,
        motion_values=None,
        num_clips=None,
        labels=None,
        gumbel_noise=None,
        generator=None,
        padding_side=None,
        truncation=True,
    ):
        """Puts images and videos in the place of their placeholders and pads the sequences again.

        Images and clips go through the visual tokenizer in one call, in the order of their placeholders, sample by
        sample; so does the noise.

        Args:
            input_ids: (batch, length) with one `config.image_token_id` per image and one `config.video_token_id` per
                video.
            attention_mask: (batch, length), 0 where padded (on either side, or inside), or None.
            pixel_values: (num_images, 3, height, width), all images of the batch in the order of their placeholders.
            pixel_values_videos: (num_clips_of_all_videos, 3, height, width): key frames of the clips, or
                (num_videos, num_clips, 3, height, width) if all videos have equally many.
            motion_values: (num_clips_of_all_videos, 2, num_frames, height, width), or with the videos' axis in front.
            num_clips: clips per video, in order. Not needed with the videos' axis in front, or with one video.
            labels: (batch, length), -100 for positions that do not count, or None.
            gumbel_noise, generator: see `get_image_features`; all images and clips of the batch in placeholder order.
            padding_side: "left" or "right"; default `config.padding_side`.
            truncation: cut sequences longer than `config.max_sequence_length` (with a warning) instead of raising.

        Returns:
            [`VideoLavitMergedInputs`].

        Raises:
            ValueError: numbers of placeholders and of images or videos differ, clips and motion maps do not match, ids
                outside the vocabulary, an empty sample, or a sequence that is too long.
        """
        config = self.config
        padding_side = padding_side or config.padding_side
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side {padding_side!r}: choose 'left' or 'right'")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        keep = attention_mask.bool()
        is_image = (input_ids == config.image_token_id) & keep
        is_video = (input_ids == config.video_token_id) & keep
        is_visual = is_image | is_video
        text_ids = input_ids.masked_fill(is_visual | ~keep, 0)
        self._check_ids(text_ids)
        clips_per_video = self._clips_per_video(pixel_values_videos, motion_values, num_clips)
        num_images = 0 if pixel_values is None else len(pixel_values)
        for what, found, given in (
            ("image", int(is_image.sum()), num_images),
            ("video", int(is_video.sum()), len(clips_per_video)),
        ):
            if found != given:
                raise ValueError(f"input_ids hold {found} {what} placeholder(s), but {given} {what}(s) were given")

        embedding = self.get_input_embeddings()
        embeds = embedding(text_ids)
        blocks = iter(
            self._visual_blocks(
                is_video[is_visual].tolist(),
                pixel_values,
                None
                if pixel_values_videos is None
                else pixel_values_videos.reshape(-1, *pixel_values_videos.shape[-3:]),
                None if motion_values is None else motion_values.reshape(-1, *motion_values.shape[-4:]),
                clips_per_video,
                gumbel_noise,
                generator,
            )
            if is_visual.any()
            else ()
        )
        rows, row_labels = [], []
        for row in range(len(input_ids)):
            columns = keep[row].nonzero().flatten()
            if len(columns) == 0:
                raise ValueError(f"sample {row} of the batch is empty (its attention mask is all zeros)")
            row_embeds = embeds[row, columns]
            given_labels = None if labels is None else labels[row, columns]
            parts, label_parts, start = [], [], 0
            for place in is_visual[row, columns].nonzero().flatten().tolist():
                block = next(blocks)
                parts += [row_embeds[start:place], block]
                if given_labels is not None:
                    label_parts += [given_labels[start:place], given_labels.new_full((len(block),), IGNORE_INDEX)]
                start = place + 1
            parts.append(row_embeds[start:])
            rows.append(self._limit(torch.cat(parts), row, truncation))
            if given_labels is not None:
                label_parts.append(given_labels[start:])
                row_labels.append(torch.cat(label_parts)[: config.max_sequence_length])
        return self._pad(rows, row_labels, padding_side)

    def _check_ids(self, text_ids):
        vocab_size = self.config.text_config.vocab_size
        outside = text_ids[(text_ids < 0) | (text_ids >= vocab_size)]
        if len(outside):
            raise ValueError(
                f"id {int(outside[0])} is outside the vocabulary (0 .. {vocab_size - 1}) and is neither the image "
                f"placeholder {self.config.image_token_id} nor the video placeholder {self.config.video_token_id}"
            )

    def _clips_per_video(self, pixel_values_videos, motion_values, num_clips):
        if (pixel_values_videos is None) != (motion_values is None):
            raise ValueError("a video needs its key frames (pixel_values_videos) and its motion (motion_values)")
        if pixel_values_videos is None:
            return []
        if pixel_values_videos.ndim not in (4, 5) or motion_values.ndim != pixel_values_videos.ndim + 1:
            raise ValueError(
                f"pixel_values_videos {tuple(pixel_values_videos.shape)}, motion_values {tuple(motion_values.shape)}: "
                "expected (clips, 3, height, width) and (clips, 2, frames, height, width), or both with the videos' "
                "axis in front"
            )
        leading = pixel_values_videos.ndim - 3
        if pixel_values_videos.shape[:leading] != motion_values.shape[:leading]:
            raise ValueError(
                f"{tuple(pixel_values_videos.shape[:leading])} key frames do not match "
                f"{tuple(motion_values.shape[:leading])} motion maps"
            )
        total = pixel_values_videos.shape[:leading].numel()
        if num_clips is not None:
            counts = [int(n) for n in num_clips]
        elif leading == 2:
            counts = [pixel_values_videos.shape[1]] * pixel_values_videos.shape[0]
        else:
            counts = [total]
        if sum(counts) != total or any(n < 1 for n in counts):
            raise ValueError(f"num_clips {counts} does not add up to the {total} clips given, or holds an empty video")
        return counts

    def _visual_blocks(
        self, is_video, pixel_values, key_frames, motion_values, clips_per_video, gumbel_noise, generator
    ):
        """Embeddings that replace each placeholder, in order: list of (length, hidden_size)."""
        config, embedding = self.config, self.get_input_embeddings()
        pixels, image, video, clip = [], 0, 0, 0
        for kind in is_video:
            if kind:
                pixels.append(key_frames[clip : clip + clips_per_video[video]])
                clip += clips_per_video[video]
                video += 1
            else:
                pixels.append(pixel_values[image : image + 1])
                image += 1
        features = iter(self.get_image_features(torch.cat(pixels), gumbel_noise=gumbel_noise, generator=generator))
        marks = embedding.weight.new_tensor(
            [
                config.image_start_token_id,
                config.image_end_token_id,
                config.motion_start_token_id,
                config.motion_end_token_id,
            ],
            dtype=torch.long,
        )
        image_start, image_end, motion_start, motion_end = embedding(marks).unsqueeze(1)
        motion = None
        if motion_values is not None:
            motion = iter(embedding(self.get_motion_codes(motion_values) + config.motion_code_offset))
        blocks, videos = [], iter(clips_per_video)
        for kind in is_video:
            parts = []
            for _ in range(next(videos) if kind else 1):
                parts += [image_start, next(features).to(image_start.dtype), image_end]
                if kind:
                    parts += [motion_start, next(motion), motion_end]
            blocks.append(torch.cat(parts))
        return blocks

    def _limit(self, sequence, row, truncation):
        limit = self.config.max_sequence_length
        if limit is None or len(sequence) <= limit:
            return sequence
        message = (
            f"sample {row} of the batch is {len(sequence)} positions long with its images and videos, more than "
            f"config.max_sequence_length {limit}"
        )
        if not truncation:
            raise ValueError(f"{message}; use fewer clips or less text")
        warnings.warn(f"{message}; its end is cut", stacklevel=2)
        return sequence[:limit]

    @staticmethod
    def _pad(rows, row_labels, padding_side):
        longest = max(len(row) for row in rows)
        paddings = [(longest - len(r), 0) if padding_side == "left" else (0, longest - len(r)) for r in rows]
        device = rows[0].device
        mask = [F.pad(torch.ones(len(r), dtype=torch.long, device=device), pad) for r, pad in zip(rows, paddings)]
        positions = [F.pad(torch.arange(len(r), device=device), pad) for r, pad in zip(rows, paddings)]
        return VideoLavitMergedInputs(
            inputs_embeds=torch.stack([F.pad(r, (0, 0, *pad)) for r, pad in zip(rows, paddings)]),
            attention_mask=torch.stack(mask),
            position_ids=torch.stack(positions),
            labels=torch.stack([F.pad(r, pad, value=IGNORE_INDEX) for r, pad in zip(row_labels, paddings)])
            if row_labels
            else None,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        pixel_values=None,
        pixel_values_videos=None,
        motion_values=None,
        num_clips=None,
        labels=None,
        gumbel_noise=None,
        generator=None,
        use_cache=None,
        **kwargs,
    ):
        """See [`VideoLavitForCausalLM.forward`]; labels are spliced and handed back, the loss is the head's."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        given_visuals = pixel_values is not None or pixel_values_videos is not None or motion_values is not None
        is_first_call = past_key_values is None or past_key_values.get_seq_length() == 0
        if given_visuals and input_ids is None:
            raise ValueError("images and videos need input_ids with placeholders, not inputs_embeds")
        if given_visuals and not is_first_call:
            raise ValueError("images and videos belong to the first call; the cache already holds a prompt")
        # Later calls carry one new id each: looking at its value would make every step wait for the device.
        if is_first_call and input_ids is not None and (given_visuals or self._has_placeholders(input_ids)):
            merged = self.merge_inputs(
                input_ids,
                attention_mask,
                pixel_values=pixel_values,
                pixel_values_videos=pixel_values_videos,
                motion_values=motion_values,
                num_clips=num_clips,
                labels=labels,
                gumbel_noise=gumbel_noise,
                generator=generator,
            )
            inputs_embeds, attention_mask = merged.inputs_embeds, merged.attention_mask
            position_ids, labels = merged.position_ids, merged.labels
        elif inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            # Positions count real tokens, so left padding does not shift them (the original counted padding too).
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return VideoLavitModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            attention_mask=attention_mask,
            labels=labels,
        )

    def _has_placeholders(self, input_ids):
        """Whether ids need the splice. Ids of neither the vocabulary nor a placeholder raise there."""
        return bool(((input_ids < 0) | (input_ids >= self.config.text_config.vocab_size)).any())


class VideoLavitForCausalLM(VideoLavitPreTrainedModel, VideoLavitGenerationMixin):
    r"""Video-LaVIT's language model with its head.

    `generate()` answers in text, with images and videos in the prompt; `generate_image_tokens()` and
    `generate_motion_tokens()` write visual and motion codes with classifier-free guidance.

    Example:

    ```python
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video", "path": "clip.mp4"}, {"type": "text", "text": "Where?"}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    print(processor.post_process_answers(ids[:, inputs["input_ids"].shape[1] :]))
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: VideoLavitConfig):
        super().__init__(config)
        self.model = VideoLavitModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def get_decoder(self):
        return self.model.get_decoder()

    def freeze_for_tuning(self):
        """See [`VideoLavitModel.freeze_for_tuning`]. Returns self."""
        self.model.freeze_for_tuning()
        return self

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        motion_values: torch.FloatTensor | None = None,
        num_clips: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        gumbel_noise: torch.FloatTensor | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> VideoLavitCausalLMOutputWithPast:
        r"""Logits, and the next-token loss if labels are given.

        Args:
            input_ids: (batch, length); `config.image_token_id` and `config.video_token_id` stand for images and videos.
            attention_mask: (batch, length), 0 where padded, on either side; with a cache, of the whole sequence so far.
            position_ids: (batch, length); by default the real tokens are counted. Not used when images or videos are
                given.
            past_key_values, use_cache, inputs_embeds: as everywhere in transformers.
            pixel_values, pixel_values_videos, motion_values, num_clips, gumbel_noise, generator: see
                [`VideoLavitModel.merge_inputs`].
            labels: (batch, length), the ids to predict, -100 for positions that do not count (questions, padding).
            logits_to_keep: compute logits of the last so many positions only (0: all), or of the given positions.

        Returns:
            [`VideoLavitCausalLMOutputWithPast`]; lengths count images and videos.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            motion_values=motion_values,
            num_clips=num_clips,
            labels=labels,
            gumbel_noise=gumbel_noise,
            generator=generator,
            use_cache=use_cache,
            **{name: value for name, value in kwargs.items() if name != "num_items_in_batch"},
        )
        hidden_states = outputs.last_hidden_state
        if not isinstance(logits_to_keep, int):
            hidden_states = hidden_states[:, logits_to_keep]
        elif logits_to_keep > 0:
            hidden_states = hidden_states[:, -logits_to_keep:]
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=outputs.labels,
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=kwargs.get("num_items_in_batch"),
            )
        return VideoLavitCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            attention_mask=outputs.attention_mask,
            labels=outputs.labels,
        )

    @apply_forward_hook
    @torch.no_grad()
    def generate(
        self,
        inputs=None,
        *args,
        attention_mask=None,
        pixel_values=None,
        pixel_values_videos=None,
        motion_values=None,
        num_clips=None,
        gumbel_noise=None,
        generator=None,
        **kwargs,
    ):
        """`GenerationMixin.generate` with images and videos in the prompt.

        Prompts may be padded on either side: they are moved to the right end before decoding, so batches of different
        lengths give what single prompts give. Beams and `num_return_sequences` share the features of a prompt.

        Args:
            inputs: (batch, length) ids with placeholders (also as `input_ids=`).
            attention_mask, pixel_values, pixel_values_videos, motion_values, num_clips, gumbel_noise, generator: see
                [`VideoLavitModel.merge_inputs`]. `generator` serves the visual tokenizer; transformers' sampling of
                text draws from torch's global generator.
            kwargs: everything `GenerationMixin.generate` takes.

        Returns:
            as `GenerationMixin.generate`; sequences start with the prompt, moved to the right end of its columns.

        Raises:
            ValueError: see [`VideoLavitModel.merge_inputs`]; a prompt longer than `config.max_sequence_length`.
        """
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if input_ids is None or kwargs.get("past_key_values") is not None:
            return super().generate(input_ids, *args, attention_mask=attention_mask, **kwargs)
        if attention_mask is not None:
            input_ids, attention_mask = _align_right(input_ids, attention_mask)
        given_visuals = pixel_values is not None or pixel_values_videos is not None or motion_values is not None
        if not given_visuals and not self.model._has_placeholders(input_ids):
            return super().generate(input_ids, *args, attention_mask=attention_mask, **kwargs)
        merged = self.model.merge_inputs(
            input_ids,
            attention_mask,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            motion_values=motion_values,
            num_clips=num_clips,
            gumbel_noise=gumbel_noise,
            generator=generator,
            padding_side="left",
            truncation=False,
        )
        output = super().generate(
            *args, inputs_embeds=merged.inputs_embeds, attention_mask=merged.attention_mask, **kwargs
        )
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        prompts = input_ids.repeat_interleave(len(sequences) // len(input_ids), dim=0)
        sequences = torch.cat([prompts, sequences], dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output


def _align_right(input_ids, attention_mask):
    """Moves the real tokens of every row to its right end, keeping their order."""
    order = attention_mask.long().argsort(dim=1, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)


__all__ = ["VideoLavitForCausalLM", "VideoLavitModel", "VideoLavitPreTrainedModel"]
