"""The sampler of Seer: DDIM (https://arxiv.org/abs/2010.02502) with the authors' noise schedule and timesteps."""

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor


class SeerDDIMScheduler(SchedulerMixin, ConfigMixin):
    """DDIM for models that predict the noise, with three habits diffusers' `DDIMScheduler` does not have together:

    - The noise schedule is that of latent diffusion (square of linspace(sqrt(1e-4), sqrt(2e-2))), not the one of
      Stable Diffusion the models are trained with. For the latter pass `beta_start=0.00085, beta_end=0.012`.
    - Timesteps are 1, 1 + c, 1 + 2c, ... up to the number of training steps, with c = num_train_timesteps //
      num_inference_steps; that can be one step more than asked for (31 for 30).
    - The last step goes to the noise level of timestep 0, not to a clean sample.

    Args:
        num_train_timesteps: length of the noise schedule.
        beta_start, beta_end: its ends.
        beta_schedule: "scaled_linear", the only one; named so that other schedulers can be made of this config.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "scaled_linear",
    ):
        if beta_schedule != "scaled_linear":
            raise ValueError(f"beta_schedule must be 'scaled_linear', got {beta_schedule!r}")
        # In double precision, as the authors compute the product of a thousand factors.
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2
        self.betas = betas.float()
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0).float()
        self.init_noise_sigma = 1.0
        self.num_inference_steps = None
        self.timesteps = torch.arange(num_train_timesteps).flip(0)

    def __len__(self):
        return self.config.num_train_timesteps

    def scale_model_input(self, sample, timestep=None):
        """Returns `sample`: this scheduler needs no scaling."""
        return sample

    def set_timesteps(self, num_inference_steps, device=None):
        """Sets the timesteps of a run (see the class).

        Raises:
            ValueError: the number is out of range, or the largest timestep would be `num_train_timesteps`, for which
                there is no noise level; the message names the nearest numbers that work.
        """
        total = self.config.num_train_timesteps
        if not self._works(num_inference_steps):
            known = [n for n in range(1, total + 1) if self._works(n)]
            near = sorted(sorted(known, key=lambda n: abs(n - num_inference_steps))[:2])
            raise ValueError(
                f"{num_inference_steps} inference steps are not possible: of the timesteps 1 + i * ({total} // steps) "
                f"one would be {total} or there would be none; try {' or '.join(map(str, near))}"
            )
        self.num_inference_steps = num_inference_steps
        steps = torch.arange(0, total, total // num_inference_steps) + 1
        self.timesteps = steps.flip(0).to(device)

    def _works(self, num_inference_steps):
        total = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= total:
            return False
        stride = total // num_inference_steps
        return (total - 1) // stride * stride + 1 < total

    def coefficients(self, timestep, eta=0.0):
        """alpha, alpha_prev, sqrt(1 - alpha) and sigma of the step that starts at `timestep` (scalar tensors;
        alpha is the cumulative product, equations 12 and 16 of the paper)."""
        if self.num_inference_steps is None:
            raise ValueError("call `set_timesteps` first")
        previous = max(int(timestep) - self.config.num_train_timesteps // self.num_inference_steps, 0)
        alpha, alpha_prev = self.alphas_cumprod[int(timestep)], self.alphas_cumprod[previous]
        sigma = eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)).sqrt()
        return alpha, alpha_prev, (1 - alpha).sqrt(), sigma

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        generator=None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple:
        """One step towards the data.

        Args:
            model_output: the predicted noise.
            timestep: one of `timesteps`.
            sample: the noisy sample at `timestep`.
            eta: 0 for deterministic DDIM, 1 for as much fresh noise as DDPM.
            generator: of the fresh noise.
            variance_noise: the fresh noise itself, instead of `generator`.
            return_dict: False returns (prev_sample, pred_original_sample).
        """
        alpha, alpha_prev, sqrt_one_minus_alpha, sigma = self.coefficients(timestep, eta)
        pred_original_sample = (sample - sqrt_one_minus_alpha * model_output) / alpha.sqrt()
        direction = (1 - alpha_prev - sigma**2).sqrt() * model_output
        prev_sample = alpha_prev.sqrt() * pred_original_sample + direction
        if eta > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
                )
            prev_sample = prev_sample + sigma * variance_noise
        if not return_dict:
            return prev_sample, pred_original_sample
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def add_noise(self, original_samples, noise, timesteps):
        """Noises (batch, ...) samples to the levels of `timesteps` (batch,)."""
        alphas = self.alphas_cumprod.to(original_samples.device)[timesteps]
        alphas = alphas.reshape(-1, *[1] * (original_samples.ndim - 1)).to(original_samples.dtype)
        return alphas.sqrt() * original_samples + (1 - alphas).sqrt() * noise
