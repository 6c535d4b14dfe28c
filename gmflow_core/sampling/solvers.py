"""Solvers: pure functions (denoiser, x, sigmas, *, ..., callback=) -> x, and their registry.

A denoiser is any callable (x, sigma) -> mixture of x_0, with x (B, C, *S) and sigma (B,). The
sigmas are a descending sequence in [0, 1], such as `flow_sigmas` gives; there is one network call
for each but the last. All solvers take the `Hooks` as keyword arguments, and `return_trajectory`,
which makes the result (x, trajectory), see `with_trajectory`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..fast.choice import axis_map
from ..flow.blended import BlendedPolicy, is_mixture, kind_of
from ..flow.checks import whole_number
from ..flow.path import reverse_transition, unshift_time
from ..flow.policy import FINAL_STEP_SIZE, Policy
from ..gaussians.draws import Generator, standard_normal
from ..gaussians.mixture import GaussianMixture, IsotropicGaussian, Mixture
from ..gaussians.spectral import sample_with_spectrum
from .denoisers import Denoiser
from .guidance import image_gaussian
from .hooks import Blend, Callback, Hooks
from .multistep import sample_dpmpp_2m, sample_uni_pc
from .rollout import Check, Constrain
from .second_order import Step, corrected
from .steps import batch_sigma, intervals
from .trajectory import Every, Trajectory, with_trajectory

Spectrum = Callable[[IsotropicGaussian], Tensor]


class Draws(NamedTuple):
    """Random numbers of one GM-SDE step.

    Args:
        component: component indices, (B, *S).
        component_noise: standard normal noise around the component, (B, C, *S).
        transition_noise: standard normal (B, C, *S); the last step uses none.
    """

    component: Tensor
    component_noise: Tensor
    transition_noise: Tensor | None


class SpectralDraws(NamedTuple):
    """Random numbers of one GM-SDE step with a spectrum.

    Args:
        spectral_noise: standard normal noise of the frequencies, (B, C, *S).
        axes: principal axes, (B, *1, C, C), whose signs are arbitrary.
        transition_noise: standard normal (B, C, *S); the last step uses none.
    """

    spectral_noise: Tensor
    axes: Tensor | None
    transition_noise: Tensor | None


@with_trajectory
def sample_gm_ode(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    order: int = 2,
    substeps: int = 4,
    shift: float = 1.0,
    spacing: Literal["time", "sigma"] = "time",
    **hooks: Any,
) -> Tensor:
    """Sample with GM-ODE (GMFlow, ICML 2025), deterministically.

    Between two network calls x follows the ODE of the predicted mixture.

    Args:
        x: (B, C, *S) at sigmas[0].
        order: 1; or 2 for the second-order correction of every mixture but the first.
        substeps: Euler substeps between two network calls.
        shift: time shift of the sigmas, see `shift_time`.
        spacing: substeps of equal size in unshifted "time", as in the reference, or in "sigma".
            They differ only if `shift` is not 1.
        hooks: see `Hooks`.

    Returns:
        x at sigmas[-1].

    Raises:
        ValueError: `order`, `substeps`, `spacing` or `sigmas` is out of range.
    """
    if spacing not in ("time", "sigma"):
        raise ValueError(f'spacing is {spacing!r}; it must be "time" or "sigma"')
    substeps = whole_number("substeps", substeps)  # before the first network call
    hooks, previous = Hooks(**hooks), None
    grid = shift if spacing == "time" else 1.0
    for index, (sigma, sigma_next) in enumerate(intervals(sigmas)):
        mixture, previous = _predict(denoiser, x, sigma, sigma_next, order, previous)
        hooks.report(index, x, mixture.mean)
        x = hooks.rollout(mixture, x, sigma, sigma_next, substeps, shift=grid)
    return x


@with_trajectory
def sample_gm_sde(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    order: int = 2,
    spectrum: Spectrum | None = None,
    noise: Generator | Sequence[Draws | SpectralDraws] | None = None,
    **hooks: Any,
) -> Tensor:
    """Sample with GM-SDE (GMFlow, ICML 2025).

    Each step draws x_0 from the predicted mixture, then x at the next sigma given both.

    Args:
        spectrum: called as spectrum(gaussian) with the Gaussian of x_0 (mean (B, C, *S), var
            (B, 1, *1)); returns the log power spectrum (B, C, *S) of the draws, see
            `sample_with_spectrum`. None: every pixel is drawn on its own.
        noise: a generator (a CPU one gives the same numbers on every device), one per sample, or
            recorded draws, one per step.
        Other arguments, return value and errors as `sample_gm_ode`.
    """
    hooks, previous, steps = Hooks(**hooks), None, intervals(sigmas)
    recorded = isinstance(noise, Sequence) and not isinstance(noise[0], torch.Generator)
    if recorded and len(noise) != len(steps):
        raise ValueError(
            f"{len(noise)} recorded draws do not fit {len(steps)} steps; give one per step"
        )
    for index, (sigma, sigma_next) in enumerate(steps):
        mixture, previous = _predict(denoiser, x, sigma, sigma_next, order, previous)
        hooks.report(index, x, mixture.mean)
        draws = noise[index] if recorded else None
        x0 = hooks.blended(x, sigma, _draw_x0(mixture, x, spectrum, noise, draws), 0.0)
        if recorded:
            transition_noise = draws.transition_noise
        else:
            transition_noise = standard_normal(x.shape, noise, like=x0) if sigma_next > 0 else None
        x = reverse_transition(x0, x, sigma_next, sigma, transition_noise)
        x = hooks.settle(x, sigma_next)
        if hooks.check is not None:
            hooks.check()
    return x


@with_trajectory
def sample_euler(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor | Sequence[float], **hooks: Any
) -> Tensor:
    """Sample with Euler steps along the mean velocity, as for any flow-matching model.

    Arguments, return value and errors as `sample_gm_ode`.
    """

    def mean(x: Tensor, sigma: Tensor) -> Mixture:
        return GaussianMixture.point_mass(denoiser(x, sigma).mean())

    return sample_gm_ode(mean, x, sigmas, order=1, substeps=1, **hooks)


@with_trajectory
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
    **hooks: Any,
) -> Tensor:
    """Sample with the policy sampler of pi-Flow (Chen et al. 2025, arXiv 2510.14974).

    Between two network calls x follows the policy that the first one predicted.

    Args:
        denoiser: as for `sample_gm_ode`, or one that returns policies of other kinds.
        substeps: Euler substeps for the whole of [0, 1] in unshifted time; each step takes its
            share, and at least 1. ArcFlow's policy needs none.
        shift: time shift of the sigmas; a step's substeps are of equal size in unshifted time.
        temperature: of the mixture, in (0, 1], at every step but one that ends at 0; below 1 it
            sharpens. None: pi-Flow's min(1, 0.1 (steps - 1)), with the steps of this call. Other
            policies have none.
        stochasticity: h >= 0. 0 is deterministic; above it each step goes to a lower sigma and
            adds noise back; 1 is as stochastic as the SDE of DDPM; math.inf goes to x_0 and adds
            fresh noise only.
        noise: a generator (a CPU one gives the same numbers on every device), or one per sample.
        Other arguments, return value and errors as `sample_gm_ode`.

    Raises:
        ValueError: `temperature`, `stochasticity` or `substeps` is out of range.
    """
    hooks, steps = Hooks(**hooks), intervals(sigmas)
    if temperature is None:
        temperature = usual_temperature(len(steps))
    elif not 0 < temperature <= 1:
        raise ValueError(
            f"temperature {temperature} must be above 0 and at most 1, which changes nothing"
        )
    if not stochasticity >= 0:
        raise ValueError(f"stochasticity {stochasticity} must be 0 (deterministic) or more")
    substeps = whole_number("substeps", substeps)
    for index, (sigma, sigma_next) in enumerate(steps):
        policy = denoiser(x, batch_sigma(x, sigma))
        hooks.report(index, x, policy.mean)
        if temperature < 1 and sigma_next > 0:
            policy = policy.with_temperature(temperature)
        kept = _kept_noise(sigma, sigma_next, stochasticity)
        signal = (1 - sigma_next) + sigma_next * kept
        target = sigma_next * kept / signal  # the rollout's end; fresh noise leads to sigma_next
        length = unshift_time(sigma, shift) - unshift_time(target, shift)
        x = hooks.rollout(policy, x, sigma, target, max(1, round(length * substeps)), shift=shift)
        if kept < 1 and sigma_next > 0:
            fresh = sigma_next * math.sqrt(1 - kept**2)
            x = signal * x + fresh * standard_normal(x.shape, noise, like=x)
            x = hooks.settle(x, sigma_next)
    return x


def usual_temperature(steps: int) -> float:
    """Return pi-Flow's temperature for the GM policy; 1 for a single step."""
    return min(1.0, 0.1 * (steps - 1)) if steps > 1 else 1.0


