"""Samplers: pure functions (denoiser, x, sigmas, *, callback, ...) -> x.

A denoiser is any callable (x, sigma) -> GaussianMixture over x_0, with x (B, C, *S) and sigma (B,). The sigmas are a
descending sequence in [0, 1], such as `flow_sigmas` gives; one network call for each but the last.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .guidance import GuidedMixture, image_gaussian, image_mean
from .mixture import GaussianMixture, IsotropicGaussian, standard_normal
from .path import posterior_mean, reverse_transition, velocity_to_x0
from .rollout import Constrain, rollout

Denoiser = Callable[[Tensor, Tensor], GaussianMixture]
Callback = Callable[[int, Tensor, Tensor], None]


class Draws(NamedTuple):
    """The random numbers of one GM-SDE step: component indices (B, *S), and standard normal noise (B, C, *S) for the
    component and for the transition; the last step uses no transition noise."""

    component: Tensor
    component_noise: Tensor
    transition_noise: Tensor | None


@dataclass(frozen=True)
class Step:
    """What the second-order correction needs of the step before: its first-order (guided, uncorrected) mixture of x_0, where
    that was predicted, and the step's size."""

    mixture: GaussianMixture
    x: Tensor
    sigma: float
    size: float


def denoiser_of(network: Callable[[Tensor, Tensor], GaussianMixture]) -> Denoiser:
    """The denoiser of a network that predicts mixtures of velocities."""
    return lambda x, sigma: velocity_to_x0(network(x, sigma), x, sigma)


