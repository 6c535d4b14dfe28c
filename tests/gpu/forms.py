"""Triton's kernel and the compiled forms on the device against the definition in float64."""

from __future__ import annotations

import functools
import importlib.util
import shutil
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gmflow_core import GaussianMixture, rollout, sample_with_spectrum
from gmflow_core.fast import choice, compiling, quantiles
from gmflow_core.gaussians.transport import AxisMap, weights_given
from tests.benchmarks.rows import END, START, compiled, describe, said_by
from tests.core.test_fast import guided_sample
from tests.helpers import F64, cast, normal, random_mixture

from .run import Run, check, check_near

SIZES = ((1, 8, 16, 96, 170), (8, 8, 4, 32, 32), (16384, 16, 2))  # (B, K, C, *S)
QUICK_SIZES = ((1, 3, 4, 5, 8), (2, 5, 3, 3, 4), (40, 3, 2))
SUBSTEPS, FEW = 32, 2
ROLLOUT, DRAW, GUIDED = 5e-5, 5e-4, 1e-4  # errors allowed in float32


def forms(run: Run) -> Iterator[tuple[str, dict | str]]:
    """Compare every method of a rollout, spectral draws and guided steps with float64."""
    for size in run.size(SIZES, QUICK_SIZES):
        for per_pixel in (False, True):
            yield from rollouts(run, size, per_pixel)
    yield draws(run)
    yield guided_steps(run)


def problem_of(method: str, run: Run) -> str | None:
    """Return why a method cannot run here; None if it has to run."""
    if method == "triton" and importlib.util.find_spec("triton") is None:
        return "not run: the package triton is not installed"
    if method == "compiled" and run.quick:
        return "not run: compiled in tests/core/test_fast.py, which takes a while on a CPU"
    return compiler_problem(run) if method == "compiled" else None


def compiler_problem(run: Run) -> str | None:
    """Return why torch.compile cannot run here; None if it has to."""
    if run.device == "cuda":
        return problem_of("triton", run)
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "not run: there is no C++ compiler"
    return None


def as_asked(function: Callable[[], Tensor], what: str) -> Tensor:
    """Return what a machine form computes.

    Raises:
        WrongError: another form took its place, of which the log warned.
    """
    compiling.declined.clear()
    compiling.log_once.cache_clear()
    choice._checked.clear()
    found: list[Tensor] = []
    warned = said_by(lambda: found.append(function()))
    check("GMFlow" not in warned, what, "this form itself to run", f"the warning {warned!r}")
    return found[0]


def rollouts(run: Run, size: tuple[int, ...], per_pixel: bool) -> Iterator[tuple[str, dict | str]]:
    """Compare the rollouts of one size, with sigmas and spread for each pixel if `per_pixel`."""
    batch, components, channels, *space = size
    mixture = random_mixture(0, batch, components, channels, space, dtype=F64)
    x, sigmas = normal(batch, channels, *space, dtype=F64), (START, END)
    if per_pixel:
        spread = 0.3 * normal(batch, 1, 1, *space, seed=2, dtype=F64) - 1
        mixture = GaussianMixture(mixture.means, mixture.log_weights, spread)
        start = 0.5 + 0.5 * normal(batch, 1, *space, seed=3, dtype=F64).sigmoid()
        sigmas = start, start * normal(batch, 1, *space, seed=4, dtype=F64).sigmoid()
    mixture, x = mixture.to(run.device), x.to(run.device)
    sigmas = tuple(s.to(run.device) if isinstance(s, Tensor) else s for s in sigmas)
    narrow, start = cast(mixture, torch.float32), x.float()
    times = tuple(s.float() if isinstance(s, Tensor) else s for s in sigmas)
    substeps = run.size(SUBSTEPS, 6)
    exact = rollout(mixture, x, *sigmas, substeps, method="plain")
    case = describe(narrow, f", {substeps} substeps{', sigmas of each pixel' * per_pixel}")
    for method in choice.METHODS:
        if method == "compiled" and (per_pixel or not space):
            continue  # each kind takes a quarter of a minute
        name = f"rollout, {method}: {case}"
        if problem := problem_of(method, run):
            yield name, problem
            continue
        form = functools.partial(rollout, narrow, start, *times, substeps, method=method)
        found = as_asked(form, name)
        yield name, {"error": check_near(found, exact, ROLLOUT, name)}


def draws(run: Run) -> tuple[str, dict | str]:
    """Compare draws from a mixture, without and with a spectrum, by the forms for a GPU.

    The axes are those of float64, as their signs are arbitrary; the device's own are orthonormal.
    """
    batch, components, channels, *space = run.size((8, 8, 4, 32, 32), (2, 3, 3, 4, 4))
    mixture = random_mixture(0, batch, components, channels, space, spread=1.0, dtype=F64)
    z = normal(batch, channels, *space, dtype=F64)
    power = 0.3 * normal(*z.shape, seed=2, dtype=F64)
    axes = mixture.principal_axes()
    exact = mixture.from_normal(z, axes), sample_with_spectrum(mixture, power, z, axes)
    mixture = cast(mixture, torch.float32).to(run.device)
    z, power, given = (each.float().to(run.device) for each in (z, power, axes))
    maps = {"by sections": AxisMap(quantiles.quantile_by_sections, weights_given)}
    if not problem_of("compiled", run):
        maps["compiled"] = AxisMap(
            quantiles.compiled_quantile, choice.form_of(weights_given, "compiled")
        )
    figures: dict[str, float] = {}
    for name, form in maps.items():
        plain = functools.partial(mixture.from_normal, z, given, form)
        spectral = functools.partial(sample_with_spectrum, mixture, power, z, given, form)
        for what, draw, right in (("draw", plain, exact[0]), ("spectral draw", spectral, exact[1])):
            found = as_asked(draw, f"{what}, {name}")
            figures[f"{what}, {name}"] = check_near(found, right, DRAW, f"{what}, {name}")
    own = mixture.principal_axes().double().cpu()
    unit = torch.eye(channels, dtype=F64).expand_as(own)
    figures["axes"] = check_near(own @ own.mT, unit, 1e-4, "principal axes times their transpose")
    return f"draws, errors: {describe(mixture)}", figures


def guided_steps(run: Run) -> tuple[str, dict | str]:
    """Compare four guided steps of GM-ODE 2, eager and compiled, with the definition in float64."""
    case = "four guided steps of GM-ODE 2, errors"
    batch, components, channels, *space = run.size((8, 8, 4, 32, 32), (2, 4, 2, 2, 3))
    velocity = random_mixture(0, batch, components, channels, space, dtype=F64)
    x = normal(batch, channels, *space, dtype=F64)
    with torch.inference_mode():
        exact = guided_sample(velocity, x, 0.3)
    velocity, x = cast(velocity, torch.float32).to(run.device), x.float().to(run.device)
    eager = functools.partial(guided_sample, velocity, x, 0.3)
    found = {"eager": as_asked(eager, f"{case}, eager")}
    problem = compiler_problem(run)
    if problem is None:
        found["compiled"] = as_asked(compiled(eager), f"{case}, compiled")
    figures: dict = {
        name: check_near(each, exact, GUIDED, f"{case}, {name}") for name, each in found.items()
    }
    return case, figures | ({"compiled": problem} if problem else {})
