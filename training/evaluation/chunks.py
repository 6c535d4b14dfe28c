"""Keep the tensors of many images in files of equal size, so that a stopped command can go on."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from gmflow_core.files.errors import FileError, quoted, reading
from gmflow_core.files.json_files import json_object
from gmflow_core.files.safetensors_files import (
    is_finite,
    open_safetensors,
    peek_header,
    read_safetensors,
    write_safetensors,
)
from training.encoders.fingerprints import MARK

AGAIN = "delete it, then run the same command again"
FILES = "chunk-*.safetensors"


class Chunks:
    """Tensors of `count` images in files of `size` images each.

    Args:
        folder: place of the files.
        key: JSON-serialisable; says what the tensors were made from. A file with another key is
            foreign. The autoencoder's fingerprint is left out of it in a folder that was begun
            without, by an older version.
        count: images in all.
        size: images per file.
        made: folder of the chunks that are made of these, which may be all that is left of them.
    """

    def __init__(
        self, folder: Path, key: dict[str, Any], count: int, size: int, made: Path | None = None
    ):
        self.folder, self.count, self.size = folder, count, size
        if MARK in key and any(map(_is_older, filter(None, (folder, made)))):
            key = {name: value for name, value in key.items() if name != MARK}
        self.key = json.dumps(key, sort_keys=True)

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def path(self, number: int) -> Path:
        """Return the file of a chunk."""
        return self.folder / f"chunk-{number:05d}.safetensors"

    def images(self, number: int) -> range:
        """Return the numbers of the images of a chunk."""
        return range(number * self.size, min((number + 1) * self.size, self.count))

    def state(self, number: int) -> str:
        """Return the state of a chunk's file.

        Returns:
            "whole", "missing", "damaged", "foreign" (it has another key), or "short" (it holds
            other images, because `count` or `size` has changed).
        """
        if not self.path(number).exists():
            return "missing"
        path = self.path(number)
        try:
            with reading(path), open_safetensors(path) as file:
                metadata, names = file.metadata() or {}, list(file.keys())
                lengths = {file.get_slice(name).get_shape()[0] for name in names}
                if metadata.get("key") == self.key:
                    json_object(metadata["facts"], path, "facts")
        except (FileError, OSError):
            return "damaged"
        if metadata.get("key") != self.key:
            return "foreign"
        here = self.images(number)
        same = lengths == {len(here)} and metadata.get("first") == str(here.start)
        return "whole" if same else "short"

    def differences(self, number: int) -> list[str]:
        """Return the entries of the key in which a foreign chunk differs."""
        path = self.path(number)
        with reading(path, AGAIN), open_safetensors(path, AGAIN) as file:
            old = json_object((file.metadata() or {}).get("key", "{}"), path, "key", AGAIN)
        differ = [name for name, value in json.loads(self.key).items() if old.get(name) != value]
        return ["VAE of this name" if name == MARK else name for name in differ]

    def read(self, number: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read the tensors of a whole chunk, and the facts that were saved with them.

        Raises:
            FileError: the file is damaged, or holds numbers that are not finite.
        """
        path = self.path(number)
        tensors, metadata = read_safetensors(path, AGAIN)
        for name, tensor in tensors.items():
            if not is_finite(tensor):
                raise FileError(path, f"holds NaN or infinity in {quoted(name)}", AGAIN)
        with reading(path, AGAIN):
            return tensors, json_object(metadata["facts"], path, "facts", AGAIN)

    def write(self, number: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write a chunk atomically; `facts` are JSON-serialisable."""
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        first = str(self.images(number).start)
        metadata = {"key": self.key, "first": first, "facts": json.dumps(facts)}
        write_safetensors(tensors, self.path(number), metadata)


def _is_older(folder: Path) -> bool:
    """Return whether a folder has chunks of a version that knew no fingerprints of VAEs."""
    headers = (peek_header(path) for path in folder.glob(FILES))
    keys = (str(header.get("__metadata__", {}).get("key", MARK)) for header in headers)
    return any(MARK not in key for key in keys)


def remove_chunks(folder: Path) -> None:
    """Delete the chunks in a folder, and the folder if nothing else is in it."""
    for file in folder.glob(FILES):
        file.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def key_digest(key: str) -> str:
    """Return the first 16 hexadecimal digits of the key's SHA-256."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]