def sample_gm_ode(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    order: int = 2,
    substeps: int = 4,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """GM-ODE (GMFlow, ICML 2025): deterministic; between two network calls x follows the ODE of the predicted mixture.

    Args:
        x: (B, C, *S) at sigmas[0].
        order: 1, or 2 for the second-order correction of every mixture but the first.
        substeps: Euler substeps between two network calls.
        callback: called as callback(step, x, x0_mean) after each network call.
        constrain: see `rollout`.

    Returns:
        x at sigmas[-1].

    Raises:
        ValueError: `order`, `substeps` or `sigmas` is out of range.
    """
    previous = None
    for index, (sigma, sigma_next) in enumerate(_intervals(sigmas)):
        mixture, previous = _predict(denoiser, x, sigma, sigma_next, order, previous)
        if callback is not None:
            callback(index, x, mixture.mean())
        x = rollout(mixture, x, sigma, sigma_next, substeps, constrain=constrain)
    return x


def sample_gm_sde(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    order: int = 2,
    noise: torch.Generator | Sequence[Draws] | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """GM-SDE (GMFlow, ICML 2025): at each step draw x_0 from the predicted mixture, then x at the next sigma given both.

    Args:
        noise: a generator (a CPU one gives the same numbers on every device), or recorded draws, one for each step.
        Other arguments, return value and errors as `sample_gm_ode`.
    """
    intervals, previous = _intervals(sigmas), None
    if isinstance(noise, Sequence) and len(noise) != len(intervals):
        raise ValueError(f"{len(noise)} recorded draws do not fit {len(intervals)} steps; give one for each")
    for index, (sigma, sigma_next) in enumerate(intervals):
        mixture, previous = _predict(denoiser, x, sigma, sigma_next, order, previous)
        if callback is not None:
            callback(index, x, mixture.mean())
        if noise is None or isinstance(noise, torch.Generator):
            x0 = mixture.sample(noise)
            transition_noise = standard_normal(x.shape, noise, like=x0) if sigma_next > 0 else None
        else:
            component, component_noise, transition_noise = noise[index]
            x0 = mixture.sample(component=component, noise=component_noise)
        x = reverse_transition(x0, x, sigma_next, sigma, transition_noise)
        if constrain is not None:
            x = constrain(x, x.new_tensor(sigma_next))
    return x


def sample_euler(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Euler steps along the mixture's mean velocity, as for any flow-matching model; arguments as `sample_gm_ode`."""
    return sample_gm_ode(denoiser, x, sigmas, order=1, substeps=1, callback=callback, constrain=constrain)


SOLVERS = ("gm-ode", "gm-sde", "euler")


def solve(
    solver: str,
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    order: int = 2,
    substeps: int = 8,
    noise: torch.Generator | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """The solver of that name, for users who choose one from a list; it takes of the settings what it knows.

    Raises:
        ValueError: `solver` is not one of SOLVERS; or as the solvers.
    """
    shared = {"callback": callback, "constrain": constrain}
    if solver == "gm-ode":
        return sample_gm_ode(denoiser, x, sigmas, order=order, substeps=substeps, **shared)
    if solver == "gm-sde":
        return sample_gm_sde(denoiser, x, sigmas, order=order, noise=noise, **shared)
    if solver == "euler":
        return sample_euler(denoiser, x, sigmas, **shared)
    raise ValueError(f"solver {solver!r} is unknown; choose one of {', '.join(SOLVERS)}")


def second_order(
    mixture: GaussianMixture, previous: Step, x: Tensor, sigma: float, size: float, ca: float = 0.005, cb: float = 1.0
) -> tuple[GaussianMixture, IsotropicGaussian]:
    """The second-order correction of GM-ODE and GM-SDE (GMFlow, ICML 2025), fused with probabilistic guidance.

    The last step's mixture, carried to (x, sigma), predicts a mean; half the difference to the new mean, scaled by the
    ratio of the step sizes and damped where it is mostly network error, extrapolates to the middle of the coming step.
    Together with the guidance bias it is applied in one update of the unguided mixture.

    Args:
        mixture: first-order mixture of x_0 at (x, sigma); a `GuidedMixture` when guided.
        previous: the step before.
        size: sigma minus the next sigma.
        ca, cb: network error relative to V, without guidance and per guidance weight.

    Returns:
        The corrected mixture, and the Gaussian it was moved to: mean (B, C, *S), var (B, 1, *1).
    """
    if isinstance(mixture, GuidedMixture):
        base, guidance_bias, scale = mixture.cond, mixture.bias, mixture.scale
    else:
        base, guidance_bias, scale = mixture, 0.0, 0.0
    gaussian = image_gaussian(base)
    var = gaussian.var
    predicted = posterior_mean(previous.mixture, previous.x, previous.sigma, x, sigma)
    error = var * ((scale * cb) ** 2 + ca) / previous.size**2
    bias = (mixture.mean() - predicted) * ((1 - error).clamp(min=0).sqrt() * (0.5 * size / previous.size)) + guidance_bias
    power = image_mean(bias.square())
    bias = bias * (var / power.clamp(min=1e-6)).clamp(max=1).sqrt()
    target = IsotropicGaussian(gaussian.mean + bias, var * (1 - power / var.clamp(min=1e-6)).clamp(min=1e-6))
    return base.times(target, over=gaussian), target


def _predict(
    denoiser: Denoiser, x: Tensor, sigma: float, sigma_next: float, order: int, previous: Step | None
) -> tuple[GaussianMixture, Step | None]:
    """One network call, corrected if `order` is 2; and what the next correction needs."""
    if order not in (1, 2):
        raise ValueError(f"order is {order}; it can be 1 or 2")
    mixture = denoiser(x, x.new_full((x.shape[0],), sigma, dtype=torch.float32))
    if order == 1:
        return mixture, None
    step = Step(mixture, x, sigma, sigma - sigma_next)
    if previous is not None:
        mixture, _ = second_order(mixture, previous, x, sigma, step.size)
    return mixture, step


def _intervals(sigmas: Tensor | Sequence[float]) -> list[tuple[float, float]]:
    """(sigma, next sigma) of every step."""
    values = sigmas.tolist() if isinstance(sigmas, Tensor) else [float(s) for s in sigmas]
    intervals = list(itertools.pairwise(values))
    if not intervals or any(not 1 >= high > low >= 0 for high, low in intervals):
        raise ValueError(f"sigmas {values} are not a descending sequence of at least two values in [0, 1]")
    return intervals
