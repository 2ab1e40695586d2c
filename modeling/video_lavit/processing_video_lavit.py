"""Text, images and videos for Video-LaVIT's language model: placeholders, the chat format, stopping and clean
answers."""

import re

import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.generation import StoppingCriteria

from .image_processing_video_lavit import VideoLavitImageProcessor
from .motion_processing import VideoLavitMotionProcessor

# The answers the model was tuned on end with a backslash and the letter n, written out: not with a line break.
STOP_STRING = "\\n"
SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IGNORE_INDEX = -100

# Vicuna's first format. A real line break follows every placeholder; every answer ends with the stop string and </s>.
CHAT_TEMPLATE = (
    "{%- macro render(content) -%}"
    "{%- if content is string -%}{{ content }}"
    "{%- else -%}"
    "{%- for block in content -%}"
    "{%- if block['type'] == 'image' -%}{{ '<image>\\n' }}"
    "{%- elif block['type'] == 'video' -%}{{ '<video>\\n' }}"
    "{%- elif block['type'] == 'text' -%}{{ block['text'] }}"
    "{%- else -%}{{ raise_exception('content is text, image or video, not ' + block['type']) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{{ render(messages[0]['content']) + ' ' }}{%- set turns = messages[1:] -%}"
    "{%- else -%}"
    "{{ '" + SYSTEM_PROMPT.replace("'", "\\'") + " ' }}{%- set turns = messages -%}"
    "{%- endif -%}"
    "{%- for message in turns -%}"
    "{%- if message['role'] == 'user' and loop.index0 % 2 == 0 -%}"
    "{{ 'USER: ' + render(message['content']) + ' ' }}"
    "{%- elif message['role'] == 'assistant' and loop.index0 % 2 == 1 -%}"
    "{{ 'ASSISTANT: ' + render(message['content']) + ' \\\\n </s>' }}"
    "{%- else -%}"
    "{{ raise_exception('turns alternate, user first, after an optional system message; found ' + message['role']) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)


class VideoLavitProcessor(ProcessorMixin):
    r"""Prepares text, images and videos for [`VideoLavitForCausalLM`] and reads its answers.

    In text, `<image>` and `<video>` stand for an image and a video. The text between them is tokenised piece by piece
    (each with sentencepiece's leading space, as in the original) behind one beginning-of-text id. How many positions
    an image takes is only known inside the model, so a placeholder stays one id here.

    Args:
        tokenizer: LLaMA's tokenizer. The 17,412 ids of codes and marks are no pieces of it.
        chat_template: Jinja template of `apply_chat_template`; default: the Vicuna format the model was tuned with.
        image_token_id, video_token_id: ids of the placeholders, as in the model's configuration.
        image_size: side of the square images and key frames are squashed to, in pixels.
        image_mean, image_std: per channel, for values in [0, 1]; default CLIP's.
        motion_fps: frames per second videos are re-encoded at to find their motion.
        num_motion_frames: motion maps per clip.
        gop_size: distance of key frames in the re-encoded video.
        motion_height, motion_width: size of a motion map in cells.
        max_clips: most clips taken from a video (the authors' examples use 16).
    """

    def __init__(
        self,
        tokenizer,
        chat_template=None,
        image_token_id=49412,
        video_token_id=49413,
        image_size=224,
        image_mean=None,
        image_std=None,
        motion_fps=6,
        num_motion_frames=24,
        gop_size=12,
        motion_height=20,
        motion_width=36,
        max_clips=8,
    ):
        for name, value in (("image_token_id", image_token_id), ("video_token_id", video_token_id)):
            if 0 <= value < len(tokenizer):
                raise ValueError(f"{name} {value} is an id of the tokenizer; choose one outside the vocabulary")
        self.image_token, self.video_token = "<image>", "<video>"
        self.image_token_id, self.video_token_id = image_token_id, video_token_id
        self.image_size, self.image_mean, self.image_std = image_size, image_mean, image_std
        self.motion_fps, self.num_motion_frames, self.gop_size = motion_fps, num_motion_frames, gop_size
        self.motion_height, self.motion_width, self.max_clips = motion_height, motion_width, max_clips
        super().__init__(tokenizer, chat_template=CHAT_TEMPLATE if chat_template is None else chat_template)

    @property
    def images(self):
        """The [`VideoLavitImageProcessor`] with these settings."""
        return VideoLavitImageProcessor(self.image_size, self.image_mean, self.image_std)

    @property
    def videos(self):
        """The [`VideoLavitMotionProcessor`] with these settings."""
        return VideoLavitMotionProcessor(
            fps=self.motion_fps,
            num_frames=self.num_motion_frames,
            gop_size=self.gop_size,
            height=self.motion_height,
            width=self.motion_width,
            max_clips=self.max_clips,
        )

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", "pixel_values", "pixel_values_videos", "motion_values", "num_clips"]

    def __call__(
        self,
        images=None,
        text=None,
        videos=None,
        audio=None,
        *,
        labels_from=None,
        add_special_tokens=True,
        padding=True,
        padding_side="left",
        max_clips=None,
        return_tensors="pt",
        **motion_options,
    ):
        """Prepares one sample or a batch.

        Args:
            images: images in the order of their placeholders: one, a list, or a list of lists (one per sample). An
                image is a path, a PIL image, a uint8 array (height, width, 3) or a tensor (3, height, width).
            text: a string or a list of strings with `<image>` and `<video>` where images and videos belong.
            videos: likewise. A video is a path, a binary file object or `MotionVectors`.
            labels_from: per sample, spans `(start, end)` of characters in the text that are answers to learn; adds
                `labels`.
            add_special_tokens: put one beginning-of-text id in front.
            padding: pad samples to the longest; False needs equal lengths, or `return_tensors=None`.
            padding_side: "left" for generation; "right" for training.
            max_clips: most clips per video instead of the processor's setting.
            return_tensors: "pt", "np", or None for lists.
            motion_options: further arguments of `cinetok.read_motion_vectors` (`start`, `end`, `on_error`).

        Returns:
            BatchFeature with `input_ids`, `attention_mask` (batch, length) and, where given: `pixel_values`
            (num_images, 3, size, size); `pixel_values_videos` (clips of all videos, 3, size, size), `motion_values`
            (clips, 2, num_frames, height, width) and `num_clips` (num_videos,); `labels` (batch, length).

        Raises:
            ValueError: numbers of placeholders and of images or videos differ, or a file cannot be read.
            TypeError: something that is no text, image or video.
        """
        if audio is not None:
            raise ValueError("Video-LaVIT does not hear: leave audio out")
        if text is None:
            raise ValueError("text is needed: a prompt with <image> and <video> where images and videos belong")
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(t, str) for t in texts):
            raise TypeError("text must be a string or a non-empty list of strings")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side {padding_side!r}: choose 'left' or 'right'")
        images = self._in_order("image", self.image_token, images, texts)
        videos = self._in_order("video", self.video_token, videos, texts)

        rows, label_rows = [], []
        for index, sample in enumerate(texts):
            ids, starts = self._encode(sample, add_special_tokens)
            rows.append(ids)
            if labels_from is not None:
                spans = labels_from[index]
                inside = [any(first <= start < last for first, last in spans) for start in starts]
                label_rows.append([i if use else IGNORE_INDEX for i, use in zip(ids, inside)])
        data = self._pad(rows, self._pad_id(), padding_side) if padding else {"input_ids": rows}
        if not padding:
            data["attention_mask"] = [[1] * len(row) for row in rows]
        if labels_from is not None:
            data["labels"] = self._pad(label_rows, IGNORE_INDEX, padding_side)["input_ids"] if padding else label_rows
        if images:
            data["pixel_values"] = self.images(images, return_tensors="pt")["pixel_values"]
        if videos:
            clips = self.videos(videos, max_clips=max_clips, return_tensors="pt", **motion_options)
            data["pixel_values_videos"] = self.images(clips["keyframes"], return_tensors="pt")["pixel_values"]
            data["motion_values"] = clips["motion_values"]
            data["num_clips"] = clips["num_clips"]
        return BatchFeature(data, tensor_type=return_tensors)

    def training_inputs(self, conversations, images=None, videos=None, **options):
        """Inputs and labels of whole conversations; only the assistant's answers (with their end marks) count.

        Args:
            conversations: a list of conversations, each a list of messages as for `apply_chat_template`, ending with
                the assistant's answer. Images and videos come from the messages' content.
            images, videos: given instead of those in the content, if any.
            options: arguments of `__call__`; `padding_side` is "right" by default.

        Returns:
            BatchFeature as of `__call__`, with `labels`.

        Raises:
            ValueError: a conversation without an answer at its end.
        """
        texts, spans, own_images, own_videos = [], [], [], []
        for conversation in conversations:
            if not conversation or conversation[-1]["role"] != "assistant":
                raise ValueError("a conversation to learn from ends with the assistant's answer")
            text = self.apply_chat_template(conversation)
            answers = []
            for turn, message in enumerate(conversation):
                if message["role"] == "assistant":
                    question = self.apply_chat_template(conversation[:turn], add_generation_prompt=True)
                    answers.append((len(question), len(self.apply_chat_template(conversation[: turn + 1]))))
            texts.append(text)
            spans.append(answers)
            own_images.append(_from_content(conversation, "image"))
            own_videos.append(_from_content(conversation, "video"))
        return self(
            text=texts,
            images=own_images if images is None else images,
            videos=own_videos if videos is None else videos,
            labels_from=spans,
            **{"padding_side": "right", **options},
        )

    def encode_prompt(self, text):
        """Ids of a prompt for writing images or motion: text alone, nothing in front (list of integers)."""
        if not isinstance(text, str):
            raise TypeError(f"a prompt is a string, not {type(text).__name__}")
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode_answer(self, token_ids, short=False):
        """One answer as text.

        Args:
            token_ids: 1-D ids of the answer, without the prompt.
            short: also cut at the first line break, full stop, exclamation mark, comma or question mark, as for
                benchmarks that expect a word or two.

        Returns:
            str, cut at the stop string, without white space at its ends.
        """
        ids = [int(i) for i in token_ids]
        text = self.tokenizer.decode([i for i in ids if 0 <= i < len(self.tokenizer)], skip_special_tokens=True)
        text = text.split(STOP_STRING)[0].strip()
        return re.split(r"[\n.!,?]", text)[0].strip() if short else text

    def post_process_answers(self, token_ids, short=False):
        """Answers of a batch as text: list of str. See `decode_answer`; `token_ids` are (batch, length)."""
        return [self.decode_answer(row, short) for row in token_ids]

    def _encode(self, text, add_special_tokens):
        """Ids of a text with placeholders, and the character each begins at (-1 for the one in front)."""
        ids, starts, position = [], [], 0
        if add_special_tokens:
            ids, starts = [self.tokenizer.bos_token_id], [-1]
        for piece in re.split(f"({self.image_token}|{self.video_token})", text):
            if piece == self.image_token or piece == self.video_token:
                ids.append(self.image_token_id if piece == self.image_token else self.video_token_id)
                starts.append(position)
            elif piece:
                encoded = self.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
                ids += encoded["input_ids"]
                starts += [position + start for start, _ in encoded["offset_mapping"]]
            position += len(piece)
        return ids, starts

    def _pad_id(self):
        # The model was tuned with the unknown id as padding; padding is masked, so any id would do.
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.unk_token_id

    @staticmethod
    def _pad(rows, value, padding_side):
        longest = max(len(row) for row in rows)
        fill = [[value] * (longest - len(row)) for row in rows]
        left = padding_side == "left"
        return {
            "input_ids": torch.tensor([f + r if left else r + f for f, r in zip(fill, rows)], dtype=torch.long),
            "attention_mask": torch.tensor(
                [[0] * len(f) + [1] * len(r) if left else [1] * len(r) + [0] * len(f) for f, r in zip(fill, rows)]
            ),
        }

    def _in_order(self, what, token, given, texts):
        """Images or videos of all samples in placeholder order, after checking their numbers."""
        found = [sample.count(token) for sample in texts]
        if given is None:
            given = []
        elif not isinstance(given, (list, tuple)):
            given = [given]
        if any(isinstance(item, (list, tuple)) for item in given):
            given = [list(item) if isinstance(item, (list, tuple)) else [item] for item in given]
            counts = [len(item) for item in given]
            given = [item for sample in given for item in sample]
        else:
            counts = found if len(given) == sum(found) else [len(given)]
        if counts != found:
            raise ValueError(
                f"the text holds {found} {token} placeholder(s) per sample, but {counts} {what}(s) were given"
            )
        return given


def _from_content(conversation, kind):
    """What the messages hold under {"type": kind, kind | "path" | "url": ...}, in order."""
    found = []
    for message in conversation:
        if not isinstance(message["content"], str):
            for block in message["content"]:
                if block["type"] == kind:
                    found += [block[key] for key in (kind, "url", "path") if key in block]
    return found


class StopAtLiteral(StoppingCriteria):
    """Ends a sample's text when the model has written its stop string (a backslash and an n) since the prompt.

    Args:
        tokenizer: to read the ids with.
        prompt_length: columns of `input_ids` that are the prompt (0 where images or videos were spliced in).
        window: how many of the newest ids are looked at per step.
    """

    def __init__(self, tokenizer, prompt_length=0, window=8):
        self.tokenizer, self.prompt_length, self.window = tokenizer, prompt_length, window

    def __call__(self, input_ids, scores, **kwargs):
        newest = input_ids[:, self.prompt_length :][:, -self.window :]
        done = [STOP_STRING in self.tokenizer.decode(row[row < len(self.tokenizer)]) for row in newest]
        return torch.tensor(done, device=input_ids.device)


__all__ = ["CHAT_TEMPLATE", "STOP_STRING", "StopAtLiteral", "VideoLavitProcessor"]
