"""How good a checkerboard model's samples are: OUT/report.png to look at, OUT/report.json to compare."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gmflow_core.files.checkpoint import load_checkpoint, read_metadata
from gmflow_core.flow.losses import nll
from gmflow_core.flow.path import diffuse
from gmflow_core.toys.checkerboard import draw_checkerboard, on_board, total_variation
from gmflow_core.toys.points import compare_solvers, comparison_sheet
from training.common.settings import SMALLEST_SIGMA

STEPS = [1, 2, 4, 8, 16]


def write_report(
    checkpoint: Path, out: Path, count: int, device: str = "auto", seed: int = 0
) -> dict:
    """Sample the model with Euler, GM-ODE 2 and GM-SDE 2 at 1 to 16 steps; write OUT/report.png and OUT/report.json.

    Returns:
        What the JSON holds: `u_nll` (nats, without 2 pi, sigma uniform; exact: 1.358) and, per solver and step count,
        `total_variation` (64 x 64 histogram over [-4, 4]^2; exact samples: 0.0405 at 200,000) and the shares of samples
        off the board, `off_support` exactly and `off_support_slack` by more than 0.05.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    network, config = load_checkpoint(checkpoint, device=device)
    data = draw_checkerboard(count, torch.Generator().manual_seed(seed))
    report = {
        "checkpoint": checkpoint.name,
        "samples": count,
        "seed": seed,
        "step": read_metadata(checkpoint)["training"].get("step"),
    }
    report["u_nll"] = velocity_nll(network, data, seed)
    report["data"] = distances(data)
    samples = []
    for solver, steps, points in tqdm(
        compare_solvers(network, STEPS, count, seed), total=3 * len(STEPS), desc="report"
    ):
        samples.append((solver, steps, points))
        report.setdefault(solver, {})[str(steps)] = distances(points)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    title = (
        f"K = {config.num_components}, {count:,} samples a picture, u-NLL {report['u_nll']:.3f}\n"
        "TV: total variation distance to the data, lower is better"
    )
    comparison_sheet(samples, data, title).save(out / "report.png")
    print(f"report: {out / 'report.png'} and {out / 'report.json'}")
    return report


@torch.inference_mode()
def velocity_nll(network: nn.Module, data: Tensor, seed: int, chunk: int = 20_000) -> float:
    """Mean NLL of the velocity under the network's mixtures, sigma uniform on (0, 1]."""
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(seed + 1)
    total = 0.0
    for x0 in data.split(chunk):
        sigma = torch.rand(len(x0), generator=generator).clamp(min=SMALLEST_SIGMA)
        noise = torch.randn(x0.shape, generator=generator)
        x, velocity, sigma = (
            diffuse(x0, sigma, noise).to(device),
            (noise - x0).to(device),
            sigma.to(device),
        )
        total += nll(network(x, sigma), velocity).double().sum().item()
    return total / len(data)


def distances(points: Tensor) -> dict[str, float]:
    """Total variation, and shares off the board."""
    return {
        "total_variation": total_variation(points),
        "off_support": 1 - on_board(points).double().mean().item(),
        "off_support_slack": 1 - on_board(points, slack=0.05).double().mean().item(),
    }
