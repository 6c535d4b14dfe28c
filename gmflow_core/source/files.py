"""Read and write Gaussian-mixture sources as safetensors files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..files.checkpoint import FORMAT, SOURCE_CLASS, open_checkpoint, stored
from ..files.data_record import checked_data
from ..files.errors import FileError, quoted, reading
from ..files.hub import folder_of, is_published, tidy_source
from ..files.json_files import EDITED, json_object
from ..files.safetensors_files import write_safetensors
from .source import FIT, GaussianMixtureSource
from .stored_tensors import LARGEST, check_names, check_shape

FILE = "source.safetensors"  # name in a folder or on the hub
NAMES = ("means", "std", "log_weights")
MOST = 2**31 - 1  # modes, or numbers along a dimension
AGAIN = "download or fit it again"


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
        FileNotFoundError, FileError, OSError: as `load_source`.
    """
    path = _source_file(source)
    file = open_checkpoint(path)
    with reading(path), file:
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
        FileError: it is not a whole source; the message names the file and what to do.
        OSError: it is on the hub and cannot be downloaded.
    """
    path = _source_file(source)
    file = open_checkpoint(path)
    with reading(path, AGAIN):
        config = _parse_metadata(file.metadata() or {}, path)["config"]
        names = [prefix + name for prefix in _sizes(config) for name in NAMES]
        check_names(file, names, path)
        for prefix, size in _sizes(config).items():  # by the header, before anything is read
            shape = (config["num_modes"], *size)
            check_shape(file, f"{prefix}means", shape, path)
            check_shape(file, f"{prefix}std", shape, path, broadcasts=True)
            check_shape(file, f"{prefix}log_weights", shape[:1], path)
    tensors = []
    for name in names:
        with reading(path, AGAIN):
            tensor = file.get_tensor(name)
        if not tensor.is_floating_point() or tensor.itemsize == 1:  # 8-bit floats: no arithmetic
            raise FileError(path, f"has {name} in {tensor.dtype}", EDITED)
        if not name.endswith("log_weights") and not tensor.abs().max() <= LARGEST:
            raise FileError(path, f"has {name} that are not finite, or beyond {LARGEST:g}", EDITED)
        tensors.append(tensor.to(device, dtype, copy=True))
    with reading(path, AGAIN):
        assigner = GaussianMixtureSource(*tensors[3:]) if tensors[3:] else None
        return GaussianMixtureSource(*tensors[:3], assigner)


def _sizes(config: dict[str, Any]) -> dict[str, list[int]]:
    """Return the shape of one sample of the source and its assigner, by their tensors' prefix."""
    sizes = {"": config["shape"], "assigner.": config.get("assigner")}
    return {prefix: size for prefix, size in sizes.items() if size}


def _source_file(source: str | Path) -> Path:
    """Return the file of a source, downloaded from the hub if need be."""
    source = tidy_source(source)
    if not is_published(source):
        return Path(source)
    path = folder_of(source, [FILE]) / FILE
    if not path.exists():
        raise FileError(source, f"holds no {FILE}", f"give the file itself, or {FIT}")
    return path


def _parse_metadata(raw: dict[str, str], path: Path) -> dict[str, Any]:
    """Return what `read_source_metadata` does from a file's own metadata."""
    if raw.get("format") != FORMAT or raw.get("model_class") != SOURCE_CLASS:
        found = (
            f"a {raw['model_class'][:100]} in format {raw.get('format', 'none')[:100]}"
            if "model_class" in raw
            else "something else"
        )
        raise FileError(
            path,
            f"holds {found}, not a Gaussian-mixture source in format {FORMAT}",
            f"give a source: {FIT}, or convert a published .pkl with "
            "python -m training.fit_source convert",
        )
    records = {
        name: json_object(raw.get(name, ""), path, name) for name in ("config", "training", "data")
    }
    _check_config(records["config"], path)
    return {**records, "data": checked_data(records["data"], path)}


def _check_config(config: dict[str, Any], path: Path) -> None:
    """Check the types and ranges of a source's config.

    Raises:
        FileError: an entry is not what `save_source` writes.
    """
    modes, shape, assigner = (config.get(name) for name in ("num_modes", "shape", "assigner"))
    if not _are_sizes([modes]):
        raise FileError(path, f"has the num_modes {quoted(modes)} instead of a number", EDITED)
    if not shape or not _are_sizes(shape):
        raise FileError(path, f"has the shape {quoted(shape)} instead of a list of sizes", EDITED)
    if assigner is not None and not (_are_sizes(assigner) and len(assigner) == 1):
        raise FileError(path, f"has the assigner {quoted(assigner)} instead of one size", EDITED)


def _are_sizes(values: Any) -> bool:
    """Return whether this is a list of whole numbers of at least 1."""
    return isinstance(values, list) and all(type(n) is int and 1 <= n <= MOST for n in values)
