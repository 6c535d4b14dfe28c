"""Check the entries of the index of a prepared folder, which may have been edited or damaged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gmflow_core.files.data_record import LONGEST_NAME
from gmflow_core.files.errors import FileError, is_file_name, printable, quoted
from gmflow_core.models.settings import LARGEST_SAMPLE, MOST_CLASSES, is_count, is_number

AGAIN = "delete it and run the same prepare command without --restart: whole shards are kept"


def checked_index(
    index: Any, path: Path, file_format: str, dtypes: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Return the index with class names that can be printed, after a check of all its entries.

    Args:
        index: as it was read from `path`.
        file_format: the format that this version reads.
        dtypes: the types of the stored samples, for each kind of samples.

    Raises:
        FileError: an entry is missing or wrong; the message quotes it.
    """
    if not isinstance(index, dict):
        raise FileError(path, f"is damaged: it holds {quoted(index)} instead of an object", AGAIN)
    for name in ("format", "kind", "shape", "classes", "count", "shards"):
        if name not in index:
            raise FileError(
                path, f"is damaged or no index of prepared data: it lacks {name}", AGAIN
            )
    kind, dtype = index["kind"], index.get("dtype")
    known = dtypes.get(kind, ()) if isinstance(kind, str) else ()
    if index["format"] != file_format or not known or dtype not in (None, *known):
        found = quoted(kind) if dtype is None else f"{quoted(kind)} in {quoted(dtype)}"
        raise FileError(
            path,
            f"describes {found} in format {quoted(index['format'])}; this version reads "
            f"{sorted(dtypes)} in format {file_format}",
            "update GMFlow, or prepare the data again",
        )
    shape = index["shape"]
    sizes = isinstance(shape, list) and len(shape) == 3 and all(map(is_count, shape))
    _require(sizes and math.prod(shape) <= LARGEST_SAMPLE, "shape", shape, "3 sizes", path)
    _check_names("classes", index["classes"], path)
    _require(index["classes"], "classes", index["classes"], "names", path)
    _check_shards(index, path)
    _check_origin(index, path)
    names = [printable(name, LONGEST_NAME) for name in index["classes"]]
    return {**index, "classes": names}


def _check_shards(index: dict[str, Any], path: Path) -> None:
    """Check the list of shards: plain names of files in the folder, counts that add up.

    Raises:
        FileError: something in it is wrong.
    """
    shards, files = index["shards"], set()
    _require(isinstance(shards, list), "shards", shards, "a list", path)
    for shard in shards:
        entry = isinstance(shard, dict) and is_count(shard.get("count"), 0)
        _require(entry, "shard", shard, "an object with file and count", path)
        file = shard.get("file")
        plain = is_file_name(file) and file.endswith(".safetensors")
        _require(plain, "shard file", file, "the name of a .safetensors file in its folder", path)
        _require(file not in files, "shard file", file, "a file that is named once", path)
        files.add(file)
    total = sum(shard["count"] for shard in shards)
    if not is_count(index["count"]) or total != index["count"]:
        raise FileError(
            path, f"says {quoted(index['count'])} samples, but its shards add up to {total}", AGAIN
        )


def _check_origin(index: dict[str, Any], path: Path) -> None:
    """Check the entries that say what the samples were made from; older files lack some.

    Raises:
        FileError: one has a wrong type.
    """
    for name, value in index.items():
        if name == "folders":
            _check_names(name, value, path)
        elif name == "skipped":
            entries = isinstance(value, list) and all(isinstance(each, dict) for each in value)
            texts = entries and all(
                isinstance(each.get(key), str) for each in value for key in ("file", "reason")
            )
            _require(texts, name, value, "a list of files and reasons", path)
        elif name in ("source", "space"):
            _require(isinstance(value, str), name, value, "a text", path)
        elif name == "vae":
            _require(value is None or isinstance(value, str), name, value, "a name", path)
        elif name == "flip":
            _require(isinstance(value, bool), name, value, "true or false", path)
        elif name in ("size", "seed"):
            _require(is_count(value, 0), name, value, "a whole number", path)
        elif name == "scaling_factor":
            right = value is None or (is_number(value) and value > 0)
            _require(right, name, value, "a positive number", path)


def _check_names(entry: str, names: Any, path: Path) -> None:
    """Check a list of names.

    Raises:
        FileError: it is none, or has more than `MOST_CLASSES`.
    """
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    _require(texts and len(names) <= MOST_CLASSES, entry, names, "a list of names", path)


def _require(condition: Any, name: str, value: Any, expected: str, path: Path) -> None:
    if not condition:
        raise FileError(path, f"is damaged: {name} is {quoted(value)} instead of {expected}", AGAIN)
