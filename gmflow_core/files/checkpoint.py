"""Checkpoints: one safetensors file whose metadata names the model's class and holds its config.

The tensors are the weights to sample with, under the model's own names. A training checkpoint also
holds the state that the trainer resumes from, under names that begin with `training.`, which
loaders skip. Nothing is ever unpickled. The same functions read models in the layout of diffusers
(`diffusers_folder.py`).
"""

from __future__ import annotations

import dataclasses
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models import MODELS
from ..models.devices import usable_device
from ..models.state_dict import check_shapes, shapes_of
from .data_record import checked_data
from .diffusers_folder import published_metadata, published_weights
from .errors import FileError, printable, quoted, reading, reason
from .hub import is_published, tidy_source
from .json_files import EDITED, json_object
from .safetensors_files import check_finite, open_safetensors, write_safetensors

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
            the source's modes, else "hidden";
            `few_steps`: set if the model was distilled: the number of `steps`, the time `shift`,
            `final_step_size`, `temperature`, `policy` ("GMFlow" or "DX"), the teacher's
            fingerprint (`teacher`), and, if there was any, its `guidance` in words.
    """
    metadata = {
        "format": FORMAT,
        "model_class": type(model).__name__,
        "config": json.dumps(config_record(model.config)),
        "training": json.dumps(facts or {}),
        "data": json.dumps(data or {}),
    }
    tensors = {name: stored(t, dtype or t.dtype) for name, t in model.state_dict().items()}
    tensors.update({TRAINING + name: stored(t, t.dtype) for name, t in (state or {}).items()})
    write_safetensors(tensors, path, metadata)


def config_record(config: Any) -> dict[str, Any]:
    """Return a network's config as files hold it.

    Settings of a DX policy are left out where there is none, so that versions that do not know
    them read the file.
    """
    record = dataclasses.asdict(config)
    if record.get("dx_segment") is None:
        record = {name: value for name, value in record.items() if not name.startswith("dx_")}
    return record


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
    source = tidy_source(source)
    if is_published(source):
        return published_metadata(source)
    with open_checkpoint(source) as file:
        return _parse_metadata(file.metadata() or {}, source)


def load_checkpoint(
    source: str | Path,
    device: str | torch.device | None = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> tuple[nn.Module, Any]:
    """Load a model.

    Args:
        source: a file of `save_checkpoint`; a folder in the layout of diffusers, such as the
            published GM-DiT; or the id of such a folder on the Hugging Face hub, "owner/name" or
            "owner/name@revision", or its address; see `tidy_source`. A file or folder of that name
            takes precedence over the hub.
        device: where the weights are put; None: a GPU if there is one.
        dtype: type of the weights in memory; as stored if None.

    Returns:
        The model in evaluation mode, without gradients, and its config.

    Raises:
        FileNotFoundError, ValueError, OSError: as `read_metadata`; also if the tensors do not fit
            the config, or the device cannot be used.
    """
    source, device = tidy_source(source), usable_device(device)
    metadata = read_metadata(source)
    config = _new_config(metadata, source)
    model = _read_weights(MODELS[metadata["model_class"]], config, source, device, dtype)
    return model.eval().requires_grad_(False), model.config


def _new_config(metadata: dict[str, Any], source: str | Path) -> Any:
    """Return the config of a checkpoint's metadata.

    Raises:
        FileError: this version has no such settings, or a value is out of range.
    """
    cls = MODELS[metadata["model_class"]]
    try:
        return cls.Config(**metadata["config"])
    except (TypeError, ValueError, ArithmeticError) as error:
        raise FileError(
            source,
            f"has a config that this version's {cls.__name__} does not know ({reason(error)}): "
            f"{quoted(metadata['config'])}",
            "update GMFlow, or train the model again",
        ) from error


def _empty_model(cls: type[nn.Module], config: Any, source: str | Path) -> nn.Module:
    """Build a model on the meta device, where its weights take no memory."""
    advice = "update GMFlow, or train the model again"
    what = f"has a config that {cls.__name__} cannot be built from"
    with reading(source, advice, what), torch.device("meta"):
        return cls(config)


def _check_layers(config: Any, names: set[str], source: str | Path) -> None:
    """Check that a file has at least as many tensors as its config has layers.

    Building a network takes time for every layer, even without weights.

    Raises:
        FileError: it has not.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name) if field.name.endswith("layers") else None
        count = len(value) if isinstance(value, tuple) else value
        if count is not None and count > len(names):
            raise FileError(
                source,
                f"holds {len(names)} tensors, too few for the {count} {field.name} of its config",
                EDITED,
            )


