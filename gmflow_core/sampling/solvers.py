"""Samplers: pure functions (denoiser, x, sigmas, *, callback, ...) -> x.

A denoiser is any callable (x, sigma) -> GaussianMixture over x_0, with x (B, C, *S) and sigma (B,). The sigmas are a
descending sequence in [0, 1], such as `flow_sigmas` gives; one network call for each but the last.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..fast.tiled import Check
from ..flow.path import reverse_transition, unshift_time, velocity_to_x0
from ..flow.policy import DXPolicy, Policy
from ..gaussians.draws import Generator, standard_normal
from ..gaussians.mixture import GaussianMixture, IsotropicGaussian
from ..gaussians.spectral import sample_with_spectrum
from .denoisers import Denoiser
from .guidance import MovedMixture, image_gaussian
from .rollout import Constrain, rollout
from .second_order import Step, second_order

Callback = Callable[[int, Tensor, Tensor], None]
Spectrum = Callable[[IsotropicGaussian], Tensor]


class Draws(NamedTuple):
    """The random numbers of one GM-SDE step: component indices (B, *S), and standard normal noise (B, C, *S) for the
    component and for the transition; the last step uses no transition noise."""

    component: Tensor
    component_noise: Tensor
    transition_noise: Tensor | None


class SpectralDraws(NamedTuple):
    """The random numbers of one GM-SDE step with a spectrum: standard normal noise (B, C, *S) for the frequencies and for the
    transition, and the principal axes (B, *1, C, C), whose signs are arbitrary."""

    spectral_noise: Tensor
    axes: Tensor | None
    transition_noise: Tensor | None


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
    check: Check | None = None,
) -> Tensor:
    """GM-ODE (GMFlow, ICML 2025): deterministic; between two network calls x follows the ODE of the predicted mixture.

    Args:
        x: (B, C, *S) at sigmas[0].
        order: 1, or 2 for the second-order correction of every mixture but the first.
        substeps: Euler substeps between two network calls.
        callback: called as callback(step, x, x0_mean) after each network call.
        constrain, check: see `rollout`.

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
        x = rollout(mixture, x, sigma, sigma_next, substeps, constrain=constrain, check=check)
    return x


def sample_gm_sde(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    order: int = 2,
    spectrum: Spectrum | None = None,
    noise: Generator | Sequence[Draws | SpectralDraws] | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
    check: Check | None = None,
) -> Tensor:
    """GM-SDE (GMFlow, ICML 2025): at each step draw x_0 from the predicted mixture, then x at the next sigma given both.

    Args:
        spectrum: called as spectrum(gaussian) with the Gaussian of x_0 (mean (B, C, *S), var (B, 1, *1)); gives the log
            power spectrum (B, C, *S) of the draws, see `sample_with_spectrum`. None: every pixel is drawn on its own.
        noise: a generator (a CPU one gives the same numbers on every device), one for each sample, or recorded draws, one
            for each step.
        Other arguments, return value and errors as `sample_gm_ode`.
    """
    intervals, previous = _intervals(sigmas), None
    recorded = isinstance(noise, Sequence) and not isinstance(noise[0], torch.Generator)
    if recorded and len(noise) != len(intervals):
        raise ValueError(
            f"{len(noise)} recorded draws do not fit {len(intervals)} steps; give one for each"
        )
    for index, (sigma, sigma_next) in enumerate(intervals):
        mixture, previous = _predict(denoiser, x, sigma, sigma_next, order, previous)
        if callback is not None:
            callback(index, x, mixture.mean())
        if spectrum is not None:
            draws = (
                noise[index]
                if recorded
                else SpectralDraws(standard_normal(x.shape, noise, like=x), None, None)
            )
            log_power = spectrum(
                mixture.gaussian if isinstance(mixture, MovedMixture) else image_gaussian(mixture)
            )
            x0 = sample_with_spectrum(mixture, log_power, draws.spectral_noise, draws.axes)
        elif recorded:
            draws = noise[index]
            x0 = mixture.sample(component=draws.component, noise=draws.component_noise)
        else:
            x0 = mixture.sample(noise)
        if recorded:
            transition_noise = draws.transition_noise
        else:
            transition_noise = standard_normal(x.shape, noise, like=x0) if sigma_next > 0 else None
        x = reverse_transition(x0, x, sigma_next, sigma, transition_noise)
        if constrain is not None:
            x = constrain(x, x.new_full((), sigma_next))
        if check is not None:
            check()
    return x


