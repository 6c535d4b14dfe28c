"""Compare noise from N(0, I) and from mixture sources on 2-D toys; the command is `training.source_toys`."""

from __future__ import annotations

import csv
import dataclasses
import functools
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from gmflow_core.files.checkpoint import load_checkpoint, read_metadata, save_checkpoint
from gmflow_core.flow.losses import nll
from gmflow_core.flow.path import diffuse, flow_sigmas
from gmflow_core.gaussians.mixture import GaussianMixture
from gmflow_core.models.mlp import GMFlowMLP, GMFlowMLPConfig
from gmflow_core.pictures import contact_sheet
from gmflow_core.sampling.denoisers import denoiser_of
from gmflow_core.sampling.solvers import solve
from gmflow_core.source.em import fit_mixture
from gmflow_core.source.files import load_source, read_source_metadata, save_source
from gmflow_core.source.source import GaussianMixtureSource
from gmflow_core.toys.checkerboard import EXTENT, draw_checkerboard, on_board
from gmflow_core.toys.density_picture import density_picture
from training.common.settings import SMALLEST_SIGMA, require

MODULE = "training.source_toys"
SCALE = EXTENT / math.sqrt(3)  # the checkerboard's standard deviation along each axis
RING_STD = 0.1  # of each of the 8 Gaussians
MODES = {"checkerboard": (8,), "8-gaussians": (4, 8)}  # M
SOURCE_CALLS, CORNER_CALLS = (1, 2, 4, 8, 16), (1, 2, 4, 8)
DIRECTIONS = 64
FIT_SAMPLES = 20_000
FIT_TOLERANCE = 1e-3  # nats a sample that EM stops at, and that a better start must gain
SOLVER_TITLES = {"": "0 calls", "euler": "Euler", "gm-ode": "GM-ODE 2", "gm-sde": "GM-SDE 2"}
SOURCES = {"gaussian": "N(0, I)", "independent": "mixture", "mode": "mixture", "known": "mixture"}
COUPLINGS = {
    "gaussian": "none",
    "independent": "independent",
    "mode": "mode",
    "known": "mode, known",
}
CASE = ("data", "source", "modes", "coupling", "output", "solver", "calls")
COLUMNS = (*CASE, "sliced_w1", "smallest", "largest", "off_board")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The experiments. The defaults shown are those of the chosen preset."""

    preset: Literal["full", "quick"] = "full"
    """Where the other defaults come from."""
    out: Path = Path("outputs/source_toys")
    """Folder for the networks, the sources and the figures; what is found there is not trained again."""
    seeds: int = 2
    """Networks of each kind."""
    starts: int = 10
    """Starts of EM for each source; the likeliest fit is taken."""
    iterations: int = 5000
    """Training iterations of each network."""
    batch_size: int = 1024
    """Points an iteration."""
    lr: float = 2e-3
    """Learning rate at the start; it falls to 0 as a cosine."""
    width: int = 256
    """Of the networks' three hidden layers."""
    num_components: int = 16
    """K of the networks with a mixture at the output."""
    samples: int = 20_000
    """Points that each distance is measured with, and as many of the data."""
    restart: bool = False
    """Throw away the networks and sources found in OUT."""

    def __post_init__(self):
        for name in (
            "seeds",
            "starts",
            "iterations",
            "batch_size",
            "width",
            "num_components",
            "samples",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.lr > 0, "lr", self.lr, "positive")


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
        noise: "gaussian"; or of a mixture source, with the mode "independent" of the point, the point's own ("mode"), or the
            point's own and the network told so ("known").
        modes: M of the mixture source; 1 for N(0, I).
    """

    toy: Literal["checkerboard", "8-gaussians"]
    noise: Literal["gaussian", "independent", "mode", "known"]
    modes: int = 1
    mixture_output: bool = False

    @property
    def solvers(self) -> tuple[str, ...]:
        return ("gm-ode", "gm-sde") if self.mixture_output else ("euler",)

    def file(self, seed: int) -> str:
        source = self.noise if self.noise == "gaussian" else f"{self.noise}{self.modes}"
        return (
            f"{self.toy}_{source}_{'mixture' if self.mixture_output else 'mean'}_{seed}.safetensors"
        )

    @property
    def title(self) -> str:
        return (
            SOURCES[self.noise]
            if self.noise == "gaussian"
            else f"{SOURCES[self.noise]} of {self.modes}"
        )

    def about(self) -> dict[str, str | int]:
        return {
            "data": self.toy, "source": SOURCES[self.noise], "modes": self.modes, "coupling": COUPLINGS[self.noise],
            "output": "mixture" if self.mixture_output else "mean",
        }  # fmt: skip


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
CORNER_ROWS = [(run, solver) for run in CORNERS for solver in run.solvers]


def draw_data(toy: str, count: int, generator: torch.Generator) -> Tensor:
    """`count` points (count, 2) of unit variance along each axis, up to 1 % for the 8 Gaussians, which lie on a circle."""
    if toy == "checkerboard":
        return draw_checkerboard(count, generator) / SCALE
    angle = torch.randint(8, (count,), generator=generator) * (math.pi / 4)
    centre = math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], -1)
    return centre + RING_STD * torch.randn(count, 2, generator=generator)


def sliced_wasserstein(x: Tensor, y: Tensor, directions: int = DIRECTIONS) -> float:
    """The Wasserstein-1 distance of the projections of points x and y, both (N, 2), averaged over equally spaced directions."""
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
    """Mean NLL of the velocity at uniform sigmas, in nats per point without the 2 pi constant: half the squared error, up to a
    constant, for the mean output."""
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
            x0, predict = (
                frame.enter(x0, 0.0),
                frame.network(functools.partial(network, labels=modes)),
            )
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
    """`count` samples (count, 2); 0 calls give the noise itself."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 2, generator=generator)
    if run.noise == "gaussian":
        return _solve(network, noise, solver, calls, generator)
    modes = source.draw_modes(count, generator)
    if run.noise != "known":
        return _solve(network, source.draw(modes, noise=noise), solver, calls, generator)
    frame = source.frame(modes)
    y = (
        _solve(
            frame.network(functools.partial(network, labels=modes)), noise, solver, calls, generator
        )
        if calls
        else noise
    )
    return frame.leave(y, 0.0 if calls else 1.0)


