"""Compare noise from N(0, I) and from mixture sources on 2-D toys: runs, data, loss and samples.

The command is `training.source_toys`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gmflow_core.flow.losses import nll
from gmflow_core.flow.path import diffuse, flow_sigmas
from gmflow_core.gaussians.mixture import GaussianMixture
from gmflow_core.models.mlp import GMFlowMLP
from gmflow_core.sampling.denoisers import denoiser_of
from gmflow_core.sampling.solvers import solve
from gmflow_core.source.source import GaussianMixtureSource
from gmflow_core.toys.checkerboard import EXTENT, draw_checkerboard
from training.common.settings import SMALLEST_SIGMA, require, require_ranges

MODULE = "training.source_toys"
SCALE = EXTENT / math.sqrt(3)  # the checkerboard's standard deviation along each axis
RING_STD = 0.1  # of each of the 8 Gaussians
MODES = {"checkerboard": (8,), "8-gaussians": (4, 8)}  # M
DIRECTIONS = 64  # projections of the sliced Wasserstein distance
SOURCES = {"gaussian": "N(0, I)", "independent": "mixture", "mode": "mixture", "known": "mixture"}
COUPLINGS = {
    "gaussian": "none",
    "independent": "independent",
    "mode": "mode",
    "known": "mode, known",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Experiments on 2-D toys. The defaults shown are those of the chosen preset."""

    preset: Literal["full", "quick"] = "full"
    """Source of the other defaults."""
    out: Path = Path("outputs/source_toys")
    """Folder for the networks, the sources and the figures; what is found there is not trained
    again."""
    seeds: int = 2
    """Networks of each kind."""
    starts: int = 10
    """Starts of EM for each source; the likeliest fit is taken."""
    iterations: int = 5000
    """Training iterations of each network."""
    batch_size: int = 1024
    """Points per iteration."""
    lr: float = 2e-3
    """Learning rate at the start; it decays to 0 as a cosine."""
    width: int = 256
    """Width of the networks' three hidden layers."""
    num_components: int = 16
    """K of the networks with a mixture output."""
    samples: int = 20_000
    """Points that each distance is measured with, and as many of the data."""
    restart: bool = False
    """Train the networks and sources found in OUT again."""

    def __post_init__(self):
        names = (
            "seeds",
            "starts",
            "iterations",
            "batch_size",
            "width",
            "num_components",
            "samples",
        )
        for name in names:
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.lr > 0, "lr", self.lr, "positive")
        require_ranges(self)


PRESETS = {
    "full": Config(),
    "quick": Config(
        preset="quick",
        seeds=1,
        starts=2,
        iterations=20,
        batch_size=256,
        width=32,
        num_components=4,
        samples=1000,
    ),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A network to train.

    Args:
        toy: the data.
        noise: "gaussian"; or from a mixture source, with the mode "independent" of the point, the
            point's own ("mode"), or the point's own and given to the network ("known").
        modes: M of the mixture source; 1 for N(0, I).
        mixture_output: predict a mixture instead of the mean.
    """

    toy: Literal["checkerboard", "8-gaussians"]
    noise: Literal["gaussian", "independent", "mode", "known"]
    modes: int = 1
    mixture_output: bool = False

    @property
    def solvers(self) -> tuple[str, ...]:
        """Solvers that sample the network."""
        return ("gm-ode", "gm-sde") if self.mixture_output else ("euler",)

    def file(self, seed: int) -> str:
        """Return the name of the network's file."""
        source = self.noise if self.noise == "gaussian" else f"{self.noise}{self.modes}"
        output = "mixture" if self.mixture_output else "mean"
        return f"{self.toy}_{source}_{output}_{seed}.safetensors"

    @property
    def title(self) -> str:
        """Source and number of modes, for tables and pictures."""
        source = SOURCES[self.noise]
        return source if self.noise == "gaussian" else f"{source} of {self.modes}"

    def about(self) -> dict[str, str | int]:
        """Return the columns of the table that describe the run."""
        return {
            "data": self.toy,
            "source": SOURCES[self.noise],
            "modes": self.modes,
            "coupling": COUPLINGS[self.noise],
            "output": "mixture" if self.mixture_output else "mean",
        }


TABLE = [
    Run(toy, noise, modes)
    for toy, sizes in MODES.items()
    for modes, noise in [(1, "gaussian"), *itertools.product(sizes, ("independent", "mode"))]
]
CORNERS = [
    Run("checkerboard", noise, modes, output)
    for noise, modes in (("gaussian", 1), ("known", 8))
    for output in (False, True)
]


def draw_data(toy: str, count: int, generator: torch.Generator) -> Tensor:
    """Draw points (count, 2) with unit variance along each axis.

    For the 8 Gaussians, which lie on a circle, the variance is 1 up to 1 %.
    """
    if toy == "checkerboard":
        return draw_checkerboard(count, generator) / SCALE
    angle = torch.randint(8, (count,), generator=generator) * (math.pi / 4)
    centre = math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], -1)
    return centre + RING_STD * torch.randn(count, 2, generator=generator)


