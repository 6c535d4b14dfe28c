"""Small folders of images and settings of training.fit_source, for its tests."""

from pathlib import Path

import numpy as np
from PIL import Image

from training.data.preparation import PreparationConfig, prepare
from training.source.config import Config


def write_images(root: Path) -> Path:
    """Write two classes of 16 x 16 images, bright on the left or right, and one broken file."""
    rng = np.random.default_rng(0)
    for folder in ("left", "right"):
        (root / folder).mkdir(parents=True)
        for number in range(30):
            pixels = rng.integers(0, 60, (16, 16, 3))
            pixels[:, slice(8) if folder == "left" else slice(8, 16)] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(root / folder / f"{number:02d}.png")
    (root / "left" / "15b.png").write_bytes(b"no picture")
    return root


def write_prepared(images: Path, out: Path) -> Path:
    """Prepare the images as pixels."""
    settings = {"size": 16, "pixels": True, "shard_size": 32, "workers": 0, "device": "cpu"}
    prepare(PreparationConfig(data=images, out=out, **settings))
    return out


def config(data: Path, out: Path, **changes) -> Config:
    """Return settings of a small fit on the CPU."""
    settings = {"data": data, "out": out, "modes": 3, "device": "cpu", "workers": 0}
    return Config(**{**settings, **changes})


def arguments(**options) -> list[str]:
    """Return a command line on the CPU, such as ["--data", "DATA", ...]."""
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items()]
    return [*(part for pair in pairs for part in pair), "--device", "cpu"]
