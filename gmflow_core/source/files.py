"""Read and write Gaussian-mixture sources as safetensors files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..files.checkpoint import FORMAT, SOURCE_CLASS, open_checkpoint, stored
from ..files.hub import folder_of, is_published
from ..files.safetensors_files import write_safetensors
from .source import FIT, GaussianMixtureSource

FILE = "source.safetensors"  # name in a folder or on the hub


def save_source(
    source: GaussianMixtureSource,
    path: str | Path,
    *,
    facts: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    data: dict[str, Any] | None = None,
) -> None:
    """Write a source and its assigner to one safetensors file, atomically.

    Args:
        source: the source.
        path: the file to write; missing folders are created.
        facts, data: JSON-able records of how the source was fitted and of what its samples are, as
            in `save_checkpoint`.
        dtype: stored type of the means; their own if None.
    """
    config = {
        "num_modes": source.num_modes,
        "shape": source.shape,
        "assigner": source.assigner and source.assigner.shape,
    }
    records = {"config": config, "training": facts or {}, "data": data or {}}
    tensors = {}
    for prefix, part in (("", source), ("assigner.", source.assigner)):
        if part is not None:
            tensors[f"{prefix}means"] = stored(part.means, dtype or part.means.dtype)
            tensors[f"{prefix}std"] = stored(part.std, part.std.dtype)
            tensors[f"{prefix}log_weights"] = stored(part.log_weights, part.log_weights.dtype)
    metadata = {
        "format": FORMAT,
        "model_class": SOURCE_CLASS,
        **{name: json.dumps(value) for name, value in records.items()},
    }
    write_safetensors(tensors, path, metadata)


def read_source_metadata(source: str | Path) -> dict[str, Any]:
    """Return `config` (num_modes, shape, assigner), `training` (the facts) and `data` of a source.

    Raises:
        FileNotFoundError, ValueError, OSError: as `load_source`.
    """
    path = _source_file(source)
    with open_checkpoint(path) as file:
        return _parse_metadata(file.metadata() or {}, path)


def load_source(
    source: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> GaussianMixtureSource:
    """Load a source.

    Args:
        source: a file of `save_source`; a folder that holds source.safetensors; or the id of such
            a folder on the Hugging Face hub, "owner/name" or "owner/name@revision".
        device: where the tensors are put.
        dtype: type of the tensors in memory; as stored if None, but at least float32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole source; the message names the file and what to do.
        OSError: it is on the hub and cannot be downloaded.
    """
    path = _source_file(source)
    with open_checkpoint(path) as file:
        config = _parse_metadata(file.metadata() or {}, path)["config"]
        prefixes = ("", "assigner.") if config.get("assigner") else ("",)
        names = [prefix + name for prefix in prefixes for name in ("means", "std", "log_weights")]
        if sorted(names) != sorted(file.keys()):
            raise ValueError(
                f"{path} holds {sorted(file.keys())} instead of {sorted(names)}; "
                "the file was edited or damaged"
            )
        try:
            tensors = [file.get_tensor(name).to(device, dtype, copy=True) for name in names]
            assigner = GaussianMixtureSource(*tensors[3:]) if tensors[3:] else None
            return GaussianMixtureSource(*tensors[:3], assigner)
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); download or fit it again") from error


def _source_file(source: str | Path) -> Path:
    """Return the file of a source, downloaded from the hub if need be."""
    if not is_published(source):
        return Path(source)
    path = folder_of(source, [FILE]) / FILE
    if not path.exists():
        raise ValueError(f"{source} holds no {FILE}; give the file itself, or {FIT}")
    return path


def _parse_metadata(raw: dict[str, str], path: Path) -> dict[str, Any]:
    """Return what `read_source_metadata` does from a file's own metadata."""
    if raw.get("format") != FORMAT or raw.get("model_class") != SOURCE_CLASS:
        found = (
            f"a {raw['model_class']} in format {raw.get('format')}"
            if "model_class" in raw
            else "something else"
        )
        raise ValueError(
            f"{path} holds {found}, not a Gaussian-mixture source in format {FORMAT}; give a "
            f"source: {FIT}, or convert a published .pkl with python -m training.fit_source convert"
        )
    try:
        return {name: dict(json.loads(raw[name])) for name in ("config", "training", "data")}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: its GMFlow metadata is unreadable ({error!r}); the file was edited or damaged"
        ) from error
