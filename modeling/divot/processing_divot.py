"""Text, videos and images for Divot-LLM: the extended tokenizer, prompts and chat format."""

import json
import re
from pathlib import Path

import torch
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerFast, ProcessorMixin
from transformers.tokenization_utils_base import AddedToken

from ...errors import CheckpointError
from .video_processing_divot import DivotVideoProcessor

TAGS = {
    "image_start": "<img>",
    "image_end": "</img>",
    "video_start": "<vid>",
    "video_end": "</vid>",
    "frame_start": "<frame>",
    "frame_end": "</frame>",
}
NUM_FRAME_TOKENS = 256  # in the vocabulary; a clip uses the first 64
VIDEO_PLACEHOLDER, IMAGE_PLACEHOLDER = "<video>", "<image>"


def frame_tokens(count):
    """`<frame_00000>`, `<frame_00001>`, ..."""
    return [f"<frame_{i:05d}>" for i in range(count)]


# Turns as the model was tuned with: no end-of-text between turns, one at the very end.
CHAT_TEMPLATE = (
    "{%- macro render(content) -%}"
    "{%- if content is string -%}{{ content }}"
    "{%- else -%}"
    "{%- for block in content -%}"
    "{%- if block['type'] == 'video' -%}{{ '<video>' }}"
    "{%- elif block['type'] == 'image' -%}{{ '<image>' }}"
    "{%- elif block['type'] == 'text' -%}{{ block['text'] }}"
    "{%- else -%}{{ raise_exception('content is text, image or video, not ' + block['type']) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' and loop.index0 % 2 == 0 -%}"
    "{{ ('' if loop.first else '\\n') + '[INST] ' + render(message['content']) + ' [/INST]\\n' }}"
    "{%- elif message['role'] == 'assistant' and loop.index0 % 2 == 1 -%}"
    "{{ render(message['content']) }}"
    "{%- if loop.last and not is_continuation -%}{{ '</s>' }}{%- endif -%}"
    "{%- else -%}"
    "{{ raise_exception('turns alternate between user and assistant, user first; found ' + message['role']) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


def build_divot_tokenizer(folder, num_frame_tokens=NUM_FRAME_TOKENS):
    """Makes Divot's text tokenizer from a Mistral tokenizer, or loads the one its authors released.

    The ids after special tokens are those of the original's slow tokenizer (every piece of text between special tokens
    gets a leading space of its own), and stay so when the result is saved and loaded again.

    Args:
        folder: folder with Mistral's `tokenizer.model` (or that file itself), or with a `tokenizer.json`. When it also
            describes added tokens (`added_tokens.json` or `tokenizer_config.json`), their ids are kept; otherwise the
            tags and frame tokens get the ids behind the last one.
        num_frame_tokens: number of frame tokens to add.

    Returns:
        A fast tokenizer that puts `<s>` in front and pads with `<unk>` on the left.

    Raises:
        CheckpointError: files that are missing, damaged, or describe other added tokens.
    """
    folder = Path(folder)
    model = folder if folder.is_file() else folder / "tokenizer.model"
    if model.is_file():
        from ...conversion.sentencepiece_llama import llama_tokenizer_from_sentencepiece

        tokenizer = llama_tokenizer_from_sentencepiece(model, pad_token="<unk>", padding_side="left")
        added = _stored_added_tokens(folder, len(tokenizer)) if folder.is_dir() else None
    elif (folder / "tokenizer.json").is_file():
        tokenizer, added = AutoTokenizer.from_pretrained(folder, padding_side="left"), None
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise CheckpointError(f"{folder}: tokenizer.json does not hold a fast tokenizer")
    else:
        raise CheckpointError(f"{folder}: has neither tokenizer.model nor tokenizer.json of a Mistral tokenizer")
    wanted = [*TAGS.values(), *frame_tokens(num_frame_tokens)]
    present = tokenizer.get_vocab()
    if added is None:
        added = [] if wanted[len(TAGS)] in present else [token for token in wanted if token not in present]
    tokens = [AddedToken(t, normalized=False, special=t in TAGS.values()) for t in added]
    tokenizer.add_tokens(tokens)
    tokenizer.add_special_tokens({"additional_special_tokens": list(TAGS.values())})
    vocabulary = tokenizer.get_vocab()
    if lacking := [token for token in wanted[: len(TAGS) + 1] if token not in vocabulary]:
        raise CheckpointError(f"{folder}: the tokenizer lacks {', '.join(lacking[:4])} (of {len(lacking)} tokens)")
    _prepend_bos(tokenizer)
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def _prepend_bos(tokenizer):
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
    )


