"""The state of a training, in a file beside the adapter, from which a later run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...gmflow_core.files.errors import FileError, quoted, reason
from ...gmflow_core.files.json_files import json_object
from ...gmflow_core.files.safetensors_files import read_safetensors, write_safetensors
from .train_optimizer import on_cpu
from .train_run import Training
from .train_settings import differing

MARK = "gmflow.training"  # key in the metadata
ENDING = ".training"  # no name that ComfyUI lists as a LoRA
ADVICE = "delete it to begin anew, or choose another save_name"
MOMENTS = ("exp_avg", "exp_avg_sq")  # tensors of AdamW's state, as large as their parameters
# Module state, as ComfyUI keeps a node's result without looking at the files that it wrote.
_finished: set[Path] = set()  # adapters whose training ended since ComfyUI started
_lost: dict[Path, int] = {}  # how often files of one were missing since


def note_finished(adapter: Path) -> None:
    """Remember that an adapter and the state beside it are written."""
    _finished.add(adapter)


def times_lost(adapter: Path) -> int:
    """Return how often the files of a finished training were found missing, this time included."""
    if adapter in _finished and not (adapter.is_file() and state_path(adapter).is_file()):
        _finished.discard(adapter)
        _lost[adapter] = _lost.get(adapter, 0) + 1
    return _lost.get(adapter, 0)


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
    tensors, metadata = read_safetensors(path, ADVICE)
    record = json_object(metadata.get(MARK, ""), path, MARK)
    _check_record(record, path)
    others = differing(record["about"], json.loads(json.dumps(about)))
    if others:
        raise ValueError(
            f"cannot go on: an earlier run of the same name had other settings: "
            f"{', '.join(others)}; set them back, or delete {path.name} to begin anew, or choose "
            "another save_name"
        )
    return lambda training: _restore(training, tensors, record, path)


def _check_record(record: dict, path: Path) -> None:
    """Check the types of what a state says beside its tensors.

    Raises:
        FileError: one is another.
    """
    losses = record.get("losses")
    sound = (
        all(isinstance(record.get(key), dict) for key in ("about", "numbers"))
        and type(record.get("iteration")) is int
        and record["iteration"] >= 0
        and isinstance(losses, list)
        and all(isinstance(loss, float) for loss in [*losses, record.get("lowest")])
    )
    if not sound:
        raise _damaged(path, f"its entry {MARK} is not as this node writes it")


def _damaged(path: Path, why: str) -> FileError:
    """Return the error of a file that is damaged."""
    return FileError(path, f"is damaged: {why}", ADVICE)


def _restore(training: Training, tensors: dict[str, Tensor], record: dict, path: Path) -> None:
    """Put a state into a training.

    Raises:
        FileError: it is that of other layers, or damaged.
    """
    parts: dict[str, dict[str, Tensor]] = {"value": {}, "average": {}, "optimizer": {}}
    for key, value in tensors.items():
        part, _, name = key.partition(".")
        if part not in parts or not value.isfinite().all():
            raise _damaged(path, f"{quoted(key)} in it is not finite, or no part of a state")
        parts[part][name] = value.clone()  # they may have been read in inference mode
    wanted = {name: value.shape for name, value in training.parameters.items()}
    for part in ("value",) if training.average is None else ("value", "average"):
        if {name: value.shape for name, value in parts[part].items()} != wanted:
            others = sorted(set(parts[part]) ^ set(wanted))[:3]
            what = f"cannot be used, as it is the state of other layers ({quoted(others)})"
            raise FileError(path, what, ADVICE)
    with torch.no_grad():
        for name, value in training.parameters.items():
            value.copy_(parts["value"][name])
    if training.average is not None:
        training.average.values = parts["average"]
    _restore_optimizer(training, {**record["numbers"], **parts["optimizer"]}, path)
    training.iteration, training.losses = record["iteration"], record["losses"]
    training.lowest = record["lowest"]


def _restore_optimizer(training: Training, entries: dict[str, Any], path: Path) -> None:
    """Put the optimizer's state, by names such as 3.exp_avg of the third parameter, in its place.

    Raises:
        FileError: an entry is of no parameter, or has another shape than it.
    """
    state: dict[int, dict[str, Any]] = {}
    shapes = dict(enumerate(value.shape for value in training.parameters.values()))
    for name, value in entries.items():
        index, _, key = name.partition(".")
        shape = shapes.get(int(index)) if index.isdecimal() else None
        if shape is None or (key in MOMENTS and getattr(value, "shape", None) != shape):
            raise _damaged(path, f"{quoted(name)} in it fits none of the optimizer's parameters")
        state.setdefault(int(index), {})[key] = value
    groups = training.optimizer.state_dict()["param_groups"]
    try:
        training.optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"the optimizer cannot take it ({reason(error)})") from error
