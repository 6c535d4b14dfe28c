"""Read PyTorch's own files of tensors, such as those that some networks are published as."""

from __future__ import annotations

import contextlib
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gmflow_core.files.atomic import scratch_folder
from gmflow_core.files.errors import (
    FileError,
    WriteError,
    check_regular_file,
    printable,
    reason,
)
from gmflow_core.files.safetensors_files import read_safetensors

ADVICE = "get it again, or give the same tensors as .safetensors"
MEMORY, TIMES = 2**32, 3  # bytes that the other process may take, and as often the file's size
SECONDS, SPEED = 120, 2**24  # time that it may take, and bytes that it reads in a further second
UNWRITTEN = 3  # exit status of the other process if it cannot write the tensors
OTHER_FOLDER = "make room, or set TMPDIR to another folder that can be written"
ROOT = Path(__file__).parents[2]
START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from training.common.files import main; main()"
)


def load_pytorch(path: Path) -> dict[str, Tensor]:
    """Load the named tensors of a PyTorch file; nothing but tensors is unpickled.

    PyTorch reads the file in a process of its own, with limits on memory (where the platform has
    them) and time, as a crafted file can end the process that reads it.

    Of a file that holds several state dicts, the averaged weights ("ema") are taken.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: it is damaged, holds no named tensors, or took too much memory or time.
        WriteError: there is no room for temporary files.
    """
    check_regular_file(path)
    size = path.stat().st_size
    with temporary_folder() as folder:
        out = folder / "tensors.safetensors"
        command = [sys.executable, "-c", START, str(ROOT), str(path), str(out), str(size)]
        try:
            done = subprocess.run(  # noqa: S603 our own code
                command, capture_output=True, timeout=SECONDS + size / SPEED, check=False
            )
        except subprocess.TimeoutExpired:
            raise FileError(path, "took too long to read", ADVICE) from None
        if done.returncode < 0:
            name = signal.Signals(-done.returncode).name
            raise FileError(path, f"ended the process that read it ({name})", ADVICE)
        if done.returncode == UNWRITTEN:
            said = printable(done.stdout.decode(errors="replace").strip(), 400)
            raise WriteError(f"{folder} cannot be written ({said}): {OTHER_FOLDER}")
        if done.returncode:
            said = done.stdout.decode(errors="replace").strip() or "the process that read it failed"
            raise FileError(path, f"is refused ({printable(said, 400)})", ADVICE)
        return read_safetensors(out)[0]


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a folder for temporary files, and remove it, with those that killed processes left.

    Raises:
        WriteError: there can be none.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(scratch_folder())
        except OSError as error:
            said = f"no temporary folder can be made ({reason(error)}): {OTHER_FOLDER}"
            raise WriteError(said) from error
        yield folder


def main() -> None:
    """Read a PyTorch file and write its tensors to a safetensors file, in the other process."""
    path, out, size = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on every platform
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        most = MEMORY + TIMES * size
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    try:
        tensors = _named_tensors(path)
        try:
            save_file(tensors, out)
        except (SafetensorError, OSError) as error:
            print(reason(error))
            raise SystemExit(UNWRITTEN) from None
    except Exception as error:  # PyTorch raises many kinds, and this one is of many lines
        other = isinstance(error, pickle.UnpicklingError)
        print("it is not a PyTorch file of tensors alone" if other else reason(error))
        raise SystemExit(1) from None


def _named_tensors(path: Path) -> dict[str, Tensor]:
    """Return the named tensors in a PyTorch file, each with memory of its own.

    Raises:
        ValueError: there are none.
        Exception: of PyTorch, many kinds: the file is damaged, or holds something else.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    for name in ("ema", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__} instead of named tensors")
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in content.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
