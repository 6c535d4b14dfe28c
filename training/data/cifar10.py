"""Read CIFAR-10's files, binary or Python's, and write them as folders of pictures."""

from __future__ import annotations

import dataclasses
import gzip
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from gmflow_core.files.atomic import atomic_folder
from gmflow_core.files.errors import FileError, check_regular_file, printable, quoted, reason
from gmflow_core.source.pickles import read_classes_pickle, read_pictures_pickle

SIDE = 32
PLANES = 3 * SIDE * SIDE  # bytes of a picture: its red, green and blue planes
RECORD = 1 + PLANES  # bytes of the binary form: the label, then the picture
RECORDS = 10_000  # of one file
MOST_BYTES = 2**25  # of one file; the binary ones have 30.7 MB, Python's 31.0 MB
NAMES = "batches.meta.txt"
PARTS = {**{f"data_batch_{i}.bin": "train" for i in range(1, 6)}, "test_batch.bin": "test"}
PYTHON_NAMES = "batches.meta"
PYTHON_PARTS = {name.removesuffix(".bin"): part for name, part in PARTS.items()}
WHAT_TO_DO = "give cifar-10-binary.tar.gz or cifar-10-python.tar.gz, or the folder in it"

Records = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cifar10Config:
    """Writing of CIFAR-10's pictures."""

    data: Path
    """cifar-10-python.tar.gz or cifar-10-binary.tar.gz, or the folder that is in it."""
    out: Path = Path("data/cifar10")
    """Folder for train and test; it must not exist yet."""


@dataclasses.dataclass(frozen=True)
class Form:
    """A form in which CIFAR-10 is published.

    Args:
        names: the file with the names of the classes.
        parts: the files of pictures, and which part each belongs to.
        lines: returns the names of the classes, a line each, of a file's path and content.
        records: returns labels and pictures of a file's path, content and number of classes.
    """

    names: str
    parts: dict[str, str]
    lines: Callable[[Path, bytes], bytes]
    records: Callable[[Path, bytes, int], Records]

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all files."""
        return (self.names, *self.parts)


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
    form = max(FORMS, key=lambda each: len(files.keys() & set(each.files)))
    missing = [name for name in form.files if name not in files]
    if missing:
        raise FileError(config.data, f"has no {' and no '.join(missing)}", WHAT_TO_DO)
    path = config.data / form.names
    names = _class_names(path, form.lines(path, files[form.names]))
    counts = {"train": 0, "test": 0}
    with atomic_folder(config.out) as unfinished:
        for file, part in form.parts.items():
            labels, pictures = form.records(config.data / file, files.pop(file), len(names))
            for label, picture in zip(labels, pictures, strict=True):
                folder = unfinished / part / names[label]
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(folder / f"{counts[part]:05d}.png")
                counts[part] += 1
    return counts


def read_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Return name and content of CIFAR-10's files in an archive or a folder.

    Raises:
        FileNotFoundError: there is no such file or folder.
        FileError: it is neither, cannot be read, or a file is too large.
    """
    wanted = {name for form in FORMS for name in form.files}
    try:
        if path.is_dir():
            for each in path.iterdir():
                if each.name in wanted and each.is_file():
                    _check_size(each, each.stat().st_size)
                    yield each.name, each.read_bytes()
            return
        check_regular_file(path)
        _check_sum(path)
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                if name in wanted and member.isfile():
                    _check_size(path / name, member.size)
                    yield name, archive.extractfile(member).read()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{printable(str(error))}; {WHAT_TO_DO} as --data") from None
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise FileError(path, f"cannot be read ({reason(error)})", WHAT_TO_DO) from error


def _check_size(path: Path, size: int) -> None:
    """Check that a file is not too large.

    Raises:
        FileError: it is.
    """
    if size > MOST_BYTES:
        raise FileError(path, f"has {size:,} bytes; the most is {MOST_BYTES:,}", WHAT_TO_DO)


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


def records(path: Path, content: bytes, classes: int) -> Records:
    """Return the labels (n,) and pictures (n, 32, 32, 3), uint8, of a binary file's content.

    Raises:
        FileError: it does not hold `RECORDS` whole records, or a label is too large.
    """
    if not content or len(content) % RECORD:
        size = f"has {len(content):,} bytes, which is no multiple of {RECORD:,}"
        raise FileError(path, size, WHAT_TO_DO)
    table = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
    return _checked(path, table[:, 0], table[:, 1:], classes)


def pickled_records(path: Path, content: bytes, classes: int) -> Records:
    """Return labels and pictures of the content of Python's form, see `records`.

    Raises:
        FileError: the pickle is refused, or does not hold `RECORDS` pictures with their labels.
    """
    planes, labels = read_pictures_pickle(path, content, WHAT_TO_DO)
    if planes.dtype != np.uint8 or planes.ndim != 2 or planes.shape[1] != PLANES:
        found = f"has data in {planes.dtype} {planes.shape} instead of uint8 ({RECORDS}, {PLANES})"
        raise FileError(path, found, WHAT_TO_DO)
    if labels.shape != planes.shape[:1]:
        found = f"has {labels.size:,} labels for {len(planes):,} pictures"
        raise FileError(path, found, WHAT_TO_DO)
    if not np.isin(labels, np.arange(256)).all():
        raise FileError(path, "has labels that are no whole numbers from 0 on", WHAT_TO_DO)
    return _checked(path, labels.astype(np.uint8), planes, classes)


def _checked(path: Path, labels: np.ndarray, planes: np.ndarray, classes: int) -> Records:
    """Return labels and pictures of the labels (n,) and the planes (n, 3072), uint8.

    Raises:
        FileError: there are not `RECORDS` of them, or a label is too large.
    """
    if len(labels) != RECORDS:
        found = f"has {len(labels):,} records instead of {RECORDS:,}, so it is not whole"
        raise FileError(path, found, WHAT_TO_DO)
    if labels.max() >= classes:
        raise FileError(path, f"has the label {labels.max()} of {classes} classes", WHAT_TO_DO)
    pictures = planes.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return labels, np.ascontiguousarray(pictures)


def _class_names(path: Path, content: bytes) -> list[str]:
    """Return the names of the classes.

    Raises:
        FileError: one could not be the name of a folder.
    """
    names = content.decode("ascii", "replace").split()
    if not names or not all(name.isalnum() for name in names):
        raise FileError(path, f"has the names {quoted(names)}", WHAT_TO_DO)
    return names


def _pickled_names(path: Path, content: bytes) -> bytes:
    return read_classes_pickle(path, content, WHAT_TO_DO)


FORMS = (
    Form(NAMES, PARTS, lambda path, content: content, records),
    Form(PYTHON_NAMES, PYTHON_PARTS, _pickled_names, pickled_records),
)
