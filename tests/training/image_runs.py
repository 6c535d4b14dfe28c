"""Small runs of the trainer of images, on data of three colours."""

from pathlib import Path
from shlex import split

import torch

from training.data.shards import FORMAT, LatentDataset, to_pixels, write_index, write_shard
from training.evaluation.classifier import train_classifier
from training.imagenet import parse
from training.loop.image_trainer import ImageTrainer

SMALL = split("--num-layers 2 --num-heads 2 --head-dim 8 --log-std-dim 8 -k 3 --device cpu")
SMALL += split("--batch-size 16 --warmup 3 --checkpoint-every 5 --log-every 5 --precision fp32")


def write_colours(folder: Path) -> Path:
    """Write prepared pictures of 4 x 4 in three classes: plain colours with a little noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 3
    x = (
        40
        + 150 * torch.eye(3)[labels][:, :, None, None]
        + 30 * torch.rand(48, 3, 4, 4, generator=generator)
    )
    write_shard(folder / "shard-00000.safetensors", x.to(torch.uint8), labels, {})
    index = {
        "format": FORMAT,
        "kind": "pixels",
        "shape": [3, 4, 4],
        "classes": ["red", "green", "blue"],
        "count": 48,
    }
    index |= {"shards": [{"file": "shard-00000.safetensors", "count": 48}], "skipped": []}
    write_index(folder, index)
    return folder


def write_features(folder: Path, data: Path) -> Path:
    """Write a small classifier of the prepared pictures, barely trained."""
    pictures = LatentDataset(data)
    images = torch.stack([pictures[i][0] for i in range(len(pictures))])
    settings = {"iterations": 5, "batch_size": 16, "progress": False}
    path = folder / "features.safetensors"
    train_classifier(to_pixels(images), pictures.labels, tuple(pictures.classes), **settings).save(
        path
    )
    return path


def arguments(data: Path, out: Path, iterations: int, *more: str) -> list[str]:
    places = ["--data", str(data), "--out", str(out), "--iterations", str(iterations)]
    return ["--preset", "digits", *SMALL, *places, *more]


def new_trainer(data: Path, out: Path, iterations: int, *more: str) -> ImageTrainer:
    return ImageTrainer(parse(arguments(data, out, iterations, *more)))


def losses_of(trainer: ImageTrainer, count: int) -> list[float]:
    return [trainer.iterate()["loss"].item() for _ in range(count)]
