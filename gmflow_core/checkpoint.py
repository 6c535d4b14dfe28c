"""Checkpoints: one safetensors file whose metadata names the model's class and holds its config as JSON.

Tensors: the weights to sample with, under the model's own names; and, in a training checkpoint, what the trainer needs
to go on, under names that begin with `training.`, which loaders skip. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .models import MODELS

FORMAT = "gmflow-1"
TRAINING = "training."
SHIPPED = Path(__file__).parent / "shipped"  # models that come with the package


def save_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    facts: dict[str, Any] | None = None,
    state: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `model` to `path`, atomically: the file is either the old one or the whole new one, even after a power cut.

    Args:
        model: one of the classes in `gmflow_core.models`; its `config` goes into the metadata.
        facts: JSON-able record of how the model was made, returned by `read_metadata`.
        state: further tensors for the trainer to resume from, returned by `load_training_state`.
        dtype: stored type of the weights; their own if None.
    """
    path = Path(path)
    metadata = {
        "format": FORMAT,
        "model_class": type(model).__name__,
        "config": json.dumps(dataclasses.asdict(model.config)),
        "training": json.dumps(facts or {}),
    }
    tensors = {name: t.detach().to(dtype or t.dtype) for name, t in model.state_dict().items()}
    tensors.update({TRAINING + name: t.detach() for name, t in (state or {}).items()})
    tensors = {name: t.cpu().contiguous().clone() for name, t in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_metadata(path: str | Path) -> dict[str, Any]:
    """`model_class`, `config` and `training` facts of a checkpoint, without reading its weights.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole GMFlow checkpoint; the message names the file and what to do.
    """
    with _open(path) as file:
        return _metadata(file, path)


def load_checkpoint(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = torch.float32
) -> tuple[nn.Module, Any]:
    """Read a model from `path`.

    Args:
        dtype: type of the weights in memory; as stored if None.

    Returns:
        The model in evaluation mode, and its config.

    Raises:
        FileNotFoundError, ValueError: as `read_metadata`; also when the tensors do not fit the config.
    """
    with _open(path) as file:
        metadata = _metadata(file, path)
        try:
            tensors = {name: file.get_tensor(name) for name in file.keys() if not name.startswith(TRAINING)}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); download or train it again") from error
    cls = MODELS[metadata["model_class"]]
    try:
        config = cls.Config(**metadata["config"])
        with torch.device("meta"):
            model = cls(config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path}: its config {metadata['config']} is not one that this version's {cls.__name__} knows ({error}); "
            "update GMFlow, or train the model again"
        ) from error
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ValueError(
            f"{path}: {len(wrong)} tensors do not fit its config, first {wrong[0]!r}: "
            f"expected {expected.get(wrong[0], 'none')}, found {found.get(wrong[0], 'none')}; the file was edited or damaged"
        )
    tensors = {name: t.to(device=device, dtype=dtype or t.dtype) for name, t in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False), config


def load_training_state(path: str | Path) -> dict[str, Tensor]:
    """The `state` of `save_checkpoint`; empty for a checkpoint that holds weights only."""
    with _open(path) as file:
        _metadata(file, path)
        return {name.removeprefix(TRAINING): file.get_tensor(name) for name in file.keys() if name.startswith(TRAINING)}


def _open(path: str | Path):
    """safe_open with errors a user can act on."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the .safetensors file inside it")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        with open(path, "rb") as file:
            head = file.read(9)
        if head[:2] == b"PK" or (head[:1] == b"\x80" and head[8:] != b"{"):  # a zip, as torch.save writes, or a bare pickle
            raise ValueError(
                f"{path} is a pickle file (.pt, .ckpt), which could run any code when opened, so GMFlow never reads one; "
                "use the .safetensors version of the model"
            ) from None
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); if it was downloaded or copied, do that again"
        ) from error


def _metadata(file, path) -> dict[str, Any]:
    raw = file.metadata() or {}
    if "format" not in raw or not raw["format"].startswith("gmflow"):
        raise ValueError(
            f"{path} is a safetensors file but not a GMFlow checkpoint (its metadata has no GMFlow format); "
            "load other models with their own loader"
        )
    if raw["format"] != FORMAT or raw.get("model_class") not in MODELS:
        raise ValueError(
            f"{path} holds a {raw.get('model_class')} in format {raw['format']}; this version knows {sorted(MODELS)} "
            f"in format {FORMAT}; update GMFlow"
        )
    try:
        return {
            "model_class": raw["model_class"],
            "config": json.loads(raw["config"]),
            "training": json.loads(raw.get("training", "{}")),
        }
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: its GMFlow metadata is unreadable ({error!r}); the file was edited or damaged") from error
