"""Regularizers of VidTok's latents: finite scalar quantization (arXiv 2309.15505). The Gaussian posterior is diffusers'
`DiagonalGaussianDistribution`, whose clamping and KL are the original's."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# The entropy loss compares positions with codes in blocks of at most this many pairs (64 MB in float32).
_ENTROPY_ELEMENTS = 2**24
_INVERSE_TEMPERATURE = 100.0


class FiniteScalarQuantizer(nn.Module):
    """Rounds every channel to one of `levels[channel]` values; the values of a position, read as digits, are its index.

    Channel 0 is the least significant digit. There are no tensors: the codebook is implicit.

    Args:
        levels: number of values per channel.
        entropy_loss_weight, entropy_loss_annealing_steps, entropy_loss_annealing_factor, commitment_loss_weight: see
            `VidTokConfig`.
    """

    def __init__(
        self,
        levels,
        entropy_loss_weight=0.0,
        entropy_loss_annealing_steps=0,
        entropy_loss_annealing_factor=1.0,
        commitment_loss_weight=0.0,
    ):
        super().__init__()
        self.levels = list(levels)
        self.codebook_size = math.prod(self.levels)
        self.entropy_loss_weight = entropy_loss_weight
        self.entropy_loss_annealing_steps = entropy_loss_annealing_steps
        self.entropy_loss_annealing_factor = entropy_loss_annealing_factor
        self.commitment_loss_weight = commitment_loss_weight

    def bound(self, latents):
        """Squashes latents (..., channels) into the range of their levels, so that rounding gives the digits."""
        levels = latents.new_tensor(self.levels)
        half = (levels - 1) * 1.001 / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0).to(latents.dtype)
        shift = torch.atanh(offset / half)
        return torch.tanh(latents + shift) * half - offset

    def forward(self, latents):
        """Quantizes latents (batch, channels, ...) with straight-through gradients.

        Returns:
            quantized: codes, same shape and dtype; multiples of 1 / (levels // 2) in [-1, 1].
            indices: (batch, ...) int64 in [0, codebook_size).
        """
        # In float32 whatever the precision around: neighbouring codes are as close as half-precision rounding errors.
        with torch.autocast(latents.device.type, enabled=False):
            bounded = self.bound(latents.movedim(1, -1).float())
            digits = bounded + (bounded.round() - bounded).detach()
            codes = digits / self._half_widths(digits)
            indices = self.codes_to_indices(codes)
        return codes.to(latents.dtype).movedim(-1, 1), indices

    def _half_widths(self, like):
        return like.new_tensor([count // 2 for count in self.levels])

    def _basis(self, device):
        basis = [math.prod(self.levels[:channel]) for channel in range(len(self.levels))]
        return torch.tensor(basis, dtype=torch.int64, device=device)

    def codes_to_indices(self, codes):
        """Codes (..., channels) -> indices (...), int64."""
        half_widths = self._half_widths(codes)
        digits = (codes * half_widths + half_widths).round().to(torch.int64)
        return (digits * self._basis(codes.device)).sum(dim=-1)

    def indices_to_codes(self, indices, dtype=torch.float32):
        """Indices (...) -> codes (..., channels).

        Raises:
            ValueError: an index lies outside [0, codebook_size).
        """
        if indices.numel() and not indices.is_meta:
            low, high = indices.min().item(), indices.max().item()
            if low < 0 or high >= self.codebook_size:
                raise ValueError(
                    f"indices must lie in [0, {self.codebook_size}), got values from {low} to {high}: these tokens were "
                    "made by another model"
                )
        levels = torch.tensor(self.levels, dtype=torch.int64, device=indices.device)
        digits = indices.long().unsqueeze(-1).div(self._basis(indices.device), rounding_mode="floor") % levels
        half_widths = torch.tensor([count // 2 for count in self.levels], dtype=torch.int64, device=indices.device)
        return ((digits - half_widths).to(torch.float32) / half_widths).to(dtype)

    def entropy_weight(self, num_steps):
        """Weight of the entropy term after `num_steps` training batches (linear annealing, then constant)."""
        if not self.entropy_loss_annealing_steps:
            return self.entropy_loss_weight
        left = max(self.entropy_loss_annealing_steps - num_steps, 0) / self.entropy_loss_annealing_steps
        start = self.entropy_loss_annealing_factor * self.entropy_loss_weight
        return left * start + (1 - left) * self.entropy_loss_weight

    def aux_loss(self, latents, quantized, num_steps=None):
        """Entropy and commitment loss (scalar) of raw latents and their codes, both (batch, channels, ...).

        The entropy term rewards confident positions and a codebook that is used evenly. It compares the raw, unbounded
        latents with every code, a block of positions at a time and again in the backward pass, so a codebook of 262,144
        entries does not build multi-gigabyte tensors. `num_steps` None stands for the end of the annealing.
        """
        with torch.autocast(latents.device.type, enabled=False):
            raw = latents.movedim(1, -1).float()
            codes = quantized.movedim(1, -1).float()
            weight = self.entropy_weight(self.entropy_loss_annealing_steps if num_steps is None else num_steps)
            loss = raw.new_zeros(())
            if self.entropy_loss_weight > 0:
                loss = loss + weight * self._entropy_term(raw.reshape(-1, raw.shape[-1]))
            if self.commitment_loss_weight > 0:
                loss = loss + self.commitment_loss_weight * F.mse_loss(raw, codes.detach())
            return loss

    def _entropy_term(self, raw):
        """Mean entropy of the positions' code distributions minus the entropy of their mean; raw: (positions, channels)."""
        codebook = self.indices_to_codes(torch.arange(self.codebook_size, device=raw.device))
        block = max(1, _ENTROPY_ELEMENTS // self.codebook_size)
        entropy_sum, probability_sum = 0.0, 0.0
        for part in raw.split(block):
            if torch.is_grad_enabled() and raw.requires_grad:
                entropy, probability = checkpoint(_code_statistics, part, codebook, use_reentrant=False)
            else:
                entropy, probability = _code_statistics(part, codebook)
            entropy_sum, probability_sum = entropy_sum + entropy, probability_sum + probability
        num_positions = raw.shape[0]
        mean_probability = probability_sum / num_positions
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            mean_probability = _average_over_ranks(mean_probability)
        return entropy_sum / num_positions - _entropy(mean_probability)


def _code_statistics(raw, codebook):
    """Summed entropy and summed probabilities (codebook_size,) of some positions' distributions over the codes."""
    probabilities = (2 * _INVERSE_TEMPERATURE * (raw @ codebook.t())).softmax(dim=-1)
    return _entropy(probabilities).sum(), probabilities.sum(dim=0)


def _entropy(probabilities):
    return -(probabilities * probabilities.clamp(min=1e-5).log()).sum(dim=-1)


def _average_over_ranks(values):
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(values) / torch.distributed.get_world_size()
