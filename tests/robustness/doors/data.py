"""Doors of training data: pictures, prepared folders, tokens, class names, autoencoders."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import split
from typing import Any

import numpy as np
import torch
from PIL import Image

from gmflow_core.files.json_files import read_json
from tests.training.image_folders import write_tiny_vae
from training import prepare as prepare_command
from training.data.class_names import read_class_names
from training.data.preparation import PreparationConfig, prepare
from training.data.shards import LatentDataset
from training.data.tokens import TokenFiles, WithTokens, write_tokens
from training.encoders.load import load_vae

from ..children import Limits
from .door import Door

PREPARED = {"index.json": "json", "shard-*.safetensors": "safetensors"}


def write_pictures(root: Path) -> None:
    """Write two classes of five small pictures."""
    rng = np.random.default_rng(0)
    for folder in ("cat", "dog"):
        (root / folder).mkdir(parents=True)
        for number in range(5):
            pixels = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{number}.png")


def options(data: Path, out: Path) -> PreparationConfig:
    """Return the settings of a small preparation."""
    return PreparationConfig(
        data=data, out=out, size=8, pixels=True, shard_size=4, workers=0, device="cpu"
    )


def read_all(folder: Path) -> list:
    """Return all samples of a prepared folder, from memory and from disk."""
    found = []
    for in_memory in (True, False):
        dataset = LatentDataset(folder, in_memory=in_memory)
        x, labels = dataset.__getitems__(list(range(len(dataset))))
        if len(x) != len(labels) or not 0 <= int(labels.min()) <= int(labels.max()) < 100:
            raise RuntimeError("samples and labels do not fit")
        found.append(x)
    return found


def use_pictures(folder: Path) -> Any:
    """Prepare a folder of pictures with the command, and read the result."""
    out = folder.parent / "out"
    arguments = ["--data", str(folder / "pictures"), "--out", str(out), "--size", "8", "--pixels"]
    prepare_command.main([*arguments, "--shard-size", "4", "--workers", "0", "--device", "cpu"])
    index = read_json(out / "index.json")
    if index["count"] > 400:
        raise RuntimeError(f"{index['count']} samples from ten pictures")
    return read_all(out)


def use_real_images(folder: Path) -> Any:
    """Read a folder of pictures as the reference of an evaluation."""
    from training.evaluation.real_images import FolderImages

    images = FolderImages(folder / "pictures", 50, 8)
    return [images.get(range(len(images)))[0]]


def make_prepared(folder: Path) -> None:
    """Prepare pictures."""
    write_pictures(folder / "pictures")
    prepare(options(folder / "pictures", folder / "out"))


def use_plan(folder: Path) -> Any:
    """Run a finished preparation again, and read the result."""
    places = ["--data", str(folder / "pictures"), "--out", str(folder / "out")]
    more = split("--size 8 --pixels --shard-size 4 --workers 0 --device cpu")
    prepare_command.main([*places, *more])
    return read_all(folder / "out")


def make_latents(folder: Path) -> None:
    """Write a prepared folder of latents with tokens."""
    from training.data.shards import FORMAT, write_index, write_shard

    generator = torch.Generator().manual_seed(0)
    for number in range(2):
        x = torch.randn(5, 4, 2, 2, generator=generator)
        write_shard(folder / f"shard-0000{number}.safetensors", x, torch.arange(5) % 2, {})
    shards = [{"file": f"shard-0000{number}.safetensors", "count": 5} for number in range(2)]
    index = {"format": FORMAT, "kind": "latents", "shape": [4, 2, 2], "classes": ["left", "right"]}
    index |= {"count": 10, "shards": shards, "skipped": [], "scaling_factor": 0.18215, "vae": "x"}
    write_index(folder, index)
    tokens = torch.randn(10, 3, generator=generator)
    write_tokens(folder / "tokens.safetensors", tokens, {"format": "gmflow-tokens-1", "count": 10})


def use_tokens(folder: Path) -> Any:
    """Read samples with their tokens."""
    samples = WithTokens(LatentDataset(folder))
    x, _, tokens = samples.__getitems__(list(range(10)))
    return [x, tokens]


def make_arrays(folder: Path) -> None:
    """Write tokens as arrays."""
    tokens = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    np.save(folder / "a.npy", tokens)
    np.savez(folder / "b.npz", tokens=tokens, other=tokens[0])
    np.savez_compressed(folder / "c.npz", tokens)


def use_arrays(folder: Path) -> Any:
    """Read tokens from arrays, as a fit does: EM names rows that are not finite itself."""
    files = TokenFiles([folder / name for name in ("a.npy", "b.npz", "c.npz")])
    for chunk in files:
        if chunk.ndim != 2 or chunk.shape[1] != np.prod(files.shape):
            raise RuntimeError(f"a chunk {tuple(chunk.shape)} of {files.shape}")
    return []


def make_names(folder: Path) -> None:
    """Write the readable names of classes, as a list, as an object and as a Python dict."""
    (folder / "list.json").write_text(json.dumps(["a cat", "a dog"]))
    (folder / "dict.txt").write_text("{0: 'a cat, a \\'big\\' one',\n 1: \"a dog\"}")
    (folder / "object.json").write_text(json.dumps({"cat": "a cat", "dog": "a dog", "x": "y"}))


def use_names(folder: Path) -> Any:
    """Read class names."""
    for path in sorted(folder.iterdir()):
        for name in read_class_names(path, ["cat", "dog"]):
            name.encode()  # a lone surrogate would fail later, in a table or on a page
    return []


def make_vae(folder: Path) -> None:
    """Write a tiny AutoencoderKL."""
    write_tiny_vae(folder)


def use_vae(folder: Path, side: int = 16) -> Any:
    """Load an autoencoder, and decode."""
    vae = load_vae(folder)
    latents = torch.zeros(1, *vae.latent_shape(side, side))
    scale = float(vae.scaling_factor)
    return [vae, scale, float(1 / scale), vae.decode(latents).shape]


def make_rae(folder: Path) -> None:
    """Write a tiny RAE."""
    from tests.training.test_rae import write_rae

    write_rae(folder, statistics="stat.pt")


DOORS = [
    Door(
        "pictures: prepare",
        lambda folder: write_pictures(folder / "pictures"),
        use_pictures,
        {"pictures": "pictures", "pictures/*/*.png": "bytes"},
        2,
        command=True,
    ),
    Door(
        "pictures: evaluation",
        lambda folder: write_pictures(folder / "pictures"),
        use_real_images,
        {"pictures": "pictures", "pictures/*/*.png": "bytes"},
        1,
    ),
    Door("prepared folder", make_latents, lambda f: read_all(f), PREPARED, 3),
    Door(
        "plan and index, resumed",
        make_prepared,
        use_plan,
        {f"out/{name}": kind for name, kind in {**PREPARED, "plan.json": "json"}.items()},
        2,
        command=True,
    ),
    Door("tokens of a folder", make_latents, use_tokens, {"tokens.safetensors": "safetensors"}, 1),
    Door("tokens in .npy and .npz", make_arrays, use_arrays, {"*.npy": "npy", "*.npz": "npz"}, 2),
    Door("class names", make_names, use_names, {"*.json": "json", "*.txt": "bytes"}, 1),
    Door("VAE", make_vae, use_vae, {"vae/*.json": "json", "vae/*.safetensors": "safetensors"}, 0.7),
    Door(
        "RAE",
        make_rae,
        lambda folder: use_vae(folder, 8),
        {
            "rae.json": "json",
            "encoder/*.json": "json",
            "decoder.safetensors": "safetensors",
            "encoder/*.safetensors": "safetensors",
            "stat.pt": "bytes",
        },
        0.7,
        Limits(60),
    ),
]
