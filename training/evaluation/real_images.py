"""Read real images to compare samples with: a prepared folder, a folder of files, an array."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gmflow_core.files.errors import reading
from gmflow_core.models.vae import VAE
from training.data.image_folder import images_below
from training.data.pictures import DECODER, read_picture
from training.data.shards import INDEX, LatentDataset, to_pixels


class RealImages(Protocol):
    """A sequence of real images; `key` identifies them."""

    key: dict[str, Any]

    def __len__(self) -> int: ...

    def get(self, images: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Return uint8 (n, 3, H, W), and labels (n,) if they are known."""


class PreparedImages:
    """Images of a prepared folder in random order; latents are decoded.

    Args:
        folder: written by training.prepare.
        count: images at most.
        vae: decoder of latents; None for pixels.
        device: of the decoder.
        batch: images decoded at a time.

    Raises:
        ValueError: the pixels do not have 3 channels.
    """

    def __init__(self, folder: Path, count: int, vae: VAE | None, device: torch.device, batch: int):
        self.data, self.vae, self.device, self.batch = LatentDataset(folder), vae, device, batch
        if self.data.kind == "pixels" and self.data.shape[0] != 3:
            raise ValueError(
                f"{folder} has pixels of shape {self.data.shape}; images of 3 channels are needed"
            )
        self.order = random_order(len(self.data), count).tolist()
        self.key = {"prepared": prepared_digest(folder, self.data), "count": len(self.order)}

    def __len__(self) -> int:
        return len(self.order)

    def get(self, images: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Return uint8 (n, 3, H, W) and labels (n,)."""
        parts = []
        for start in range(0, len(images), self.batch):
            rows = [self.order[i] for i in images[start : start + self.batch]]
            x, labels = self.data.__getitems__(rows)
            parts.append((to_images(x, self.vae, self.device), labels))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


class FolderImages:
    """Image files anywhere below a folder, in random order; centre crops, scaled as for training.

    Args:
        folder: searched with its subfolders.
        count: images at most.
        size: width and height of the crops in pixels.
        option: that the folder comes from, for messages.

    Raises:
        ValueError: there are fewer than 2 images.
    """

    def __init__(self, folder: Path, count: int, size: int, option: str = "reference"):
        files = images_below(folder)
        if len(files) < 2:
            raise ValueError(
                f"{folder} has {len(files)} images and no {INDEX}; "
                f"give --{option} a folder of images, a prepared folder, or an .npz file"
            )
        chosen = [files[i] for i in random_order(len(files), count).tolist()]
        self.files, self.size = [folder / file for file in chosen], size
        listing = json.dumps([(file, *_stamp_of(folder / file)) for file in chosen])
        self.key = {
            "folder": hashlib.sha256(listing.encode()).hexdigest(),
            "size": size,
            "decoder": DECODER,
        }

    def __len__(self) -> int:
        return len(self.files)

    def get(self, images: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Return uint8 (n, 3, size, size) and None: their labels are unknown.

        Raises:
            ValueError: a file cannot be read as an image.
        """
        found = []
        for i in images:
            advice = "mend or remove it"
            with reading(self.files[i], advice, "cannot be read as an image"):
                image = read_picture(self.files[i], self.size)
            found.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        return torch.stack(found), None


class ArrayImages:
    """Images in memory, in random order.

    Args:
        images: uint8 (N, 3, H, W).
        count: images at most.
        key: identifies them.
    """

    def __init__(self, images: Tensor, count: int, key: dict[str, Any]):
        self.images, self.order = images, random_order(len(images), count)
        self.key = {**key, "count": len(self.order)}

    def __len__(self) -> int:
        return len(self.order)

    def get(self, images: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Return uint8 (n, 3, H, W) and None: their labels are unknown."""
        return self.images[self.order[torch.as_tensor(images)]].contiguous(), None


def prepared_digest(folder: Path, data: LatentDataset) -> str:
    """Return what tells a prepared folder from others: its index, and the times of its shards."""
    content = hashlib.sha256((folder / INDEX).read_bytes())
    for shard in data.index["shards"]:
        stat = (folder / shard["file"]).stat()
        content.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return content.hexdigest()


def _stamp_of(path: Path) -> tuple[int, int]:
    """Return the size of a file and the time of its last change; zeros if there is none."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def random_order(total: int, count: int) -> Tensor:
    """Return `count` of the numbers below `total` at most, in an order that is always the same."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count]


def to_images(x: Tensor, vae: VAE | None, device: torch.device) -> Tensor:
    """Return samples (n, C, h, w) of the model's space as uint8 (n, 3, H, W) on the CPU."""
    return to_pixels(x if vae is None else vae.decode(x.to(device))).cpu()