@dataclass(frozen=True)
class Solver:
    """An entry of the registry `SOLVERS`.

    Args:
        name: as users write it.
        title: as plots show it.
        sample: the function.
        needs_mixture: False if it follows the mean only.
        takes_policies: True if the denoiser may return other policies than a mixture.
        substeps: usual number of substeps, as the solver counts them; None if it has none.
        substeps_in_all: True if `substeps` counts those of the whole run, not of a step.
        final_step_size: usual size of the last step relative to the others.
    """

    name: str
    title: str
    sample: Callable[..., Tensor]
    needs_mixture: bool = True
    takes_policies: bool = False
    substeps: int | None = None
    substeps_in_all: bool = False
    final_step_size: float = 1.0

    @property
    def settings(self) -> frozenset[str]:
        """Names of the keyword arguments that `sample` takes, without the hooks."""
        parameters = inspect.signature(self.sample).parameters.values()
        return frozenset(each.name for each in parameters if each.kind is each.KEYWORD_ONLY)


_POLICY = {
    "takes_policies": True,
    "substeps": 128,
    "substeps_in_all": True,
    "final_step_size": FINAL_STEP_SIZE,
}
_MEAN = {"needs_mixture": False, "takes_policies": True}
SOLVERS = {
    solver.name: solver
    for solver in (
        Solver("gm-ode", "GM-ODE", sample_gm_ode, substeps=8),
        Solver("gm-sde", "GM-SDE", sample_gm_sde),
        Solver("gm-policy", "GM policy", sample_gm_policy, **_POLICY),
        Solver("euler", "Euler on the mean", sample_euler, **_MEAN),
        Solver("dpmpp-2m", "DPM-Solver++(2M)", sample_dpmpp_2m, **_MEAN),
        Solver("uni-pc", "UniPC", sample_uni_pc, **_MEAN),
    )
}
MEAN_SOLVERS = tuple(name for name, solver in SOLVERS.items() if not solver.needs_mixture)


