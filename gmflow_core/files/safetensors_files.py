"""Read and write safetensors files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .atomic import atomic_write
from .errors import REPEAT, FileError, check_regular_file, quoted, reading, reason

PICKLE = (
    "is a pickle file (.pt, .ckpt), which could run any code when opened, so GMFlow never reads one"
)
LARGEST_HEADER = 16 * 2**20  # bytes of a header that is looked at only


def open_safetensors(path: str | Path, advice: str = REPEAT):
    """Open a safetensors file with `safe_open`.

    Tensors are read into memory of their own where the library can (from version 0.8), so that a
    file which is overwritten at the same time is an error; a mapped file would end the process.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: it is no file, a pickle, or not a whole safetensors file.
    """
    check_regular_file(path)
    try:
        try:
            return safe_open(path, framework="pt", backend="pread")
        except TypeError:  # safetensors before 0.8
            return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        if not os.access(path, os.R_OK):  # which the library tells as a file that is missing
            raise FileError(path, "may not be read", "change its permissions") from error
        if _is_pickle(path):
            raise FileError(path, PICKLE, "use the .safetensors version of the model") from None
        raise FileError(
            path, f"is not a whole safetensors file ({reason(error)})", advice
        ) from error


def _is_pickle(path: str | Path) -> bool:
    """Return whether the file begins as a zip of torch.save or as a bare pickle does.

    The length of a safetensors header may begin with the byte of a pickle; its ninth byte is "{".
    """
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError:
        return False
    return head[:2] == b"PK" or (head[:1] == b"\x80" and head[8:] != b"{")


def peek_header(path: str | Path) -> dict[str, Any]:
    """Return the header of a safetensors file: an entry for each tensor, and __metadata__.

    At most LARGEST_HEADER bytes are read. What is no such file has an empty header.
    """
    try:
        check_regular_file(path)
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            raw = file.read(size) if 2 <= size <= LARGEST_HEADER else b""
        header = json.loads(raw) if len(raw) == size else None
    except (OSError, ValueError, RecursionError, MemoryError):
        return {}
    return header if isinstance(header, dict) else {}


def read_safetensors(
    path: str | Path, advice: str = REPEAT
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Raises:
        FileNotFoundError, FileError: as `open_safetensors`; also if a tensor cannot be read.
    """
    file = open_safetensors(path, advice)
    with reading(path, advice), file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def write_safetensors(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str]
) -> None:
    """Write a safetensors file, atomically; `tensors` are contiguous and on the CPU.

    Raises:
        WriteError: it cannot be written.
    """
    need = sum(tensor.nbytes for tensor in tensors.values())
    with atomic_write(path, need) as temporary:
        save_file(dict(tensors), temporary, metadata)


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers of a tensor are finite; integers always are.

    The sum costs one pass and no memory. It decides unless finite numbers overflow in it.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.itemsize == 1:  # 8-bit floats have no arithmetic
        tensor = tensor.to(torch.float16 if "e5m2" in str(tensor.dtype) else torch.float32)
    wide = tensor.dtype if tensor.is_complex() else torch.promote_types(tensor.dtype, torch.float32)
    return bool(tensor.sum(dtype=wide).isfinite()) or bool(tensor.isfinite().all())


def count_not_finite(tensor: Tensor) -> int:
    """Return how many numbers of a tensor are not finite."""
    plain = tensor.float() if tensor.itemsize == 1 else tensor
    return int((~plain.isfinite()).sum())


BLACK = (
    "with them every picture would be black; train it again from an earlier checkpoint, or "
    "download it again"
)


def check_finite(tensor: Tensor, name: str, path: str | Path, advice: str = BLACK) -> None:
    """Check that a tensor read from a file holds finite numbers only.

    Raises:
        FileError: it does not; the message names the tensor and counts them.
    """
    if not is_finite(tensor):
        count = count_not_finite(tensor)
        raise FileError(
            path,
            f"holds {count} numbers in {quoted(name)} that are not finite (NaN or infinity)",
            advice,
        )
