"""Checkpoints: one safetensors file whose metadata names the model's class and holds its config.

The tensors are the weights to sample with, under the model's own names. A training checkpoint also
holds the state that the trainer resumes from, under names that begin with `training.`, which
loaders skip. Nothing is ever unpickled. The same functions read models in the layout of diffusers
(`diffusers_folder.py`).
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
SOURCE_CLASS = "GaussianMixtureSource"  # stands where a model's class does, see source/files.py
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
    """Write a model to one safetensors file, atomically.

    Args:
        model: one of the classes in `gmflow_core.models`; its `config` goes into the metadata.
        path: the file to write; missing folders are created.
        facts: JSON-able record of how the model was made, returned by `read_metadata`.
        state: further tensors that the trainer resumes from, returned by `load_training_state`.
        dtype: stored type of the weights; their own if None.
        data: JSON-able record of what the model's samples are, returned by `read_metadata`. It may
            hold anything; these entries are known:
            `labels`: list of the labels' names, by number;
            `space`: "pixels" for RGB in [-1, 1], "sd-vae" for latents of Stable Diffusion's VAE,
            "rae" for latents of a representation autoencoder;
            `scaling_factor`: the factor that the VAE's latents are multiplied by (0.18215 for
            Stable Diffusion's);
            `source`: set if the model was trained with a `GaussianMixtureSource`: the source's
            `num_modes` and `shape`, the `coupling`, and `conditioning`, "mode" if the labels are
            the source's modes, else "hidden".
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
    """Write a safetensors file, atomically; `tensors` are on the CPU, see `stored`."""
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata)


def read_metadata(source: str | Path) -> dict[str, Any]:
    """Return the metadata of a checkpoint, without reading its weights.

    Args:
        source: as in `load_checkpoint`.

    Returns:
        A dict with `model_class`, `config`, `training` (the facts) and `data`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole GMFlow checkpoint; the message names the file and the fix.
        OSError: it is on the hub and cannot be downloaded.
    """
    if is_published(source):
        return published_metadata(source)
    with open_checkpoint(source) as file:
        return _parse_metadata(file.metadata() or {}, source)


def load_checkpoint(
    source: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> tuple[nn.Module, Any]:
    """Load a model.

    Args:
        source: a file of `save_checkpoint`; a folder in the layout of diffusers, such as the
            published GM-DiT; or the id of such a folder on the Hugging Face hub, "owner/name" or
            "owner/name@revision". A file or folder of that name takes precedence over the hub.
        device: where the weights are put.
        dtype: type of the weights in memory; as stored if None.

    Returns:
        The model in evaluation mode, without gradients, and its config.

    Raises:
        FileNotFoundError, ValueError, OSError: as `read_metadata`; also if the tensors do not fit
            the config.
    """
    model = _empty_model(read_metadata(source), source)
    tensors = _read_weights(source, shapes_of(model.state_dict()), device, dtype)
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False), model.config


def _empty_model(metadata: dict[str, Any], source: str | Path) -> nn.Module:
    """Build the model of a checkpoint's metadata on the meta device."""
    cls = MODELS[metadata["model_class"]]
    try:
        with torch.device("meta"):
            return cls(cls.Config(**metadata["config"]))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{source}: its config {metadata['config']} is not one that this version's "
            f"{cls.__name__} knows ({error}); update GMFlow, or train the model again"
        ) from error


def _read_weights(
    source: str | Path,
    expected: dict[str, tuple[int, ...]],
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Read the weights of a checkpoint after a check of all their shapes."""
    files = published_weights(source) if is_published(source) else [("", source)]
    with ExitStack() as stack:
        places = {}  # name in the model -> file, name in that file
        for prefix, path in files:
            file = stack.enter_context(open_checkpoint(path))
            names = [name for name in file.keys() if not name.startswith(TRAINING)]
            places.update({prefix + name: (file, name) for name in names})
        try:
            check_shapes(
                expected,
                {n: tuple(file.get_slice(key).get_shape()) for n, (file, key) in places.items()},
                "its config",
                source=str(source),
                advice="the file was edited or damaged",
            )
            # Copies: a file that is overwritten while it is mapped would crash the process.
            # One after another: no more than one tensor is in memory twice.
            return {
                name: file.get_tensor(key).to(device, dtype, copy=True)
                for name, (file, key) in places.items()
            }
        except SafetensorError as error:
            raise ValueError(
                f"{source} is damaged ({error}); download or train it again"
            ) from error


def load_training_state(path: str | Path) -> dict[str, Tensor]:
    """Load the `state` of `save_checkpoint`; empty for a checkpoint that holds weights only.

    Raises:
        FileNotFoundError, ValueError: as `read_metadata`.
    """
    with open_checkpoint(path) as file:
        _parse_metadata(file.metadata() or {}, path)
        return {
            name.removeprefix(TRAINING): file.get_tensor(name)
            for name in file.keys()
            if name.startswith(TRAINING)
        }


def stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous copy on the CPU, as `save_file` needs it."""
    return tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)


def open_checkpoint(path: str | Path):
    """Open a safetensors file with `safe_open`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, a pickle, or not a whole safetensors file; the message says
            what to do.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no checkpoint {path}: no such file or folder, and no hub id "
            "(owner/name) either"
        )
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the .safetensors file inside it")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        if _is_pickle(path):
            raise ValueError(
                f"{path} is a pickle file (.pt, .ckpt), which could run any code when opened, so "
                "GMFlow never reads one; use the .safetensors version of the model"
            ) from None
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); if it was downloaded or copied, "
            "do that again"
        ) from error


def _is_pickle(path: Path) -> bool:
    """Return whether the file begins as a zip of torch.save or as a bare pickle does.

    The length of a safetensors header may begin with the byte of a pickle; its ninth byte is "{".
    """
    with open(path, "rb") as file:
        head = file.read(9)
    return head[:2] == b"PK" or (head[:1] == b"\x80" and head[8:] != b"{")


def _parse_metadata(raw: dict[str, str], path: str | Path) -> dict[str, Any]:
    """Return what `read_metadata` does from a file's own metadata."""
    if "format" not in raw or not raw["format"].startswith("gmflow"):
        raise ValueError(
            f"{path} is a safetensors file but not a GMFlow checkpoint (its metadata has no GMFlow "
            "format); load other models with their own loader"
        )
    if raw.get("model_class") == SOURCE_CLASS:
        raise ValueError(
            f"{path} holds a Gaussian-mixture source, not a model; give it where a source is asked "
            "for"
        )
    if raw["format"] != FORMAT or raw.get("model_class") not in MODELS:
        raise ValueError(
            f"{path} holds a {raw.get('model_class')} in format {raw['format']}; this version "
            f"knows {sorted(MODELS)} in format {FORMAT}; update GMFlow"
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
