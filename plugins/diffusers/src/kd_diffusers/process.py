"""How noise enters: flow matching, and the discrete diffusion of DDPM, as a scheduler of diffusers configures them.

Both processes have the same methods. A level of noise is the number that the scheduler calls timestep, in `[0, T]`; for
flow matching it is T times sigma and need not be whole.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor

from kdcore.errors import ModelError, did_you_mean


class FlowMatching:
    """Rectified flow: `x_t = (1 - sigma) x0 + sigma noise`, velocity `noise - x0`, logit-normal sigma.

    Source: Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, ICML 2024, section 3.

    Args:
        scheduler: its `shift` (or that of the latents' size, if it shifts dynamically) moves the levels to more noise.
        mean, std: of the normal distribution whose sigmoid sigma is, before the shift.
    """

    def __init__(self, scheduler: Any, mean: float = 0.0, std: float = 1.0) -> None:
        self.scheduler, self.mean, self.std = scheduler, mean, std
        self.levels = int(scheduler.config.num_train_timesteps)

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """A random level for one sample of latents `[C, H, W]`, a scalar."""
        sigma = (self.mean + self.std * torch.randn((), generator=generator)).sigmoid()
        shift = math.exp(mu) if (mu := dynamic_mu(self.scheduler, shape)) is not None else self._fixed_shift
        return self.levels * shift * sigma / (1 + (shift - 1) * sigma)

    @property
    def _fixed_shift(self) -> float:
        config = self.scheduler.config
        return float(config.get("shift") or config.get("flow_shift") or 1.0)

    def sigma(self, timestep: Tensor) -> Tensor:
        """The share of the noise, `[B]` in [0, 1]."""
        return timestep.float() / self.levels

    def noised(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """`x_t`, shaped as `clean` `[B, ...]`."""
        sigma = like(self.sigma(timestep), clean)
        return sigma * noise + (1 - sigma) * clean

    def target(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What the network is to predict: the velocity."""
        return noise - clean

    def clean(self, noised: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        """`x0` according to a prediction: `x_t - sigma v`."""
        return noised - like(self.sigma(timestep), noised) * prediction


class Diffusion:
    """DDPM: `x_t = a x0 + s noise` with `a^2 + s^2 = 1`, uniform whole timesteps; the network predicts the noise, the
    velocity `a noise - s x0`, or x0.

    Source: Ho et al., Denoising Diffusion Probabilistic Models, NeurIPS 2020, equation 4; for the velocity Salimans
    and Ho, Progressive Distillation for Fast Sampling of Diffusion Models, ICLR 2022, section 4.

    Args:
        scheduler: gives the betas and what is predicted.

    Raises:
        ModelError: if the scheduler has no such process, or asks for an unknown kind of prediction.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.levels = int(scheduler.config.num_train_timesteps)
        self.predicts = str(scheduler.config.get("prediction_type") or "epsilon")
        if self.predicts not in ("epsilon", "v_prediction", "sample"):
            raise ModelError(f"scheduler: prediction_type {self.predicts!r} is not trained here; "
                             "epsilon, v_prediction and sample are")  # fmt: skip
        if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
            raise ModelError(f"scheduler: {type(scheduler).__name__} has neither sigmas of a flow nor betas: name one "
                             "that has, such as `scheduler: DDPMScheduler`")  # fmt: skip
        self.signal = scheduler.alphas_cumprod.float().clone()

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """A random level for one sample, a whole number as a scalar."""
        return torch.randint(self.levels, (), generator=generator)

    def sigma(self, timestep: Tensor) -> Tensor:
        """The factor of the noise, `[B]` in [0, 1]."""
        return (1 - self._signal(timestep)).sqrt()

    def noised(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """`x_t`, shaped as `clean` `[B, ...]`."""
        a, s = self._factors(timestep, clean)
        return a * clean + s * noise

    def target(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What the network is to predict."""
        if self.predicts == "v_prediction":
            a, s = self._factors(timestep, clean)
            return a * noise - s * clean
        return noise if self.predicts == "epsilon" else clean

    def clean(self, noised: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        """`x0` according to a prediction."""
        a, s = self._factors(timestep, noised)
        if self.predicts == "v_prediction":
            return a * noised - s * prediction
        return (noised - s * prediction) / a if self.predicts == "epsilon" else prediction

    def _signal(self, timestep: Tensor) -> Tensor:
        return self.signal.to(timestep.device)[timestep.long()]

    def _factors(self, timestep: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        signal = like(self._signal(timestep), values)
        return signal.sqrt(), (1 - signal).sqrt()


Process = FlowMatching | Diffusion


def make_process(scheduler: Any, mean: float = 0.0, std: float = 1.0) -> Process:
    """The process behind a scheduler of diffusers. Raises `ModelError` where there is none that is trained here."""
    name, config = type(scheduler).__name__, scheduler.config
    flow = name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"
    return FlowMatching(scheduler, mean, std) if flow else Diffusion(scheduler)


def make_scheduler(name: str, config: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Any:
    """A scheduler of diffusers by its class, from a config with changes.

    Raises:
        ModelError: if there is no such class, or it has no entry of the changes.
    """
    names = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    if name not in names:
        raise ModelError(f"diffusers has no scheduler {name!r}; {did_you_mean(name, names, 'schedulers')}")
    made = getattr(diffusers, name)
    known = [p for p in inspect.signature(made.__init__).parameters if p not in ("self", "kwargs")]
    for key in changes or {}:
        if key not in known:
            raise ModelError(f"scheduler_config.{key}: {name} has no such entry; {did_you_mean(key, known, 'entries')}")
    return made.from_config({**config, **(changes or {})})


def dynamic_mu(scheduler: Any, shape: torch.Size) -> float | None:
    """The logarithm of the shift for latents `[..., H, W]`, linear in their number of 2x2 patches, where the scheduler
    shifts by their size; else `None`."""
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return None
    tokens = shape[-1] * shape[-2] // 4
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    return float(config["base_shift"] + slope * (tokens - config["base_image_seq_len"]))


def like(values: Tensor, wanted: Tensor) -> Tensor:
    """Values `[B]` shaped so that they multiply `wanted` `[B, ...]` sample by sample."""
    return values.reshape(-1, *[1] * (wanted.ndim - 1))
