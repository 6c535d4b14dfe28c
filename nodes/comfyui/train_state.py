"""The state of a training, in a file beside the adapter, from which a later run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...gmflow_core.files.errors import FileError, quoted
from ...gmflow_core.files.json_files import json_object
from ...gmflow_core.files.safetensors_files import read_safetensors, write_safetensors
from .train_optimizer import on_cpu
from .train_run import Training
from .train_settings import differing

MARK = "gmflow.training"  # key in the metadata
ENDING = ".training"  # no name that ComfyUI lists as a LoRA


def state_path(adapter: Path) -> Path:
    """Return the path of the state that belongs to an adapter's file."""
    return adapter.with_suffix(ENDING)


def write_state(training: Training, about: dict[str, Any], path: Path) -> None:
    """Write the state of a training.

    Args:
        about: what a later run has to have in common: settings, teacher and prompts.

    Raises:
        WriteError: it cannot be written.
    """
    tensors = {f"value.{name}": on_cpu(value) for name, value in training.parameters.items()}
    if training.average is not None:
        tensors |= {f"average.{name}": value for name, value in training.average.values.items()}
    numbers: dict[str, Any] = {}
    for index, entries in training.optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = on_cpu(value)
            else:
                numbers[f"{index}.{key}"] = value
    record = {"about": about, "iteration": training.iteration, "numbers": numbers}
    record |= {"losses": training.losses, "lowest": training.watch.lowest}
    plain = {name: value.contiguous() for name, value in tensors.items()}
    write_safetensors(plain, path, {MARK: json.dumps(record)})


def restorer(path: Path, about: dict[str, Any]) -> Callable[[Training], None] | None:
    """Return a function that puts an earlier run's state into a training; None if there is none.

    Raises:
        ValueError: the earlier run had other settings, another teacher or other prompts.
        FileError: the file cannot be read.
    """
    if not path.is_file():
        return None
    advice = f"delete {path.name} to begin anew, or choose another save_name"
    tensors, metadata = read_safetensors(path, advice)
    record = json_object(metadata.get(MARK, ""), path, MARK)
    others = differing(record.get("about", {}), json.loads(json.dumps(about)))
    if others:
        raise ValueError(
            f"cannot go on: an earlier run of the same name had other settings: "
            f"{', '.join(others)}; set them back, or {advice}"
        )
    return lambda training: _restore(training, tensors, record, path)


def _restore(training: Training, tensors: dict[str, Tensor], record: dict, path: Path) -> None:
    """Put a state into a training.

    Raises:
        FileError: it is that of other layers.
    """
    parts: dict[str, dict[str, Tensor]] = {"value": {}, "average": {}, "optimizer": {}}
    for key, value in tensors.items():
        part, _, name = key.partition(".")
        parts[part][name] = value.clone()  # they may have been read in inference mode
    wanted = {name: value.shape for name, value in training.parameters.items()}
    if {name: value.shape for name, value in parts["value"].items()} != wanted:
        others = sorted(set(parts["value"]) ^ set(wanted))[:3]
        raise FileError(
            path,
            f"cannot be used, as it is the state of other layers ({quoted(others)})",
            "delete it to begin anew, or choose another save_name",
        )
    with torch.no_grad():
        for name, value in training.parameters.items():
            value.copy_(parts["value"][name])
    if training.average is not None:
        training.average.values = parts["average"]
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**record["numbers"], **parts["optimizer"]}.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    groups = training.optimizer.state_dict()["param_groups"]
    training.optimizer.load_state_dict({"state": state, "param_groups": groups})
    training.iteration, training.losses = record["iteration"], record["losses"]
    training.lowest = record["lowest"]
