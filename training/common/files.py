"""Read PyTorch's own files of tensors, such as those that some networks are published as."""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from gmflow_core.files.errors import FileError, quoted

MOST_PICKLED = 2**25  # bytes of the pickle in a file; the tensors stand beside it
MOST_NESTED = 1000  # opcodes that put a tuple around something, in a row
NESTING = {"TUPLE1", "TUPLE2", "TUPLE3", "TUPLE"}
ADVICE = "get it again, or give the same tensors as .safetensors"


def load_pytorch(path: Path) -> dict[str, Tensor]:
    """Load the named tensors of a PyTorch file; nothing but tensors is unpickled.

    Of a file that holds several state dicts, the averaged weights ("ema") are taken.

    Raises:
        FileError: it is in the format before PyTorch 1.6, nested, or holds no named tensors.
        Exception: of PyTorch, many kinds: it is damaged, or holds something else.
    """
    if zipfile.is_zipfile(path):
        _check_nesting(path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    for name in ("ema", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict):
        raise FileError(path, f"holds a {type(content).__name__} instead of named tensors", ADVICE)
    return {
        name: tensor
        for name, tensor in content.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }


def _check_nesting(path: Path) -> None:
    """Check the pickle in the archive: tuples nested by thousands would crash the process.

    Raises:
        FileError: it is too large, or nested too deep.
    """
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.filename.endswith(".pkl"):
                continue
            if info.file_size > MOST_PICKLED:
                raise FileError(path, f"has {info.file_size:,} bytes in {quoted(info.filename)}")
            depth = 0
            for opcode, _, _ in pickletools.genops(archive.read(info)):
                if opcode.name in NESTING:
                    depth += 1
                elif opcode.name in ("SETITEM", "SETITEMS", "REDUCE", "BUILD"):
                    depth = 0
                if depth > MOST_NESTED:
                    raise FileError(path, "holds values nested too deep", ADVICE)
