"""Score points with a checkerboard model's log-likelihood, and compare it with the exact density.

The command is `training.likelihood`; its settings are here, for image models too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gmflow_core.files.checkpoint import load_checkpoint
from gmflow_core.flow.path import flow_sigmas, x0_to_velocity
from gmflow_core.sampling.denoisers import Denoiser, denoiser_of
from gmflow_core.sampling.likelihood import log_likelihood
from gmflow_core.toys.checkerboard import EXTENT, board_posterior_mean, draw_checkerboard
from training.common.settings import require, require_device, require_ranges, require_unused
from training.common.tables import check_table, write_table

MODULE = "training.likelihood"
SHIPPED = Path("gmflow_core/shipped/checkerboard_k64.safetensors")
SHIFT = 0.2  # of the sigmas: small steps near the data, whose density has edges
EXACT = -math.log(2 * EXTENT**2)  # log-density on the filled half of [-EXTENT, EXTENT]^2
COLUMNS = (
    *("denoiser", "points", "divergence", "steps", "count"),
    *("mean", "standard_error", "rms_error"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Log-likelihood of models. The defaults shown are those of the chosen preset."""

    preset: Literal["full", "quick"] = "full"
    """Source of the other defaults."""
    checkpoint: tuple[str, ...] = (str(SHIPPED),)
    """Model of 2-D points that learned the checkerboard; with --data one image model or more."""
    data: Path | None = None
    """Prepared data (training.prepare) that image models were trained on; without, points of the
    checkerboard are scored."""
    out: Path = Path("outputs/likelihood")
    """Folder for the figures."""
    points: int = 500
    """Points of each kind."""
    steps: tuple[int, ...] = (16, 64, 256)
    """Numbers of integration steps of the flow."""
    seed: int = 0
    """Seed of the points and of the random direction, or of the images, times and noises."""
    count: int = 50_000
    """Images, each at one random time; the paper's number. If the data have fewer, they are used
    again at other times."""
    batch_size: int = 100
    """Images in a network call."""
    widths: tuple[float, ...] = (1.0,)
    """Measure image models with the standard deviations of all components times each of these
    factors: one whose likelihood grows with a factor above 1 is too sure of itself."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of an image network's products; auto: bf16 on a GPU, fp32 on the CPU."""
    device: str = "auto"
    """auto (a GPU if there is one) or cpu, for image models."""

    def __post_init__(self):
        require(self.points >= 2, "points", self.points, "at least 2")
        require(len(self.steps) > 0, "steps", self.steps, "one number or more")
        require(min(self.steps) >= 1, "steps", self.steps, "at least 1 each")
        require(self.count >= 2, "count", self.count, "at least 2")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        for width in self.widths or (0.0,):
            require(0 < width < math.inf, "widths", self.widths, "positive, one or more")
        require(len(self.checkpoint) > 0, "checkpoint", self.checkpoint, "one file or more")
        require_device(self.device)
        require_ranges(self)

    def check_effects(self) -> None:
        """Check that all options that are not the preset's have an effect.

        Raises:
            ValueError: one has none.
        """
        of_points, of_images = ("points", "steps"), ("count", "batch_size", "widths", "precision")
        names = of_images if self.data is None else of_points
        when = "without --data" if self.data is None else "with --data"
        require_unused(self, PRESETS[self.preset], names, when)


PRESETS = {"full": Config(), "quick": Config(preset="quick", points=20, steps=(2, 4))}


def write(config: Config) -> list[dict[str, Any]]:
    """Score the points, and write the table to OUT/likelihood.csv after each of its lines.

    Returns:
        Its lines.

    Raises:
        FileExistsError: the table is not of this command.
        ValueError: the checkpoint is not one of a model of 2-D points.
    """
    checkpoint, *more = config.checkpoint
    if more:
        raise ValueError("points are scored with one --checkpoint; give --data with image models")
    network, _ = load_checkpoint(checkpoint)
    if getattr(network, "channels", None) != 2:
        kind = type(network).__name__
        raise ValueError(
            f"{checkpoint} holds a {kind}, not a model of 2-D points; for an image model give "
            "--data, what it was trained on"
        )
    network.requires_grad_(False)
    path = config.out / "likelihood.csv"
    check_table(path, COLUMNS, MODULE)
    denoisers = {"exact": denoiser_of(exact_velocity, 0.0), "model": denoiser_of(network)}
    lines = []
    for line in measure(denoisers, config):
        case = "{denoiser}, {points}, divergence {divergence}, {steps} steps"
        lines.append(line)
        write_table(lines, COLUMNS, path)
        print(f"{case.format(**line)}: {line['mean']:.3f}", flush=True)
    print(f"figures: {path}")
    return lines


def exact_velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """Return the mean velocity of a perfect model at points (N, 2)."""
    return x0_to_velocity(board_posterior_mean(x, sigma), x, sigma)


def measure(denoisers: dict[str, Denoiser], config: Config) -> Iterator[dict[str, Any]]:
    """Yield the lines of the table."""
    data = draw_checkerboard(config.points, torch.Generator().manual_seed(config.seed)).double()
    empty = data * torch.tensor([-1, 1])  # the mirrored board fills the other squares
    for name, denoiser in denoisers.items():
        runs = [(data, "data", "exact", steps) for steps in config.steps]
        runs.append((data, "data", "one direction", max(config.steps)))
        if name == "model":  # the exact density is 0
            runs.append((empty, "empty squares", "exact", max(config.steps)))
        for points, kind, divergence, steps in runs:
            noise = torch.Generator().manual_seed(config.seed)
            probes = None if divergence == "exact" else 1
            sigmas = flow_sigmas(steps, SHIFT)
            found = log_likelihood(denoiser, points, sigmas, probes=probes, generator=noise)
            case = {"denoiser": name, "points": kind, "divergence": divergence, "steps": steps}
            yield case | {"count": len(points)} | figures(found, kind == "data")


def figures(found: Tensor, of_data: bool) -> dict[str, float | str]:
    """Return mean, standard error and, for points of the data, root mean square error in nats."""
    rms = (found - EXACT).square().mean().sqrt().item() if of_data else ""
    error = found.std().item() / math.sqrt(len(found))
    return {"mean": found.mean().item(), "standard_error": error, "rms_error": rms}
