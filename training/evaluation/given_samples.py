"""Read samples that are there already, to score them without a model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gmflow_core.files.errors import FileError, printable, quoted, reading
from gmflow_core.files.json_files import read_json
from training.common.arrays import NpzRows
from training.data.image_folder import images_below
from training.data.pictures import DECODER, read_file, read_rgb
from training.evaluation.config import NEIGHBOURS
from training.evaluation.real_images import random_order
from training.evaluation.reference_file import check_images_array

LABELS = "dataset.json"  # StyleGAN's file of labels, beside the images
LARGEST = 4096  # pixels per side


class GivenSamples:
    """Samples from a file or folder, in its order; images are read when they are asked for.

    Attributes:
        path: of the file or folder.
        size: width and height of the images in pixels.
        labels: (n,) int64, classes that the images should have; None if unknown.
        key: identifies the samples.
    """

    path: Path
    size: int
    labels: Tensor | None
    key: dict[str, Any]

    def __len__(self) -> int:
        raise NotImplementedError

    def get(self, images: range) -> tuple[Tensor, Tensor | None]:
        """Return uint8 (n, 3, H, W), and labels (n,) if they are known."""
        raise NotImplementedError

    def check_labels(self, classes: int) -> None:
        """Check that all labels are of so many classes.

        Raises:
            ValueError: they are not.
        """
        if self.labels is not None and not 0 <= self.labels.min() <= self.labels.max() < classes:
            bad = self.labels[(self.labels < 0) | (self.labels >= classes)][0]
            raise ValueError(
                f"{self.path} has the label {int(bad)}, but the features tell {classes} classes, 0 "
                f"to {classes - 1}; give --features of the same classes, or samples without labels"
            )


class NpzSamples(GivenSamples):
    """Samples in an .npz file, in ADM's form: `arr_0` (N, H, W, 3) uint8, `arr_1` labels (N,).

    Of more than `count` images random ones are taken, as of a folder.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: it is damaged, or its arrays are others.
    """

    def __init__(self, path: Path, count: int):
        self.path, self.images = path, NpzRows(path, "arr_0")
        check_images_array(self.images.dtype, self.images.shape, path)
        total, height, width, _ = self.images.shape
        self.size = checked_size(width, height, path)
        self.rows = random_order(total, checked_count(total, count, path)).sort().values
        self.labels = self._labels(total)
        stat = path.stat()
        self.key = {"npz": path.name, "bytes": stat.st_size, "time": stat.st_mtime_ns}
        self.key["count"] = len(self)
        if len(self) < total:
            self.key["chosen"] = "at random"

    def _labels(self, total: int) -> Tensor | None:
        """Return the labels, if there are any.

        Raises:
            FileError: they are not one whole number for each image.
        """
        if "arr_1" not in self.images.names:
            return None
        labels = NpzRows(self.path, "arr_1")
        if labels.shape != (total,) or labels.dtype.kind not in "iu":
            found = f"has arr_1 in {labels.dtype} {labels.shape} for {total} images"
            raise FileError(self.path, found, "it must be their labels (N,), whole numbers")
        values = labels[:total][self.rows.numpy()]
        if len(values) and values.max() > np.iinfo(np.int64).max:
            found = f"has the label {values.max()} in arr_1"
            raise FileError(self.path, found, "labels are below 2**63")
        return torch.from_numpy(values.astype(np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    def get(self, images: range) -> tuple[Tensor, Tensor | None]:
        """Return uint8 (n, 3, H, W), and labels (n,) if they are known."""
        these = slice(images.start, images.stop)
        rows = [self.images[row : row + 1] for row in self.rows[these].tolist()]
        pixels = torch.from_numpy(np.concatenate(rows)).permute(0, 3, 1, 2).contiguous()
        return pixels, None if self.labels is None else self.labels[these]


class FolderSamples(GivenSamples):
    """Image files below a folder, sorted by name; labels are those of its dataset.json, if any.

    Of more than `count` files random ones are taken, always the same: the first ones may be of few
    classes.

    Raises:
        FileError: the images have another size than the first one, or dataset.json is no list of
            their labels.
    """

    def __init__(self, path: Path, count: int):
        self.path = path
        files = images_below(path)
        chosen = random_order(len(files), checked_count(len(files), count, path))
        self.files = [files[number] for number in sorted(chosen.tolist())]
        self.size = checked_size(*self._image(self.files[0]).size, path)
        self.labels = self._labels()
        for file in self.files:
            if not (path / file).exists():
                raise FileError(path / file, "is a link to nothing", "mend or remove it")
        stats = [(path / file).stat() for file in self.files]
        listing = [
            (file, s.st_size, s.st_mtime_ns) for file, s in zip(self.files, stats, strict=True)
        ]
        content = hashlib.sha256(json.dumps(listing).encode())
        if self.labels is not None:
            content.update(self.labels.numpy().tobytes())
        self.key = {"folder": content.hexdigest(), "decoder": DECODER}

    def _labels(self) -> Tensor | None:
        """Return the labels in dataset.json, if there is one with labels.

        Raises:
            FileError: it does not say the label of each image.
        """
        path = self.path / LABELS
        if not path.exists():
            return None
        content = read_json(path, "mend or remove it")
        pairs = content.get("labels") if isinstance(content, dict) else content
        if pairs is None:
            return None
        with reading(path, "mend or remove it", 'has other "labels" than [[file, label], ...]'):
            known = {str(file): label for file, label in pairs}
            for file, label in known.items():
                if type(label) is not int or not -(2**63) <= label < 2**63:
                    found = f"has the label {quoted(label)} of {quoted(file)}"
                    raise FileError(path, found, "labels are whole numbers")
            missing = [file for file in self.files if file not in known]
            if missing:
                found = f"has no label of {quoted(missing[0])} ({len(missing)} images in all)"
                raise FileError(path, found, "mend or remove it")
            return torch.tensor([known[file] for file in self.files])

    def __len__(self) -> int:
        return len(self.files)

    def get(self, images: range) -> tuple[Tensor, Tensor | None]:
        """Return uint8 (n, 3, H, W), and labels (n,) if they are known."""
        found = []
        for file in self.files[images.start : images.stop]:
            image = self._image(file)
            if image.size != (self.size, self.size):
                raise FileError(
                    self.path / file,
                    f"has {image.width} x {image.height} pixels, and the first image of the "
                    f"folder {self.size} x {self.size}",
                    "samples are of one size; nothing is scaled",
                )
            found.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        labels = None if self.labels is None else self.labels[images.start : images.stop]
        return torch.stack(found), labels

    def _image(self, file: str) -> Image.Image:
        """Return an image in RGB.

        Raises:
            FileError: it cannot be read.
        """
        with reading(self.path / file, "mend or remove it", "cannot be read as an image"):
            return read_rgb(read_file(self.path / file))


def open_samples(path: Path, count: int) -> GivenSamples:
    """Open an .npz file or a folder of images; at most `count` of them.

    Raises:
        FileNotFoundError: there is nothing of that name.
        FileError: it holds no images that can be scored.
    """
    if path.is_dir():
        return FolderSamples(path, count)
    if not path.exists():
        raise FileNotFoundError(f"there are no samples {printable(str(path))} (--samples)")
    if path.suffix != ".npz":
        raise FileError(path, "is no .npz file", "give --samples .npz files or folders of images")
    return NpzSamples(path, count)


def checked_count(total: int, count: int, path: Path) -> int:
    """Return how many of the images are scored.

    Raises:
        FileError: there are too few.
    """
    if total <= NEIGHBOURS:
        found = f"holds {total} images"
        raise FileError(path, found, f"at least {NEIGHBOURS + 1} are needed to be scored")
    return min(total, count)


def checked_size(width: int, height: int, path: Path) -> int:
    """Return the width and height of square images.

    Raises:
        FileError: they are not square, or too large.
    """
    if width != height or width > LARGEST:
        found = f"holds images of {width} x {height} pixels"
        raise FileError(path, found, f"square ones of at most {LARGEST} are needed")
    return width
