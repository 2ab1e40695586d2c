"""Stories of captioned clips with Divot-LLM (arXiv:2412.04432, section 4.4)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput

from .detokenizing import FRAMES_PER_SECOND
from .language import as_texts, check_sampling, unpadded_rows
from .pipeline_divot_text_to_video import DivotTextToVideoPipeline


@dataclass
class DivotStoryClip(BaseOutput):
    """A clip of a story.

    Attributes:
        caption: what the model wrote before the clip.
        frames: one video in the form `output_type` asks for (see `DivotVideoOutput`).
        features: (num_features, feature_dim), what the frames were made from.
    """

    caption: str
    frames: Any
    features: torch.Tensor


@dataclass
class DivotStoryOutput(BaseOutput):
    """What `DivotStoryPipeline` returns.

    Attributes:
        stories: one list of `DivotStoryClip` per instruction.
        endings: what the model wrote after the last clip of each story, "" if nothing.
        fps: frames per second of the clips.
    """

    stories: list[list[DivotStoryClip]]
    endings: list[str]
    fps: float = FRAMES_PER_SECOND


class DivotStoryPipeline(DivotTextToVideoPipeline):
    r"""Tells stories: text and clips take turns.

    The language model writes text until it opens a video, then the features of the clip; these are put back into the
    text as a clip it has seen, and it goes on. The authors describe this with a model tuned on one animated series and
    released neither those weights nor their prompt format, so the format is this project's: that of single clips,
    continued. Components as for `DivotTextToVideoPipeline`.
    """

    @torch.no_grad()
    def __call__(
        self,
        instruction: str | Sequence[str],
        *,
        max_clips: int = 4,
        min_clips: int = 1,
        max_new_tokens: int = 256,
        do_sample: bool = True,
        temperature: float = 0.7,
        top_p: float = 0.5,
        feature_sampling: str = "mixture",
        var_scale: float | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.7,
        eta: float = 1.0,
        fs: int | None = None,
        num_frames: int = 16,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        unconditional_features: torch.Tensor | None = None,
        clip_batch_size: int = 4,
        decode_chunk_size: int = 4,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> DivotStoryOutput | tuple:
        """Tells stories.

        Args:
            instruction: for example "Generate a story about a visit to the dentist.", one or a list.
            max_clips: a story ends after so many clips at the latest.
            min_clips: a story that ends earlier gets another clip all the same.
            max_new_tokens: of every piece of text between clips.
            generator: one, or one per story.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: return `DivotStoryOutput` instead of a tuple.

        The other arguments are those of `DivotTextToVideoPipeline`.

        Returns:
            `DivotStoryOutput`.

        Raises:
            ValueError: arguments that do not fit.
        """
        instructions = as_texts(instruction, "instruction")
        self.check_inputs(instructions, "video", generator, feature_sampling, var_scale, clip_batch_size)
        check_sampling(max_new_tokens, temperature, top_p)
        self._check_decoding(
            num_inference_steps=num_inference_steps,
            output_type=output_type,
            unconditional_features=unconditional_features,
            num_frames=num_frames,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            eta=eta,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        if not 1 <= min_clips <= max_clips:
            raise ValueError(f"min_clips={min_clips} and max_clips={max_clips} must be 1 <= min_clips <= max_clips")
        if guidance_scale != 1.0 and unconditional_features is None:
            unconditional_features = self.video_tokenizer.unconditional_features(self.processor.video_processor.size)

        stories, endings = [], []
        for i, text in enumerate(instructions):
            source = generator[i] if isinstance(generator, (list, tuple)) else generator
            captions, features, ending = self.write_story(
                text,
                max_clips=max_clips,
                min_clips=min_clips,
                feature_sampling=feature_sampling,
                var_scale=var_scale,
                max_new_tokens=max_new_tokens,
                do_sample=do_sample,
                temperature=temperature,
                top_p=top_p,
                generator=source,
            )
            frames = self.decode(
                features,
                generator=source,
                unconditional_features=unconditional_features,
                clip_batch_size=clip_batch_size,
                output_type=output_type,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                guidance_rescale=guidance_rescale,
                eta=eta,
                fs=fs,
                num_frames=num_frames,
                decode_chunk_size=decode_chunk_size,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            )
            stories.append([DivotStoryClip(*clip) for clip in zip(captions, frames, features)])
            endings.append(ending)
        self.maybe_free_model_hooks()
        if not return_dict:
            return stories, endings
        return DivotStoryOutput(stories=stories, endings=endings)

    @torch.no_grad()
    def write_story(
        self,
        instruction: str,
        *,
        max_clips: int = 4,
        min_clips: int = 1,
        feature_sampling: str = "mixture",
        var_scale: float | None = None,
        generator: torch.Generator | None = None,
        **sampling,
    ):
        """The language model's part of one story.

        Returns:
            (captions, features (num_clips, num_features, feature_dim), text after the last clip).
        """
        inputs = self.processor(self.processor.story_prompt(instruction))
        row = unpadded_rows(inputs["input_ids"], inputs["attention_mask"])[0]
        tokenizer = self.processor.tokenizer
        clip = tokenizer(self.processor.clip_text(1), add_special_tokens=False)["input_ids"]
        captions, clips = [], []
        for number in range(max_clips):
            seen = torch.cat(clips) if clips else None
            opened, written = self.open_clips([row], seen, force=[number < min_clips], generator=generator, **sampling)
            caption = self.processor.post_process_text(written)[0]
            if opened[0] is None:
                return captions, torch.cat(clips), caption
            captions.append(caption)
            clips.append(
                self.write_clips(
                    opened, seen, feature_sampling=feature_sampling, var_scale=var_scale, generator=generator
                )
            )
            # The opening tag is already there.
            row = opened[0] + clip[1:]
        return captions, torch.cat(clips), ""
