"""Change safetensors files: the header, the JSON in the metadata, and the tensors."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .json_text import changed

DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
)
NUMBERS = (float("nan"), float("inf"), -float("inf"), 3e38, -1.0, 0.0, 1e-45)


def change_header(path: Path, rng: Random) -> str:
    """Change the JSON of a safetensors header; the bytes of the tensors stay."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    text, about = changed(raw[8 : 8 + length].decode(), rng)
    header = text.encode("utf-8", "surrogateescape")
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
    return f"{path.name}: header: {about}"


def change_metadata(path: Path, rng: Random) -> str:
    """Change the JSON in one entry of the metadata, or the entry itself."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    metadata = header.get("__metadata__") or {}
    if not metadata:
        return change_header(path, rng)
    name = rng.choice(sorted(metadata))
    try:
        metadata[name], about = changed(metadata[name], rng)
    except json.JSONDecodeError:  # plain text
        metadata[name] = rng.choice(("", "x", "\ud800", "gmflow-9", "x" * 100_000))
        about = "other text"
    if "\udcff" in metadata[name]:
        metadata[name] = "\ud800"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return f"{path.name}: metadata {name}: {about}"


def change_tensors(path: Path, rng: Random) -> str:
    """Change one tensor: type, shape, numbers, name; or remove it, or add others."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    name = rng.choice(list(tensors))
    ways = (_retyped, _retyped, _reshaped, _reshaped, _renumbered, _renumbered, _renamed)
    about = rng.choice(ways)(tensors, name, rng)
    save_file({key: t.contiguous().clone() for key, t in tensors.items()}, path, metadata)
    return f"{path.name}: {name} {about}"


def _retyped(tensors: dict[str, Tensor], name: str, rng: Random) -> str:
    dtype = rng.choice(DTYPES)
    tensors[name] = tensors[name].to(dtype)
    return f"as {dtype}"


def _reshaped(tensors: dict[str, Tensor], name: str, rng: Random) -> str:
    old = tensors[name]
    tensors[name] = rng.choice(
        (
            old.flatten(),
            old[None],
            old[..., None],
            old.flatten()[: old.numel() // 2],
            old.flatten()[:0],
            old.new_zeros(()),
            old.mT if old.ndim > 1 else old.repeat(2),
            old.flatten().repeat(3),
            old.new_zeros(0, *old.shape[1:]),
            old[:1] if old.ndim else old,
        )
    )
    return f"{tuple(old.shape)} as {tuple(tensors[name].shape)}"


def _renumbered(tensors: dict[str, Tensor], name: str, rng: Random) -> str:
    value = rng.choice(NUMBERS)
    tensor = tensors[name].clone()
    if not tensor.is_floating_point():
        value = rng.choice((-1, 0, 127, 2**62 if tensor.dtype == torch.int64 else 1))
    flat = tensor.view(-1) if tensor.ndim else tensor.view(1)
    if rng.random() < 0.5 and len(flat):
        flat[rng.randrange(len(flat))] = value
    else:
        flat.fill_(value)
    tensors[name] = tensor
    return f"with {value}"


def _renamed(tensors: dict[str, Tensor], name: str, rng: Random) -> str:
    way = rng.choice(("missing", "extra", "swapped", "renamed", "surrounded"))
    old = tensors[name]
    if way in ("missing", "renamed"):
        del tensors[name]
    if way == "renamed":
        tensors[rng.choice((f"{name}x", "", "a\n\x1b[31m", "x" * 5000, f"training.{name}"))] = old
    elif way == "extra":
        tensors[rng.choice((f"{name}.more", "extra", "training.extra"))] = torch.ones(2)
    elif way == "swapped":
        other = rng.choice(list(tensors))
        tensors[name], tensors[other] = tensors[other], old
    elif way == "surrounded":
        tensors |= {f"extra.{i}": torch.ones(1) for i in range(2000)}
    return way
