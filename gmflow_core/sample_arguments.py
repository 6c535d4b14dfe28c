"""Arguments of `gmflow sample`, and what a distilled model sets for those that are left out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .flow.path import flow_sigmas
from .models.precision import PRECISIONS
from .sampling.solvers import MEAN_SOLVERS, SOLVERS

STEPS = 8  # network calls of a model that was made for no number of them


def fill_left_out(args: argparse.Namespace, data: dict[str, Any]) -> None:
    """Set solver, steps, shift, temperature and sigmas where the user gives none.

    Args:
        args: of `gmflow sample`; changed.
        data: the record of the checkpoint's samples; `few_steps` says what it was distilled for.

    Raises:
        ValueError: a setting is out of range.
    """
    few = data.get("few_steps") or {}
    if args.solver is None:
        args.solver = "gm-policy" if few else "gm-ode"
    if args.steps is None:
        args.steps = few.get("steps", STEPS)
    if args.shift is None:
        args.shift = few.get("shift", 1.0)
    args.temperature = few.get("temperature")
    args.sigmas = None
    if few and args.steps:
        last = few.get("final_step_size", 1.0)
        args.sigmas = flow_sigmas(args.steps, args.shift, final_step_size=last)


def add_sample_arguments(p: argparse.ArgumentParser) -> None:
    """Add the arguments of `gmflow sample`."""
    p.add_argument("checkpoint", type=Path)
    p.add_argument(
        "--solver",
        choices=SOLVERS,
        help="default gm-ode, or gm-policy for a distilled model; "
        f"{' and '.join(MEAN_SOLVERS)} follow only the mean",
    )
    about = f"network calls (default {STEPS}, or what a distilled model was made for)"
    p.add_argument("--steps", type=int, help=about)
    about = "order of GM-ODE and GM-SDE (default 2)"
    p.add_argument("--order", type=int, choices=(1, 2), default=2, help=about)
    p.add_argument(
        "--substeps",
        type=int,
        help="GM-ODE's substeps per network call (default 8; 32 for 1 step), GM policy's in all "
        "(default 128)",
    )
    p.add_argument(
        "--shift",
        type=float,
        help="time shift, above 1 for more steps at high noise (default 1, or a distilled model's)",
    )
    p.add_argument(
        "--count",
        type=int,
        help="number of points (default 100000), or images of each label (default 8)",
    )
    p.add_argument(
        "--labels",
        nargs="+",
        metavar="LABEL",
        help="classes, by name or number (default: the first ten)",
    )
    p.add_argument("--unlabelled", action="store_true", help="images of no class, --count of them")
    p.add_argument(
        "--source", help="mixture source that the model was trained with: a file, folder or hub id"
    )
    p.add_argument(
        "--guidance",
        type=float,
        default=0.0,
        help="weight of probabilistic guidance, in [0, 1) (default 0)",
    )
    p.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="of the network's products: bf16 (and TF32) or fp32 (default auto: bf16 for images on "
        "a GPU, else fp32)",
    )
    p.add_argument(
        "--outline", action="store_true", help="draw the checkerboard's squares over the picture"
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("samples.png"),
        help=".png or .safetensors (default samples.png)",
    )
