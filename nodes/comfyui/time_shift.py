"""Time shift of flow models in ComfyUI: read it from a model, or put one on."""

from __future__ import annotations

import math
from types import SimpleNamespace

import comfy.model_sampling
import torch
from torch import Tensor

HIGHEST = 1 + 1e-4  # sigma of a flow: 1, and what rounding adds for some time shifts
LARGEST_HALF = 1 - 2**-24  # sigma half-way: larger ones are 1 in float32


def own_shift(model_sampling) -> float:
    """Return the time shift of a flow model's sampling, however the class parametrises it.

    It is the odds sigma / (1 - sigma) half-way, where an unshifted model has sigma = 1/2.

    Raises:
        ValueError: the sampling is not that of a flow model.
    """
    check_flow(model_sampling)
    half = min(float(model_sampling.percent_to_sigma(0.5)), LARGEST_HALF)
    return half / (1 - half)


def check_flow(model_sampling) -> None:
    """Check that a model's sampling is a rectified flow: x_0 = x - sigma u, and sigma in [0, 1].

    Raises:
        ValueError: it is not; the message names its classes.
    """
    highest, half = float(model_sampling.sigma_max), float(model_sampling.percent_to_sigma(0.5))
    if is_velocity(model_sampling) and 0 < half <= 1 and highest <= HIGHEST:
        return
    kind = type(model_sampling)
    kinds = [each.__name__ for each in (kind, *kind.__bases__)]
    raise ValueError(
        "this model predicts a velocity of a flow, with sigmas up to 1, and its sampling is "
        f"another ({', '.join(kinds)}; sigmas up to {highest:.4g}): with it every picture would be "
        "noise. GM samplers are for flow models: connect a model from GM Load Model or GM Adapter, "
        "and remove nodes such as ModelSamplingDiscrete and ModelSamplingContinuousEDM (those for "
        "SD3, AuraFlow and Flux are fine)"
    )


def is_velocity(model_sampling) -> bool:
    """Return whether a sampling takes the network's output as the velocity of a rectified flow."""
    sigma, one = torch.tensor([0.25, 0.5]), torch.ones(2, 1, 1, 1)
    expected = one - sigma.reshape(2, 1, 1, 1)
    given = model_sampling.calculate_input(sigma, one)
    found = model_sampling.calculate_denoised(sigma, one, one)
    noisy = model_sampling.noise_scaling(sigma, torch.zeros(2, 1, 1, 1), one.clone())
    return all(map(torch.allclose, (given, found, noisy), (one, expected, expected)))


class ShiftedFlow(comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.CONST):
    """Flow matching with a time shift, for stock schedulers.

    Args:
        time_shift: see `gmflow_core.shift_time`.
        multiplier: factor from sigma to the unit of time that the network takes.
    """

    def __init__(self, time_shift: float, multiplier: float = 1.0):
        super().__init__(SimpleNamespace(sampling_settings={"shift": math.log(time_shift)}))
        self.multiplier = multiplier

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
