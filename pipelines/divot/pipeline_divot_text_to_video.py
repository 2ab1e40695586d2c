"""Text to video with Divot-LLM and the Divot de-tokenizer (arXiv:2412.04432)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.utils import logging

from ...modeling.divot.gmm_divot import SAMPLING_METHODS
from ...modeling.divot.modeling_divot import DivotForCausalLM
from ...modeling.divot.modeling_divot_tokenizer import DivotTokenizerModel
from ...modeling.divot.processing_divot import TAGS, DivotProcessor
from ...modeling.divot.resampler_divot import DivotFeatureResampler
from ...modeling.divot.scheduling_divot import DivotDDIMScheduler
from ...modeling.divot.unet_divot import DivotUNet3DConditionModel
from .detokenizing import DivotVideoOutput, check_decoding_inputs, decode_features, placement
from .language import as_texts, check_sampling, generate_text, pad_rows, unpadded_rows

logger = logging.get_logger(__name__)


@dataclass
class DivotTextToVideoOutput(DivotVideoOutput):
    """What `DivotTextToVideoPipeline` returns: the attributes of `DivotVideoOutput`, and

    Attributes:
        texts: what the language model wrote before each clip (usually nothing).
    """

    texts: list[str] | None = None


class DivotTextToVideoPipeline(DiffusionPipeline):
    r"""Writes clips of 16 frames at 8 fps for prompts.

    The language model first writes text until it opens a video, then the features of the clip in one pass, from which
    the de-tokenizer samples frames.

    Args:
        processor (`DivotProcessor`): prepares text.
        llm (`DivotForCausalLM`): prompts to features; use the weights tuned for generation.
        video_tokenizer (`DivotTokenizerModel`): encodes the mid-gray clip that guidance compares with (and, for
            stories, nothing else).
        resampler, unet, vae, scheduler: the de-tokenizer, stage 2 (see `DivotReconstructionPipeline`).

    Raises:
        ValueError: a tokenizer whose vocabulary is not the language model's, or parts that do not fit each other.
    """

    model_cpu_offload_seq = "llm->video_tokenizer->resampler->unet->vae"
    _callback_tensor_inputs = ["latents", "pred_original_sample"]

    def __init__(
        self,
        processor: DivotProcessor,
        llm: DivotForCausalLM,
        video_tokenizer: DivotTokenizerModel,
        resampler: DivotFeatureResampler,
        unet: DivotUNet3DConditionModel,
        vae: AutoencoderKL,
        scheduler: DivotDDIMScheduler,
    ):
        super().__init__()
        if processor is not None and llm is not None:
            processor.check_model(llm.config)
        if llm is not None and resampler is not None:
            ours = (llm.config.num_query_tokens, llm.config.feature_dim)
            theirs = (resampler.config.num_features, resampler.config.feature_dim)
            if ours != theirs:
                raise ValueError(f"the language model writes features {ours}, the de-tokenizer reads {theirs}")
        self.register_modules(
            processor=processor,
            llm=llm,
            video_tokenizer=video_tokenizer,
            resampler=resampler,
            unet=unet,
            vae=vae,
            scheduler=scheduler,
        )

    @classmethod
    def from_parts(cls, llm, detokenizer, **options):
        """The pipeline over two folders (or Hub repositories) as conversion writes them.

        Args:
            llm: of the language model and its processor.
            detokenizer: of the de-tokenizer (a `DivotReconstructionPipeline`), stage 2.
            options: of the models' `from_pretrained`, for example `dtype=torch.bfloat16`.
        """
        from .pipeline_divot_reconstruction import DivotReconstructionPipeline

        parts = dict(DivotReconstructionPipeline.from_pretrained(detokenizer, **options).components)
        parts.pop("video_processor")
        return cls(
            processor=DivotProcessor.from_pretrained(llm),
            llm=DivotForCausalLM.from_pretrained(llm, **options).eval(),
            **parts,
        )

    # ---- language ------------------------------------------------------------------------------------------------

    def open_clips(self, rows, features=None, kind="video", force=None, **sampling):
        """Lets the language model continue texts until each opens a clip.

        Frame tokens that are written outside a clip (they would stand for features that do not exist) are dropped.

        Args:
            rows: ids of the texts so far, one list each.
            features: features of all clips in them, in reading order.
            kind: "video" or "image".
            force: per row, whether a text that ends without opening a clip gets the tag all the same (with a warning).
                Default: all.
            sampling: see `generate_text`.

        Returns:
            (texts that end with the opening tag, or None where a text has ended; the ids written for each).
        """
        opening = TAGS["video_start" if kind == "video" else "image_start"]
        tag, end = self.processor.tokenizer.convert_tokens_to_ids([opening, self.processor.tokenizer.eos_token])
        ids, mask = pad_rows(rows, self.processor.tokenizer.pad_token_id)
        written = generate_text(self.llm, self.processor, ids, mask, features, stop_tokens=[opening], **sampling)
        dropped, opened = {tag, end, *self.processor.frame_token_ids()}, []
        for i, (row, new) in enumerate(zip(rows, written)):
            ended = new[-1] == end
            text = [token for token in new if token not in dropped]
            if new[-1] != tag:
                if ended and force is not None and not force[i]:
                    opened.append(None)
                    continue
                logger.warning(f"text {i} ended without {opening}; it was appended so that a clip can be written")
            opened.append([*row, *text, tag])
        return opened, written

    def write_clips(self, rows, features=None, *, feature_sampling="mixture", var_scale=None, generator=None):
        """Draws the features of the clips that texts ask for.

        Args:
            rows: ids of texts that end with `<vid>` or `<img>`, one list each.
            features: features of all clips in them, in reading order.
            feature_sampling, var_scale: see `DivotForCausalLM.generate_video_features`.
            generator: one, or one per text.

        Returns:
            (batch, num_features, feature_dim), float32.
        """
        device, _ = placement(self.llm)
        inputs = self.processor.with_queries(*pad_rows(rows, self.processor.tokenizer.pad_token_id))
        return self.llm.generate_video_features(
            inputs["input_ids"].to(device),
            inputs["attention_mask"].to(device),
            video_features=features.to(device) if features is not None else None,
            method=feature_sampling,
            var_scale=var_scale,
            generator=generator,
        )

    # ---- video ---------------------------------------------------------------------------------------------------

    def decode(
        self, features, *, generator=None, unconditional_features=None, clip_batch_size=4, output_type="pil", **options
    ):
        """Features (num_clips, num_features, feature_dim) -> frames (see `DivotVideoOutput`).

        Args:
            generator: one, or one per clip.
            unconditional_features: features of a mid-gray clip from an earlier call; computed when absent.
            clip_batch_size: clips sampled at a time.
            output_type: "pil", "np", "pt" or "latent".
            options: see `decode_features`.
        """
        if options.get("guidance_scale", 7.5) != 1.0 and unconditional_features is None:
            unconditional_features = self.video_tokenizer.unconditional_features(self.processor.video_processor.size)
        frames = []
        for start in range(0, len(features), clip_batch_size):
            batch = slice(start, start + clip_batch_size)
            part = generator[batch] if isinstance(generator, (list, tuple)) else generator
            frames.append(
                decode_features(
                    self.unet,
                    self.vae,
                    self.resampler,
                    self.scheduler,
                    features[batch],
                    unconditional_features=unconditional_features,
                    generator=part,
                    output_type=output_type,
                    pipeline=self,
                    **options,
                )
            )
        if output_type == "pil":
            return [video for part in frames for video in part]
        return np.concatenate(frames) if output_type == "np" else torch.cat(frames)

    def check_inputs(self, texts, kind, generator, feature_sampling, var_scale, clip_batch_size):
        """Raises ValueError for inputs that do not fit."""
        if not texts or not all(text.strip() for text in texts):
            raise ValueError("give a prompt, or a list of prompts, that are not empty")
        for text in texts:
            if found := self.processor.find_reserved(text):
                raise ValueError(
                    f"prompts for generation are plain text, without <video>, <image> or other tags; found {found[0]}"
                )
        if kind not in ("video", "image"):
            raise ValueError(f'kind={kind!r}; choose "video" or "image"')
        if isinstance(generator, (list, tuple)) and len(generator) != len(texts):
            raise ValueError(f"{len(generator)} generators for {len(texts)} results; give one, or one per result")
        if feature_sampling not in SAMPLING_METHODS:
            raise ValueError(f"feature_sampling={feature_sampling!r}; choose from {', '.join(SAMPLING_METHODS)}")
        if var_scale is not None and not 0 <= var_scale < float("inf"):
            raise ValueError(f"var_scale={var_scale} must be a finite number, 0 or larger")
        if clip_batch_size < 1:
            raise ValueError(f"clip_batch_size={clip_batch_size} must be at least 1")

    def _check_decoding(self, **options):
        """The de-tokenizer's arguments, before the language model has worked for them."""
        features = torch.zeros(1, self.resampler.config.num_features, self.resampler.config.feature_dim)
        check_decoding_inputs(self.resampler, self.scheduler, features, **options)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        kind: str = "video",
        num_videos_per_prompt: int = 1,
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
    ) -> DivotTextToVideoOutput | tuple:
        """Makes videos.

        Args:
            prompt: what the video shows, one or a list ("a dog runs along the beach").
            kind: "video", or "image" for a clip of a still picture.
            num_videos_per_prompt: videos per prompt, one after another in the result.
            max_new_tokens, do_sample, temperature, top_p: of the text before the clip; released settings.
            feature_sampling, var_scale: how features are drawn (see `DivotForCausalLM.generate_video_features`).
            num_inference_steps, guidance_scale, guidance_rescale, eta, fs, num_frames: of the de-tokenizer (see
                `decode_features`); released settings. A guidance scale of 1 halves the work.
            generator: one, or one per video (a video then does not depend on the batch it is in).
            unconditional_features: features of a mid-gray clip from an earlier call.
            clip_batch_size: clips sampled at a time.
            decode_chunk_size: frames the VAE decodes at a time.
            callback_on_step_end, callback_on_step_end_tensor_inputs: called as (pipeline, step, timestep, tensors)
                after every de-tokenizer step; may return tensors to replace.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: return `DivotTextToVideoOutput` instead of a tuple.

        Returns:
            `DivotTextToVideoOutput`.

        Raises:
            ValueError: arguments that do not fit.
        """
        prompts = as_texts(prompt, "prompt")
        if num_videos_per_prompt < 1:
            raise ValueError(f"num_videos_per_prompt={num_videos_per_prompt} must be at least 1")
        prompts = [text for text in prompts for _ in range(num_videos_per_prompt)]
        self.check_inputs(prompts, kind, generator, feature_sampling, var_scale, clip_batch_size)
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

        inputs = self.processor([self.processor.generation_prompt(text, kind) for text in prompts])
        rows, written = self.open_clips(
            unpadded_rows(inputs["input_ids"], inputs["attention_mask"]),
            kind=kind,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_p=top_p,
            generator=generator,
        )
        features = self.write_clips(rows, feature_sampling=feature_sampling, var_scale=var_scale, generator=generator)
        frames = self.decode(
            features,
            generator=generator,
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
        self.maybe_free_model_hooks()
        texts = self.processor.post_process_text(written)
        if not return_dict:
            return frames, features, texts
        return DivotTextToVideoOutput(frames=frames, features=features, texts=texts)
