"""Logits processors for writing text with Divot-LLM."""

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor

from .gmm_divot import gumbel_noise


class DivotFrameTokenLogitsProcessor(LogitsProcessor):
    r"""Keeps the frame tokens of generated text in order.

    After `<frame>`, or one of the frame tokens, the next one of `<frame>, <frame_00000>, ..., </frame>` is forced.
    Anywhere else these tokens are not offered, except `<frame>` itself.

    Args:
        frame_start_token_id, frame_end_token_id: ids of `<frame>` and `</frame>`.
        frame_token_ids: ids of the frame tokens of one block, in order. The authors' scripts pass 100 of them; the
            model was trained with blocks of 64.
        suppressed_score: score of tokens that are not offered. The authors' scripts use 0.0, which does not exclude
            them.
    """

    def __init__(
        self,
        frame_start_token_id: int,
        frame_token_ids: Sequence[int],
        frame_end_token_id: int,
        suppressed_score: float = float("-inf"),
    ):
        self.sequence = [frame_start_token_id, *frame_token_ids, frame_end_token_id]
        self.suppressed_score = suppressed_score

    @classmethod
    def from_config(cls, config):
        """For a `DivotConfig`: blocks of the trained length."""
        return cls(config.frame_start_token_id, config.query_token_ids, config.frame_end_token_id)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        sequence = torch.tensor(self.sequence, device=scores.device)
        forced_score = scores.max(dim=-1, keepdim=True).values + 10.0
        # Which position of the sequence each row ends with; the last one (`</frame>`) forces nothing.
        found = input_ids[:, -1:] == sequence[:-1]
        inside = found.any(-1, keepdim=True)
        following = sequence[found.int().argmax(-1, keepdim=True) + 1]
        forced = scores.scatter(1, following, forced_score)
        free = scores.index_fill(1, sequence[1:], self.suppressed_score)
        return torch.where(inside, forced, free)


class GeneratorSamplingLogitsProcessor(LogitsProcessor):
    r"""Turns greedy decoding into sampling with `torch.Generator`s, which `generate()` does not take.

    Gumbel noise is added to the scores, whose maximum is then distributed as their softmax. With one generator per row,
    a row's text does not depend on the batch it is in. Put it last in the list and decode greedily.

    Args:
        generator: one, or one per row.
        prompt_length: tokens of the (padded) prompt.
        eos_token_ids: rows that have ended with one of these draw nothing more.
    """

    def __init__(self, generator, prompt_length: int, eos_token_ids: Sequence[int] = ()):
        self.generator = generator
        self.prompt_length = prompt_length
        self.eos_token_ids = list(eos_token_ids)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        ends = torch.tensor(self.eos_token_ids, device=input_ids.device, dtype=input_ids.dtype)
        ended = torch.isin(input_ids[:, self.prompt_length :], ends).any(-1).tolist()
        if isinstance(self.generator, (list, tuple)):
            if len(self.generator) != len(scores):
                raise ValueError(f"{len(self.generator)} generators for {len(scores)} rows; give one, or one per row")
            generators = self.generator
        else:
            generators = [self.generator] * len(scores)
        result = scores.float()
        noise = torch.zeros_like(result)
        for row, (generator, done) in enumerate(zip(generators, ended)):
            if not done:
                device = generator.device if generator is not None else result.device
                noise[row] = gumbel_noise(result.shape[1], generator, device).to(result.device)
        return result + noise


__all__ = ["DivotFrameTokenLogitsProcessor", "GeneratorSamplingLogitsProcessor"]
