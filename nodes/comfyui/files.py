"""Read files of weights through ComfyUI, and notice when they change."""

from __future__ import annotations

import contextlib
import hashlib
import os
from typing import Any

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


def fingerprint(*paths: str) -> list[str]:
    """Return a digest of names, times and sizes of files: it changes when a file is replaced.

    ComfyUI writes it into the pictures that it saves, which must not tell where the user's files
    are.
    """
    facts: list[Any] = []
    for path in paths:
        facts.append(path)
        with contextlib.suppress(OSError, ValueError):  # gone, or no name of a file
            stat = os.stat(path)
            facts += [stat.st_mtime, stat.st_size]
    return [hashlib.sha256(ascii(facts).encode()).hexdigest()[:16]]