def _read_weights(
    cls: type[nn.Module],
    config: Any,
    source: str | Path,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> nn.Module:
    """Build a model and read its weights, after a check of all their shapes."""
    files = published_weights(source) if is_published(source) else [("", source)]
    with ExitStack() as stack:
        places = {}  # name in the model -> file, name in that file, path
        for prefix, path in files:
            file = stack.enter_context(open_safetensors(path))
            for name in file.keys():
                if not name.startswith(TRAINING):
                    places[prefix + name] = (file, name, path)
        _check_layers(config, set(places), source)
        model = _empty_model(cls, config, source)
        expected = shapes_of(model.state_dict())
        with reading(source):
            found = {n: tuple(f.get_slice(k).get_shape()) for n, (f, k, _) in places.items()}
        advice = "the file was edited or damaged"
        check_shapes(expected, found, "its config", source=str(source), advice=advice)
        tensors = {}
        for name, (file, key, path) in places.items():
            with reading(path, "download or train it again"):
                tensor = file.get_tensor(key)
                if not tensor.is_floating_point():
                    raise FileError(path, f"has the weights {quoted(name)} in {tensor.dtype}")
                check_finite(tensor, name, path)
            # Copies: a file that is overwritten while it is mapped would crash the process.
            # One after another: no more than one tensor is in memory twice.
            tensors[name] = tensor.to(device, dtype, copy=True)
    model.load_state_dict(tensors, assign=True)
    return model


def load_training_state(path: str | Path) -> dict[str, Tensor]:
    """Load the `state` of `save_checkpoint`; empty for a checkpoint that holds weights only.

    Raises:
        FileNotFoundError, ValueError: as `read_metadata`.
    """
    file = open_checkpoint(path)
    with reading(path), file:
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
    if os.path.isdir(path):
        raise FileError(path, "is a folder", "give the .safetensors file inside it")
    try:
        return open_safetensors(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no checkpoint {printable(str(Path(path)))}: no such file or folder, and no "
            "hub id (owner/name) either"
        ) from None


def _parse_metadata(raw: dict[str, str], path: str | Path) -> dict[str, Any]:
    """Return what `read_metadata` does from a file's own metadata."""
    if "format" not in raw or not raw["format"].startswith("gmflow"):
        raise FileError(
            path,
            "is a safetensors file but not a GMFlow checkpoint (its metadata has no GMFlow format)",
            "load other models with their own loader",
        )
    if raw.get("model_class") == SOURCE_CLASS:
        raise FileError(
            path,
            "holds a Gaussian-mixture source, not a model",
            "give it where a source is asked for",
        )
    if raw["format"] != FORMAT or raw.get("model_class") not in MODELS:
        raise FileError(
            path,
            f"holds a {quoted(raw.get('model_class'))} in format {quoted(raw['format'])}",
            f"this version knows {sorted(MODELS)} in format {FORMAT}; update GMFlow",
        )
    records = {
        "config": json_object(raw.get("config", ""), path, "config"),
        "training": json_object(raw.get("training", "{}"), path, "training record"),
        "data": json_object(raw.get("data", "{}"), path, "data record"),  # older files have none
    }
    return {
        "model_class": raw["model_class"],
        **records,
        "data": checked_data(records["data"], path),
    }
