"""The DDIM sampler of Divot's de-tokenizer.

diffusers' `DDIMScheduler` cannot reproduce it, because the original mixes two noise tables: v is turned into the
predicted sample and noise with the float32 table, while the step itself (alphas, previous alphas, sigmas) uses the
table rounded to float16. The images differ visibly (about 1e-2) when one table is used for both.
"""

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


class DivotDDIMScheduler(DDIMScheduler):
    """DDIM with v prediction and zero terminal signal-to-noise ratio, as Divot's de-tokenizer samples.

    Args:
        num_train_timesteps: steps of the noise schedule.
        beta_start, beta_end: ends of the schedule before rescaling.
        rescale_betas_zero_snr: make the last step pure noise, as the released weights were trained.
        timestep_spacing: "uniform" (1, 1 + k, 1 + 2k, ... with k = num_train_timesteps // num_inference_steps; the last
            step is never visited), "uniform_trailing" (ends at the last step) or "quad" (denser near 0).

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
        self._previous = None

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None):
        """Chooses the steps of a sampling run; `timesteps` then holds them, noisiest first.

        Raises:
            ValueError: `num_inference_steps` is not between 1 and `num_train_timesteps`.
        """
        total = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= total:
            raise ValueError(f"num_inference_steps={num_inference_steps} is not between 1 and {total}")
        if self.config.timestep_spacing == "uniform":
            steps = np.arange(0, total, total // num_inference_steps) + 1
            # Where the last step would lie beyond the schedule (3, 9, ... steps) the original crashes; it is left out.
            steps = steps[steps < total]
        elif self.config.timestep_spacing == "uniform_trailing":
            steps = np.round(np.arange(total, 0, -total / num_inference_steps))[::-1].astype(np.int64) - 1
        else:
            steps = (np.linspace(0, np.sqrt(total * 0.8), num_inference_steps) ** 2).astype(np.int64) + 1
            if len(np.unique(steps)) < len(steps):
                raise ValueError(f"'quad' spacing has fewer than {num_inference_steps} different steps; ask for fewer")
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.from_numpy(steps[::-1].copy()).to(device)
        self._previous = {int(step): int(before) for step, before in zip(steps[1:], steps)} | {int(steps[0]): 0}

    def step_coefficients(self, timestep: int, eta: float) -> tuple[float, float, float]:
        """(alpha_t, alpha_previous, sigma) of one step, from the noise table rounded to float16.

        1 - alpha_t and its reciprocal are rounded to float16 too, everything else is float64: this is how numpy and
        torch happened to mix types in the original, and the released images were sampled with it.
        """
        if self._previous is None:
            raise ValueError("call `set_timesteps` before sampling")
        if timestep not in self._previous:
            raise ValueError(f"timestep {timestep} is not one of `timesteps`")
        alpha, previous = (self.alphas_cumprod[t].half() for t in (timestep, self._previous[timestep]))
        reciprocal = (1 - alpha).reciprocal()
        alpha, previous, reciprocal = float(alpha), float(previous), float(reciprocal)
        sigma = eta * (reciprocal * (1 - previous) * (1 - alpha / previous)) ** 0.5
        return alpha, previous, sigma

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

        Returns:
            `DDIMSchedulerOutput` with `prev_sample` and `pred_original_sample`.
        """
        timestep = int(timestep)
        _, previous, sigma = self.step_coefficients(timestep, eta)
        exact = self.alphas_cumprod[timestep]
        signal, noise_level = float(exact.sqrt()), float((1 - exact).sqrt())
        original = signal * sample - noise_level * model_output
        epsilon = signal * model_output + noise_level * sample
        previous_sample = previous**0.5 * original + max(1 - previous - sigma**2, 0.0) ** 0.5 * epsilon
        if sigma > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    model_output.shape, generator=generator, device=sample.device, dtype=sample.dtype
                )
            previous_sample = previous_sample + sigma * variance_noise
        if not return_dict:
            return previous_sample, original
        return DDIMSchedulerOutput(prev_sample=previous_sample, pred_original_sample=original)
