"""Read NumPy's .npy and .npz files, which may be damaged or hostile.

Their headers are compared with the files' sizes before any memory is taken, and Python objects are
never unpickled. Nothing is memory-mapped: a mapped file that is overwritten ends the process.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from gmflow_core.files.errors import FileError, check_regular_file, quoted, reading

ADVICE = "give a whole file of plain arrays, as numpy.save or numpy.savez writes it"
MOST_EXPANDED = 50  # times the size of an .npz file that its arrays may take
SMALL = 2**28  # bytes that they may always take
MOST_MEMBERS = 1000


class NpyFile:
    """An array in an .npy file, whose rows are read when they are asked for.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: it is damaged, or no array of numbers.
    """

    def __init__(self, path: Path):
        check_regular_file(path)
        self.path = path
        with reading(path, ADVICE, "is no whole .npy file"), open(path, "rb") as file:
            self.shape, self.fortran, self.dtype = _header(file, path)
            self.start = file.tell()
        size = math.prod(self.shape) * self.dtype.itemsize
        if path.stat().st_size < self.start + size:
            found = f"is truncated: an array of shape {self.shape} takes {size:,} bytes"
            raise FileError(path, found, ADVICE)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Return the rows of a slice, in the machine's byte order; all if the order is Fortran's.

        Raises:
            FileError: the file has become shorter, or cannot be read.
        """
        low, high, _ = rows.indices(self.shape[0])
        inner = math.prod(self.shape[1:])
        first, count = (low, high - low) if not self.fortran else (0, self.shape[0])
        with reading(self.path, ADVICE, "cannot be read"):
            offset = self.start + first * inner * self.dtype.itemsize
            flat = np.fromfile(self.path, self.dtype, count * inner, offset=offset)
            shape = (count, *self.shape[1:])
            values = flat.reshape(shape, order="F" if self.fortran else "C")
        return native(values[low:high] if self.fortran else values)


def read_npz(path: Path, names: Sequence[str] | None = None) -> tuple[dict[str, np.ndarray], list]:
    """Read arrays of an .npz file.

    Args:
        path: the file.
        names: arrays to read if they are there; all if None.

    Returns:
        The arrays by name, and the names of all arrays in the file.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: it is damaged, holds Python objects, or would take far more memory than disk.
    """
    check_regular_file(path)
    arrays = {}
    with reading(path, ADVICE, "is not a whole .npz file"), zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if len(members) > MOST_MEMBERS:
            raise FileError(path, f"holds {len(members):,} arrays", ADVICE)
        wanted = [name for name in members if names is None or name in names]
        total = sum(members[name].file_size for name in wanted)
        if total > max(SMALL, MOST_EXPANDED * path.stat().st_size):
            raise FileError(
                path, f"says that its arrays take {total:,} bytes, far more than the file", ADVICE
            )
        for name in wanted:
            with archive.open(members[name]) as file:
                shape, fortran, dtype = _header(file, path)
                size = math.prod(shape) * dtype.itemsize
                if file.tell() + size != members[name].file_size:
                    found = f"is damaged: {quoted(name)} of shape {shape} takes {size:,} bytes"
                    raise FileError(path, found, ADVICE)
                flat = np.frombuffer(bytearray(file.read()), dtype)
                arrays[name] = native(flat.reshape(shape, order="F" if fortran else "C"))
    return arrays, sorted(members)


def native(values: np.ndarray) -> np.ndarray:
    """Return numbers in the machine's byte order, as torch needs them."""
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _header(file: IO[bytes], path: Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the header of an array: shape, whether its order is Fortran's, type.

    Raises:
        FileError: it is no array of numbers that torch knows.
        ValueError: it cannot be read.
    """
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):  # 3.0 is for names of fields
        raise FileError(path, f"has an array in version {version} of the format", ADVICE)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.kind not in "biuf" or dtype.itemsize > 8 or dtype.subdtype or dtype.names:
        raise FileError(path, f"holds values of type {quoted(str(dtype))}, not numbers", ADVICE)
    if not all(0 <= size < 2**63 for size in shape) or math.prod(shape) >= 2**60:
        raise FileError(path, f"has an array of shape {quoted(shape)}", ADVICE)
    return shape, fortran, dtype
