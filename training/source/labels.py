"""Write the mode of every sample beside a source.

OUT/labels.npy holds the number of each sample's likeliest mode, int64 (N,), in the order of the
data: that of the shards' samples, of the rows of an array, or of the images as
`training.data.image_folder.list_images` lists them (class folders sorted by name, and the files
inside each).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from numpy.lib import format as npy
from torch import Tensor
from tqdm import tqdm

from gmflow_core.files.atomic import atomic_write
from gmflow_core.files.errors import FileError, reading
from gmflow_core.files.json_files import json_object
from gmflow_core.files.safetensors_files import open_safetensors, write_safetensors
from gmflow_core.source.source import GaussianMixtureSource
from training.common.devices import to_device
from training.common.processes import together

FILE = "labels.npy"
NAME = "modes"  # of the array in a process's part
BLOCK = 2**24  # elements (samples, modes) of a temporary tensor
KEEP_EVERY = 60.0  # seconds between two saves of a part


def label_samples(
    mixture: GaussianMixtureSource,
    read: Callable[[range], Iterable[Tensor]],
    rows: range,
    out: Path,
    state: PartialState,
) -> Tensor:
    """Find the likeliest mode of each of this process's samples, and keep them in a part of OUT.

    A part that a stopped run has begun is continued. All processes call it together.

    Args:
        mixture: over vectors (D,).
        read: returns the samples of some rows in chunks (m, D).
        rows: this process's samples.

    Returns:
        (len(rows),) int64, on the device.
    """
    path = part_file(out, state.process_index)
    settings = {"mixture": mixture.digest, "rows": [rows.start, rows.stop]}
    mixture = mixture.to(state.device)
    with together(state):
        found = [_kept(path, settings, len(rows), mixture.num_modes)]
        begun = len(found[0])
        bar = tqdm(
            total=len(rows),
            initial=begun,
            desc="labels",
            unit="sample",
            disable=not state.is_main_process,
            dynamic_ncols=True,
        )
        kept = time.monotonic()
        with bar:
            for x in read(rows[begun:]) if begun < len(rows) else ():
                found.append(likeliest_modes(mixture, to_device(x, state.device)).cpu())
                bar.update(len(x))
                if time.monotonic() - kept > KEEP_EVERY:
                    _keep(path, torch.cat(found), settings)
                    kept = time.monotonic()
        modes = torch.cat(found)
        _keep(path, modes, settings)
    return modes.to(state.device)


def likeliest_modes(mixture: GaussianMixtureSource, x: Tensor) -> Tensor:
    """Return the most probable mode (n,) of each x (n, D), in blocks that fit the memory."""
    block = max(1, BLOCK // mixture.num_modes)
    return torch.cat([mixture.posterior_modes(part, "hard") for part in x.split(block)])


def write_labels(out: Path, processes: int, num_modes: int) -> Tensor:
    """Join the parts of all processes in OUT/labels.npy; the main process calls it.

    Returns:
        The number of samples of each mode, (num_modes,).
    """
    paths = [part_file(out, process) for process in range(processes)]
    count, sizes = 0, torch.zeros(num_modes, dtype=torch.int64)
    for path in paths:
        count += len(_read(path)[0])
    header = {"descr": "<i8", "fortran_order": False, "shape": (count,)}
    with atomic_write(out / FILE, 8 * count) as temporary, open(temporary, "wb") as file:
        npy.write_array_header_1_0(file, header)
        for path in paths:
            modes = _read(path)[0]
            sizes += modes.bincount(minlength=num_modes)
            file.write(modes.numpy().astype("<i8", copy=False).tobytes())
    return sizes


def remove_parts(out: Path) -> None:
    """Remove the parts, of this run and of runs on more processes."""
    for path in out.glob("labels_*.safetensors"):
        if path.stem.removeprefix("labels_").isdigit():
            path.unlink(missing_ok=True)


def part_file(out: Path, process: int) -> Path:
    """Return the file where a process keeps its part until labels.npy is written."""
    return out / f"labels_{process}.safetensors"


def _keep(path: Path, modes: Tensor, settings: dict[str, Any]) -> None:
    write_safetensors({NAME: modes}, path, {"gmflow": json.dumps(settings)})


def _read(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Return modes and settings of a part.

    Raises:
        FileError: it is damaged.
        FileNotFoundError: there is none.
    """
    with reading(path), open_safetensors(path) as file:
        settings = json_object((file.metadata() or {})["gmflow"], path, "settings")
        return file.get_tensor(NAME), settings


def _kept(path: Path, settings: dict[str, Any], count: int, num_modes: int) -> Tensor:
    """Return the modes in the part of a run that was stopped; (0,) if there is none of this fit."""
    nothing = torch.zeros(0, dtype=torch.int64)
    try:
        modes, found = _read(path)
    except (FileError, OSError):
        return nothing
    right = found == settings and modes.dtype == torch.int64 and modes.ndim == 1
    right = right and len(modes) <= count
    return modes if right and bool(((modes >= 0) & (modes < num_modes)).all()) else nothing
