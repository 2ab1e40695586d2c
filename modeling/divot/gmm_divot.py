"""The Gaussian mixture Divot-LLM predicts for every video feature (arXiv:2412.04432, section 3.3).

Per feature vector of width D: K diagonal Gaussians. The head's output is laid out as K*D means, K*D raw variances and K
mixture logits. Softplus of a raw value is a variance (not a standard deviation).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

SAMPLING_METHODS = ("mixture", "weighted", "mean")

Generators = torch.Generator | Sequence[torch.Generator] | None


def _draw(draw, shape, generator, device):
    """`draw(shape, generator, device)`, sample by sample when there is one generator per sample."""
    if isinstance(generator, (list, tuple)):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} samples; give one, or one per sample")
        return torch.stack([_draw(draw, shape[1:], one, device) for one in generator])
    # Drawn where the generator lives, so that a seed means the same on every device.
    return draw(shape, generator, generator.device if generator is not None else device).to(device)


def _normal(shape, generator, device):
    return torch.randn(shape, generator=generator, device=device)


def gumbel_noise(shape, generator, device):
    """Standard Gumbel noise: the largest of logits plus it is distributed as the softmax of the logits."""
    uniform = torch.rand(shape, generator=generator, device=device)
    # rand may give exactly 0, and rounds to 1 on some devices; both would become infinite.
    exponential = -torch.log(uniform.clamp(min=1e-20, max=1 - 1e-7))
    return -torch.log(exponential)


@dataclass
class DivotGaussianMixture:
    """Mixtures of diagonal Gaussians, one per feature vector; everything is float32.

    Attributes:
        means: (..., num_components, feature_dim).
        variances: (..., num_components, feature_dim), positive.
        weight_logits: (..., num_components).
    """

    means: torch.Tensor
    variances: torch.Tensor
    weight_logits: torch.Tensor

    @classmethod
    def from_parameters(cls, parameters, num_components, feature_dim, min_variance=1e-5):
        """Splits the head's output (..., 2 * num_components * feature_dim + num_components).

        Raises:
            ValueError: another last axis.
        """
        expected = 2 * num_components * feature_dim + num_components
        if parameters.shape[-1] != expected:
            raise ValueError(
                f"mixture parameters have width {parameters.shape[-1]}; {num_components} components of width "
                f"{feature_dim} need {expected}"
            )
        # In half precision the variances of confident components would round to zero.
        means, raw, weights = parameters.float().split(
            [num_components * feature_dim, num_components * feature_dim, num_components], dim=-1
        )
        shape = (num_components, feature_dim)
        variances = F.softplus(raw).clamp(min=min_variance)
        return cls(means.unflatten(-1, shape), variances.unflatten(-1, shape), weights)

    def log_prob(self, targets: torch.Tensor) -> torch.Tensor:
        """Log density of `targets` (..., feature_dim) -> (...)."""
        squared = (targets.float().unsqueeze(-2) - self.means).square() / self.variances
        gaussians = -0.5 * (squared + self.variances.log() + math.log(2 * math.pi)).sum(-1)
        return torch.logsumexp(F.log_softmax(self.weight_logits, dim=-1) + gaussians, dim=-1)

    def nll_per_feature(self, targets: torch.Tensor) -> torch.Tensor:
        """Negative log likelihood of every target (..., feature_dim), divided by the feature width -> (...)."""
        if targets.shape != self.means.shape[:-2] + self.means.shape[-1:]:
            raise ValueError(
                f"targets have shape {tuple(targets.shape)}, the mixtures describe features of shape "
                f"{tuple(self.means.shape[:-2] + self.means.shape[-1:])}"
            )
        return -self.log_prob(targets) / self.means.shape[-1]

    def nll(self, targets: torch.Tensor) -> torch.Tensor:
        """The training loss: `nll_per_feature` averaged over everything."""
        return self.nll_per_feature(targets).mean()

    @property
    def mean(self) -> torch.Tensor:
        """Mean of the mixture, (..., feature_dim)."""
        return (self.weight_logits.softmax(-1).unsqueeze(-1) * self.means).sum(-2)

    def sample(
        self,
        var_scale: float = 1.0,
        generator: Generators = None,
        component: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Draws a component per feature, then from that component with variances times `var_scale`.

        Args:
            var_scale: 1 samples the mixture itself, smaller values stay closer to the components' means.
            generator: one, or one per sample of the first axis.
            component, noise: the draws themselves, (...) integers and (..., feature_dim) standard normal.

        Returns:
            (..., feature_dim).
        """
        if component is None:
            noisy = self.weight_logits + _draw(gumbel_noise, self.weight_logits.shape, generator, self.means.device)
            component = noisy.argmax(-1)
        index = component[..., None, None].expand(*component.shape, 1, self.means.shape[-1])
        means = self.means.gather(-2, index).squeeze(-2)
        variances = self.variances.gather(-2, index).squeeze(-2)
        if noise is None:
            noise = _draw(_normal, means.shape, generator, means.device)
        return means + (var_scale * variances).sqrt() * noise

    def weighted_sample(
        self, var_scale: float = 1.0, generator: Generators = None, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Draws from every component and averages the draws with the mixture weights -> (..., feature_dim).

        `noise` (..., num_components, feature_dim) replaces the draws.
        """
        if noise is None:
            noise = _draw(_normal, self.means.shape, generator, self.means.device)
        draws = self.means + (var_scale * self.variances).sqrt() * noise
        return (self.weight_logits.softmax(-1).unsqueeze(-1) * draws).sum(-2)

    def draw(self, method: str = "mixture", var_scale: float = 1.0, generator: Generators = None) -> torch.Tensor:
        """Features (..., feature_dim) by "mixture" (`sample`), "weighted" (`weighted_sample`) or "mean" (`mean`)."""
        if method not in SAMPLING_METHODS:
            raise ValueError(f"unknown sampling method {method!r}; choose from {', '.join(SAMPLING_METHODS)}")
        if not (math.isfinite(var_scale) and var_scale >= 0):
            raise ValueError(f"var_scale={var_scale} must be a finite number, 0 or larger")
        if method == "mean":
            return self.mean
        return (self.sample if method == "mixture" else self.weighted_sample)(var_scale, generator)


__all__ = ["SAMPLING_METHODS", "DivotGaussianMixture", "gumbel_noise"]
