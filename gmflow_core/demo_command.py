"""The command `gmflow demo`: what solvers make of the shipped models in few network calls."""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from .files.atomic import check_target
from .files.checkpoint import SHIPPED, load_checkpoint
from .files.errors import printable
from .files.targets import path_argument
from .pictures import contact_sheet, image_grid
from .pipeline import ImagePipeline
from .sample_command import checked_count, save_png, seeds_from
from .sampling.guidance import Guidance
from .sampling.solvers import SOLVERS
from .toys.checkerboard import draw_checkerboard
from .toys.points import compare_solvers, comparison_sheet

POINTS_MODEL = SHIPPED / "checkerboard_k64.safetensors"
IMAGE_MODEL = SHIPPED / "emoji_k8.safetensors"
STEPS = (1, 2, 4, 8)
CLASSES = ("people_and_body", "flags", "smileys_and_emotion", "symbols")
IMAGE_SOLVERS = {  # and their guidance
    "euler": Guidance(1.5, "cfg"),
    "uni-pc": Guidance(1.5, "cfg"),
    "gm-ode": Guidance(0.1),
}
COLUMNS, ENLARGED = 6, 2  # images of each class, in a row of a picture, and pixels per pixel


def add_demo_command(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser of all commands.

    Args:
        common: options of all commands that sample.
    """
    about = "picture of a shipped model's samples: three solvers at 1, 2, 4 and 8 steps"
    p = commands.add_parser("demo", parents=[common], help=about, description=about)
    about = "draw the points of the checkerboard, not emoji"
    p.add_argument("--checkerboard", action="store_true", help=about)
    about = "points per picture of the checkerboard (default 30000)"
    p.add_argument("--count", type=int, help=about)
    about = "picture to write (default gmflow_demo.png)"
    p.add_argument("--out", type=path_argument, default=Path("gmflow_demo.png"), help=about)
    p.set_defaults(run=demo)


def demo(args: argparse.Namespace) -> None:
    """Draw a contact sheet of a shipped model's samples, from the same noise by each solver.

    Raises:
        ValueError: --out does not end in .png, or --count is out of range or without points.
        WriteError: the picture cannot be written; it is checked before anything is sampled.
    """
    started = time.perf_counter()
    if args.out.suffix != ".png":
        raise ValueError(f"--out {args.out} must end in .png")
    check_target(args.out)
    if args.count is not None and not args.checkerboard:
        raise ValueError(f"--count {args.count} goes with --checkerboard only")
    count = checked_count(args.count, 30_000, 2)
    if args.checkerboard:
        sheet = _board(args.device, count, args.seed)
    else:
        sheet = _images(args.device, args.seed)
    print(file=sys.stderr)
    save_png(sheet, args.out)
    print(f"{printable(str(args.out.resolve()))}  ({time.perf_counter() - started:.0f} s)")


def _board(device: str, count: int, seed: int) -> Image.Image:
    """Return the sheet of the checkerboard's points, and their distances to the data."""
    network, config = load_checkpoint(POINTS_MODEL, device=device)
    samples = []
    for solver, steps, points in compare_solvers(network, list(STEPS), count, seed):
        samples.append((solver, steps, points))
        _say(solver, steps)
    data = draw_checkerboard(count, torch.Generator().manual_seed(seed))
    title = (
        f"GMFlow, K = {config.num_components}, {count:,} samples a picture\n"
        "TV: total variation distance to the data, lower is better"
    )
    return comparison_sheet(samples, data, title)


def _images(device: str, seed: int) -> Image.Image:
    """Return the sheet of images of four classes, the same noise in every picture."""
    pipeline = ImagePipeline.load(IMAGE_MODEL, device=device, precision="fp32")
    named = "; ".join(name.replace("_", " ") for name in CLASSES)
    title = (
        f"GMFlow, K = {pipeline.network.config.num_components}: one model, from the same noise\n"
        f"Four of its nine classes, row by row: {named}\n"
        "Euler and UniPC have classifier-free guidance of 1.5, GM-ODE probabilistic guidance of 0.1"
    )
    return contact_sheet(list(_rows(pipeline, seed)), None, title, tile=_tile(pipeline))


def _rows(pipeline: ImagePipeline, seed: int) -> Iterator[tuple[str, list]]:
    """Yield a row of the sheet for each solver: its title, and captions with pictures."""
    labels = [name for name in CLASSES for _ in range(COLUMNS)]
    seeds = seeds_from(seed, len(labels))
    for solver, guidance in IMAGE_SOLVERS.items():
        cells = []
        for steps in STEPS:
            x = pipeline.sample(labels, seeds=seeds, solver=solver, steps=steps, guidance=guidance)
            picture = image_grid(pipeline.decode(x), COLUMNS, ENLARGED)
            cells.append((_steps(steps), picture))
            _say(solver, steps)
        yield textwrap.fill(SOLVERS[solver].title, 9), cells


def _tile(pipeline: ImagePipeline) -> int:
    """Return the width of a picture of the sheet, so that it is drawn pixel by pixel."""
    blank = torch.zeros(1, 3, *(pipeline.network.config.latent_size,) * 2)
    return image_grid(blank.expand(COLUMNS, -1, -1, -1), COLUMNS, ENLARGED).shape[1]


def _steps(steps: int) -> str:
    """Return a number of steps in words."""
    return f"{steps} step{'s' * (steps > 1)}"


def _say(solver: str, steps: int) -> None:
    """Print how far the sheet is, on one line."""
    print(f"\r{solver}, {_steps(steps)}: done  ", end="", file=sys.stderr, flush=True)
