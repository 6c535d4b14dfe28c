"""Tensors of many images in files that a command which was stopped finds again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gmflow_core.files.atomic import atomic_write
from training.common.files import read_safetensors


class Chunks:
    """Tensors of `count` images in files of `size` images each, every one with a key that says what it was made from.

    Args:
        folder: where the files are.
        key: JSON-able; a file with another key is not one of these.
    """

    def __init__(self, folder: Path, key: dict[str, Any], count: int, size: int):
        self.folder, self.key, self.count, self.size = (
            folder,
            json.dumps(key, sort_keys=True),
            count,
            size,
        )

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def path(self, number: int) -> Path:
        return self.folder / f"chunk-{number:05d}.safetensors"

    def images(self, number: int) -> range:
        """The images of a chunk."""
        return range(number * self.size, min((number + 1) * self.size, self.count))

    def state(self, number: int) -> str:
        """What there is of a chunk: "whole", "missing", "damaged", "foreign" (another key), or "short" (of other images, as the
        count or the size of the files has changed)."""
        if not self.path(number).exists():
            return "missing"
        try:
            with safe_open(self.path(number), framework="pt") as file:
                metadata, names = file.metadata() or {}, list(file.keys())
                lengths = {file.get_slice(name).get_shape()[0] for name in names}
        except (SafetensorError, OSError):
            return "damaged"
        if metadata.get("key") != self.key:
            return "foreign"
        here = self.images(number)
        return (
            "whole"
            if lengths == {len(here)} and metadata.get("first") == str(here.start)
            else "short"
        )

    def differences(self, number: int) -> list[str]:
        """The parts of the key in which a foreign chunk's differs."""
        with safe_open(self.path(number), framework="pt") as file:
            old = json.loads((file.metadata() or {}).get("key", "{}"))
        return [name for name, value in json.loads(self.key).items() if old.get(name) != value]

    def read(self, number: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A whole chunk's tensors, and the facts that were saved with them."""
        tensors, metadata = read_safetensors(self.path(number))
        return tensors, json.loads(metadata["facts"])

    def write(self, number: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Save a chunk, atomically."""
        with atomic_write(self.path(number)) as temporary:
            tensors = {name: t.contiguous() for name, t in tensors.items()}
            first = str(self.images(number).start)
            save_file(
                tensors, temporary, {"key": self.key, "first": first, "facts": json.dumps(facts)}
            )


def key_digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]