def sample_euler(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
    check: Check | None = None,
) -> Tensor:
    """Euler steps along the mixture's mean velocity, as for any flow-matching model; arguments as `sample_gm_ode`."""
    return sample_gm_ode(
        denoiser,
        x,
        sigmas,
        order=1,
        substeps=1,
        callback=callback,
        constrain=constrain,
        check=check,
    )


def sample_gm_policy(
    denoiser: Callable[[Tensor, Tensor], Policy],
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    substeps: int = 128,
    shift: float = 1.0,
    temperature: float | None = None,
    stochasticity: float = 0.0,
    noise: Generator | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
    check: Check | None = None,
) -> Tensor:
    """The policy sampler of pi-Flow (Chen et al. 2025, arXiv 2510.14974): between two network calls x follows the policy that
    the first one predicted.

    Args:
        denoiser: as for `sample_gm_ode`, or one that gives DX policies.
        substeps: Euler substeps for the whole of [0, 1] in unshifted time; a step gets its share, and 1 at least.
        shift: the time shift of the sigmas, so that a step's substeps are of equal size in unshifted time.
        temperature: of the mixture, in (0, 1], at every step but one that ends at 0: below 1 it sharpens. None is pi-Flow's
            min(1, 0.1 (steps - 1)), of the steps of this call. A DX policy has none.
        stochasticity: h >= 0. 0 is deterministic; above it each step goes to a lower sigma and adds noise back; 1 is as
            stochastic as the SDE of DDPM.
        noise: a generator (a CPU one gives the same numbers on every device), or one for each sample.
        Other arguments, return value and errors as `sample_gm_ode`.

    Raises:
        ValueError: `temperature` or `stochasticity` is out of range.
    """
    intervals = _intervals(sigmas)
    if temperature is None:
        temperature = usual_temperature(len(intervals))
    elif not 0 < temperature <= 1:
        raise ValueError(
            f"temperature {temperature} must be above 0 and at most 1, which leaves the mixture as it is"
        )
    if not stochasticity >= 0:
        raise ValueError(f"stochasticity {stochasticity} must be 0 (deterministic) or more")
    if substeps < 1:
        raise ValueError(f"substeps is {substeps}; at least 1 is needed")
    for index, (sigma, sigma_next) in enumerate(intervals):
        policy = denoiser(x, _batch_sigma(x, sigma))
        if callback is not None:
            callback(index, x, policy.mean())
        if temperature < 1 and sigma_next > 0 and not isinstance(policy, DXPolicy):
            policy = policy.with_temperature(temperature)
        kept = _kept_noise(sigma, sigma_next, stochasticity)
        signal = (1 - sigma_next) + sigma_next * kept
        target = (
            sigma_next * kept / signal
        )  # where the rollout ends; what is missing to sigma_next is fresh noise
        count = max(1, round((unshift_time(sigma, shift) - unshift_time(target, shift)) * substeps))
        x = rollout(policy, x, sigma, target, count, shift=shift, constrain=constrain, check=check)
        if kept < 1 and sigma_next > 0:
            x = signal * x + sigma_next * math.sqrt(1 - kept**2) * standard_normal(
                x.shape, noise, like=x
            )
            if constrain is not None:
                x = constrain(x, x.new_full((), sigma_next))
    return x


def usual_temperature(steps: int) -> float:
    """pi-Flow's temperature for the GM policy; a single step takes none."""
    return min(1.0, 0.1 * (steps - 1)) if steps > 1 else 1.0


def _kept_noise(sigma: float, sigma_next: float, stochasticity: float) -> float:
    """How much of the noise in x at sigma_next comes from x at sigma, in [0, 1]; the rest is fresh (pi-Flow's flow map SDE)."""
    if stochasticity == 0:
        return 1.0
    return (sigma_next * (1 - sigma) / (sigma * (1 - sigma_next))) ** (stochasticity**2)


