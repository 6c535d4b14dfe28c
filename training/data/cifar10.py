"""Read CIFAR-10's binary files, and write them as folders of pictures."""

from __future__ import annotations

import dataclasses
import gzip
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from gmflow_core.files.atomic import atomic_folder
from gmflow_core.files.errors import FileError, quoted

SIDE = 32
RECORD = 1 + 3 * SIDE * SIDE  # bytes: the label, then the red, green and blue planes
MOST_BYTES = 10_000 * RECORD  # of one file
NAMES = "batches.meta.txt"
PARTS = {**{f"data_batch_{i}.bin": "train" for i in range(1, 6)}, "test_batch.bin": "test"}
WHAT_TO_DO = "give cifar-10-binary.tar.gz, or the folder cifar-10-batches-bin of it"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cifar10Config:
    """Writing of CIFAR-10's pictures."""

    data: Path
    """cifar-10-binary.tar.gz, or the folder cifar-10-batches-bin that is in it."""
    out: Path = Path("data/cifar10")
    """Folder for train and test; it must not exist yet."""


def write_cifar10(config: Cifar10Config) -> dict[str, int]:
    """Write all pictures into config.out/train and config.out/test, a folder for each class.

    Returns:
        The number of pictures in train and in test.

    Raises:
        ValueError: config.out exists.
        FileError: a file is missing, or not CIFAR-10's.
    """
    if config.out.exists():
        raise ValueError(f"{config.out} exists already; delete it, or give another --out")
    files = dict(read_files(config.data))
    missing = [name for name in (NAMES, *PARTS) if name not in files]
    if missing:
        raise FileError(config.data, f"has no {' and no '.join(missing)}", WHAT_TO_DO)
    names = _class_names(config.data, files.pop(NAMES))
    counts = {"train": 0, "test": 0}
    with atomic_folder(config.out) as unfinished:
        for file, part in PARTS.items():
            labels, pictures = records(config.data / file, files[file], len(names))
            for label, picture in zip(labels, pictures, strict=True):
                folder = unfinished / part / names[label]
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(folder / f"{counts[part]:05d}.png")
                counts[part] += 1
    return counts


def read_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Return name and content of CIFAR-10's files in an archive or a folder.

    Raises:
        FileError: it is neither, or cannot be read.
    """
    wanted = {NAMES, *PARTS}
    try:
        if path.is_dir():
            for each in path.iterdir():
                if each.name in wanted and each.stat().st_size <= MOST_BYTES:
                    yield each.name, each.read_bytes()
            return
        _check_sum(path)
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                if name in wanted and member.isfile() and member.size <= MOST_BYTES:
                    yield name, archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise FileError(path, f"cannot be read ({quoted(str(error), 200)})", WHAT_TO_DO) from error


def _check_sum(path: Path) -> None:
    """Read a compressed archive to its end, where its checksum is; tarfile stops before.

    Raises:
        OSError, EOFError, zlib.error: it is damaged.
    """
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    if compressed:
        with gzip.open(path) as content:
            while content.read(2**20):
                pass


def records(path: Path, content: bytes, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels (n,) and pictures (n, 32, 32, 3), uint8, of a file's content.

    Raises:
        FileError: it is not a whole number of records, or a label is too large.
    """
    if not content or len(content) % RECORD:
        size = f"has {len(content):,} bytes, which is no multiple of {RECORD:,}"
        raise FileError(path, size, WHAT_TO_DO)
    table = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
    labels, planes = table[:, 0], table[:, 1:].reshape(-1, 3, SIDE, SIDE)
    if labels.max() >= classes:
        raise FileError(path, f"has the label {labels.max()} of {classes} classes", WHAT_TO_DO)
    return labels, np.ascontiguousarray(planes.transpose(0, 2, 3, 1))


def _class_names(path: Path, content: bytes) -> list[str]:
    """Return the names of the classes.

    Raises:
        FileError: one could not be the name of a folder.
    """
    names = content.decode("ascii", "replace").split()
    if not names or not all(name.isalnum() for name in names):
        raise FileError(path / NAMES, f"has the names {quoted(str(names), 200)}", WHAT_TO_DO)
    return names