def solve(
    solver: str,
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
    blend: Blend | None = None,
    check: Check | None = None,
    return_trajectory: bool | Every = False,
    **settings: Any,
) -> Tensor | tuple[Tensor, Trajectory]:
    """Run the solver of that name with those of the settings that it takes.

    Args:
        solver: a name in SOLVERS.
        settings: settings of any solver: `order`, `substeps` (the solver's usual number if None),
            `shift`, `spacing`, `temperature`, `stochasticity`, `spectrum`, `noise`.
        return_trajectory: True or "step", or "substep", to return (x, trajectory), see
            `with_trajectory`.
        Other arguments of the solvers.

    Raises:
        ValueError: `solver` is unknown; or as the solvers.
        TypeError: no solver has a setting of that name.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is unknown; choose one of {', '.join(SOLVERS)}")
    unknown = settings.keys() - frozenset().union(*(each.settings for each in SOLVERS.values()))
    if unknown:
        raise TypeError(f"no solver has the settings {', '.join(sorted(unknown))}")
    chosen = SOLVERS[solver]
    if settings.get("substeps") is None:
        settings["substeps"] = chosen.substeps
    taken = {name: value for name, value in settings.items() if name in chosen.settings}
    hooks = {"callback": callback, "constrain": constrain, "blend": blend, "check": check}
    taken["return_trajectory"] = return_trajectory
    return chosen.sample(denoiser, x, sigmas, **taken, **hooks)


def _predict(
    denoiser: Denoiser,
    x: Tensor,
    sigma: float,
    sigma_next: float,
    order: int,
    previous: Step | None,
) -> tuple[Mixture, Step | None]:
    """Call the network once; return the mixture, corrected if `order` is 2, and this step.

    Raises:
        ValueError: `order` is neither, or the network predicts no mixture.
    """
    if order not in (1, 2):
        raise ValueError(f"order is {order}; it can be 1 or 2")
    mixture = denoiser(x, batch_sigma(x, sigma))
    if not is_mixture(mixture):
        able = ", ".join(name for name, each in SOLVERS.items() if each.takes_policies)
        raise ValueError(
            f"this solver needs a mixture, and the model predicts {kind_of(mixture)}; use {able}"
        )
    if order == 1:
        return mixture, None
    step = Step(mixture, x, sigma, sigma - sigma_next)
    if previous is not None:
        mixture = corrected(mixture, previous, x, sigma, step.size)
    return mixture, step


def _draw_x0(
    mixture: Mixture,
    x: Tensor,
    spectrum: Spectrum | None,
    noise: Generator | None,
    draws: Draws | SpectralDraws | None,
) -> Tensor:
    """Draw x_0, (B, C, *S), with a spectrum or pixel by pixel; recorded draws replace `noise`.

    A blend is always drawn pixel by pixel.
    """
    if spectrum is None or isinstance(mixture, BlendedPolicy):
        if draws is None:
            return mixture.sample(noise)
        return mixture.sample(component=draws.component, noise=draws.component_noise)
    draws = draws or SpectralDraws(standard_normal(x.shape, noise, like=x), None, None)
    log_power = spectrum(image_gaussian(mixture))
    given = draws.spectral_noise, draws.axes, axis_map(x.device)
    return sample_with_spectrum(mixture, log_power, *given)


def _kept_noise(sigma: float, sigma_next: float, stochasticity: float) -> float:
    """Return the share of the noise in x at sigma_next that comes from x at sigma, in [0, 1].

    The rest is fresh noise (pi-Flow's flow map SDE).
    """
    if stochasticity == 0:
        return 1.0
    ratio = sigma_next * (1 - sigma) / (sigma * (1 - sigma_next))
    return ratio ** (stochasticity * stochasticity)  # which may be infinite
