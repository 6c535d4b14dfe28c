"""Checkpoints: one safetensors file whose metadata names the model's class and holds its config as JSON.

Tensors: the weights to sample with, under the model's own names; and, in a training checkpoint, what the trainer needs
to go on, under names that begin with `training.`, which loaders skip. Nothing is ever unpickled. Published models in other
layouts (`published.py`) are read by the same functions.
"""

from __future__ import annotations

import dataclasses
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..models import MODELS
from ..models.state_dict import check_shapes, shapes_of
from .atomic import atomic_write
from .diffusers_folder import published_metadata, published_weights
from .hub import is_published

FORMAT = "gmflow-1"
TRAINING = "training."
SOURCE_CLASS = "GaussianMixtureSource"  # in the place of a model's class, see source.py
SHIPPED = Path(__file__).parents[1] / "shipped"  # models that come with the package


def save_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    facts: dict[str, Any] | None = None,
    state: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    data: dict[str, Any] | None = None,
) -> None:
    """Write `model` to `path`, atomically: the file is either the old one or the whole new one, even after a power cut.

    Args:
        model: one of the classes in `gmflow_core.models`; its `config` goes into the metadata.
        facts: JSON-able record of how the model was made, returned by `read_metadata`.
        state: further tensors for the trainer to resume from, returned by `load_training_state`.
        dtype: stored type of the weights; their own if None.
        data: JSON-able record of what the model's samples are, returned by `read_metadata`. Free-form; these entries are known:
            `labels`: list of the labels' names, by number;
            `space`: "pixels" for RGB in [-1, 1], "sd-vae" for latents of Stable Diffusion's VAE, "rae" for those of
            a representation autoencoder;
            `scaling_factor`: what the VAE's latents are multiplied by (0.18215 for Stable Diffusion's);
            `source`: of a model that was trained with a `GaussianMixtureSource`: its `num_modes` and `shape`, the `coupling`,
            and `conditioning`, "mode" if the labels are its modes, else "hidden".
    """
    metadata = {
        "format": FORMAT,
        "model_class": type(model).__name__,
        "config": json.dumps(dataclasses.asdict(model.config)),
        "training": json.dumps(facts or {}),
        "data": json.dumps(data or {}),
    }
    tensors = {name: stored(t, dtype or t.dtype) for name, t in model.state_dict().items()}
    tensors.update({TRAINING + name: stored(t, t.dtype) for name, t in (state or {}).items()})
    write_tensors(tensors, path, metadata)


def write_tensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file, atomically: it is either the old one or the whole new one, even after a power cut."""
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata)


def read_metadata(source: str | Path) -> dict[str, Any]:
    """`model_class`, `config`, `training` facts and `data` of a checkpoint, without reading its weights.

    Args:
        source: as in `load_checkpoint`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole GMFlow checkpoint; the message names the file and what to do.
        OSError: it is on the hub, and cannot be had from there.
    """
    if is_published(source):
        return published_metadata(source)
    with open_checkpoint(source) as file:
        return _metadata(file, source)


def load_checkpoint(
    source: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> tuple[nn.Module, Any]:
    """Read a model.

    Args:
        source: a file of `save_checkpoint`; a folder in the layout of diffusers, as the published GM-DiT is; or the id of
            such a folder on the Hugging Face hub, "owner/name" or "owner/name@revision", of which a file or folder of that
            name takes precedence.
        dtype: type of the weights in memory; as stored if None.

    Returns:
        The model in evaluation mode, and its config.

    Raises:
        FileNotFoundError, ValueError, OSError: as `read_metadata`; also when the tensors do not fit the config.
    """
    metadata = read_metadata(source)
    cls = MODELS[metadata["model_class"]]
    try:
        config = cls.Config(**metadata["config"])
        with torch.device("meta"):
            model = cls(config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{source}: its config {metadata['config']} is not one that this version's {cls.__name__} knows ({error}); "
            "update GMFlow, or train the model again"
        ) from error
    expected = shapes_of(model.state_dict())
    with ExitStack() as stack:
        places = {}  # name in the model -> file, name there
        for prefix, path in published_weights(source) if is_published(source) else [("", source)]:
            file = stack.enter_context(open_checkpoint(path))
            places.update(
                {
                    prefix + name: (file, name)
                    for name in file.keys()
                    if not name.startswith(TRAINING)
                }
            )
        try:
            found = {
                name: tuple(file.get_slice(key).get_shape()) for name, (file, key) in places.items()
            }
            check_shapes(
                expected,
                found,
                "its config",
                source=str(source),
                advice="the file was edited or damaged",
            )
            # copies, as a file that is overwritten while it is mapped would take the process down; one after another, so that
            # never more than one tensor is in memory twice
            tensors = {
                name: file.get_tensor(key).to(device, dtype, copy=True)
                for name, (file, key) in places.items()
            }
        except SafetensorError as error:
            raise ValueError(
                f"{source} is damaged ({error}); download or train it again"
            ) from error
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False), config


def load_training_state(path: str | Path) -> dict[str, Tensor]:
    """The `state` of `save_checkpoint`; empty for a checkpoint that holds weights only."""
    with open_checkpoint(path) as file:
        _metadata(file, path)
        return {
            name.removeprefix(TRAINING): file.get_tensor(name)
            for name in file.keys()
            if name.startswith(TRAINING)
        }


def stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """On the CPU, in memory of its own, as save_file wants it."""
    return tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)


def open_checkpoint(path: str | Path):
    """safe_open with errors a user can act on."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no checkpoint {path}: no such file or folder, and no hub id (owner/name) either"
        )
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the .safetensors file inside it")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        with open(path, "rb") as file:
            head = file.read(9)
        if head[:2] == b"PK" or (
            head[:1] == b"\x80" and head[8:] != b"{"
        ):  # a zip, as torch.save writes, or a bare pickle
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
    if raw.get("model_class") == SOURCE_CLASS:
        raise ValueError(
            f"{path} holds a Gaussian-mixture source, not a model; give it where a source is asked for"
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
            "data": dict(json.loads(raw.get("data", "{}"))),  # older files have none
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: its GMFlow metadata is unreadable ({error!r}); the file was edited or damaged"
        ) from error
