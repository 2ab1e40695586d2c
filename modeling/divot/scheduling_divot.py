"""The DDIM sampler of Divot's de-tokenizer.

diffusers' `DDIMScheduler` cannot reproduce it, because the original mixes two noise tables: v is turned into the
predicted sample and noise with the float32 table, while the step itself (alphas, previous alphas, sigmas) uses the
table rounded to float16. The images differ visibly (about 1e-2) when one table is used for both. Its tables are also looked
up by position instead of by timestep, which "quad" spacing visits repeatedly.
"""

import math
import numbers

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

_SPACINGS = ("uniform", "uniform_trailing", "quad")


def divot_betas(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True):
    """Noise schedule in float64: squares of a linear ramp, rescaled so that the last step is pure noise (zero terminal
    signal-to-noise ratio, arXiv:2305.08891, algorithm 1)."""
    betas = np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=np.float64) ** 2
    if not rescale_betas_zero_snr:
        return betas
    signal = np.sqrt(np.cumprod(1.0 - betas))
    signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    squared = signal**2
    return 1.0 - np.concatenate([squared[:1], squared[1:] / squared[:-1]])


def check_eta(eta):
    """Raises ValueError unless `eta` is a number from 0 (deterministic) to 1."""
    if not (isinstance(eta, numbers.Real) and math.isfinite(eta) and 0 <= eta <= 1):
        raise ValueError(f"eta={eta} must be a number from 0 (deterministic) to 1")


