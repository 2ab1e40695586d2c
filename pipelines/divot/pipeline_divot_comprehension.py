"""Questions about videos and images, answered by Divot-LLM (arXiv:2412.04432)."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from ...modeling.divot.modeling_divot import DivotForCausalLM
from ...modeling.divot.modeling_divot_tokenizer import DivotTokenizerModel
from ...modeling.divot.processing_divot import DivotProcessor
from .language import AnswerStreamer, as_texts, check_sampling, encode_clips, generate_text


@dataclass
class DivotTextOutput(BaseOutput):
    """What `DivotComprehensionPipeline` returns.

    Attributes:
        texts: one string per question or conversation.
        token_ids: the new ids of each, with the token that ended it.
        features: features of all clips, (num_clips, num_features, feature_dim), to pass with the next question; None
            when there was nothing to see.
        num_clips: clips of every video and image, in the same order.
    """

    texts: list[str]
    token_ids: list[list[int]]
    features: torch.Tensor | None = None
    num_clips: list[int] | None = None


class DivotComprehensionPipeline(DiffusionPipeline):
    r"""Answers questions about videos and images.

    Args:
        processor (`DivotProcessor`): prepares text, videos and images.
        video_tokenizer (`DivotTokenizerModel`): frames to features.
        llm (`DivotForCausalLM`): reads features and writes text; use the weights tuned for comprehension.

    Raises:
        ValueError: a tokenizer whose vocabulary is not the language model's.
    """

    model_cpu_offload_seq = "video_tokenizer->llm"

    def __init__(self, processor: DivotProcessor, video_tokenizer: DivotTokenizerModel, llm: DivotForCausalLM):
        super().__init__()
        if processor is not None and llm is not None:
            processor.check_model(llm.config)
        self.register_modules(processor=processor, video_tokenizer=video_tokenizer, llm=llm)

    @classmethod
    def from_parts(cls, llm, tokenizer, **options):
        """The pipeline over two folders (or Hub repositories) as conversion writes them.

        Args:
            llm: of the language model and its processor.
            tokenizer: of the video tokenizer.
            options: of both models' `from_pretrained`, for example `dtype=torch.bfloat16`.
        """
        return cls(
            processor=DivotProcessor.from_pretrained(llm),
            video_tokenizer=DivotTokenizerModel.from_pretrained(tokenizer, **options).eval(),
            llm=DivotForCausalLM.from_pretrained(llm, **options).eval(),
        )

    def check_inputs(self, question, video, image, messages, features, num_clips, instruct):
        """Raises ValueError for inputs that contradict each other."""
        if (features is None) != (num_clips is None):
            raise ValueError("features need num_clips (clips of every video), and the other way round")
        if features is not None and (video is not None or image is not None):
            raise ValueError("give a video, an image, or features of one, not several")
        if messages is not None:
            if any(value is not None for value in (question, video, image)):
                raise ValueError("messages hold their questions, videos and images themselves")
            conversations = messages if messages and isinstance(messages[0], (list, tuple)) else [messages]
            if not all(conversations):
                raise ValueError("messages are empty")
            self.processor.check_conversations(conversations)
            if any(conversation[-1]["role"] != "user" for conversation in conversations):
                raise ValueError("messages must end with the user's turn, which is then answered")
            return
        if instruct and not question:
            raise ValueError(
                "no question given; for a description by a model without instruction tuning pass instruct=False"
            )
        if not instruct and question is not None:
            raise ValueError("instruct=False continues the video alone and takes no question")
        for text in as_texts(question, "question") if instruct else ():
            if found := self.processor.find_reserved(text):
                raise ValueError(f"a question is plain text, without {found[0]}; the video is put in front of it")
        if (video is not None) + (image is not None) + (features is not None) != 1:
            raise ValueError("a question needs a video, an image, or features with num_clips")

    def encode_video(
        self, video=None, *, image=None, video_fps=None, clip_selection=None, max_clips=None, clip_batch_size=4
    ):
        """Videos or images -> (features (clips of all, num_features, feature_dim), list of clips per video), to ask
        several questions about them. Arguments as for the call."""
        inputs = self.processor(
            videos=video, images=image, video_fps=video_fps, clip_selection=clip_selection, max_clips=max_clips
        )
        features = self._encode(inputs["pixel_values_videos"], clip_batch_size)
        self.maybe_free_model_hooks()
        return features, inputs["num_clips"].tolist()

    def _encode(self, pixels, clip_batch_size):
        return encode_clips(self.video_tokenizer, pixels, clip_batch_size, self.progress_bar)

    @torch.no_grad()
    def __call__(
        self,
        question: str | Sequence[str] | None = None,
        video=None,
        *,
        image=None,
        messages=None,
        features: torch.Tensor | None = None,
        num_clips: Sequence[int] | None = None,
        instruct: bool = True,
        video_fps: float | None = None,
        clip_selection: str | None = None,
        max_clips: int | None = None,
        max_new_tokens: int = 256,
        do_sample: bool = True,
        temperature: float = 0.7,
        top_p: float = 0.5,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        streamer=None,
        clip_batch_size: int = 4,
        return_dict: bool = True,
    ) -> DivotTextOutput | tuple:
        """Answers questions.

        Args:
            question: one or a list.
            video: one video per question, or one for all (see `DivotVideoProcessor` for what a video may be).
            image: instead of videos, images.
            messages: instead of question and video, a conversation or a list of them (see
                `DivotProcessor.apply_chat_template`); may hold several videos, several turns, or only text.
            features, num_clips: instead of videos, what `encode_video` or an earlier call gave.
            instruct: False for the pre-trained weights, which describe a video without being asked.
            video_fps, clip_selection, max_clips: see `DivotVideoProcessor`.
            max_new_tokens, do_sample, temperature, top_p: sampling; the defaults are those of the released scripts.
            generator: one, or one per question.
            streamer: gets tokens as they come (one question only); see also `stream`.
            clip_batch_size: clips encoded at a time.
            return_dict: return `DivotTextOutput` instead of a tuple.

        Returns:
            `DivotTextOutput`.

        Raises:
            ValueError, TypeError: inputs that do not fit. VideoReadError: a file that cannot be read.
        """
        self.check_inputs(question, video, image, messages, features, num_clips, instruct)
        check_sampling(max_new_tokens, temperature, top_p)
        options = {"video_fps": video_fps, "clip_selection": clip_selection, "max_clips": max_clips}
        if messages is not None:
            inputs = self.processor.apply_chat_template(messages, tokenize=True, num_clips=num_clips, **options)
            if "pixel_values_videos" in inputs:
                features, num_clips = self._encode(inputs["pixel_values_videos"], clip_batch_size), inputs["num_clips"]
        else:
            if features is None:
                features, num_clips = self.encode_video(video, image=image, clip_batch_size=clip_batch_size, **options)
            kind = "image" if image is not None else "video"
            inputs, features, num_clips = self._prepare_questions(question, kind, features, list(num_clips), instruct)
        if streamer is not None and len(inputs["input_ids"]) != 1:
            raise ValueError(f"a streamer takes one text at a time, not {len(inputs['input_ids'])}")
        rows = generate_text(
            self.llm,
            self.processor,
            inputs["input_ids"],
            inputs["attention_mask"],
            features,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_p=top_p,
            generator=generator,
            streamer=streamer,
        )
        self.maybe_free_model_hooks()
        texts = self.processor.post_process_text(rows)
        num_clips = [int(count) for count in num_clips] if num_clips is not None else None
        if not return_dict:
            return texts, rows, features, num_clips
        return DivotTextOutput(texts=texts, token_ids=rows, features=features, num_clips=num_clips)

    def _prepare_questions(self, question, kind, features, num_clips, instruct):
        """Ids of all prompts, with one video each; several questions may share the only one."""
        if not instruct:
            prompts = [f"<{kind}>"] * len(num_clips)
        else:
            prompts = [self.processor.comprehension_prompt(text, kind) for text in as_texts(question, "question")]
        if len(num_clips) == 1 and len(prompts) > 1:
            features, num_clips = features.repeat(len(prompts), 1, 1), num_clips * len(prompts)
        if len(prompts) != len(num_clips):
            raise ValueError(f"{len(num_clips)} {kind}s for {len(prompts)} questions; give one, or one per question")
        return self.processor(prompts, num_clips=num_clips), features, num_clips

    def stream(self, *args, **kwargs):
        """Yields the answer to one question piece by piece (arguments as for the call)."""
        streamer = AnswerStreamer(self.processor)
        errors = []

        def answer():
            try:
                self(*args, streamer=streamer, **kwargs)
            except Exception as error:
                errors.append(error)
                streamer.end()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield from (piece for piece in streamer if piece)
        thread.join()
        if errors:
            raise errors[0]
