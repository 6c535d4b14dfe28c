"""Read files of weights through ComfyUI, and notice when they change."""

from __future__ import annotations

import contextlib
import os

import comfy.utils
from torch import Tensor

from ...gmflow_core.files.errors import reason


def read_tensors(path: str, name: str) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Read the tensors and the metadata of a file in any format that ComfyUI reads.

    Args:
        name: the file's name in messages.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        return comfy.utils.load_torch_file(path, return_metadata=True)
    except Exception as error:
        raise ValueError(
            f"{name} cannot be read ({reason(error)}). If the download is incomplete, repeat it"
        ) from error


def fingerprint(*paths: str) -> list[float]:
    """Return the times and sizes of files: they change when a file is replaced."""
    stats = []
    for path in paths:
        with contextlib.suppress(OSError, ValueError):  # gone, or no name of a file
            stats.append(os.stat(path))
    return [value for stat in stats for value in (stat.st_mtime, stat.st_size)]
