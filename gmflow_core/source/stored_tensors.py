"""Read tensors of sources and of unfinished fits from safetensors files, each checked by itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.errors import FileError, quoted, reading
from ..files.json_files import EDITED, json_object
from ..files.safetensors_files import check_finite

ANEW = "remove it to begin anew"
LARGEST = 1e15  # of a mean; the sum of many squares of it is still a float32


def check_names(file: Any, names: Sequence[str], path: str | Path, advice: str = EDITED) -> None:
    """Check that an open safetensors file holds exactly these tensors.

    Raises:
        FileError: it does not.
    """
    found = sorted(file.keys())
    if found != sorted(names):
        raise FileError(path, f"holds {quoted(found)} instead of {sorted(names)}", advice)


def check_shape(
    file: Any,
    name: str,
    shape: Sequence[int | None],
    path: str | Path,
    advice: str = EDITED,
    broadcasts: bool = False,
) -> None:
    """Check the shape of a tensor in an open safetensors file, by the header alone.

    Args:
        file: from `open_checkpoint`.
        name: of the tensor.
        shape: what it has to be; None stands for any size.
        path, advice: as for `FileError`.
        broadcasts: sizes of 1 will do too.

    Raises:
        FileError: it has another shape.
    """
    found = tuple(file.get_slice(name).get_shape())
    if len(found) != len(shape) or any(
        n not in ((size, 1) if broadcasts else (size,))
        for n, size in zip(found, shape, strict=True)
        if size is not None
    ):
        expected = f"({', '.join('any' if size is None else str(size) for size in shape)})"
        raise FileError(path, f"has {name} of {quoted(found)} instead of {expected}", advice)


def read_state(
    file: Any, shapes: dict[str, Sequence[int | None]], path: str | Path
) -> dict[str, Tensor]:
    """Return the tensors of an unfinished fit from an open safetensors file, on the CPU.

    Args:
        file: from `open_checkpoint`.
        shapes: of the tensors, as `check_shape` takes them.
        path: of the file, for errors.

    Raises:
        FileError: one is missing, has another shape, is no float64 or float32 (int64 for
            `counts`), is not finite, or too large.
    """
    check_names(file, list(shapes), path, ANEW)
    for name, shape in shapes.items():
        check_shape(file, name, shape, path, ANEW)
    tensors = {}
    for name in shapes:
        with reading(path, ANEW):
            tensor = file.get_tensor(name).clone()
        types = (torch.int64,) if name == "counts" else (torch.float64, torch.float32)
        if tensor.dtype not in types:
            raise FileError(path, f"has {name} in {tensor.dtype} instead of {types[0]}", ANEW)
        check_finite(tensor, name, path, ANEW)
        most = LARGEST**2 if name in ("var", "squares") else LARGEST
        if tensor.is_floating_point() and tensor.numel() and tensor.abs().max() > most:
            raise FileError(path, f"has {name} beyond {most:g}, too large to be squared", ANEW)
        tensors[name] = tensor
    return tensors


def check_values(right: bool | Tensor, found: str, path: str | Path) -> None:
    """Check the content of an unfinished fit.

    Raises:
        FileError: `right` is false; `found` says what is wrong.
    """
    if not right:
        raise FileError(path, found, ANEW)


def settings_of(metadata: dict[str, str], path: str | Path) -> dict[str, Any]:
    """Return the settings of an unfinished fit from its file's metadata.

    Raises:
        FileError: they cannot be read.
    """
    return json_object(metadata.get("settings", ""), path, "settings", ANEW)


def same_json(value: Any) -> Any:
    """Return a value as it comes back from JSON, to be compared with one that did."""
    return json.loads(json.dumps(value))
