"""Report on a checkerboard model: OUT/report.png with its samples, OUT/report.json with figures."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gmflow_core.files.atomic import atomic_write
from gmflow_core.files.checkpoint import load_checkpoint, read_metadata
from gmflow_core.files.json_files import write_json
from gmflow_core.flow.losses import nll
from gmflow_core.flow.path import diffuse
from gmflow_core.toys.checkerboard import draw_checkerboard, on_board, total_variation
from gmflow_core.toys.points import compare_solvers, comparison_sheet
from training.common.devices import cuda_or_cpu
from training.common.settings import SMALLEST_SIGMA

STEPS = [1, 2, 4, 8, 16]


def write_report(
    checkpoint: Path, out: Path, count: int, device: str = "auto", seed: int = 0
) -> dict:
    """Sample the model with Euler, GM-ODE 2 and GM-SDE 2 at 1 to 16 steps, and write the report.

    Args:
        checkpoint: file of the model.
        out: folder for report.png and report.json.
        count: samples per solver and number of steps.
        device: --device, see `cuda_or_cpu`.

    Returns:
        The content of report.json: `u_nll` (nats, without the 2 pi constant, sigma uniform; the
        exact model has 1.358), and for each solver and number of steps `total_variation`
        (64 x 64 histogram over [-4, 4]^2; exact samples have 0.0405 at 200,000), `off_support`
        (share of samples off the board) and `off_support_slack` (off by more than 0.05).
    """
    network, config = load_checkpoint(checkpoint, device=cuda_or_cpu(device))
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
    write_json(out / "report.json", report, indent=2)
    title = (
        f"K = {config.num_components}, {count:,} samples a picture, u-NLL {report['u_nll']:.3f}\n"
        "TV: total variation distance to the data, lower is better"
    )
    with atomic_write(out / "report.png") as temporary:
        comparison_sheet(samples, data, title).save(temporary, format="png")
    print(f"report: {out / 'report.png'} and {out / 'report.json'}")
    return report


@torch.inference_mode()
def velocity_nll(network: nn.Module, data: Tensor, seed: int, chunk: int = 20_000) -> float:
    """Return the mean NLL of the velocity under the network's mixtures, sigma uniform in (0, 1].

    Args:
        data: points x_0 (N, 2).
        chunk: points per network call.

    Returns:
        Nats per point, without the 2 pi constant.
    """
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(seed + 1)
    total = 0.0
    for x0 in data.split(chunk):
        sigma = torch.rand(len(x0), generator=generator).clamp(min=SMALLEST_SIGMA)
        noise = torch.randn(x0.shape, generator=generator)
        x, velocity = diffuse(x0, sigma, noise).to(device), (noise - x0).to(device)
        total += nll(network(x, sigma.to(device)), velocity).double().sum().item()
    return total / len(data)


def distances(points: Tensor) -> dict[str, float]:
    """Return the total variation distance of points (N, 2), and their shares off the board."""
    return {
        "total_variation": total_variation(points),
        "off_support": 1 - on_board(points).double().mean().item(),
        "off_support_slack": 1 - on_board(points, slack=0.05).double().mean().item(),
    }
