"""Read NumPy's .npy and .npz files, which may be damaged or hostile; write large .npz files.

Their headers are compared with the files' sizes before any memory is taken, and Python objects are
never unpickled. Nothing is memory-mapped: a mapped file that is overwritten ends the process.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

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
        members = _members(archive, path)
        wanted = [name for name in members if names is None or name in names]
        _check_expanded([members[name] for name in wanted], path)
        for name in wanted:
            with archive.open(members[name]) as file:
                shape, fortran, dtype = _member_header(file, members[name], path)
                flat = np.frombuffer(bytearray(file.read()), dtype)
                arrays[name] = native(flat.reshape(shape, order="F" if fortran else "C"))
    return arrays, sorted(members)


class NpzRows:
    """An array in an .npz file whose rows are read when they are asked for, best in order.

    Args:
        path: the file.
        name: of the array.

    Attributes:
        shape, dtype: of the array.
        names: of all arrays in the file.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: it is damaged, has no such array, or would take far more memory than disk.
    """

    def __init__(self, path: Path, name: str):
        check_regular_file(path)
        self.path = path
        with reading(path, ADVICE, "is not a whole .npz file"):
            self._archive = zipfile.ZipFile(path)
            members = _members(self._archive, path)
            self.names = sorted(members)
            if name not in members:
                raise FileError(path, f"holds {quoted(self.names)}, and no {name}", ADVICE)
            _check_expanded([members[name]], path)
            self._file = self._archive.open(members[name])
            self.shape, fortran, self.dtype = _member_header(self._file, members[name], path)
            self._start = self._file.tell()
        if not self.shape:
            raise FileError(path, f"has one number as {name}", "it must be an array of rows")
        if fortran:
            advice = f"save numpy.ascontiguousarray({name})"
            raise FileError(path, f"has {name} in Fortran's order", advice)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Return the rows of a slice, in the machine's byte order.

        Raises:
            FileError: they cannot be read.
        """
        low, high, _ = rows.indices(len(self))
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        with reading(self.path, ADVICE, "cannot be read"):
            self._file.seek(self._start + low * row)  # reads on from where it is, if it can
            raw = bytearray(self._file.read((high - low) * row))
            values = np.frombuffer(raw, self.dtype).reshape(high - low, *self.shape[1:])
        return native(values)


class Rows(NamedTuple):
    """An array to write: its shape, its type, and blocks of its rows in order."""

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Iterable[np.ndarray]


def write_npz(file: IO[bytes], arrays: Mapping[str, Rows]) -> None:
    """Write arrays to an .npz file block by block, as numpy.savez would; no more is in memory.

    Raises:
        ValueError: the blocks of an array have more or fewer rows than its shape says.
    """
    with zipfile.ZipFile(file, "w") as archive:
        for name, (shape, dtype, blocks) in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False}
                npy.write_array_header_1_0(member, {**header, "shape": tuple(shape)})
                rows = 0
                for block in blocks:
                    member.write(np.ascontiguousarray(block, dtype).data)
                    rows += len(block)
                if rows != shape[0]:
                    raise ValueError(f"{name} has {rows} rows instead of {shape[0]}")


def native(values: np.ndarray) -> np.ndarray:
    """Return numbers in the machine's byte order, as torch needs them."""
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return the arrays of an .npz file by name.

    Raises:
        FileError: there are too many.
    """
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    if len(members) > MOST_MEMBERS:
        raise FileError(path, f"holds {len(members):,} arrays", ADVICE)
    return members


def _check_expanded(members: list[zipfile.ZipInfo], path: Path) -> None:
    """Check that arrays do not take far more memory than the file.

    Raises:
        FileError: they do.
    """
    total = sum(member.file_size for member in members)
    if total > max(SMALL, MOST_EXPANDED * path.stat().st_size):
        raise FileError(
            path, f"says that its arrays take {total:,} bytes, far more than the file", ADVICE
        )


def _member_header(
    file: IO[bytes], member: zipfile.ZipInfo, path: Path
) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the header of an array in an .npz file, as `_header`.

    Raises:
        FileError: its shape does not fit its size; or as `_header`.
    """
    shape, fortran, dtype = _header(file, path)
    size = math.prod(shape) * dtype.itemsize
    if file.tell() + size != member.file_size:
        name = member.filename.removesuffix(".npy")
        found = f"is damaged: {quoted(name)} of shape {shape} takes {size:,} bytes"
        raise FileError(path, found, ADVICE)
    return shape, fortran, dtype


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