def _solve(
    network: Callable[[Tensor, Tensor], GaussianMixture],
    noise: Tensor,
    solver: str,
    calls: int,
    generator: torch.Generator,
) -> Tensor:
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


# What is kept in OUT
def settings_of(config: Config, seed: int) -> dict:
    """What decides what a network learns."""
    names = ("iterations", "batch_size", "lr", "width", "num_components")
    return {"seed": seed} | {name: getattr(config, name) for name in names}


def require_same(path: Path, found: dict, settings: dict) -> None:
    """
    Raises:
        ValueError: the file was made with other settings.
    """
    differ = [f"{name} {found.get(name)} there, {value} asked for" for name, value in settings.items()
              if found.get(name) != value]  # fmt: skip
    if differ:
        raise ValueError(
            f"{path} was made with other settings ({'; '.join(differ)}); give another --out, or --restart"
        )


def source_of(toy: str, modes: int, seed: int, config: Config) -> GaussianMixtureSource:
    """The mixture of spherical modes fitted to `FIT_SAMPLES` points, from OUT if it is there."""
    path = config.out / f"{toy}_source{modes}_{seed}.safetensors"
    settings = {"seed": seed, "samples": FIT_SAMPLES, "modes": modes, "starts": config.starts}
    if path.exists() and not config.restart:
        require_same(path, read_source_metadata(path)["training"], settings)
        return load_source(path)
    data = draw_data(toy, FIT_SAMPLES, torch.Generator().manual_seed(1000 + seed))
    source, log_likelihoods = likeliest_fit(data, modes, seed, config.starts)
    save_source(source, path, facts=settings | {"log_likelihoods": log_likelihoods})
    return source


def likeliest_fit(
    data: Tensor, modes: int, seed: int, starts: int
) -> tuple[GaussianMixtureSource, list[float]]:
    """The first fit that is as likely as the best up to `FIT_TOLERANCE`, and the log-likelihoods of all, in nats a sample."""
    seeds = range(seed, seed + starts)
    fits = [
        fit_mixture(data, modes, spherical=True, seed=start, tolerance=FIT_TOLERANCE)
        for start in seeds
    ]
    ends = [fit.log_likelihoods[-1] for fit in fits]
    best = next(
        fit for fit, end in zip(fits, ends, strict=True) if end >= max(ends) - FIT_TOLERANCE
    )
    return best.source, ends


