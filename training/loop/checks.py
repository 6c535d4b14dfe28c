"""Check what a run finds in the checkpoint that it resumes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gmflow_core.files.checkpoint import config_record
from gmflow_core.files.errors import FileError, quoted
from gmflow_core.files.safetensors_files import is_finite
from gmflow_core.models.settings import is_number
from training.encoders.fingerprints import CHANGED, MARK
from training.loop.training_state import optimized

ADVICE = (
    "the file was edited or damaged: put an earlier copy in its place, or give --restart to train "
    "anew"
)
NOT_NEGATIVE = ("step", "exp_avg_sq", "absmax1", "absmax2", "mode_losses")
Shape = tuple[tuple[int, ...], torch.dtype]


def check_no_weights(out: Path) -> None:
    """Check that a new run would replace no model to share of another one.

    Raises:
        ValueError: it would.
    """
    path = out / "weights.safetensors"
    if path.exists():
        raise ValueError(
            f"{path} is there without the checkpoint of its run, and this run would replace it; "
            "give another --out, or --restart to overwrite it"
        )


def check_settings(found: Any, mine: dict[str, Any], path: Path) -> None:
    """Check that a checkpoint's settings are those of this run.

    Args:
        found: the settings there, from JSON.
        mine: those of this run that it may not change.
        path: the checkpoint.

    Raises:
        ValueError: one of them differs.
    """
    if not isinstance(found, dict):
        raise FileError(path, f"has the settings {quoted(found)}", ADVICE)
    differ = [name for name in mine if not same(found.get(name), mine[name])]
    if differ:
        raise ValueError(
            f"{path} belongs to a run with other settings ({changes(differ, found, mine)}); give "
            "another --out, the same settings to go on, or --restart to throw it away"
        )


def check_network(metadata: dict[str, Any], model: nn.Module, data: str, path: Path) -> None:
    """Check that a checkpoint holds the network of this run.

    Args:
        metadata: as `read_metadata` returns.
        model: the network of this run.
        data: where its data lie, for the message.
        path: the checkpoint.

    Raises:
        ValueError: it holds another one.
    """
    mine = {"class": type(model).__name__, **config_record(model.config)}
    mine = {k: list(v) if isinstance(v, tuple) else v for k, v in mine.items()}  # as in JSON
    found = {"class": metadata["model_class"], **metadata["config"]}
    differ = [name for name in mine if not same(found.get(name), mine[name])]
    if differ:
        raise ValueError(
            f"{path} holds a model of another shape ({changes(differ, found, mine)}); give another "
            f"--out, the same settings and data{data} to go on, or --restart to throw it away"
        )


def same(found: Any, mine: Any) -> bool:
    """Return whether a value that was read from JSON is the one that was written there.

    Unlike ==, it tells true from 1.
    """
    return found == mine and isinstance(found, bool) == isinstance(mine, bool)


def changes(differ: list[str], found: dict[str, Any], mine: dict[str, Any]) -> str:
    """Say how these entries differ."""
    said = {k: f"{k}: {quoted(found.get(k))} there, {quoted(mine[k])} here" for k in differ}
    return ", ".join((said | {MARK: CHANGED})[k] for k in differ)


def known_figures(found: Any) -> dict[str, float]:
    """Return the figures of a checkpoint's facts; what is no finite number is left out."""
    return {k: v for k, v in found.items() if is_number(v)} if isinstance(found, dict) else {}


