"""Doors of models: checkpoints of each class, published folders, the shell, listings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gmflow_core import cli
from gmflow_core.files.checkpoint import (
    load_checkpoint,
    load_training_state,
    read_metadata,
    save_checkpoint,
)
from gmflow_core.files.labels import known_names
from gmflow_core.models import DiTDH, GMDiT, GMFlowMLP
from gmflow_core.models.ditdh import DiTDHConfig
from gmflow_core.models.gmdit import GMDiTConfig
from gmflow_core.models.mlp import GMFlowMLPConfig
from tests.diffusers_folder import random_model, write_published_folder

from .door import Door

FILE = "model.safetensors"
DATA = {"labels": ["left", "right"], "space": "sd-vae", "scaling_factor": 0.18215}
MLP = {"num_components": 3, "hidden_dim": 16, "embed_dim": 8, "num_layers": 2}
GMDIT = {
    "num_components": 2,
    "channels": 4,
    "latent_size": 4,
    "num_classes": 2,
    "num_layers": 1,
    "num_heads": 2,
    "head_dim": 8,
    "log_std_dim": 8,
    "spectrum_layers": (4,),
}
DITDH = {
    "num_components": 2,
    "channels": 4,
    "latent_size": 4,
    "num_classes": 2,
    "trunk_layers": 1,
    "trunk_width": 16,
    "trunk_heads": 2,
    "head_layers": 1,
    "head_width": 16,
    "head_heads": 2,
    "log_std_dim": 8,
    "constant_log_std": None,
    "spectrum_layers": (4,),
}


def random_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Fill a model with small random numbers, as a fresh one has zeros."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def write_model(model: torch.nn.Module, folder: Path) -> None:
    """Write a checkpoint with a record of its samples and a training state."""
    state = {"step": torch.tensor(3), "model.x": torch.ones(4)}
    facts = {"step": 3, "config": {"lr": 0.1, "steps": [1, 2]}}
    save_checkpoint(random_weights(model), folder / FILE, facts=facts, state=state, data=DATA)


def use_model(folder: Path) -> Any:
    """Load a model in every way there is, and call it."""
    path = folder / FILE
    metadata = read_metadata(path)
    model, config = load_checkpoint(path)
    names, _ = known_names([str(path)])
    if not all(name.isprintable() for name in names):
        raise RuntimeError(f"names that cannot be printed: {names!r}")
    call_model(model, config)
    data = {"scaling_factor": float(metadata["data"].get("scaling_factor", 1))}
    return [model, load_training_state(path).keys(), data]


def call_model(model: torch.nn.Module, config: Any) -> None:
    """Call a model; its output depends on weights that may be large, so it may be anything."""
    if isinstance(model, GMFlowMLP):
        model(torch.zeros(2, config.channels if hasattr(config, "channels") else 2), torch.ones(2))
        return
    x = torch.zeros(1, config.channels, config.latent_size, config.latent_size)
    model(x, torch.ones(1), torch.zeros(1, dtype=torch.int64))


def make_folder(folder: Path, **options: Any) -> None:
    """Write a published folder."""
    labels = {str(i): f"class {i}" for i in range(10)}
    write_published_folder(folder / "published", random_model(), labels=labels, **options)


def use_folder(folder: Path) -> Any:
    """Load a published folder."""
    metadata = read_metadata(folder / "published")
    names, _ = known_names([str(folder / "published")])
    model, _ = load_checkpoint(folder / "published")
    return [model, names, float(metadata["data"]["scaling_factor"])]


def use_shell(folder: Path) -> Any:
    """Run each command of the shell on a checkpoint."""
    path, out = str(folder / FILE), folder.parent / "out"
    cli.main(["inspect", path])
    cli.main(["convert", path, str(out / "converted.safetensors")])
    numbers = out / "samples.safetensors"
    cli.main(["sample", path, "--steps", "2", "--count", "2", "--out", str(numbers)])
    from safetensors.torch import load_file

    return [load_file(numbers)]


def make_mlp(folder: Path) -> None:
    """Write a small checkerboard model without labels, as the trainer does."""
    model = random_weights(GMFlowMLP(GMFlowMLPConfig(**MLP)))
    save_checkpoint(model, folder / FILE, facts={"step": 1})


FOLDER_FILES = {
    "published/*.json": "json",
    "published/*/config.json": "json",
    "published/transformer/*.safetensors": "safetensors",
    "published/spectrum_net/*.safetensors": "safetensors",
}
DOORS = [
    Door(
        "checkpoint GMFlowMLP",
        lambda folder: write_model(GMFlowMLP(GMFlowMLPConfig(**MLP)), folder),
        use_model,
        {FILE: "safetensors"},
        2,
    ),
    Door(
        "checkpoint GMDiT",
        lambda folder: write_model(GMDiT(GMDiTConfig(**GMDIT)), folder),
        use_model,
        {FILE: "safetensors"},
        2,
    ),
    Door(
        "checkpoint DiTDH",
        lambda folder: write_model(DiTDH(DiTDHConfig(**DITDH)), folder),
        use_model,
        {FILE: "safetensors"},
        2,
    ),
    Door("published folder", make_folder, use_folder, FOLDER_FILES, 2),
    Door(
        "published folder in shards",
        lambda folder: make_folder(folder, shards=3),
        use_folder,
        {**FOLDER_FILES, "published/transformer/*.index*.json": "json"},
        2,
    ),
    Door(
        "shell: inspect, convert, sample",
        make_mlp,
        use_shell,
        {FILE: "safetensors"},
        1,
        command=True,
    ),
]
