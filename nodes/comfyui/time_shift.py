"""Time shift of models in ComfyUI: read it from a model, use it, or put one on."""

from __future__ import annotations

import math

import comfy.model_sampling
import torch
from torch import Tensor

from ...gmflow_core.flow.path import flow_sigmas, unshift_time
from ...gmflow_core.sampling.solvers import FINAL_STEP_SIZE
from .paths import HIGHEST, names_of, path_of

LARGEST_HALF = 1 - 2**-24  # sigma half-way: larger ones are 1 in float32


def own_shift(model_sampling) -> float:
    """Return the time shift of a model's sampling, however the class parametrises it.

    It is the odds sigma / (1 - sigma) half-way, where an unshifted flow has sigma = 1/2; sigma is
    that of the straight path (see `path_of`).

    Raises:
        ValueError: the sampling is none that GM samplers know.
    """
    path = path_of(model_sampling)
    half = min(path.sigma_of(float(model_sampling.percent_to_sigma(0.5))), LARGEST_HALF)
    if not half > 0:
        raise ValueError(
            f"wrong sampling: sigma {half:.4g} half-way, which leaves no steps: "
            f"{names_of(model_sampling)}; use a stock sampler, or remove the node that set it"
        )
    return half / (1 - half)


def own_sigmas(
    model_sampling,
    steps: int,
    shift: float = 0.0,
    denoise: float = 1.0,
    final_step_size: float = 1.0,
) -> Tensor:
    """Return `steps` + 1 sigmas in a model's own units, evenly spaced before the time shift.

    They go from the model's highest noise (for a flow 1) to 0, on the straight path.

    Args:
        shift: time shift; the model's own if 0.
        denoise: share of the way that is sampled; there are no sigmas if it is 0.
        final_step_size: see `flow_sigmas`.

    Raises:
        ValueError: as `own_shift` and `flow_sigmas`.
    """
    shift = shift or own_shift(model_sampling)
    if denoise <= 0:
        return torch.FloatTensor([])
    path = path_of(model_sampling)
    highest = path.sigma_of(float(model_sampling.sigma_max)) if path.exploding else 1.0
    start = unshift_time(highest, shift) * denoise
    return path.time_of(flow_sigmas(steps, shift, start=start, final_step_size=final_step_size))


def check_flow(model_sampling) -> None:
    """Check that a model's sampling is a rectified flow: x_0 = x - sigma u, and sigma in [0, 1].

    Raises:
        ValueError: it is not; the message names its classes.
    """
    highest, half = float(model_sampling.sigma_max), float(model_sampling.percent_to_sigma(0.5))
    if is_velocity(model_sampling) and 0 < half <= 1 and highest <= HIGHEST:
        return
    raise ValueError(
        "wrong sampling, every picture would be noise: this model predicts a velocity of a flow, "
        f"with sigmas up to 1, and its sampling is another: {names_of(model_sampling)}"
        f"{_scale_of(model_sampling)}; remove nodes such as ModelSamplingDiscrete, "
        "ModelSamplingContinuousEDM and ModelNoiseScale (those for SD3, AuraFlow and Flux are fine)"
    )


def _scale_of(model_sampling) -> str:
    """Describe the scale of a sampling's noise for a message, "" if it has none or 1."""
    scale = getattr(model_sampling, "noise_scale", 1.0)
    return "" if scale == 1 else f", noise of scale {scale:g}"


def is_velocity(model_sampling) -> bool:
    """Return whether a sampling takes the network's output as the velocity of a rectified flow."""
    sigma, one = torch.tensor([0.25, 0.5]), torch.ones(2, 1, 1, 1)
    expected = one - sigma.reshape(2, 1, 1, 1)
    given = model_sampling.calculate_input(sigma, one)
    found = model_sampling.calculate_denoised(sigma, one, one)
    noisy = model_sampling.noise_scaling(sigma, 2 * one, one.clone())
    mixed = expected + 2 * sigma.reshape(2, 1, 1, 1)  # data and noise, the noise not rescaled
    return all(map(torch.allclose, (given, found, noisy), (one, expected, mixed)))


class ShiftedFlow(comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.CONST):
    """Flow matching with a time shift, for stock schedulers.

    Nodes such as ModelNoiseScale make a model's sampling anew, from its class and the model's
    config, and hand it `shift` and `multiplier` of the old one. So both are as ComfyUI's classes
    have them: `shift` is the logarithm of the time shift, which the config does not know.
    """

    multiplier = 1.0
    final_step_size = FINAL_STEP_SIZE

    @classmethod
    def with_shift(
        cls,
        time_shift: float,
        multiplier: float = 1.0,
        final_step_size: float = FINAL_STEP_SIZE,
    ) -> ShiftedFlow:
        """Return the sampling of a time shift.

        Args:
            time_shift: see `gmflow_core.shift_time`.
            multiplier: factor from sigma to the unit of time that the network takes.
            final_step_size: size of the last step relative to the others, which schedules that
                know it take from here.
        """
        sampling = cls()
        sampling.set_parameters(math.log(time_shift), multiplier=multiplier)
        sampling.final_step_size = final_step_size
        return sampling

    def __init__(self, model_config: object = None):
        super().__init__()

    def set_parameters(
        self, shift: float = 1.15, timesteps: int = 10_000, multiplier: float = 1.0
    ) -> None:
        """Make the table of sigmas of a shift."""
        self.__dict__.pop("sigmas", None)
        super().set_parameters(shift, timesteps)
        self.multiplier = multiplier

    def set_noise_scale(self, noise_scale: float) -> None:
        """Keep the scale of the noise, which only 1 fits: `check_flow` refuses others."""
        self.noise_scale = float(noise_scale)

    def register_buffer(self, name: str, tensor: Tensor, persistent: bool = True) -> None:
        """Keep the table of sigmas as an attribute, and ignore every later one.

        There is no plain way: ComfyUI's memory managers back up a model's buffers by name and
        write them back with `register_buffer`. While this object stands in for the base model's
        sampling, that would put the base's table in the place of this one.
        """
        if name not in self.__dict__:
            object.__setattr__(self, name, tensor)

    def timestep(self, sigma: Tensor) -> Tensor:
        """Return the time that the network is fed."""
        return sigma * self.multiplier
