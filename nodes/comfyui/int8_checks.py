"""Check the tensors of a file before it is loaded in 8 bit."""

from __future__ import annotations

import torch
from torch import Tensor

from ...gmflow_core.files.errors import quoted, reason
from ...gmflow_core.files.safetensors_files import check_finite
from .int8_layers import FLOATS, FORMAT, MARK, StateDict, is_quantisable, read_layout

OTHERS = {  # parts of key names that identify other kinds of quantised files
    "scaled_fp8": "scaled fp8",
    "scale_weight": "scaled fp8",
    "quant_state.bitsandbytes": "bitsandbytes 4 bit",
    ".absmax": "bitsandbytes 4 bit",
    ".SCB": "bitsandbytes int8",
    ".qweight": "GPTQ, AWQ or SVDQuant",
    ".wscales": "SVDQuant",
}


def check_state_dict(name: str, state_dict: StateDict) -> None:
    """Check that a file can be loaded in 8 bit: not quantised in another way, whole, and finite.

    The weights that become int8 are checked for finite numbers as they are rounded.

    Raises:
        ValueError: it cannot; the message names the tensor, or the node to use.
    """
    marks = {key: mark for key, mark in state_dict.items() if key.endswith(f".{MARK}")}
    formats = {_layout_of(name, key, mark)[0] for key, mark in marks.items()} - {FORMAT}
    found = [f"ComfyUI's {format}" for format in sorted(map(str, formats))]
    found += [kind for part, kind in OTHERS.items() if any(part in key for key in state_dict)]
    if not marks:
        types = {weight.dtype for key, weight in state_dict.items() if key.endswith("weight")}
        found += sorted(str(dtype).removeprefix("torch.") for dtype in types if dtype.itemsize == 1)
    if found:
        raise ValueError(
            f"{name!r} is quantised already ({found[0]}). Load it with Load Diffusion Model, or "
            "the loader of its format; for 8 bit use the bf16 or fp16 file of the model"
        )
    for key, mark in marks.items():
        _check_int8(name, key.removesuffix(MARK), state_dict, _layout_of(name, key, mark)[1])
    for key, weight in state_dict.items():
        if weight.dtype not in FLOATS and f"{key.rpartition('.')[0]}.{MARK}" not in marks:
            if key.endswith((".weight", ".bias")):
                raise _damaged(name, key, f"has the type {weight.dtype}, which no weight has")
        elif not is_quantisable(key, weight):
            check_finite(weight, key, quoted(name))


def _layout_of(name: str, key: str, mark: Tensor) -> tuple[str, int]:
    """Return what `read_layout` reads from a file's entry.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return read_layout(mark)
    except Exception as error:  # JSON of any content, a tensor of any type
        raise _damaged(name, key, f"is no description of a layout ({reason(error)})") from error


def _check_int8(name: str, prefix: str, state_dict: StateDict, group: object) -> None:
    """Check the int8 weight of a layer, its scales, and the size of its rotation.

    Raises:
        ValueError: they do not fit each other.
    """
    key, scale_key = f"{prefix}weight", f"{prefix}weight_scale"
    weight, scale = state_dict.get(key), state_dict.get(scale_key)
    if weight is None or scale is None:
        raise _damaged(name, key if weight is None else scale_key, "is missing")
    if weight.dtype != torch.int8 or weight.ndim != 2:
        raise _damaged(name, key, f"is {weight.dtype} of shape {tuple(weight.shape)}, not int8")
    rows, inputs = weight.shape
    if scale.dtype not in FLOATS or scale.numel() not in (1, rows):
        found = f"{scale.dtype} of shape {tuple(scale.shape)}"
        raise _damaged(name, scale_key, f"is {found}, not one float for each of {rows} rows")
    is_size = isinstance(group, int) and (group == 0 or group in (4**n for n in range(1, 8)))
    if not is_size or (group and inputs % group):
        found = f"a rotation of size {quoted(group)} for {inputs} inputs"
        raise _damaged(name, f"{prefix}{MARK}", f"describes {found}")


def _damaged(name: str, key: str, found: str) -> ValueError:
    """Return the error of a file with a tensor that does not fit."""
    return ValueError(
        f"{quoted(name)} cannot be loaded in 8 bit: {quoted(key)} {found}; the file is damaged, "
        "download or save it again"
    )


def check_complete(name: str, missing: list[str]) -> None:
    """Check that the file held every weight of the network: the others would be random memory.

    Raises:
        ValueError: some are missing; the message names them.
    """
    if missing:
        shown = ", ".join(map(quoted, missing[:4])) + (", ..." if len(missing) > 4 else "")
        raise ValueError(
            f"{quoted(name)} lacks {len(missing)} of the network's tensors: {shown}; the file is "
            "damaged or a part of a model: download it again"
        )
