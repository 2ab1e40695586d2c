"""Writing images and motion with Video-LaVIT's language model: restricted vocabularies and classifier-free guidance.

Both branches of the guidance (with and without the prompt) run in one forward over a batch of twice the size with one
cache; the original ran two models' worth of passes. Per step the order is the original's: log-softmax of both branches
over the full vocabulary, guidance, minimum length, suppressed ids, then temperature, top-k and top-p.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.utils.accelerate_utils import apply_forward_hook
from transformers import DynamicCache, GenerationMixin
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.utils import ModelOutput

from .modeling_visual_tokenizer import check_generator

# The original fills rows that are done with LLaMA's end-of-text id and drops that id from every result.
FILL_TOKEN_ID = 2


@dataclass
class VideoLavitTokenOutput(ModelOutput):
    """Result of [`VideoLavitGenerationMixin.generate_image_tokens`] and of `generate_motion_tokens`.

    Attributes:
        sequences: per sample a 1-D tensor: prompt, opening mark and what was written, without any id 2 (the original's
            filling, which is LLaMA's end of a text).
        new_token_ids: per sample a 1-D tensor: what was written, with its closing mark (if it was reached).
        raw_token_ids: (batch, num_steps), as decoded: rows that are done are filled with id 2.
        scores: (batch, num_steps, vocab_size) processed scores of every step, if asked for; -inf for excluded ids.
    """

    sequences: list | None = None
    new_token_ids: list | None = None
    raw_token_ids: torch.LongTensor | None = None
    scores: torch.FloatTensor | None = None


class VideoLavitGenerationMixin(GenerationMixin):
    """Adds the writing of visual and motion codes to transformers' `generate`."""

    def generate_image_tokens(self, prompts, *, guidance_scale=4.0, max_new_tokens=500, **options):
        """Writes the visual codes of one image per prompt (Video-LaVIT, section 3.3).

        Args:
            prompts: ids per sample: a sequence of 1-D tensors or lists of ids, or a (batch, length) tensor, which is
                padded where `attention_mask` is 0. The mark that opens an image is appended.
            guidance_scale: weight of the prompt; 1 turns guidance off.
            max_new_tokens: at most so many ids (the original takes 500 for a key frame, 200 for a picture).
            options: see `_generate_codes`.

        Returns:
            [`VideoLavitTokenOutput`]; `visual_codes()` turns its `new_token_ids` into codes.
        """
        config = self.config
        return self._generate_codes(
            prompts,
            start=config.image_start_token_id,
            end=config.image_end_token_id,
            # Ids 0, 1 and 2 stay possible, as in the original: they are simply no visual codes.
            suppressed=[(3, config.image_start_token_id), (config.motion_start_token_id, config.num_token_ids)],
            guidance_scale=guidance_scale,
            max_new_tokens=max_new_tokens,
            **options,
        )

    def generate_motion_tokens(self, prompts, *, guidance_scale=7.0, max_new_tokens=500, **options):
        """Writes the motion codes of one clip per prompt.

        Args:
            prompts: ids per sample, everything so far including the closed key frame; the mark that opens motion is
                appended. Otherwise as in `generate_image_tokens`.
            guidance_scale, max_new_tokens, options: as in `generate_image_tokens`. Text-to-video decodes motion
                greedily (`do_sample=False`), image-to-video samples.

        Returns:
            [`VideoLavitTokenOutput`]; `motion_codes()` turns its `new_token_ids` into codes.
        """
        config = self.config
        return self._generate_codes(
            prompts,
            start=config.motion_start_token_id,
            end=config.motion_end_token_id,
            suppressed=[(3, config.motion_start_token_id)],
            guidance_scale=guidance_scale,
            max_new_tokens=max_new_tokens,
            **options,
        )

    @apply_forward_hook
    @torch.no_grad()
    def _generate_codes(
        self,
        prompts,
        *,
        start,
        end,
        suppressed,
        guidance_scale,
        max_new_tokens,
        min_new_tokens=20,
        do_sample=True,
        temperature=1.0,
        top_k=200,
        top_p=1.0,
        attention_mask=None,
        negative_prompts=None,
        generator=None,
        forced_token_ids=None,
        output_scores=False,
        on_step=None,
    ):
        """Guided decoding within a restricted vocabulary.

        Args:
            min_new_tokens: the closing mark is excluded for so many steps.
            do_sample: draw ids; False takes the most probable one.
            temperature, top_k, top_p: applied when drawing; `top_k=None`/0 and `top_p=1.0` turn them off.
            attention_mask: per sample as many numbers as ids in `prompts`; ids with 0 are padding and left out. By
                default all count.
            negative_prompts: ids per sample of the branch without the prompt, complete with the opening mark; by
                default it sees nothing but that mark.
            generator: a `torch.Generator`, or a list with one per sample (then results do not depend on the batch).
            forced_token_ids: (batch, num_steps) ids to follow instead of choosing, for looking at the scores of a given
                continuation.
            output_scores: also return the processed scores.
            on_step: called after every step with the number of steps done.
        """
        device = self.get_input_embeddings().weight.device
        if device.type == "meta":  # weights that are kept elsewhere between calls; their hooks move what they are given
            device = torch.device("cpu")
        prompts = self._clean_prompts(prompts, device, attention_mask)
        prompts = [torch.cat([p, p.new_tensor([start])]) for p in prompts]
        batch_size = len(prompts)
        if max_new_tokens < 1 or min_new_tokens < 0:
            raise ValueError(f"max_new_tokens {max_new_tokens} and min_new_tokens {min_new_tokens}: 1 and 0 or more")
        check_generator(generator, batch_size, f"{batch_size} prompts")
        generators = list(generator) if isinstance(generator, (list, tuple)) else None
        if forced_token_ids is not None:
            if forced_token_ids.ndim != 2 or len(forced_token_ids) != batch_size:
                raise ValueError(
                    f"forced_token_ids {tuple(forced_token_ids.shape)}: expected ({batch_size}, num_steps)"
                )
            max_new_tokens = forced_token_ids.shape[1]

        guided = guidance_scale != 1.0
        rows = list(prompts)
        if guided and negative_prompts is None:
            rows += [prompt[-1:] for prompt in prompts]
        elif guided:
            negative_prompts = self._clean_prompts(negative_prompts, device)
            if len(negative_prompts) != batch_size:
                raise ValueError(f"{len(negative_prompts)} negative prompts for {batch_size} prompts")
            rows += negative_prompts
        self._check_length(max(len(row) for row in rows) + max_new_tokens)
        input_ids, attention_mask = _pad_left(rows)

        vocab_size = self.config.num_token_ids
        excluded = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        for first, last in suppressed:
            excluded[first:last] = True
        warpers = _warpers(temperature, top_k, top_p) if do_sample else []
        unfinished = torch.ones(batch_size, dtype=torch.bool, device=device)
        cache = DynamicCache(config=self.config.text_config)
        new_ids, all_scores = [], []
        for step in range(max_new_tokens):
            outputs = self(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            scores = outputs.logits[:, -1].float().to(device)
            if guided:
                conditional, unconditional = F.log_softmax(scores, dim=-1).chunk(2)
                scores = unconditional + guidance_scale * (conditional - unconditional)
            if step < min_new_tokens:
                scores[:, end] = -torch.inf
            scores = scores.masked_fill(excluded, -torch.inf)
            for warper in warpers:
                scores = warper(None, scores)
            if output_scores:
                all_scores.append(scores)
            if forced_token_ids is not None:
                chosen = forced_token_ids[:, step].to(device)
            else:
                chosen = _choose(scores, do_sample, generators, generator, unfinished)
            new_ids.append(chosen)
            unfinished = unfinished & (chosen != end)
            if on_step is not None:
                on_step(step + 1)
            if forced_token_ids is None and not unfinished.any():
                break
            input_ids = chosen.repeat(2 if guided else 1).unsqueeze(1)
            attention_mask = F.pad(attention_mask, (0, 1), value=1)

        raw = torch.stack(new_ids, dim=1)
        written = [row[row != FILL_TOKEN_ID] for row in raw]
        read = [prompt[prompt != FILL_TOKEN_ID] for prompt in prompts]
        return VideoLavitTokenOutput(
            sequences=[torch.cat([prompt, row]) for prompt, row in zip(read, written)],
            new_token_ids=written,
            raw_token_ids=raw,
            scores=torch.stack(all_scores, dim=1) if output_scores else None,
        )

    def _clean_prompts(self, prompts, device, attention_mask=None):
        if not isinstance(prompts, (Sequence, torch.Tensor)) or isinstance(prompts, str) or len(prompts) == 0:
            raise TypeError("prompts must be a non-empty sequence of ids per sample (tensors or lists of integers)")
        if attention_mask is not None and len(attention_mask) != len(prompts):
            raise ValueError(f"attention_mask has {len(attention_mask)} rows for {len(prompts)} prompts")
        cleaned = []
        for index, prompt in enumerate(prompts):
            prompt = torch.as_tensor(prompt, device=device).long()
            if prompt.ndim != 1:
                raise ValueError(f"prompt {index} has shape {tuple(prompt.shape)}; expected a row of ids")
            if attention_mask is not None:
                mask = torch.as_tensor(attention_mask[index], device=device).bool()
                if mask.shape != prompt.shape:
                    raise ValueError(f"prompt {index} has {len(prompt)} ids, its attention_mask {tuple(mask.shape)}")
                prompt = prompt[mask]
            if len(prompt) and not 0 <= int(prompt.min()) <= int(prompt.max()) < self.config.num_token_ids:
                raise ValueError(
                    f"prompt {index} holds ids outside the vocabulary (0 .. {self.config.num_token_ids - 1})"
                )
            cleaned.append(prompt)
        return cleaned

    def _check_length(self, length):
        limit = self.config.text_config.max_position_embeddings
        if length > limit:
            raise ValueError(
                f"the prompt and the ids to write make {length} positions, more than the language model's {limit}; "
                "shorten the prompt, write fewer clips or lower max_new_tokens"
            )


def _pad_left(rows):
    longest = max(len(row) for row in rows)
    pads = [(longest - len(row), 0) for row in rows]
    ids = torch.stack([F.pad(row, pad, value=FILL_TOKEN_ID) for row, pad in zip(rows, pads)])
    mask = torch.stack([F.pad(torch.ones_like(row), pad) for row, pad in zip(rows, pads)])
    return ids, mask


def _warpers(temperature, top_k, top_p):
    warpers = []
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(TopKLogitsWarper(int(top_k)))
    if top_p is not None and top_p < 1.0:
        warpers.append(TopPLogitsWarper(float(top_p)))
    return warpers


def _choose(scores, do_sample, generators, generator, unfinished):
    """Next ids (batch,). With a generator per sample, one that is done draws nothing more, whatever the others do."""
    if not do_sample:
        chosen = scores.argmax(dim=-1)
    elif generators is None:
        chosen = _draw(scores.softmax(dim=-1), generator)
    else:
        chosen = torch.full_like(unfinished, FILL_TOKEN_ID, dtype=torch.long)
        for row in unfinished.nonzero().flatten().tolist():
            chosen[row] = _draw(scores[row : row + 1].softmax(dim=-1), generators[row])
    return torch.where(unfinished, chosen, FILL_TOKEN_ID)


def _draw(probabilities, generator):
    # A CPU generator serves any device, so that a seed gives the same draws everywhere.
    device = probabilities.device if generator is None else generator.device
    return torch.multinomial(probabilities.to(device), 1, generator=generator).flatten().to(probabilities.device)


def visual_codes(token_ids, config):
    """Visual codes among ids: 1-D integer tensor; marks and text ids are left out.

    Raises:
        ValueError: ids beyond the visual codes (motion, placeholders) are among them.
    """
    token_ids = torch.as_tensor(token_ids).long()
    beyond = token_ids[token_ids >= config.motion_start_token_id]
    if len(beyond):
        raise ValueError(
            f"id {int(beyond[0])} is no visual code ({config.visual_code_offset} .. {config.motion_start_token_id - 1})"
        )
    return token_ids[token_ids >= config.visual_code_offset] - config.visual_code_offset


def motion_codes(token_ids, config, num_codes=135):
    """Exactly `num_codes` motion codes from ids: what is too much is cut, what is missing is code 0 (as in the
    original).

    Args:
        token_ids: 1-D ids as `generate_motion_tokens` writes them; marks and all other ids below are left out.
        num_codes: codes of a clip.

    Raises:
        ValueError: an id lies outside the vocabulary.
    """
    token_ids = torch.as_tensor(token_ids).long()
    outside = token_ids[(token_ids < 0) | (token_ids >= config.num_token_ids)]
    if len(outside):
        raise ValueError(f"id {int(outside[0])} is outside the vocabulary (0 .. {config.num_token_ids - 1})")
    codes = token_ids[token_ids >= config.motion_code_offset][:num_codes] - config.motion_code_offset
    return F.pad(codes, (0, num_codes - len(codes)))


__all__ = ["VideoLavitGenerationMixin", "VideoLavitTokenOutput", "motion_codes", "visual_codes"]