def sliced_wasserstein(x: Tensor, y: Tensor, directions: int = DIRECTIONS) -> float:
    """Return the sliced Wasserstein-1 distance of points x and y, both (N, 2).

    It is averaged over projections on equally spaced directions.
    """
    angle = torch.arange(directions, dtype=x.dtype) * (math.pi / directions)
    axes = torch.stack([angle.cos(), angle.sin()])
    return ((x @ axes).sort(0).values - (y @ axes).sort(0).values).abs().mean().item()


def loss_of(
    network: GMFlowMLP,
    run: Run,
    source: GaussianMixtureSource | None,
    x0: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Return the mean NLL of the velocity at uniform sigmas.

    It is in nats per point, without the 2 pi constant. For a mean output it is half the squared
    error, up to a constant.

    Args:
        source: None for Gaussian noise.
        x0: points (B, 2) of the data.
    """
    sigma = torch.rand(len(x0), generator=generator).clamp(min=SMALLEST_SIGMA)
    predict, noise = network, torch.randn(x0.shape, generator=generator)
    if run.noise == "independent":
        noise = source.draw(source.draw_modes(len(x0), generator), noise=noise)
    elif run.noise != "gaussian":
        modes = source.posterior_modes(x0, "soft", generator)
        if run.noise == "mode":
            noise = source.draw(modes, noise=noise)
        else:
            frame = source.frame(modes)
            x0 = frame.enter(x0, 0.0)
            predict = frame.network(functools.partial(network, labels=modes))
    return nll(predict(diffuse(x0, sigma, noise), sigma), noise - x0).mean()


@torch.inference_mode()
def sample(
    network: GMFlowMLP | None,
    run: Run,
    source: GaussianMixtureSource | None,
    count: int,
    solver: str,
    calls: int,
    seed: int,
) -> Tensor:
    """Draw samples (count, 2) with a number of network calls; 0 calls return the noise itself."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 2, generator=generator)
    if run.noise == "gaussian":
        return follow(network, noise, solver, calls, generator)
    modes = source.draw_modes(count, generator)
    if run.noise != "known":
        return follow(network, source.draw(modes, noise=noise), solver, calls, generator)
    frame = source.frame(modes)
    if not calls:
        return frame.leave(noise, 1.0)
    in_frame = frame.network(functools.partial(network, labels=modes))
    return frame.leave(follow(in_frame, noise, solver, calls, generator), 0.0)


def follow(
    network: Callable[[Tensor, Tensor], GaussianMixture],
    noise: Tensor,
    solver: str,
    calls: int,
    generator: torch.Generator,
) -> Tensor:
    """Solve from noise (n, 2) to samples (n, 2); without calls, return the noise."""
    if not calls:
        return noise
    return solve(
        solver,
        denoiser_of(network),
        noise,
        flow_sigmas(calls),
        substeps=max(8, 32 // calls),
        noise=generator,
    )
