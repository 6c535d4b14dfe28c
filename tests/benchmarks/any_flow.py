"""Compare samplers and guidance on models of which only the mean velocity is known.

    python -m tests.benchmarks.any_flow                        # all parts, some hours on one core
    python -m tests.benchmarks.any_flow --only digits spread   # or checkerboard, guidance
    python -m tests.benchmarks.any_flow --only digits --more   # of ours, what the csv has not

The shipped models are sampled in a real ComfyUI (found as by the tests) as ordinary flow models,
by every stock sampler and by gm_ode with one Gaussian (K = 1), all from the same noise at equal
network calls; and once more with their own mixture. Figures go to docs/results/any_flow_*.csv.
Stock samplers are screened first, on fewer samples; the best ones are then measured on as many as
the others.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from gmflow_core.files.checkpoint import SHIPPED, load_checkpoint
from gmflow_core.flow.path import flow_sigmas
from gmflow_core.flow.single_gaussian import single_gaussian
from gmflow_core.gaussians.mixture import GaussianMixture, Mixture
from gmflow_core.sampling.solvers import sample_gm_ode
from gmflow_core.toys.checkerboard import (
    LEAST_SIGNAL,
    board_posterior_mean,
    draw_checkerboard,
    total_variation,
)

from .picture_sets import Digits
from .stock import sampled, screened
from .tables import RESULTS, Row, write

MODEL = SHIPPED / "digits_k8.safetensors"
SPREADS = (0.3, 0.5, 0.7, 1.0)
BOARD_SPREADS = (0.5, 1.0, 2.0, 3.0)  # the board's own standard deviation is 2.3
SCREENED, COUNT = 200, Digits.samples
SCREENED_POINTS, POINTS = 128 * 128, 448 * 448
SIGMAS = (0.02, 0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.65, 0.75, 0.85, 0.9, 0.95, 0.98, 1.0)


def digits(work: Path, more: bool = False) -> None:
    """Compare samplers on the digits by Fréchet distance: docs/results/any_flow_digits.csv.

    With `more`, sample only those of our settings that the file has not, and add them to it.
    """
    data = Digits(work)
    if more:
        with (RESULTS / "any_flow_digits.csv").open(newline="") as file:
            before = list(csv.DictReader(file))
        known = [old.items() for old in before]
        lacking = [row for row in ours(COUNT) if not any(_texts(row) <= old for old in known)]
        return write_part("digits", [*before, *data.compare(lacking, MODEL)])
    best = screened(lambda settings: data.compare(settings, MODEL), SCREENED, "frechet_distance")
    settings = [
        *({**row, "count": COUNT} for row in best),
        *ours(COUNT),
        *({**row, "calls": 8} for row in _at_calls(best, 4, COUNT)),
    ]
    rows = data.compare(settings, MODEL)
    floor = data.floor()["frechet_distance"]
    write_part("digits", [{"sampler": "held-out images", "frechet_distance": floor}, *rows])


def _texts(row: Row) -> set[tuple[str, str]]:
    return {(name, str(value)) for name, value in row.items()}


def ours(count: int, spreads: tuple[float, ...] = SPREADS, one: float = 0.5) -> list[Row]:
    """Return the settings of ours: one Gaussian of several spreads, and the model's mixture."""
    rows = [
        *({"sampler": "gm_ode", "spread": spread} for spread in spreads),
        *({"sampler": sampler, "spread": one} for sampler in ("gm_sde", "gm_policy")),
        *({"sampler": sampler, "mixture": True} for sampler in ("gm_ode", "gm_sde")),
    ]
    return [{**row, "calls": each, "count": count} for each in (2, 3, 4, 8) for row in rows]


def _at_calls(rows: list[Row], calls: int, count: int) -> list[Row]:
    return [{**row, "count": count} for row in rows if row["calls"] == calls]


def checkerboard(work: Path, points: int = POINTS) -> None:
    """Compare samplers on the checkerboard by total variation: any_flow_checkerboard.csv."""
    inputs, side = work / "board_inputs.safetensors", round(points**0.5)
    noise = torch.randn(1, 2, side, side, generator=torch.Generator().manual_seed(0))
    save_file({"noise": noise}, inputs)

    def compare(settings: list[Row]) -> list[Row]:
        found = sampled(work, SHIPPED / "checkerboard_k64.safetensors", inputs, settings)
        return [
            {**row, **facts, "total_variation": total_variation(x.movedim(1, -1).reshape(-1, 2))}
            for row, (x, facts) in zip(settings, found, strict=True)
        ]

    best = screened(compare, SCREENED_POINTS, "total_variation")
    at_8 = ({**row, "calls": 8} for row in _at_calls(best, 4, points))
    single = ours(points, BOARD_SPREADS, one=2.0)
    rows = compare([*({**row, "count": points} for row in best), *single, *at_8])
    exact = total_variation(draw_checkerboard(points, torch.Generator().manual_seed(0)))
    write_part("checkerboard", [{"sampler": "exact samples", "total_variation": exact}, *rows])