def _stored_added_tokens(folder, base_size):
    """Added tokens of a stored tokenizer in the order of their ids, or None."""
    ids = {}
    if (folder / "added_tokens.json").is_file():
        ids = json.loads((folder / "added_tokens.json").read_text())
    elif (folder / "tokenizer_config.json").is_file():
        described = json.loads((folder / "tokenizer_config.json").read_text()).get("added_tokens_decoder", {})
        ids = {entry["content"]: int(i) for i, entry in described.items()}
    ids = {token: i for token, i in ids.items() if i >= base_size}
    if ids and sorted(ids.values()) != list(range(base_size, base_size + len(ids))):
        raise CheckpointError(f"{folder}: the ids of the added tokens do not follow those of tokenizer.model")
    return sorted(ids, key=ids.get) or None


class DivotProcessor(ProcessorMixin):
    r"""Prepares text, videos and images for `DivotForCausalLM`, and reads what it writes.

    In text, `<video>` and `<image>` stand for a video and an image. They become runs of frame tokens, one run per clip,
    whose embeddings the model replaces by the features of `DivotTokenizerModel`.

    Args:
        tokenizer: Mistral's tokenizer with the tags and frame tokens (`build_divot_tokenizer`).
        video_processor: `DivotVideoProcessor`; default: the released settings.
        chat_template: Jinja template of `apply_chat_template`; default: the format the model was tuned with.
        num_query_tokens: frame tokens per clip.

    Raises:
        ValueError: a tokenizer without the tags and frame tokens.
    """

    def __init__(self, tokenizer=None, video_processor=None, chat_template=None, num_query_tokens=64, **kwargs):
        self.num_query_tokens = num_query_tokens
        if video_processor is None:
            video_processor = DivotVideoProcessor()
        super().__init__(tokenizer, video_processor, chat_template=chat_template or CHAT_TEMPLATE)
        vocabulary = tokenizer.get_vocab()
        lacking = [t for t in (*TAGS.values(), *frame_tokens(num_query_tokens)) if t not in vocabulary]
        if lacking:
            raise ValueError(
                f"the tokenizer lacks {', '.join(lacking[:4])} (of {len(lacking)} tokens); extend a Mistral tokenizer "
                "with DivotProcessor.from_base_tokenizer(folder)"
            )

    @classmethod
    def from_base_tokenizer(cls, folder, **kwargs):
        """A processor for a folder with a Mistral tokenizer (see `build_divot_tokenizer`)."""
        return cls(build_divot_tokenizer(folder), **kwargs)

    # ---- ids ---------------------------------------------------------------------------------------------------------

    def token_ids(self):
        """The arguments of `DivotConfig` that depend on the tokenizer."""
        convert = self.tokenizer.convert_tokens_to_ids
        ids = {f"{name}_token_id": convert(tag) for name, tag in TAGS.items()}
        return ids | {"query_token_ids": convert(frame_tokens(self.num_query_tokens))}

    def frame_token_ids(self):
        """Ids of `<frame>`, `</frame>` and all frame tokens: what stands for a clip in text."""
        vocabulary = self.tokenizer.get_vocab()
        frames = [token for token in frame_tokens(NUM_FRAME_TOKENS) if token in vocabulary]
        return self.tokenizer.convert_tokens_to_ids([TAGS["frame_start"], *frames, TAGS["frame_end"]])

    def unwritten_token_ids(self):
        """Ids that texts are shown without: tags, frame tokens, beginning and end."""
        tags = self.tokenizer.convert_tokens_to_ids(list(TAGS.values()))
        return {*tags, *self.frame_token_ids(), *self.tokenizer.all_special_ids}

    def find_reserved(self, text):
        """What a text holds of placeholders, tags, frame tokens and other tokens that are not text."""
        reserved = (VIDEO_PLACEHOLDER, IMAGE_PLACEHOLDER, *TAGS.values(), *self.tokenizer.all_special_tokens)
        found = [mark for mark in dict.fromkeys(reserved) if mark in text]
        return found + re.findall(r"<frame_\d{5}>", text)

    def check_model(self, config):
        """Raises ValueError when the vocabulary of a model (its `DivotConfig`) is not that of this tokenizer."""
        size = config.get_text_config().vocab_size
        if len(self.tokenizer) != size:
            raise ValueError(
                f"the tokenizer has {len(self.tokenizer)} tokens, the model {size}; use the processor saved with it"
            )
        different = [
            name
            for name, ids in self.token_ids().items()
            if (list(getattr(config, name)) if isinstance(ids, list) else getattr(config, name)) != ids
        ]
        if different:
            raise ValueError(
                f"tokenizer and model disagree on {', '.join(different)}; use the processor saved with the model"
            )

    def clip_text(self, num_clips, kind="video"):
        """The text of a video of `num_clips` clips (or of an image)."""
        start, end = (
            (TAGS["video_start"], TAGS["video_end"]) if kind == "video" else (TAGS["image_start"], TAGS["image_end"])
        )
        return start + num_clips * f"{self.query_text()}{TAGS['frame_end']}" + end

    def query_text(self):
        """What asks the model for a clip: `<frame>` and the frame tokens, with nothing after them."""
        return TAGS["frame_start"] + "".join(frame_tokens(self.num_query_tokens))

    def with_queries(self, input_ids, attention_mask=None):
        """Appends what asks for a clip to prompts that end with `<vid>` or `<img>`.

        Args:
            input_ids, attention_mask: (batch, length), padded on the left.

        Returns:
            BatchFeature with `input_ids` and `attention_mask` (batch, length + 1 + num_query_tokens); the queries are
            marked -1.

        Raises:
            ValueError: a prompt that does not end with the tag.
        """
        ids = self.token_ids()
        openers = input_ids.new_tensor([ids["video_start_token_id"], ids["image_start_token_id"]])
        if not bool(torch.isin(input_ids[:, -1], openers).all()):
            raise ValueError("a prompt that asks for a clip must end with <vid> or <img> (padding goes on the left)")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        suffix = input_ids.new_tensor([ids["frame_start_token_id"], *ids["query_token_ids"]])
        marks = mask.new_tensor([1] + [-1] * self.num_query_tokens)
        return BatchFeature(
            {
                "input_ids": torch.cat([input_ids, suffix.expand(len(input_ids), -1)], dim=1),
                "attention_mask": torch.cat([mask, marks.expand(len(mask), -1)], dim=1),
            }
        )

    # ---- prompts -----------------------------------------------------------------------------------------------------

    @staticmethod
    def comprehension_prompt(question, kind="video"):
        """Prompt of a question about one video or image (`kind`)."""
        return f"[INST] <{kind}>{question} [/INST]\n"

    @staticmethod
    def generation_prompt(caption, kind="video"):
        """Prompt that asks for a video or an image (`kind`) of `caption`."""
        return f"[INST] Generate {'a video' if kind == 'video' else 'an image'} of {caption} [/INST]\n"

    @staticmethod
    def story_prompt(instruction):
        """Prompt of a story, for example "Generate a story about a visit to the dentist."."""
        return f"[INST] {instruction} [/INST]\n"

    # ---- inputs ------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        text=None,
        videos=None,
        images=None,
        *,
        num_clips=None,
        video_fps=None,
        clip_selection=None,
        max_clips=None,
        padding=True,
        add_special_tokens=True,
        return_tensors="pt",
    ):
        """Prepares prompts.

        Args:
            text: one prompt or a list. Without text, only the videos or images are prepared.
            videos: the videos of all `<video>` in reading order: one, or a list (what they may be: see
                `DivotVideoProcessor`).
            images: the images of all `<image>` in reading order.
            num_clips: instead of videos and images, when their features are at hand: clips of every placeholder in
                reading order.
            video_fps, clip_selection, max_clips: see `DivotVideoProcessor`.
            padding: pad prompts to the longest (on the left).
            add_special_tokens: begin prompts with `<s>`.
            return_tensors: "pt", or None for lists.

        Returns:
            BatchFeature with `input_ids` and `attention_mask` (batch, length), and, for videos and images,
            `pixel_values_videos` (clips of all in reading order, 5, 3, size, size) and `num_clips` (one number per
            video or image).

        Raises:
            ValueError: placeholders and videos that do not match in number. Others as `DivotVideoProcessor`.
        """
        if text is None and videos is None and images is None:
            raise ValueError("give text, videos or images")
        if num_clips is not None and (videos is not None or images is not None):
            raise ValueError("give videos and images, or num_clips, not both")
        single = isinstance(text, str)
        prompts = [text] if single else list(text) if text is not None else None
        options = {"video_fps": video_fps, "clip_selection": clip_selection, "max_clips": max_clips}
        data, media = {}, {}
        for kind, given in (("video", videos), ("image", images)):
            media[kind] = self._prepare_media(kind, given, options)
        if prompts is not None:
            order = [kind for prompt in prompts for kind in self._placeholders(prompt)]
        else:
            order = ["video"] * len(media["video"]) + ["image"] * len(media["image"])
        if num_clips is not None:
            counts = [int(count) for count in num_clips]
            if len(counts) != len(order) or min(counts, default=1) < 1:
                raise ValueError(f"num_clips={counts} does not fit {len(order)} <video> and <image> in the text")
        else:
            for kind, prepared in media.items():
                if order.count(kind) != len(prepared):
                    raise ValueError(
                        f"the text has {order.count(kind)} <{kind}>, but {len(prepared)} {kind}s were given"
                    )
            queues = {kind: iter(prepared) for kind, prepared in media.items()}
            clips = [next(queues[kind]) for kind in order]
            counts = [len(clip) for clip in clips]
            if clips:
                data = {"pixel_values_videos": torch.cat(clips), "num_clips": torch.tensor(counts)}
        if prompts is not None:
            remaining = iter(counts)
            expanded = [self._expand(prompt, remaining) for prompt in prompts]
            encoded = self.tokenizer(
                expanded,
                padding=padding,
                padding_side="left",
                add_special_tokens=add_special_tokens,
                return_tensors=return_tensors,
                return_token_type_ids=False,
            )
            data = {**encoded, **data}
        return BatchFeature(data)

    def _prepare_media(self, kind, given, options):
        """Clips of every video or image, each (num_clips, 5, 3, size, size)."""
        if given is None or (isinstance(given, (list, tuple)) and len(given) == 0):
            return []
        if kind == "video":
            prepared = self.video_processor(given, **options)
        else:
            prepared = self.video_processor(images=given)
        return list(prepared["pixel_values_videos"].split(prepared["num_clips"].tolist()))

    @staticmethod
    def _split(prompt):
        """Text and placeholders of a prompt, alternating."""
        parts, rest = [], prompt
        while True:
            found = [(rest.find(mark), mark) for mark in (VIDEO_PLACEHOLDER, IMAGE_PLACEHOLDER) if mark in rest]
            if not found:
                return [*parts, rest]
            position, mark = min(found)
            parts += [rest[:position], mark]
            rest = rest[position + len(mark) :]

    def _placeholders(self, prompt):
        return ["video" if mark == VIDEO_PLACEHOLDER else "image" for mark in self._split(prompt)[1::2]]

    def _expand(self, prompt, counts):
        parts = self._split(prompt)
        for i in range(1, len(parts), 2):
            parts[i] = self.clip_text(next(counts), "video" if parts[i] == VIDEO_PLACEHOLDER else "image")
        return "".join(parts)

    def apply_chat_template(self, conversation, chat_template=None, tokenize=False, **kwargs):
        """Renders one conversation or a list of them.

        Contents are strings, or lists of {"type": "text", "text": ...}, {"type": "video", "video": ...} and {"type":
        "image", "image": ...}; what a video or image may be: see `DivotVideoProcessor`.

        Args:
            conversation: list of messages with "role" and "content", or a list of such lists.
            chat_template: another template.
            tokenize: prepare videos, images and ids (as `__call__`) instead of returning text.
            kwargs: of the template, or with `tokenize` also of `__call__`.

        Returns:
            str or list of str; with `tokenize` a BatchFeature.

        Raises:
            ValueError: no messages, messages of another form, or turns the template does not know.
        """
        batched = len(conversation) > 0 and isinstance(conversation[0], (list, tuple))
        conversations = conversation if batched else [conversation]
        self.check_conversations(conversations)
        names = ("num_clips", "video_fps", "clip_selection", "max_clips", "padding", "return_tensors")
        options = {name: kwargs.pop(name) for name in names if name in kwargs}
        kwargs.pop("return_dict", None)
        kwargs = {"add_generation_prompt": False, "continue_final_message": False} | kwargs
        final = kwargs.pop("continue_final_message")
        kwargs.pop("add_generation_prompt")  # a user's turn already ends with what makes the model answer
        rendered = [self._render(messages, chat_template, final, kwargs) for messages in conversations]
        if not tokenize:
            return rendered if batched else rendered[0]
        media = {"video": [], "image": []}
        for message in (message for messages in conversations for message in messages):
            for block in message["content"] if not isinstance(message["content"], str) else ():
                if block["type"] in media and options.get("num_clips") is None:
                    if block.get(block["type"]) is None:
                        raise ValueError(f'a block of type {block["type"]!r} lacks its "{block["type"]}"')
                    media[block["type"]].append(block[block["type"]])
        return self(rendered, videos=media["video"] or None, images=media["image"] or None, **options)

    @staticmethod
    def check_conversations(conversations):
        """Raises ValueError for conversations that are not lists of messages as `apply_chat_template` takes them."""
        for messages in conversations:
            if not messages:
                raise ValueError("a conversation is empty")
            for message in messages:
                if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                    raise ValueError('a message is a dictionary with "role" ("user" or "assistant") and "content"')
                content = message.get("content")
                if not isinstance(content, (str, list, tuple)):
                    raise ValueError(f'the "content" of a message ({message["role"]}) is text or a list of blocks')
                for block in content if not isinstance(content, str) else ():
                    if not isinstance(block, dict) or block.get("type") not in ("text", "image", "video"):
                        kind = block.get("type") if isinstance(block, dict) else type(block).__name__
                        raise ValueError(f"content is text, image or video, not {kind}")
                    if block["type"] == "text" and not isinstance(block.get("text"), str):
                        raise ValueError('a block of type "text" lacks its "text"')

    def _render(self, messages, chat_template, continue_final_message, kwargs):
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                [messages],
                chat_template=chat_template or self.chat_template,
                add_generation_prompt=False,
                **(kwargs | {"continue_final_message": False, "is_continuation": continue_final_message}),
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        return rendered[0]

    # ---- outputs -----------------------------------------------------------------------------------------------------

    def post_process_text(self, generated_ids):
        """Generated ids (batch, length) -> texts without tags, frame tokens and surrounding space."""
        unwanted = self.unwritten_token_ids()
        rows = generated_ids.tolist() if isinstance(generated_ids, torch.Tensor) else generated_ids
        kept = [[i for i in row if i not in unwanted] for row in rows]
        return [self.tokenizer.decode(row).strip() for row in kept]

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", "pixel_values_videos"]


__all__ = ["CHAT_TEMPLATE", "DivotProcessor", "build_divot_tokenizer", "frame_tokens"]
