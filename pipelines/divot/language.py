"""Text with Divot-LLM: what every Divot pipeline that reads or writes text shares."""

import torch
from transformers import GenerationConfig, TextIteratorStreamer
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from ...modeling.divot.generation_divot import DivotFrameTokenLogitsProcessor, GeneratorSamplingLogitsProcessor
from .detokenizing import placement


def check_sampling(max_new_tokens, temperature, top_p):
    """Raises ValueError for arguments `generate_text` cannot work with."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive; for the likeliest text pass do_sample=False")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1")


def as_texts(texts, name):
    """One text or several -> list. TypeError for anything else."""
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a text or a list of texts")
    return list(texts)


class AnswerStreamer(TextIteratorStreamer):
    """An answer piece by piece, as it is written; together the pieces are what `post_process_text` makes of it."""

    def __init__(self, processor):
        super().__init__(processor.tokenizer, skip_prompt=True)
        self.unwanted = processor.unwritten_token_ids()
        self.ids, self.text = [], ""

    def put(self, value):
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        self.ids += [token for token in value.flatten().tolist() if token not in self.unwanted]
        text = self.tokenizer.decode(self.ids).strip()
        # An incomplete character is shown as U+FFFD until its last byte is there.
        if not text.endswith("\ufffd"):
            self._emit(text)

    def end(self):
        self._emit(self.tokenizer.decode(self.ids).strip(), stream_end=True)

    def _emit(self, text, stream_end=False):
        self.on_finalized_text(text[len(self.text) :], stream_end)
        self.text = text


@torch.no_grad()
def encode_clips(video_tokenizer, pixel_values_videos, clip_batch_size=4, progress_bar=None):
    """Clips (num_clips, 5, 3, height, width) -> features (num_clips, num_features, feature_dim), float32, on the
    tokenizer's device. `progress_bar(iterable)` shows progress."""
    if clip_batch_size < 1:
        raise ValueError(f"clip_batch_size={clip_batch_size} must be at least 1")
    device, dtype = placement(video_tokenizer)
    parts = pixel_values_videos.split(clip_batch_size)
    parts = progress_bar(parts) if progress_bar is not None else parts
    return torch.cat([video_tokenizer(part.to(device, dtype)).features.float() for part in parts])


@torch.no_grad()
def generate_text(
    llm,
    processor,
    input_ids,
    attention_mask,
    video_features=None,
    *,
    stop_tokens=(),
    max_new_tokens=256,
    do_sample=True,
    temperature=0.7,
    top_p=0.5,
    generator=None,
    streamer=None,
):
    """Continues prompts.

    Args:
        llm, processor: `DivotForCausalLM` and `DivotProcessor`.
        input_ids, attention_mask: (batch, length), padded on the left.
        video_features: features of all clips in the prompts in reading order.
        stop_tokens: tokens (strings) besides `</s>` that end a text.
        max_new_tokens, do_sample, temperature, top_p: sampling; the defaults are those of the released scripts.
        generator: one, or one per prompt (a text then does not depend on the batch it is in).
        streamer: gets tokens as they come (a streamer of transformers; one prompt only).

    Returns:
        One list of new ids per prompt, up to and with the token that ended it.
    """
    device, _ = placement(llm)
    ends = [
        processor.tokenizer.eos_token_id,
        *(processor.tokenizer.convert_tokens_to_ids(token) for token in stop_tokens),
    ]
    processors = LogitsProcessorList([DivotFrameTokenLogitsProcessor.from_config(llm.config)])
    length = input_ids.shape[1]
    if do_sample:
        processors += [
            TemperatureLogitsWarper(float(temperature)),
            TopPLogitsWarper(float(top_p)),
            GeneratorSamplingLogitsProcessor(generator, length, ends),
        ]
    output = llm.generate(
        input_ids.to(device),
        GenerationConfig(
            do_sample=False,  # sampling happens in the last logits processor
            temperature=1.0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            pad_token_id=processor.tokenizer.pad_token_id,
            bos_token_id=processor.tokenizer.bos_token_id,
        ),
        attention_mask=attention_mask.to(device),
        video_features=video_features.to(device) if video_features is not None else None,
        logits_processor=processors,
        streamer=streamer,
    )
    rows = []
    for row in output[:, length:].tolist():
        last = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        rows.append(row[: last + 1])
    return rows


def pad_rows(rows, pad_token_id):
    """Lists of ids -> (input_ids, attention_mask), (batch, longest), padded on the left."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[pad_token_id] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def unpadded_rows(input_ids, attention_mask):
    """The inverse of `pad_rows`."""
    return [ids[mask != 0].tolist() for ids, mask in zip(input_ids, attention_mask)]
