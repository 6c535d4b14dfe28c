"""Read folders of images with one subfolder for each class: list, crop, load in workers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gmflow_core.files.errors import printable, reason
from gmflow_core.models.settings import MOST_CLASSES
from training.common.processes import again, ignore_interrupt, loader_workers
from training.data.pictures import PictureError, read_picture

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
    above = {_identity(each) for each in (root, *root.resolve().parents)}
    visible = [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
    folders = sorted(
        entry.name
        for entry in visible
        if os.path.isdir(entry.path) and _identity(Path(entry.path)) not in above
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
    if len(folders) > MOST_CLASSES:
        raise ValueError(f"{root} has {len(folders):,} class folders; the most is {MOST_CLASSES:,}")
    names: dict[tuple | None, str] = {}
    for folder in folders:
        other = names.setdefault(_identity(root / folder), folder)
        if other != folder:
            raise ValueError(
                f"{root / folder} and {root / other} are the same folder, so its images would have "
                "two classes; remove the link"
            )
    files, labels, empty = [], [], []
    for label, folder in enumerate(folders):
        found = images_below(root, folder)
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


def images_below(root: Path, folder: str = "", known: set[str] | None = None) -> list[str]:
    """Return the paths from `root` of the images below one of its folders, sorted.

    Links are followed, but each folder is read once, under its own name if it lies there, and
    never one that `folder` itself lies in. Hidden files are left out.

    Args:
        known: endings of the images' names; those of the formats that Pillow opens if None.

    Raises:
        OSError: a folder cannot be read.
    """
    known = image_endings() if known is None else known
    seen = {_identity(above) for above in (root / folder).resolve().parents} - {None}
    found, folders, links = [], [root / folder], []
    while folders or links:
        place = folders.pop() if folders else links.pop()
        identity = _identity(place)
        if identity is None or identity in seen:
            continue
        seen.add(identity)
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise OSError(
                f"the folder {printable(str(place))} cannot be read ({reason(error)}); mend that, "
                "or take it away"
            ) from error
        for entry in entries:
            if os.path.isdir(entry.path):  # entry.is_dir raises for a link to itself
                (links if entry.is_symlink() else folders).append(Path(entry.path))
            elif not entry.name.startswith(".") and Path(entry.name).suffix.lower() in known:
                found.append(Path(entry.path).relative_to(root).as_posix())
    return sorted(found)


def image_endings() -> set[str]:
    """Return the endings of file names of the formats that Pillow opens, such as ".png"."""
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _identity(folder: Path) -> tuple | None:
    """Return what all names of a folder have in common; None if there is no such folder."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else (os.path.realpath(folder),)


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
        return self.item(index)

    def item(self, index: int, epoch: int = 0) -> Item:
        """Return an image with the flip and the noise of an epoch."""
        path = self.images.root / self.images.files[index]
        try:
            image = read_picture(path, self.size)
        except PictureError as error:
            return Item(index, reason=reason(error))
        except OSError as error:
            text = f"{path} cannot be read ({reason(error)}); mend that, then {again()}"
            return Item(index, reason=printable(text), fatal=True)
        rng = np.random.default_rng((self.seed, index, epoch) if epoch else (self.seed, index))
        mirrored = rng.random() < 0.5
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if self.flip and mirrored:
            pixels = pixels.flip(-1)
        noise = None
        if self.noise_shape is not None:
            noise = torch.from_numpy(rng.standard_normal(self.noise_shape, dtype=np.float32))
        return Item(index, pixels.contiguous(), noise)


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
