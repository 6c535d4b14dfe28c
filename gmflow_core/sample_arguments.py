"""Arguments of `gmflow sample`; what a model sets for those left out is `choose_sampling`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .files.targets import path_argument
from .models.precision import PRECISIONS
from .sampling.few_steps import STEPS
from .sampling.solvers import MEAN_SOLVERS, SOLVERS

SOURCE_HELP = (
    "a checkpoint, a folder in the layout of diffusers, or the id of one on the Hugging Face hub "
    "(owner/name)"
)


def add_sample_arguments(p: argparse.ArgumentParser) -> None:
    """Add the arguments of `gmflow sample`."""
    p.add_argument("checkpoint", help=SOURCE_HELP)
    p.add_argument(
        "--solver",
        choices=SOLVERS,
        help="default gm-ode, or gm-policy for a distilled model; "
        f"{' and '.join(MEAN_SOLVERS)} follow only the mean",
    )
    about = f"network calls (default {STEPS}, or what a distilled model was made for)"
    p.add_argument("--steps", type=int, help=about)
    about = "order of GM-ODE and GM-SDE (default 2)"
    p.add_argument("--order", type=int, choices=(1, 2), help=about)
    p.add_argument(
        "--no-spectrum",
        action="store_true",
        help="draw every pixel of GM-SDE on its own, not with the model's spectrum network",
    )
    p.add_argument(
        "--substeps",
        type=int,
        help="GM-ODE's substeps per network call (default 8; give 32 for 1 step), GM policy's in "
        "all (default 128)",
    )
    p.add_argument(
        "--shift",
        type=float,
        help="time shift, above 1 for more steps at high noise (default 1, or a distilled model's)",
    )
    _add_what_is_sampled(p)
    p.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="of the network's products: bf16 (and TF32) or fp32 (default auto: bf16 for images on "
        "a GPU, else fp32)",
    )
    p.add_argument(
        "--outline",
        action="store_true",
        help="draw the checkerboard's squares over the picture, for a model of points",
    )
    p.add_argument(
        "--out",
        type=path_argument,
        dest="target",
        metavar="OUT",
        default=Path("samples.png"),
        help=".png, for images a sheet with a row for each label; .safetensors, the numbers (no "
        "other .safetensors file is overwritten); or a folder, for single images, written batch by "
        "batch (default samples.png)",
    )


def _add_what_is_sampled(p: argparse.ArgumentParser) -> None:
    """Add the arguments that say which samples are made, and how many."""
    p.add_argument(
        "--count",
        type=int,
        help="number of points (default 100000), or images of each label (default 8, or 4 of a "
        "model of latents)",
    )
    about = (
        "seeds of the images of each label, instead of --count from --seed on; each another one "
        "modulo 2**32, as equal ones make the same picture"
    )
    p.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help=about)
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
    about = "VAE of a model of latents: a folder or hub id (default: that of the model's folder)"
    p.add_argument("--vae", help=about)
    p.add_argument(
        "--guidance",
        type=float,
        default=0.0,
        help="weight of probabilistic guidance, in [0, 1) (default 0)",
    )