def check_facts(facts: dict[str, Any], state: dict[str, Tensor], path: Path) -> None:
    """Check the record of a run in its checkpoint's metadata, and its counters.

    Args:
        facts: `training` of `read_metadata`.
        state: as `load_training_state` returns.
        path: the checkpoint.

    Raises:
        FileError: an entry has another type or value than a trainer writes.
    """
    counters = {name: state.get(name) for name in ("step", "skipped")}
    for name, value in counters.items():
        if value is None or (value.shape, value.dtype) != ((), torch.int64) or value < 0:
            found = "no" if value is None else f"the {described(value)}"
            raise FileError(path, f"has {found} training.{name}, not one whole number", ADVICE)
    step, skipped = map(int, counters.values())
    if skipped > step:
        raise FileError(path, f"has {skipped} skipped steps of {step}", ADVICE)
    for name, value in (("step", step), ("skipped_steps", skipped)):
        if name in facts and (isinstance(facts[name], bool) or facts[name] != value):
            found = f"has {name} {quoted(facts[name])} in its record, but {value} in its state"
            raise FileError(path, found, ADVICE)
    seconds = facts.get("seconds")
    if not is_number(seconds, 0):
        raise FileError(path, f"has the training time {quoted(seconds)} in its record", ADVICE)
    starts = facts.get("starts", [])
    if not isinstance(starts, list) or not all(map(_is_start, starts)):
        raise FileError(path, f"has the starts {quoted(starts)} in its record", ADVICE)


def _is_start(start: Any) -> bool:
    """Return whether a value describes a start of a run."""
    return (
        isinstance(start, dict)
        and isinstance(start.get("command"), str)
        and isinstance(start.get("step"), int)
    )


def check_state(
    state: dict[str, Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    more: dict[str, Tensor],
    path: Path,
) -> None:
    """Check that a training state has the tensors of this model and this optimizer, and no others.

    Optimizers load tensors of any shape; some then compute with them, or read beside them.

    Args:
        state: as `load_training_state` returns.
        more: further tensors of the trainer (`extra_state`), such as they are now.
        path: the checkpoint.

    Raises:
        FileError: a tensor is missing or unknown, or has another shape or type, or numbers that
            it cannot have.
    """
    expected: dict[str, Shape] = {
        **{f"model.{name}": shape_of(tensor) for name, tensor in model.state_dict().items()},
        **{name: shape_of(tensor) for name, tensor in more.items()},
        **{name: ((), torch.int64) for name in ("step", "skipped")},
    }
    # an optimizer has no state before its first step
    if any(key.startswith("optimizer.") for key in state) or state["step"] > state["skipped"]:
        expected |= expected_slots(model, optimizer)
    for what, names in (("lacks", expected.keys() - state), ("holds", state.keys() - expected)):
        if names:
            unknown = " that this run does not have" if what == "holds" else " to go on from"
            found = f"{what} {quoted(min(names))} ({len(names)} in all){unknown}"
            raise FileError(path, found, ADVICE)
    for name, tensor in state.items():
        if shape_of(tensor) != expected[name]:
            shape, dtype = expected[name]
            found = f"has the {described(tensor)} {quoted(name)} instead of {dtype} {list(shape)}"
            raise FileError(path, found, ADVICE)
        if not is_finite(tensor):
            raise FileError(path, f"has numbers in {quoted(name)} that are not finite", ADVICE)
        if name.rpartition("/")[2] in NOT_NEGATIVE and (tensor < 0).any():
            raise FileError(path, f"has negative numbers in {quoted(name)}", ADVICE)


def expected_slots(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Shape]:
    """Return shapes and types of an optimizer's state, under the names of `pack_state`."""
    eight_bit = hasattr(optimizer, "init_state")  # bitsandbytes
    expected: dict[str, Shape] = {}
    places = [
        (number, place)
        for number, group in enumerate(optimizer.param_groups)
        for place in range(len(group["params"]))
    ]
    for (name, parameter), (group, place) in zip(optimized(model, optimizer), places, strict=True):
        shape = shape_of(parameter)
        slots = {"step": ((), torch.float32), "exp_avg": shape, "exp_avg_sq": shape}
        if eight_bit:
            # which it alone knows: small weights have another state, and block sizes have changed
            optimizer.init_state(optimizer.param_groups[group], parameter, group, place)
            slots = optimizer.state.pop(parameter)
            slots = {slot: shape_of(torch.as_tensor(value)) for slot, value in slots.items()}
        expected |= {f"optimizer.{name}/{slot}": value for slot, value in slots.items()}
    return expected


def shape_of(tensor: Tensor) -> Shape:
    """Return a tensor's shape and type."""
    return tuple(tensor.shape), tensor.dtype


def described(tensor: Tensor) -> str:
    """Describe a tensor by its type and shape."""
    return f"{tensor.dtype} {list(tensor.shape)}"
