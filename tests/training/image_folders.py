"""Small folders of images, a tiny VAE, and short ways to prepare them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.data.preparation import PreparationConfig, prepare


def write_images(root: Path) -> Path:
    """Write two classes of random pictures of several sizes and formats: 7 and 6."""
    rng = np.random.default_rng(0)
    for folder, count in (("cat", 7), ("dog", 6)):
        for number in range(count):
            size = (8, 8, 3) if number % 2 else (17, 20 + number, 3)
            path = (
                root
                / folder
                / ("deeper" if number == 3 else "")
                / f"{number}.{('png', 'bmp', 'webp')[number % 3]}"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(path)
        (root / folder / "notes.txt").write_text("not an image")
    return root


def write_tiny_vae(folder: Path) -> Path:
    """Write a random AutoencoderKL in the layout of the published pipeline."""
    try:
        from diffusers import AutoencoderKL
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"diffusers does not import: {error}")
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    network = AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=4,
        **blocks,
    )
    network.save_pretrained(folder / "vae", variant="bf16")
    return folder


def run(data, out, **options):
    settings = {
        "size": 8,
        "pixels": True,
        "shard_size": 5,
        "workers": 0,
        "device": "cpu",
        **options,
    }
    return prepare(PreparationConfig(data=data, out=out, **settings))


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}