def guidance(work: Path) -> None:
    """Compare guidance on the digits in 8 calls of DPM-Solver++ 2M: any_flow_guidance.csv."""
    common = {"sampler": "dpmpp_2m", "scheduler": "simple", "calls": 8, "count": COUNT}
    weights, scales = (0.1, 0.3, 0.5, 0.7, 0.9), (2.0, 3.0, 4.0)
    rows = [{**common, "cfg": 1.0}, *({**common, "cfg": scale} for scale in scales)]
    for remedy in ("APG", "RescaleCFG", "CFGNorm", "CFGZeroStar"):
        rows += [{**common, "cfg": scale, "remedy": remedy} for scale in scales[:2]]
    rows += [{**common, "cfg": scale, "remedy": "APG, eta 0"} for scale in (1.2, 1.5, 2.0)]
    one = {**common, "remedy": "probabilistic"}
    rows += [{**one, "cfg": weight} for weight in weights]
    rows += [{**one, "cfg": weight, "mixture": True} for weight in (0.1, 0.2, 0.3)]
    write_part("guidance", Digits(work).compare(rows, MODEL))


@torch.inference_mode()
def spread(work: Path) -> None:
    """Compare ways to know the spread, with the digits' mean: docs/results/any_flow_spread.csv.

    A constant; one measured at every sigma on held-out digits; the power that successive means
    gain (the posterior mean is a martingale, so E|m|^2 grows by the variance that goes away); the
    variance that the network has learned for every pixel; and the network's whole mixture.
    """
    data = Digits(work)
    network, _ = load_checkpoint(MODEL)
    network = network.float()
    measured = measured_spread(network, *data.test)
    ways: dict[str, Callable[[], Way]] = {
        **{f"constant {value:g}": partial(constant, value) for value in SPREADS},
        "measured": lambda: lambda mixture, x, mean, sigma: measured(sigma),
        "power of the means": power_of_means,
        "learned variance": lambda: learned,
    }
    rows = [
        {"way": "measured, at sigma", "sigma": sigma, "spread": measured(sigma)} for sigma in SIGMAS
    ]
    for name, make in ways.items():
        for calls in (2, 3, 4, 8):
            denoise = one_gaussian(network, data.labels, make())
            x = sample_gm_ode(denoise, data.noise, flow_sigmas(calls), substeps=8)
            rows.append({"way": name, "calls": calls, "count": COUNT, **data.score(x)})
    write_part("spread", rows)


# (mixture of the velocity, x, mean of x_0, sigma) -> spread
Way = Callable[[Any, Tensor, Tensor, float], Any]


def learned(mixture: Mixture, x: Tensor, mean: Tensor, sigma: float) -> Tensor:
    """Return the spread that the network has learned, for each pixel."""
    return mixture.moment_match().var.sqrt()


def constant(value: float) -> Way:
    """Return the way that always gives one spread."""
    return lambda mixture, x, mean, sigma: value


def power_of_means() -> Way:
    """Return the way that watches the means: spread^2 (sigma_0^2 - sigma^2) = gain in E|m|^2."""
    first: list[tuple[float, float]] = []

    def way(mixture: Any, x: Tensor, mean: Tensor, sigma: float) -> float:
        power = mean.square().mean().item()
        if not first:
            first.append((sigma, power))
            return 0.5
        gain = (power - first[0][1]) / (first[0][0] ** 2 - sigma**2)
        return min(max(gain, 0.01), 2.25) ** 0.5

    return way


def one_gaussian(network: Any, labels: Tensor, way: Way) -> Callable[[Tensor, Tensor], Mixture]:
    """Return a denoiser of one Gaussian around the network's mean, of the spread that `way` tells.

    The images of a call are one batch to the network, 250 at a time.
    """

    def denoise(x: Tensor, sigma: Tensor) -> GaussianMixture:
        parts = zip(x.split(250), sigma.split(250), labels.split(250), strict=True)
        mixtures = [network(*part) for part in parts]
        mixture = GaussianMixture(
            *(torch.cat([getattr(m, name) for m in mixtures]) for name in FIELDS)
        )
        level = sigma[0].item()
        mean = x - level * mixture.mean()
        return single_gaussian(mean, sigma, way(mixture, x, mean, level))

    return denoise


