"""Tiny data, models and commands of training.evaluate, for its tests."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from gmflow_core import save_checkpoint
from gmflow_core.models.gmdit import GMDiT, GMDiTConfig
from training.data.shards import FORMAT, write_index, write_shard
from training.evaluate import parse
from training.evaluation.classifier import train_classifier
from training.evaluation.evaluation import Evaluation
from training.evaluation.inception import fidelity

CLASSES = ["left", "right"]


def two_classes(count: int, seed: int = 0, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noisy images, bright on the left or on the right in a random colour, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    colour = torch.rand(count, 3, 1, 1, generator=generator) * 160 + 60
    images = torch.rand(count, 3, size, size, generator=generator) * 40
    bright = (torch.arange(size) * 2 // size)[None, :] == labels[:, None]
    return (images + colour * bright[:, None, None, :]).to(torch.uint8), labels


def write_prepared(
    folder: Path, images: torch.Tensor, labels: torch.Tensor, classes=CLASSES, kind="pixels"
) -> Path:
    """Write a prepared folder of one shard."""
    write_shard(folder / "shard-00000.safetensors", images, labels, {})
    index = {
        "format": FORMAT,
        "kind": kind,
        "shape": list(images.shape[1:]),
        "classes": classes,
        "count": len(images),
        "shards": [{"file": "shard-00000.safetensors", "count": len(images)}],
    }
    write_index(folder, index)
    return folder


def write_model(path: Path, seed: int = 0, data: dict | None = None, **changes) -> Path:
    """Write a tiny random network; its last layers are not zero, so its samples differ."""
    torch.manual_seed(seed)
    settings = {
        "num_components": 2,
        "channels": 3,
        "latent_size": 8,
        "num_classes": 2,
        "num_layers": 1,
        "num_heads": 2,
        "head_dim": 8,
        "log_std_dim": 8,
    }
    network = GMDiT(GMDiTConfig(**{**settings, **changes}))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_checkpoint(network, path, data=data)
    return path


def write_place(folder: Path) -> Path:
    """Write training and test data, a model, and trained features to a folder."""
    images, labels = two_classes(200)
    write_prepared(folder / "train", images, labels)
    write_prepared(folder / "test", *two_classes(60, seed=1))
    data = {"labels": CLASSES, "space": "pixels"}
    write_model(folder / "tiny.safetensors", data=data, spectrum_layers=(4,))
    settings = {"iterations": 40, "batch_size": 32, "progress": False}
    train_classifier(images, labels, CLASSES, **settings).save(folder / "f.safetensors")
    return folder


def arguments(place: Path, out: Path, *more: str) -> list[str]:
    """Return a command line for the folder of `write_place`."""
    options = {
        "checkpoint": place / "tiny.safetensors",
        "data": place / "train",
        "features": place / "f.safetensors",
        "count": 50,
        "chunk-size": 20,
        "batch-size": 20,
        "steps": 2,
        "device": "cpu",
        "out": out,
    }
    pairs = [(f"--{name}", str(value)) for name, value in options.items()]
    return [*(part for pair in pairs for part in pair), *map(str, more)]


def scoring(place: Path, out: Path, *samples: Path, more=()) -> list[str]:
    """Return the command line that scores samples without a model."""
    parts = arguments(place, out, *more)
    for name in ("--checkpoint", "--steps"):
        at = parts.index(name)
        parts = [*parts[:at], *parts[at + 2 :]]
    return [*parts, "--samples", *map(str, samples)]


def run(place: Path, out: Path, *more: str) -> dict:
    """Run the command, and return the content of results.json."""
    return Evaluation(parse(arguments(place, out, *more))).run()


def samples_of(place: Path, out: Path, *more: str) -> torch.Tensor:
    """Run a command with one setting, and return its first 20 images as integers."""
    run(place, out, *more)
    (chunk,) = out.glob("samples/*/chunk-00000.safetensors")
    return load_file(chunk)["images"].int()


def torch_fidelity(module: str) -> ModuleType:
    """Import a module of torch-fidelity, or skip the test where it does not import."""
    try:
        return fidelity(module)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
