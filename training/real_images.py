"""Real images, which samples are compared with: of a prepared folder, of any folder, or in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.latents import INDEX, LatentDataset, to_pixels
from training.prepare import centre_crop
from training.vae import VAE

IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".JPEG")


class RealImages(Protocol):
    """Real images: `len()`, a `key` that says which they are, and `get`."""

    key: dict[str, Any]

    def __len__(self) -> int: ...

    def get(self, images: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """uint8 (n, 3, H, W), and labels (n,) if they are known."""


class PreparedImages:
    """Images of a prepared folder, in an order of chance; latents are decoded."""

    def __init__(self, folder: Path, count: int, vae: VAE | None, device: torch.device, batch: int):
        self.data, self.vae, self.device, self.batch = LatentDataset(folder), vae, device, batch
        if self.data.kind == "pixels" and self.data.shape[0] != 3:
            raise ValueError(f"{folder} has pixels of shape {self.data.shape}; images of 3 channels are needed")
        self.order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(0))[:count].tolist()
        content = hashlib.sha256((folder / INDEX).read_bytes())
        for shard in self.data.index["shards"]:
            stat = (folder / shard["file"]).stat()
            content.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
        self.key = {"prepared": content.hexdigest(), "count": len(self.order)}

    def __len__(self) -> int:
        return len(self.order)

    def get(self, images: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        parts = []
        for start in range(0, len(images), self.batch):
            x, labels = self.data.__getitems__([self.order[i] for i in images[start : start + self.batch]])
            parts.append((to_images(x, self.vae, self.device), labels))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


class FolderImages:
    """Image files anywhere in a folder, in an order of chance; the centre of each, scaled to `size` as for training."""

    def __init__(self, folder: Path, count: int, size: int):
        files = sorted(p for p in folder.rglob("*") if p.suffix in IMAGE_FILES or p.suffix.lower() in IMAGE_FILES)
        if len(files) < 2:
            raise ValueError(
                f"{folder} has {len(files)} images ({', '.join(IMAGE_FILES[:-1])}) and no {INDEX}; give --reference a folder "
                "of images, a prepared folder, or an .npz file"
            )
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:count].tolist()
        self.files, self.size = [files[i] for i in order], size
        listing = json.dumps([(str(p.relative_to(folder)), p.stat().st_size) for p in self.files])
        self.key = {"folder": hashlib.sha256(listing.encode()).hexdigest(), "size": size}

    def __len__(self) -> int:
        return len(self.files)

    def get(self, images: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        found = []
        for i in images:
            try:
                image = centre_crop(Image.open(self.files[i]).convert("RGB"), self.size)
            except OSError as error:
                raise ValueError(f"{self.files[i]} cannot be read as an image ({error}); mend or remove it") from error
            found.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        return torch.stack(found), None


class ArrayImages:
    """Images (N, 3, H, W) in memory."""

    def __init__(self, images: Tensor, count: int, key: dict[str, Any]):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
        self.images, self.order, self.key = images, order, {**key, "count": len(order)}

    def __len__(self) -> int:
        return len(self.order)

    def get(self, images: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        return self.images[self.order[torch.as_tensor(images)]].contiguous(), None


def to_images(x: Tensor, vae: VAE | None, device: torch.device) -> Tensor:
    """Samples of the model's space, (n, C, h, w), as uint8 (n, 3, H, W) on the CPU."""
    return to_pixels(x if vae is None else vae.decode(x.to(device))).cpu()
