"""Compare what runs leave on disk: contents, whole files, leftovers."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

# Logs and locks: they may differ from run to run, and stay behind
AROUND = re.compile(r"(events\.out\.tfevents\..*|\.gmflow\.lock|\.gmflow\.owner|\..*\.lock)")
# Times, and what a run that was stopped knows about its own starts
VOLATILE = {"seconds", "starts", "command", "date", "since", "images_per_second", "began"}


def files_of(folder: Path) -> list[Path]:
    """List the files below a folder, but for logs and locks."""
    found = (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return sorted(path for path in found if not AROUND.fullmatch(path.name))


def content_of(folder: Path) -> dict[str, Any]:
    """Return what the files below a folder hold, by relative path, without times."""
    return {str(path.relative_to(folder)): content(path) for path in files_of(folder)}


def content(path: Path) -> Any:
    """Return what a file holds, in a form that can be compared.

    Raises:
        ValueError: it is not whole.
    """
    raw = path.read_bytes()
    kind = path.suffix
    try:
        if kind == ".safetensors":
            return _tensors(path)
        if kind == ".json":
            return _stable(json.loads(raw))
        if kind == ".csv":
            return _table(raw.decode())
        if kind in (".png", ".jpg"):
            image = Image.open(io.BytesIO(raw))
            return image.mode, image.size, _digest(image.tobytes())
        if kind in (".npy", ".npz", ".pt") and not raw:
            raise ValueError("it is empty")
    except (SafetensorError, OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path.name} is not whole: {error}") from error
    return _digest(raw)


def broken(folder: Path, names: Iterable[str]) -> list[str]:
    """Name the files below a folder that are there under their final names and are not whole."""
    found = []
    for name in names:
        if (folder / name).exists():
            try:
                content(folder / name)
            except ValueError as error:
                found.append(str(error))
    return found


def leftovers(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """Return the sizes of files that no finished run has, by relative path."""
    paths = {str(path.relative_to(folder)): path for path in files_of(folder)}
    return {name: path.lstat().st_size for name, path in paths.items() if name not in set(names)}


def temporary(left: dict[str, int]) -> dict[str, int]:
    """Return those leftovers that are temporary by their name."""
    return {name: size for name, size in left.items() if re.search(r"(^|/)\.|\.tmp", name)}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Say in which files two contents differ."""
    texts = [f"{name} is missing" for name in expected if name not in found]
    texts += [f"{name} is left over" for name in found if name not in expected]
    for name, value in expected.items():
        if name in found and found[name] != value:
            texts.append(f"{name} differs{_where(found[name], value)}")
    return texts


def emptied(folder: Path) -> Path:
    """Return the folder, new and empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _where(found: Any, expected: Any) -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = [k for k in {**found, **expected} if found.get(k) != expected.get(k)]
        return f" in {', '.join(map(str, keys[:3]))}"
    return ""


def _tensors(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        about = {f"metadata {k}": _maybe_json(v) for k, v in (file.metadata() or {}).items()}
        for name in file.keys():
            tensor = file.get_tensor(name).contiguous().flatten()
            about[name] = (
                file.get_slice(name).get_dtype(),
                tuple(file.get_slice(name).get_shape()),
            )
            about[name] += (_digest(tensor.view(torch.uint8).numpy().tobytes()),)
        return about


def _maybe_json(text: str) -> Any:
    try:
        return _stable(json.loads(text))
    except ValueError:
        return text


def _stable(value: Any) -> Any:
    """Return a value of JSON without times."""
    if isinstance(value, dict):
        return {k: _stable(v) for k, v in value.items() if k not in VOLATILE}
    return [_stable(each) for each in value] if isinstance(value, list) else value


def _table(text: str) -> list[list[str]]:
    """Return the cells of a CSV file without the columns of times."""
    rows = list(csv.reader(io.StringIO(text)))
    kept = [i for i, name in enumerate(rows[0]) if name not in VOLATILE] if rows else []
    return [[row[i] for i in kept if i < len(row)] for row in rows]


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]