def network_of(
    run: Run, seed: int, config: Config, source: GaussianMixtureSource | None
) -> GMFlowMLP:
    """The trained network, from OUT if it is there."""
    path, settings = config.out / run.file(seed), settings_of(config, seed)
    if path.exists() and not config.restart:
        require_same(path, read_metadata(path)["training"], settings)
        return load_checkpoint(path)[0]
    torch.manual_seed(seed)
    output = (
        {"num_components": config.num_components}
        if run.mixture_output
        else {"num_components": 1, "constant_log_std": 0.0}
    )
    labels = run.modes if run.noise == "known" else 0
    network = GMFlowMLP(
        GMFlowMLPConfig(
            embed_dim=64,
            hidden_dim=config.width,
            num_layers=3,
            min_period=0.2,
            num_classes=labels,
            **output,
        )
    )
    train(network, run, seed, config, source)
    data = {}
    if source is not None:
        coupling = "independent" if run.noise == "independent" else "soft"
        data["source"] = {
            "num_modes": run.modes, "shape": source.shape, "coupling": coupling, "conditioning": "mode" if labels else "hidden"
        }  # fmt: skip
    save_checkpoint(network, path, facts=settings, data=data)
    return network.eval()


def train(
    network: GMFlowMLP, run: Run, seed: int, config: Config, source: GaussianMixtureSource | None
) -> None:
    generator = torch.Generator().manual_seed(2000 + seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.iterations)
    bar = tqdm(range(config.iterations), desc=run.file(seed), leave=False, dynamic_ncols=True)
    for step in bar:
        optimizer.zero_grad()
        loss = loss_of(
            network, run, source, draw_data(run.toy, config.batch_size, generator), generator
        )
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            bar.set_postfix(loss=f"{loss.item():.4f}")