class DivotDDIMScheduler(DDIMScheduler):
    """DDIM with v prediction and zero terminal signal-to-noise ratio, as Divot's de-tokenizer samples.

    Args:
        num_train_timesteps: steps of the noise schedule.
        beta_start, beta_end: ends of the schedule before rescaling.
        rescale_betas_zero_snr: make the last step pure noise, as the released weights were trained.
        timestep_spacing: "uniform" (1, 1 + k, 1 + 2k, ... with k = num_train_timesteps // num_inference_steps; the last
            step is never visited), "uniform_trailing" (ends at the last step) or "quad" (denser near 0;
            from 30 steps on the smallest timesteps are visited repeatedly).

    With "uniform" spacing a number of inference steps that does not divide `num_train_timesteps` gives more steps than
    asked for (7 gives 8), as in the original; `timesteps` holds the truth.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        rescale_betas_zero_snr: bool = True,
        timestep_spacing: str = "uniform",
        prediction_type: str = "v_prediction",
    ):
        if timestep_spacing not in _SPACINGS:
            raise ValueError(f"timestep_spacing={timestep_spacing!r}; choose from {', '.join(_SPACINGS)}")
        if prediction_type != "v_prediction":
            raise ValueError(f"prediction_type={prediction_type!r}; Divot's de-tokenizer predicts v ('v_prediction')")
        betas = divot_betas(num_train_timesteps, beta_start, beta_end, rescale_betas_zero_snr)
        self.betas = torch.from_numpy(betas).float()
        self.alphas = torch.from_numpy(1.0 - betas).float()
        self.alphas_cumprod = torch.from_numpy(np.cumprod(1.0 - betas)).float()
        self.init_noise_sigma = 1.0
        self.num_inference_steps = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self._alphas_previous = None
        self._step_index = self._begin_index = None

    @property
    def step_index(self) -> int | None:
        """Position in `timesteps` of the next step; None before the first one."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Position in `timesteps` sampling starts at, if `set_begin_index` was called."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0):
        """Says where in `timesteps` sampling starts. Needed only when it starts at a timestep that is repeated."""
        self._begin_index = begin_index

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None):
        """Chooses the steps of a sampling run; `timesteps` then holds them, noisiest first.

        Raises:
            ValueError: `num_inference_steps` is not an integer between 1 and `num_train_timesteps`.
        """
        total = self.config.num_train_timesteps
        if not isinstance(num_inference_steps, numbers.Integral) or isinstance(num_inference_steps, bool):
            raise ValueError(f"num_inference_steps={num_inference_steps!r} is not an integer")
        if not 1 <= num_inference_steps <= total:
            raise ValueError(f"num_inference_steps={num_inference_steps} is not between 1 and {total}")
        if self.config.timestep_spacing == "uniform":
            steps = np.arange(0, total, total // num_inference_steps) + 1
            # Where the last step would lie beyond the schedule (3, 9, ... steps) the original crashes; it is left out.
            steps = steps[steps < total]
        elif self.config.timestep_spacing == "uniform_trailing":
            steps = np.round(np.arange(total, 0, -total / num_inference_steps))[::-1].astype(np.int64) - 1
            # Rounding gives some numbers (61, 103, ...) a step -1 in front, where the original divides by zero.
            steps = steps[steps >= 0]
        else:
            steps = (np.linspace(0, np.sqrt(total * 0.8), num_inference_steps) ** 2).astype(np.int64) + 1
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.from_numpy(steps[::-1].copy()).to(device)
        previous = np.concatenate([[0], steps[:-1]])[::-1].copy()
        self._alphas_previous = self.alphas_cumprod[torch.from_numpy(previous)].half()
        self._step_index = self._begin_index = None

    def index_for_timestep(self, timestep: int | torch.Tensor) -> int:
        """First position of `timestep` in `timesteps`.

        Raises:
            ValueError: it is not one of them, or `set_timesteps` was not called.
        """
        if self._alphas_previous is None:
            raise ValueError("call `set_timesteps` before sampling")
        found = (self.timesteps == int(timestep)).nonzero()
        if not len(found):
            raise ValueError(f"timestep {int(timestep)} is not one of `timesteps`")
        return int(found[0])

    def step_coefficients(self, timestep: int, eta: float, index: int | None = None) -> tuple[float, float, float]:
        """(alpha_t, alpha_previous, sigma) of one step, from the noise table rounded to float16.

        1 - alpha_t and its reciprocal are rounded to float16 too, everything else is float64 (with a single step:
        float16): this is how numpy and torch happened to mix types in the original, and the released images were
        sampled with it.

        Args:
            timestep: one of `timesteps`.
            eta: 0 is deterministic, 1 the released setting.
            index: its position in `timesteps`, for timesteps that are repeated. Default: the first.

        Raises:
            ValueError: another timestep, or an eta outside [0, 1].
        """
        check_eta(eta)
        index = self.index_for_timestep(timestep) if index is None else index
        alpha, previous = self.alphas_cumprod[timestep].half(), self._alphas_previous[index]
        reciprocal = (1 - alpha).reciprocal()
        number = np.float16 if len(self.timesteps) == 1 else np.float64
        alpha, previous, reciprocal = (number(value.item()) for value in (alpha, previous, reciprocal))
        sigma = float(eta) * np.sqrt(reciprocal * (1 - previous) * (1 - alpha / previous))
        return float(alpha), float(previous), float(sigma)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step of the reverse process. Noise is added at the last step too.

        Args:
            model_output: predicted v, of the shape of `sample`.
            timestep: the current entry of `timesteps`.
            sample: the current noisy latents.
            eta: 0 is deterministic, 1 the released setting.
            generator: draws the noise, one per sample or one for all.
            variance_noise: the noise itself, instead of a generator.
            return_dict: return an output object instead of a tuple.

        Steps are taken in the order of `timesteps`; a timestep that is not the next one is looked up.

        Returns:
            `DDIMSchedulerOutput` with `prev_sample` and `pred_original_sample`.

        Raises:
            ValueError: a timestep that is not one of `timesteps`, or an eta outside [0, 1].
        """
        timestep = int(timestep)
        index = self._begin_index if self._step_index is None else self._step_index
        if index is None or not 0 <= index < len(self.timesteps) or int(self.timesteps[index]) != timestep:
            index = self.index_for_timestep(timestep)
        _, previous, sigma = self.step_coefficients(timestep, eta, index)
        self._step_index = index + 1
        exact = self.alphas_cumprod[timestep]
        signal, noise_level = float(exact.sqrt()), float((1 - exact).sqrt())
        original = signal * sample - noise_level * model_output
        epsilon = signal * model_output + noise_level * sample
        # In float32 as in the original: at the last timestep, where everything cancels, that leaves about 2e-4.
        rounded, spread = (torch.tensor(value, dtype=torch.float32) for value in (previous, sigma))
        direction = float((1 - rounded - spread**2).clamp(min=0).sqrt())
        previous_sample = float(rounded.sqrt()) * original + direction * epsilon
        if sigma > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    model_output.shape, generator=generator, device=sample.device, dtype=sample.dtype
                )
            previous_sample = previous_sample + sigma * variance_noise
        if not return_dict:
            return previous_sample, original
        return DDIMSchedulerOutput(prev_sample=previous_sample, pred_original_sample=original)
