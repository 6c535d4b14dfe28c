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

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from gmflow_core.files.atomic import atomic_write
from gmflow_core.files.safetensors_files import write_safetensors

FORMAT = "gmflow-latents-1"
INDEX, PLAN = "index.json", "plan.json"
DTYPES = {"pixels": ("uint8",), "latents": ("float32", "float16")}  # the first is the default
IN_MEMORY = 2**30  # bytes of stored data below which a set is read into memory as a whole
REPAIR = "run the same prepare command again: it rewrites only that shard"


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
            self._x = torch.cat([open_shard(path).get_tensor("x") for path in self._paths])

    def _checked_labels(self, path: Path, count: int) -> Tensor:
        """Return the labels of one shard, after checking everything else about it."""
        file = open_shard(path)
        shape, labels = file.get_slice("x").get_shape(), file.get_tensor("labels")
        mixed = "the folder mixes two sets: run the prepare command again with --restart"
        if list(shape) != [count, *self.shape] or len(labels) != count:
            raise ValueError(
                f"{path} holds {shape[0]} samples of shape {tuple(shape[1:])} and {len(labels)} "
                f"labels, but {INDEX} says {count} of shape {self.shape}; {mixed}"
            )
        if count and not (labels.min() >= 0 and labels.max() < len(self.classes)):
            raise ValueError(
                f"{path} has labels from {labels.min()} to {labels.max()}, but {INDEX} lists "
                f"{len(self.classes)} classes; {mixed}"
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
            x[position] = self._file(shard).get_slice("x")[row : row + 1][0]
        return to_model(x), self.labels[where]

    def _file(self, shard: int):
        """Return shard number `shard`, opened by this very process."""
        if self._pid != os.getpid():
            self._files, self._pid = {}, os.getpid()
        if shard not in self._files:
            self._files[shard] = open_shard(self._paths[shard])
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files out: they cannot be sent to another process."""
        return {**self.__dict__, "_files": {}}


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
                "the folder is not finished; run the same prepare command again, it goes on where "
                "it stopped"
            )
        else:  # an existing folder may be the one with the images
            out = "ANOTHER_FOLDER" if path.parent.exists() else path.parent
            fix = f"make it with python -m training.prepare --data IMAGES --out {out}"
        raise FileNotFoundError(f"there is no {path}: {fix}")
    again = "delete it and run the same prepare command again: whole shards are kept"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        file_format, kind, dtype = index["format"], index["kind"], index.get("dtype")
        total = sum(shard["count"] for shard in index["shards"])
        for name in ("shape", "classes"):
            len(index[name])
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is damaged or no index of prepared data ({error!r}); {again}"
        ) from error
    if file_format != FORMAT or dtype not in (None, *DTYPES.get(kind, ())) or kind not in DTYPES:
        found = kind if dtype is None else f"{kind} in {dtype}"
        raise ValueError(
            f"{path} describes {found} in format {file_format}; this version reads "
            f"{sorted(DTYPES)} in format {FORMAT}: update GMFlow, or prepare the data again"
        )
    if total != index["count"] or total == 0:
        raise ValueError(
            f"{path} says {index['count']} samples, but its shards add up to {total}; {again}"
        )
    return index


def write_index(folder: str | Path, index: dict[str, Any], name: str = INDEX) -> None:
    """Write an index, or with `name` a plan, atomically."""
    with atomic_write(Path(folder) / name) as temporary:
        temporary.write_text(
            json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def open_shard(path: Path):
    """Open a shard with safe_open.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is truncated, or holds something else.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; {REPAIR}")
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); {REPAIR}") from error
    if not {"x", "labels"} <= set(file.keys()):
        raise ValueError(
            f"{path} holds {sorted(file.keys())} instead of x and labels; delete it, then {REPAIR}"
        )
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


def read_shard_record(path: Path) -> dict[str, Any] | None:
    """Read the `record` of a shard, with the `count` of its samples.

    Returns:
        None if the file is missing, truncated, or no such shard.
    """
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})["gmflow"])
            count, labelled = (file.get_slice(name).get_shape()[0] for name in ("x", "labels"))
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
    return {**record, "count": count} if labelled == count else None