# Figures
def cases(run: Run, calls: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    """(solver, calls) of a run, the source itself first."""
    yield "", 0
    yield from itertools.product(run.solvers, calls)


def measure(
    config: Config,
) -> tuple[list[dict], dict[str, list[float]], dict[tuple[Run, str, int], Tensor]]:
    """Train or load everything, and sample it.

    Returns:
        The lines of the table; the distance between two draws of the data, for each toy and seed; and the points of the first
        seed.
    """
    calls = {run: SOURCE_CALLS for run in TABLE} | {
        run: CORNER_CALLS for run in CORNERS if run not in TABLE
    }
    figures: dict[tuple[Run, str, int], list[tuple[float, float]]] = {}
    points, floor = {}, {}
    bar = tqdm(total=config.seeds * len(calls), desc="networks", dynamic_ncols=True)
    for seed in range(config.seeds):
        sources = {
            (toy, modes): source_of(toy, modes, seed, config)
            for toy, sizes in MODES.items()
            for modes in sizes
        }
        generator = torch.Generator().manual_seed(3000 + seed)
        data = {toy: draw_data(toy, config.samples, generator) for toy in MODES}
        for toy in MODES:
            floor.setdefault(toy, []).append(
                sliced_wasserstein(draw_data(toy, config.samples, generator), data[toy])
            )
        for run in calls:
            source = sources.get((run.toy, run.modes))
            network = network_of(run, seed, config, source)
            for solver, n in cases(run, calls[run]):
                x = sample(network, run, source, config.samples, solver, n, 4000 + seed)
                off = 1 - on_board(x * SCALE, slack=0.05).double().mean().item()
                figures.setdefault((run, solver, n), []).append(
                    (sliced_wasserstein(x, data[run.toy]), off)
                )
                points.setdefault((run, solver, n), x)
            bar.update()
    bar.close()
    lines = []
    for (run, solver, n), values in figures.items():
        distances, off = zip(*values, strict=True)
        spread = {
            "sliced_w1": statistics.mean(distances),
            "smallest": min(distances),
            "largest": max(distances),
        }
        off_board = {"off_board": statistics.mean(off)} if run.toy == "checkerboard" else {}
        lines.append(run.about() | {"solver": solver, "calls": n} | spread | off_board)
    return lines, floor, points


def markdown(lines: list[dict]) -> str:
    """The two tables; the second one with the share of points off the board."""

    def table(title: str, calls: tuple[int, ...], rows: list[tuple[Run, str]], shares: bool) -> str:
        text = [
            "| " + " | ".join([title, *map(str, calls)]) + " |",
            "|" + "---|" * (1 + len(calls)),
        ]
        for run, solver in rows:
            about = run.about()
            of = {
                line["calls"]: line
                for line in lines
                if about.items() <= line.items() and line["solver"] in ("", solver)
            }
            cells = [
                f"{of[n]['sliced_w1']:.3f}" + (f" ({of[n]['off_board']:.1%})" if shares else "")
                for n in calls
            ]
            name = f"{about['data']}, {run.title}, {about['coupling']}"
            if shares:
                name = f"{about['source']} to {about['output']}, {SOLVER_TITLES[solver]}"
            text.append("| " + " | ".join([name, *cells]) + " |")
        return "\n".join(text) + "\n"

    first = table(
        "data, source, coupling",
        (0, *SOURCE_CALLS),
        [(run, "euler") for run in TABLE],
        shares=False,
    )
    return (
        first
        + "\n"
        + table(
            "source to output, solver (off the board)", (0, *CORNER_CALLS), CORNER_ROWS, shares=True
        )
    )


def sheet(
    rows: list[tuple[str, Run, str]], calls: tuple[int, ...], lines: list[dict], points: dict[tuple[Run, str, int], Tensor],
    config: Config, title: str,
):  # fmt: skip
    """Samples of the first seed, a row for each (caption, run, solver); the captions give the distance, averaged over seeds."""
    w1 = {tuple(line[name] for name in CASE): line["sliced_w1"] for line in lines}
    data = draw_data("checkerboard", config.samples, torch.Generator().manual_seed(5000))

    def picture(x: Tensor, toy: str) -> Tensor:
        peak = None if toy == "checkerboard" else 0.4 / (16 * math.pi * (RING_STD * SCALE) ** 2)
        return density_picture(x * SCALE, size=256, bins=64, peak=peak)

    content = []
    for caption, run, solver in rows:
        cells = []
        for n in calls:
            key = (run, solver if n else "", n)
            name = f"{n} call{'s' * (n > 1)}" if n else "the source"
            cells.append(
                (
                    f"{name}   W1 {w1[(*run.about().values(), *key[1:])]:.3f}",
                    picture(points[key], run.toy),
                )
            )
        content.append((caption, cells))
    return contact_sheet(content, ("data", picture(data, "checkerboard")), title, tile=192)


def write(config: Config) -> list[dict]:
    """Everything; returns the lines of the table."""
    config.out.mkdir(parents=True, exist_ok=True)
    lines, floor, points = measure(config)
    path = config.out / "source_toys"
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in line.items()}
            for line in lines
        )
    settings = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in ("out", "restart")
    }
    settings |= {
        "directions": DIRECTIONS,
        "modes": MODES,
        "fit_samples": FIT_SAMPLES,
        "fit_tolerance": FIT_TOLERANCE,
    }
    record = {"settings": settings, "data_against_data": floor, "lines": lines}
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    text = markdown(lines)
    path.with_suffix(".md").write_text(text)
    seeds = f"mean over {config.seeds} seed{'s' * (config.seeds > 1)}"
    title = f"W1: sliced Wasserstein distance to the data,\n{config.samples:,} points, {seeds}. Lower is better."
    names = {"gaussian": "", "independent": ",\nany mode", "mode": ",\nown mode"}
    rows = [(run.title + names[run.noise], run, "euler") for run in TABLE]
    sheet(rows, (0, *SOURCE_CALLS), lines, points, config, title).save(path.with_suffix(".png"))
    rows = [
        (f"{SOURCES[run.noise]}\nto {run.about()['output']},\n{SOLVER_TITLES[solver]}", run, solver)
        for run, solver in CORNER_ROWS
    ]
    sheet(rows, (0, *CORNER_CALLS), lines, points, config, title).save(
        config.out / "source_toys_corners.png"
    )
    print(text)
    for toy, distances in floor.items():
        print(f"{toy}: the data against itself {statistics.mean(distances):.3f}")
    print(f"figures and pictures: {path}.*")
    return lines
