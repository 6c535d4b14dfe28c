"""Write and read prepared data: images or latents in safetensors shards, with an index.

A prepared folder holds `index.json` and `shard-00000.safetensors`, `shard-00001.safetensors`, ...
Each shard has `x` (n, C, h, w), uint8 for pixels and float32 or float16 for latents, and `labels`
(n,) int64, the position of each sample's class in the index. A shard's metadata says which images
it was made from and which of them were left out. `plan.json` holds the settings that all shards
have in common.

A shard of latents takes n C h w times 4 bytes in float32 and times 2 in float16. For the 1.28
million images of ImageNet at 256 x 256 that is 21 GB and 10 GB for Stable Diffusion's VAE (4 x 32
x 32), 1.0 TB and 0.5 TB for an RAE of width 768 (768 x 16 x 16).
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Dataset

from gmflow_core.files.errors import FileError, printable, quoted, reading, reason
from gmflow_core.files.json_files import json_object, read_json, write_json
from gmflow_core.files.safetensors_files import is_finite, open_safetensors, write_safetensors
from gmflow_core.source.source import listed
from training.data.index_check import AGAIN, checked_index

FORMAT = "gmflow-latents-1"
INDEX, PLAN = "index.json", "plan.json"
DTYPES = {"pixels": ("uint8",), "latents": ("float32", "float16")}  # the first is the default
TYPES = {  # -> safetensors' names
    torch.uint8: "U8",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int64: "I64",
}
IN_MEMORY = 2**30  # bytes of stored data below which a set is read into memory as a whole
REPAIR = "run the same prepare command without --restart: it rewrites only that shard"


def shard_name(number: int) -> str:
    """Return the file name of shard `number`."""
    return f"shard-{number:05d}.safetensors"


def to_model(x: Tensor) -> Tensor:
    """Convert stored values to the network's: uint8 0..255 to [-1, 1], all to float32."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x.float()


