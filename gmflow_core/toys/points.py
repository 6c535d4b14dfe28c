"""Samples of 2-D models, and a picture that compares the solvers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import Tensor, nn

from ..flow.path import flow_sigmas
from ..pictures import contact_sheet
from ..sampling.denoisers import denoiser_of
from ..sampling.seeds import checked_seed
from ..sampling.solvers import SOLVERS, solve
from .checkerboard import total_variation
from .density_picture import density_picture

CHUNK = 8_192  # points sampled at a time, so that they fit the cache
COMPARED = ("euler", "gm-ode", "gm-sde")  # solvers in the picture of `compare_solvers`


def sample_points(
    network: nn.Module,
    count: int,
    *,
    solver: str = "gm-ode",
    steps: int = 8,
    order: int = 2,
    substeps: int | None = None,
    shift: float = 1.0,
    seed: int = 0,
    sigmas: Tensor | None = None,
    temperature: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw samples (count, 2) of a 2-D model and return them on the CPU.

    Args:
        network: a `GMFlowMLP`.
        count: number of samples.
        solver, order, substeps, shift, temperature: see `gmflow_core.sampling.solvers.solve`.
        steps: network calls per sample.
        seed: of the initial noise and of GM-SDE's, see `seed_list`; the numbers do
            not depend on the device.
        sigmas: times to use instead of those of `steps` and `shift`.
        progress: called as progress(done, total) with numbers of network calls.

    Raises:
        ValueError: the network is not one for 2-D points, or a setting is out of range.
    """
    if getattr(network, "channels", None) != 2:
        raise ValueError(f"{type(network).__name__} is not a model of 2-D points")
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1")
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(checked_seed(seed))
    sigmas = flow_sigmas(steps, shift) if sigmas is None else sigmas
    calls, done = math.ceil(count / CHUNK) * (len(sigmas) - 1), 0

    def callback(step: int, x: Tensor, x0: Tensor) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, calls)

    points = []
    for start in range(0, count, CHUNK):
        noise = torch.randn(min(CHUNK, count - start), 2, generator=generator).to(device)
        with torch.inference_mode():
            samples = solve(
                solver,
                denoiser_of(network),
                noise,
                sigmas,
                order=order,
                substeps=substeps,
                shift=shift,
                temperature=temperature,
                noise=generator,
                callback=callback,
            )
        points.append(samples.cpu())
    return torch.cat(points)


def compare_solvers(
    network: nn.Module, steps: list[int], count: int, seed: int = 0
) -> Iterator[tuple[str, int, Tensor]]:
    """Sample a 2-D model with each of the COMPARED solvers and numbers of steps.

    GM-ODE takes 8 substeps between two network calls, and at least 32 in all.

    Yields:
        (solver, steps, points (count, 2)).
    """
    for solver in COMPARED:
        for n in steps:
            settings = {"solver": solver, "steps": n, "substeps": max(8, 32 // n), "seed": seed}
            yield solver, n, sample_points(network, count, **settings)


def comparison_sheet(
    samples: list[tuple[str, int, Tensor]], data: Tensor, title: str
) -> Image.Image:
    """Draw the samples of `compare_solvers`, a row for each solver, below a picture of the data.

    Captions give the network calls and the total variation distance (TV) to the checkerboard.
    """
    rows = []
    for solver in COMPARED:
        cells = [
            (f"{n} step{'s' * (n > 1)}   TV {total_variation(points):.3f}", density_picture(points))
            for s, n, points in samples
            if s == solver
        ]
        rows.append((_row_title(solver), cells))
    reference = (f"data   TV {total_variation(data):.3f}", density_picture(data))
    return contact_sheet(rows, reference, title)


def _row_title(solver: str) -> str:
    """Return the solver's title, with its order if it has one, in short lines."""
    entry = SOLVERS[solver]
    return textwrap.fill(f"{entry.title} 2" if "order" in entry.settings else entry.title, 9)
