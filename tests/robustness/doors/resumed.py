"""Doors of stopped runs: training state, cached samples, results, features, references."""

from __future__ import annotations

from pathlib import Path
from shlex import split
from typing import Any

import numpy as np
from safetensors.torch import load_file

from gmflow_core import load_checkpoint
from tests.training.evaluation_runs import arguments, write_place
from training import checkerboard, evaluate
from training.common.processes import command
from training.evaluation.classifier import ClassifierFeatures
from training.evaluation.reference_file import read_reference
from training.loop.checkerboard_trainer import CheckerboardTrainer

from ..children import Limits
from .door import Door

TRAIN = split("-k 2 --batch-size 16 --warmup 2 --checkpoint-every 2 --log-every 2 --device cpu")


def train(folder: Path, iterations: int) -> None:
    """Train the checkerboard for some iterations, from its checkpoint if there is one."""
    more = ["--out", str(folder), "--iterations", str(iterations)]
    with command():
        CheckerboardTrainer(checkerboard.parse([*TRAIN, *more])).run()


def use_state(folder: Path) -> Any:
    """Resume a training run, and return its weights and state."""
    train(folder, 6)
    model, _ = load_checkpoint(folder / "model.safetensors")
    return [model, load_file(folder / "model.safetensors")]


def make_evaluation(folder: Path) -> None:
    """Evaluate a tiny model, so that samples, measures and results are there."""
    write_place(folder / "place")
    evaluate.main(arguments(folder / "place", folder / "out"))


def use_evaluation(folder: Path) -> Any:
    """Run a finished evaluation again: what is whole is taken from its files."""
    evaluate.main(arguments(folder / "place", folder / "out"))
    import json

    results = json.loads((folder / "out" / "results.json").read_text())["results"]
    return [{k: v for k, v in row.items() if isinstance(v, float)} for row in results]


def use_features(folder: Path) -> Any:
    """Load a feature extractor."""
    import torch

    features = ClassifierFeatures.load(folder / "place" / "f.safetensors", torch.device("cpu"))
    size = features.network.config
    found = features.extract(torch.zeros(1, 3, size.height, size.width, dtype=torch.uint8))
    return [features.network, found["features"].shape]


def make_references(folder: Path) -> None:
    """Write reference files of images and of statistics."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    x = rng.normal(size=(40, 4))
    np.savez(folder / "both.npz", arr_0=pixels, mu=x.mean(0), sigma=np.cov(x.T))
    np.savez_compressed(folder / "images.npz", arr_0=pixels)


def use_references(folder: Path) -> Any:
    """Read the reference files."""
    found = []
    for name in ("both.npz", "images.npz"):
        images, statistics, *_ = read_reference(folder / name)
        found += [images, *(statistics or ())]
    return found


DOORS = [
    Door(
        "training state",
        lambda folder: train(folder, 4),
        use_state,
        {"model.safetensors": "safetensors"},
        2,
        Limits(60),
        command=True,
    ),
    Door(
        "evaluation, resumed",
        make_evaluation,
        use_evaluation,
        {
            "out/results.json": "json",
            "out/samples/*/*.safetensors": "safetensors",
            "out/measures/*/*.safetensors": "safetensors",
            "place/train/*.json": "json",
            "place/tiny.safetensors": "safetensors",
        },
        1,
        Limits(90),
        command=True,
    ),
    Door("features", make_evaluation, use_features, {"place/f.safetensors": "safetensors"}, 1),
    Door("references in .npz", make_references, use_references, {"*.npz": "npz"}, 2),
]