def to_pixels(x: Tensor) -> Tensor:
    """Convert pixels (B, 3, h, w) in [-1, 1] to uint8, clamped: the inverse of `to_model`."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def stored_dtype(record: dict[str, Any]) -> str:
    """Return the type of the samples that an index or a plan describes, such as "float32".

    Records of older versions do not say it, and mean the default of their kind.
    """
    return record.get("dtype", DTYPES[record["kind"]][0])


class LatentDataset(Dataset):
    """A data set of the samples in a prepared folder.

    A DataLoader fetches whole batches at once, so `collate_fn` has nothing to do:

        DataLoader(LatentDataset(folder), batch_size=128, shuffle=True, collate_fn=lambda b: b)

    Attributes:
        shape: (C, h, w) of a sample.
        classes: names of the classes; a label is a position in this list.
        kind: "pixels" or "latents".
        dtype: type of the stored samples.
        labels: (n,) int64, of all samples.
        index: content of index.json.

    Args:
        folder: written by training.prepare.
        in_memory: hold all samples in memory; by default if they take less than 1 GiB there.
            Larger sets are read from disk sample by sample, through files that each process opens
            for itself.

    Raises:
        FileNotFoundError: there is no index, or a shard is missing.
        ValueError: the index or a shard is damaged, or they do not fit each other; the message
            names the file and the fix.
    """

    def __init__(self, folder: str | Path, in_memory: bool | None = None):
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.kind: str = self.index["kind"]
        self.dtype: torch.dtype = getattr(torch, stored_dtype(self.index))
        self.shape: tuple[int, int, int] = tuple(self.index["shape"])
        self.classes: list[str] = self.index["classes"]
        self._paths = [self.folder / shard["file"] for shard in self.index["shards"]]
        labels = [
            self._checked_labels(path, shard["count"])
            for path, shard in zip(self._paths, self.index["shards"], strict=True)
        ]
        self.labels = torch.cat(labels)
        self._starts = torch.tensor([0] + [len(part) for part in labels]).cumsum(0)
        self._files: dict[int, Any] = {}
        self._pid = os.getpid()
        size = len(self) * torch.Size(self.shape).numel() * self.dtype.itemsize
        self._x: Tensor | None = None
        if in_memory or (in_memory is None and size < IN_MEMORY):
            self._x = torch.cat([self._read_whole(path) for path in self._paths])

    def _read_whole(self, path: Path) -> Tensor:
        """Return all samples of one shard, after a check that they are finite."""
        with reading(path, REPAIR), open_shard(path) as file:
            x = file.get_tensor("x")
        if not is_finite(x):
            bad = (~x.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
            raise self._not_finite(path, bad)
        return x

    def _not_finite(self, path: Path, rows: list[int]) -> FileError:
        """Return the error about samples of a shard that are not finite."""
        found = f"holds NaN or infinity in its samples {listed(rows)}"
        return FileError(path, found, f"delete it, then {REPAIR}")

    def _checked_labels(self, path: Path, count: int) -> Tensor:
        """Return the labels of one shard, after checking everything else about it."""
        mixed = "the folder mixes two sets: run the prepare command again with --restart"
        with reading(path, REPAIR), open_shard(path) as file:
            x, y = file.get_slice("x"), file.get_slice("labels")
            shape, types = list(x.get_shape()), (x.get_dtype(), y.get_dtype())
            if shape[1:] != list(self.shape) or shape[0] != count or y.get_shape() != shape[:1]:
                raise FileError(
                    path,
                    f"holds {shape[0] if shape else 1} samples of shape {tuple(shape[1:])} and "
                    f"{y.get_shape()} labels, but {INDEX} says {count} of shape {self.shape}",
                    mixed,
                )
            if types != (TYPES[self.dtype], TYPES[torch.int64]):
                found = f"holds samples and labels of types {types}, not {self.dtype} and int64"
                raise FileError(path, found, mixed)
            labels = file.get_tensor("labels")
        if count and not (labels.min() >= 0 and labels.max() < len(self.classes)):
            raise FileError(
                path,
                f"has labels from {labels.min()} to {labels.max()}, but {INDEX} lists "
                f"{len(self.classes)} classes",
                mixed,
            )
        return labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """Return sample i, (C, h, w) float32 with pixels in [-1, 1], and its label."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        x, labels = self.__getitems__([i % len(self)])
        return x[0], int(labels[0])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return samples (n, C, h, w) float32, pixels in [-1, 1], and labels (n,) int64."""
        where = torch.as_tensor(indices, dtype=torch.int64)
        if self._x is not None:
            return to_model(self._x[where]), self.labels[where]
        x = torch.empty(len(where), *self.shape, dtype=self.dtype)
        shards = torch.searchsorted(self._starts, where, right=True) - 1
        rows = where - self._starts[shards]
        for position, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
            x[position] = self._file(shard).read(row)
        if not is_finite(x):
            bad = (~x.flatten(1).isfinite().all(1)).nonzero().flatten()
            shard = int(shards[bad[0]])
            raise self._not_finite(self._paths[shard], rows[bad][shards[bad] == shard].tolist())
        return to_model(x), self.labels[where]

    def _file(self, shard: int) -> SampleFile:
        """Return shard number `shard`, opened by this very process."""
        if self._pid != os.getpid():
            self._files, self._pid = {}, os.getpid()
        if shard not in self._files:
            self._files[shard] = SampleFile(self._paths[shard], self.shape, self.dtype)
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files out: they cannot be sent to another process."""
        return {**self.__dict__, "_files": {}}