def sample_dpmpp_2m(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
    check: Check | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022) on the mixture's mean, the usual second-order solver with one network call a step; the
    first two steps (log alpha / sigma is infinite at sigma = 1) and one that ends at 0 are of first order. Arguments as
    `sample_gm_ode`."""
    previous = log_snr_previous = None
    for index, (sigma, sigma_next) in enumerate(_intervals(sigmas)):
        mean = denoiser(x, _batch_sigma(x, sigma)).mean()
        if callback is not None:
            callback(index, x, mean)
        log_snr, log_snr_next = _log_snr(sigma), _log_snr(sigma_next)
        target = mean
        if previous is not None and math.isfinite(log_snr_previous) and math.isfinite(log_snr_next):
            target = mean + (mean - previous) * (
                0.5 * (log_snr_next - log_snr) / (log_snr - log_snr_previous)
            )
        # from the line through x and target at sigma_next: alpha_next target + the part of x that is noise
        kept = sigma_next / sigma
        x = kept * x + ((1 - sigma_next) - kept * (1 - sigma)) * target
        previous, log_snr_previous = mean, log_snr
        if constrain is not None:
            x = constrain(x, x.new_full((), sigma_next))
        if check is not None:
            check()
    return x


SOLVERS = ("gm-ode", "gm-sde", "gm-policy", "euler", "dpmpp-2m")
MEAN_SOLVERS = ("euler", "dpmpp-2m")  # that follow the mean only
SUBSTEPS = {
    "gm-ode": 8,
    "gm-policy": 128,
}  # a usual number: between two network calls, and over all of [0, 1]
FINAL_STEP_SIZE = 0.5  # of the last step beside the others, in the time grids that pi-Flow's adapters are made for


def solve(
    solver: str,
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    order: int = 2,
    substeps: int | None = None,
    shift: float = 1.0,
    temperature: float | None = None,
    stochasticity: float = 0.0,
    spectrum: Spectrum | None = None,
    noise: Generator | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
    check: Check | None = None,
) -> Tensor:
    """The solver of that name, for users who choose one from a list; it takes of the settings what it knows.

    Args:
        substeps: what the solver means by it; its entry in SUBSTEPS if None.
        Others: of the solvers.

    Raises:
        ValueError: `solver` is not one of SOLVERS; or as the solvers.
    """
    shared = {"callback": callback, "constrain": constrain, "check": check}
    substeps = SUBSTEPS.get(solver) if substeps is None else substeps
    if solver == "gm-ode":
        return sample_gm_ode(denoiser, x, sigmas, order=order, substeps=substeps, **shared)
    if solver == "gm-sde":
        return sample_gm_sde(
            denoiser, x, sigmas, order=order, spectrum=spectrum, noise=noise, **shared
        )
    if solver == "gm-policy":
        shared.update(
            shift=shift, temperature=temperature, stochasticity=stochasticity, noise=noise
        )
        return sample_gm_policy(denoiser, x, sigmas, substeps=substeps, **shared)
    if solver == "euler":
        return sample_euler(denoiser, x, sigmas, **shared)
    if solver == "dpmpp-2m":
        return sample_dpmpp_2m(denoiser, x, sigmas, **shared)
    raise ValueError(f"solver {solver!r} is unknown; choose one of {', '.join(SOLVERS)}")


def _predict(
    denoiser: Denoiser,
    x: Tensor,
    sigma: float,
    sigma_next: float,
    order: int,
    previous: Step | None,
) -> tuple[GaussianMixture, Step | None]:
    """One network call, corrected if `order` is 2: the mixture, and what the next correction needs."""
    if order not in (1, 2):
        raise ValueError(f"order is {order}; it can be 1 or 2")
    mixture = denoiser(x, _batch_sigma(x, sigma))
    if order == 1:
        return mixture, None
    step = Step(mixture, x, sigma, sigma - sigma_next)
    if previous is not None:
        mixture = second_order(mixture, previous, x, sigma, step.size)
    return mixture, step


def _batch_sigma(x: Tensor, sigma: float) -> Tensor:
    """`sigma` for every sample, (B,)."""
    return x.new_full((x.shape[0],), sigma, dtype=torch.float32)


def _log_snr(sigma: float) -> float:
    """log(alpha / sigma), infinite at both ends."""
    if sigma in (0, 1):
        return math.inf if sigma == 0 else -math.inf
    return math.log((1 - sigma) / sigma)


def _intervals(sigmas: Tensor | Sequence[float]) -> list[tuple[float, float]]:
    """(sigma, next sigma) of every step."""
    values = sigmas.tolist() if isinstance(sigmas, Tensor) else [float(s) for s in sigmas]
    intervals = list(itertools.pairwise(values))
    if not intervals or any(not 1 >= high > low >= 0 for high, low in intervals):
        raise ValueError(
            f"sigmas {values} are not a descending sequence of at least two values in [0, 1]"
        )
    return intervals