FIELDS = ("means", "log_weights", "log_std")


def measured_spread(network: Any, images: Tensor, labels: Tensor) -> Callable[[float], float]:
    """Return the root mean square error of the network's velocity on images, by sigma."""
    x0, generator = images[:500].float() / 127.5 - 1, torch.Generator().manual_seed(1)
    noise, errors = torch.randn(x0.shape, generator=generator), []
    for sigma in SIGMAS:
        velocity = network(
            (1 - sigma) * x0 + sigma * noise, torch.full((500,), sigma), labels[:500]
        ).mean()
        errors.append((velocity - (noise - x0)).square().mean().sqrt().item())
    return lambda sigma: float(np.interp(sigma, SIGMAS, errors))


def board_spread(work: Path) -> None:
    """Compare ways to know the spread on the checkerboard: any_flow_board_spread.csv.

    The mean is the exact posterior's. Its variance is sigma^2 / (1 - sigma) times the derivative of
    that mean (Tweedie's second-order formula): for each point, or averaged at every sigma.
    """
    data = draw_checkerboard(20_000, torch.Generator().manual_seed(0)).double()
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(POINTS // 4, 2, generator=generator, dtype=torch.float64)
    mean_of = {}  # spread of the exact posterior, averaged, by sigma

    def averaged(mixture: Any, x: Tensor, mean: Tensor, sigma: float) -> float:
        if sigma not in mean_of:
            noise = torch.randn(data.shape, generator=generator, dtype=torch.float64)
            noisy = (1 - sigma) * data + sigma * noise
            mean_of[sigma] = board_std(noisy, sigma).square().mean().sqrt().item() / sigma
        return mean_of[sigma]

    ways: dict[str, Callable[[], Way]] = {
        **{f"constant {value:g}": partial(constant, value) for value in BOARD_SPREADS},
        "exact, averaged": lambda: averaged,
        "power of the means": power_of_means,
        "exact, per point": lambda: lambda mixture, x, mean, sigma: board_std(x, sigma) / sigma,
    }
    rows = []
    for name, make in ways.items():
        for calls in (2, 3, 4, 8):
            x = sample_gm_ode(exact_board(make()), start, flow_sigmas(calls), substeps=8)
            rows.append(
                {"way": name, "calls": calls, "total_variation": total_variation(x.float())}
            )
    write_part("board_spread", rows)


def exact_board(way: Way) -> Callable[[Tensor, Tensor], Mixture]:
    """Return a denoiser of one Gaussian around the board's exact posterior mean."""

    def denoise(x: Tensor, sigma: Tensor) -> GaussianMixture:
        level, mean = sigma[0].item(), board_posterior_mean(x, sigma)
        return single_gaussian(mean, level, way(None, x, mean, level))

    return denoise


def board_std(x: Tensor, sigma: float) -> Tensor:
    """Return the exact standard deviation (N,) of x_0 given points x (N, 2), averaged over axes."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        mean = board_posterior_mean(x, torch.full((len(x),), sigma, dtype=torch.float64))
        slopes = [
            torch.autograd.grad(mean[:, i].sum(), x, retain_graph=True)[0][:, i] for i in (0, 1)
        ]
    signal = max(1 - sigma, LEAST_SIGNAL)
    return (sigma**2 / signal * sum(slopes) / 2).clamp(min=0).sqrt()


def write_part(part: str, rows: list[Row]) -> None:
    """Write the rows of a part to docs/results."""
    write(rows, RESULTS / f"any_flow_{part}.csv")


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PART, default=list(PART))
    parser.add_argument("--work", type=Path, default=Path("outputs/any_flow"), help="for data")
    parser.add_argument("--points", type=int, default=POINTS, help="a square, of checkerboard")
    parser.add_argument("--more", action="store_true", help="add to the file of digits")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    of_part = {"checkerboard": {"points": options.points}, "digits": {"more": options.more}}
    for part in options.only:
        PART[part](options.work, **of_part.get(part, {}))


PART = {
    "digits": digits,
    "checkerboard": checkerboard,
    "guidance": guidance,
    "spread": spread,
    "board_spread": board_spread,
}

if __name__ == "__main__":
    main()
