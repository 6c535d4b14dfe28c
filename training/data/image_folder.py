"""Read folders of images with one subfolder for each class: list, crop, load in workers."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.common.processes import ignore_interrupt, loader_workers

SPLITS = {"train", "test", "val", "valid", "validation"}


class ImageList(NamedTuple):
    """Images of a folder of class folders."""

    root: Path
    folders: list[str]  # the classes, sorted
    files: list[str]  # paths from the root, class by class, sorted inside each
    labels: list[int]  # position in folders, one for each file


class Item(NamedTuple):
    """One image on its way through a loader, or the reason why it is left out."""

    index: int
    pixels: Tensor | None = None  # (3, size, size) uint8
    noise: Tensor | None = None  # for the posterior sample, of the latent's shape
    reason: str = ""
    fatal: bool = False  # its file could not be read, so the image itself may be good


class Batch(NamedTuple):
    """Some images on their way through a loader; `failed` holds those that are left out."""

    indices: list[int]
    pixels: Tensor | None  # (n, 3, size, size) uint8
    noise: Tensor | None
    failed: list[Item]


def collate(items: list[Item]) -> Batch:
    """Stack the readable items, and list the others."""
    good = [item for item in items if item.pixels is not None]
    return Batch(
        [item.index for item in good],
        torch.stack([item.pixels for item in good]) if good else None,
        torch.stack([item.noise for item in good]) if good and good[0].noise is not None else None,
        [item for item in items if item.pixels is None],
    )


def list_images(root: Path) -> ImageList:
    """List the images below `root`: all files whose ending is that of a format Pillow opens.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no class folders, or one without images.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"there is no folder {root}; give --data the folder that holds one subfolder for each "
            "class"
        )
    folders = sorted(
        entry.name
        for entry in os.scandir(root)
        if entry.is_dir() and not entry.name.startswith(".")
    )
    if not folders:
        raise ValueError(
            f"{root} has no class folders; put the images of each class into a subfolder of it"
        )
    if set(folders) <= SPLITS:
        raise ValueError(
            f"{root} holds {' and '.join(folders)}, which are parts of a data set, not classes; "
            f"give --data {root / folders[0]}, and prepare each into a folder of its own"
        )
    files, labels, empty = [], [], []
    for label, folder in enumerate(folders):
        found = _images_below(root, folder)
        if not found:
            empty.append(folder)
        files += found
        labels += [label] * len(found)
    if len(empty) == len(folders):
        raise ValueError(
            f"{root} has {len(folders)} subfolders but no images in them; --data must hold "
            "CLASS/IMAGE.jpg or the like"
        )
    if empty:
        raise ValueError(
            f"{len(empty)} of the {len(folders)} class folders of {root} have no images, first "
            f"{root / empty[0]}; put images there, or remove the folder"
        )
    return ImageList(root, folders, files, labels)


def _images_below(root: Path, folder: str) -> list[str]:
    """Return the paths from `root` of the images in one class folder, sorted."""
    known = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = []
    for place, _, names in os.walk(root / folder, followlinks=True):
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in known:
                found.append((Path(place) / name).relative_to(root).as_posix())
    return sorted(found)


def read_class_names(path: Path | None, folders: list[str]) -> list[str]:
    """Read readable names of the class folders from JSON; without a file, return `folders`.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is no such JSON, or does not name every class.
    """
    if path is None:
        return folders
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}; give --class-names a JSON file, or leave it out"
        )
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON file ({error})") from error
    if isinstance(names, dict):
        by_folder = any(folder in names for folder in folders)
        keys = folders if by_folder else [str(label) for label in range(len(folders))]
        missing = [key for key in keys if key not in names]
        if missing:
            raise ValueError(f"{path} names {len(names)} classes but not {missing[0]!r}; add it")
        names = [names[key] for key in keys]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} must hold a list of names, or an object of them")
    if len(names) != len(folders):
        raise ValueError(
            f"{path} names {len(names)} classes, but the images are in {len(folders)} class folders"
        )
    return names


def read_rgb(raw: bytes) -> Image.Image:
    """Decode the first picture of an image file as RGB of 8 bits.

    Grey of 16 bits is scaled to 8, where Pillow would clip it.
    """
    image = Image.open(io.BytesIO(raw))
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert("RGB")


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Crop an image to its central square, scaled to size x size, as ADM does.

    The image is halved by box averages while its shorter side is at least 2 size, then scaled
    bicubically, then cropped (Dhariwal and Nichol 2021).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if scale != 1:
        image = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
        )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class ImageCrops(Dataset):
    """Images in the order of the list, cropped, flipped, each with its posterior noise.

    Args:
        images: from `list_images`.
        size: width and height of the crops.
        flip: mirror each image with probability 1/2.
        seed: flip and noise of an image depend on this seed and on its number alone.
        noise_shape: (C, h, w) of a latent; None for pixels, and for a VAE that needs no noise.
    """

    def __init__(
        self,
        images: ImageList,
        size: int,
        flip: bool,
        seed: int,
        noise_shape: tuple[int, ...] | None,
    ):
        self.images, self.size, self.flip = images, size, flip
        self.seed, self.noise_shape = seed, noise_shape

    def __len__(self) -> int:
        return len(self.images.files)

    def __getitem__(self, index: int) -> Item:
        path = self.images.root / self.images.files[index]
        try:
            raw = path.read_bytes()
        except OSError as error:
            reason = f"{path} cannot be read ({error}); mend that, then run the same command again"
            return Item(index, reason=reason, fatal=True)
        if not raw:
            return Item(index, reason="the file is empty")
        try:
            image = centre_crop(read_rgb(raw), self.size)
        except Exception as error:  # Pillow raises many kinds
            return Item(index, reason=_short(error))
        rng = np.random.default_rng((self.seed, index))
        mirrored = rng.random() < 0.5
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if self.flip and mirrored:
            pixels = pixels.flip(-1)
        noise = None
        if self.noise_shape is not None:
            noise = torch.from_numpy(rng.standard_normal(self.noise_shape, dtype=np.float32))
        return Item(index, pixels.contiguous(), noise)


def _short(error: Exception) -> str:
    """Return why Pillow refused an image, without the address of the buffer it read."""
    text = str(error)
    if "cannot identify" in text:
        return "not an image that Pillow can read"
    return text or type(error).__name__


def image_loader(
    crops: ImageCrops, batches: list[list[int]], workers: int | None, state: PartialState
) -> DataLoader:
    """Load these batches of images in worker processes.

    Args:
        batches: indices of each batch, in order.
        workers: as the user gave it; see `loader_workers`.

    Returns:
        A loader of `Batch`.
    """
    return DataLoader(
        crops,
        batch_sampler=batches,
        num_workers=loader_workers(workers, state),
        collate_fn=collate,
        worker_init_fn=ignore_interrupt,
    )