class SampleFile:
    """The samples of a shard, read one by one.

    They are not memory-mapped: a mapped file that is overwritten would end the process.

    Args:
        path: the shard, which has been checked.
        shape, dtype: of a sample.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype):
        self.path, self.shape, self.dtype = path, shape, dtype
        self.bytes = math.prod(shape) * dtype.itemsize
        with reading(path, REPAIR):
            self.file = io.FileIO(path)
            length = int.from_bytes(self.file.read(8), "little")
            header = json_object(self.file.read(length).decode(), path, "header")
            self.start = 8 + length + header["x"]["data_offsets"][0]

    def read(self, row: int) -> Tensor:
        """Return the sample of this row.

        Raises:
            FileError: the file has become shorter, or cannot be read.
        """
        raw = bytearray(self.bytes)
        with reading(self.path, REPAIR, "cannot be read"):
            self.file.seek(self.start + row * self.bytes)
            if self.file.readinto(raw) != len(raw):
                raise FileError(self.path, f"ends before its sample {row}", REPAIR)
        return torch.frombuffer(raw, dtype=self.dtype).view(self.shape)


def read_index(folder: str | Path) -> dict[str, Any]:
    """Read the index of a prepared folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of a format that this version does not read.
    """
    path = Path(folder) / INDEX
    if not path.exists():
        if (path.parent / PLAN).exists():
            fix = (
                "the folder is not finished; run the same prepare command without --restart, "
                "it goes on where it stopped"
            )
        else:  # an existing folder may be the one with the images
            out = "ANOTHER_FOLDER" if path.parent.exists() else path.parent
            fix = f"make it with python -m training.prepare --data IMAGES --out {out}"
        raise FileNotFoundError(f"there is no {path}: {fix}")
    return checked_index(read_json(path, AGAIN), path, FORMAT, DTYPES)


def write_index(folder: str | Path, index: dict[str, Any], name: str = INDEX) -> None:
    """Write an index, or with `name` a plan, atomically."""
    write_json(Path(folder) / name, index)


def open_shard(path: Path):
    """Open a shard with safe_open.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is truncated, or holds something else.
    """
    if not path.exists():
        raise FileNotFoundError(f"{printable(str(path))} is missing; {REPAIR}")
    try:
        file = open_safetensors(path, REPAIR)
    except FileError as error:
        if isinstance(error.__cause__, SafetensorError):
            found = f"is truncated or damaged ({reason(error.__cause__)})"
            raise FileError(path, found, REPAIR) from error
        raise
    names = sorted(file.keys())
    if not {"x", "labels"} <= set(names):
        found = f"holds {quoted(names)} instead of x and labels"
        raise FileError(path, found, f"delete it, then {REPAIR}")
    return file


def write_shard(path: Path, x: Tensor, labels: Tensor, record: dict[str, Any]) -> None:
    """Write one shard, atomically; the same content gives the same bytes.

    Args:
        x: (n, C, h, w), in the type to store.
        labels: (n,).
        record: what the shard was made from, returned by `read_shard_record`.
    """
    # one entry of metadata, as safetensors shuffles several
    metadata = {"gmflow": json.dumps({"format": FORMAT, **record})}
    write_safetensors({"x": x.contiguous(), "labels": labels.contiguous()}, path, metadata)


def read_shard_record(path: Path, dtype: torch.dtype | None = None) -> dict[str, Any] | None:
    """Read the `record` of a shard, with the `count` of its samples.

    Args:
        dtype: type that the samples must have; any if None.

    Returns:
        None if the file is missing, truncated, or no such shard.
    """
    try:
        with reading(path), open_shard(path) as file:
            record = json_object((file.metadata() or {})["gmflow"], path, "record")
            shape, labels = (file.get_slice(name).get_shape() for name in ("x", "labels"))
            right = dtype is None or file.get_slice("x").get_dtype() == TYPES[dtype]
            right = right and len(shape) == 4 and labels == shape[:1]
            right = right and file.get_slice("labels").get_dtype() == TYPES[torch.int64]
    except (FileError, OSError):
        return None
    skipped = record.get("skipped", [])
    if not isinstance(skipped, list) or not all(
        isinstance(entry, dict)
        and isinstance(entry.get("file"), str)
        and isinstance(entry.get("reason"), str)
        for entry in skipped
    ):
        return None
    return {**record, "skipped": skipped, "count": shape[0]} if right else None
