"""Check the values of a node's inputs against the types in its schema.

ComfyUI checks literal values only, and of those no NaN; links and other extensions bring anything.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ...gmflow_core.files.errors import quoted
from ...gmflow_core.files.safetensors_files import count_not_finite, is_finite
from .label_conditioning import problem_of

LONGEST_TEXT = 1_000_000  # characters of a text input
SEEDS = 2**64  # torch counts negative seeds from there
ROUNDING = 1e-6  # share of a range by which computed numbers may leave it
SHOWN = "samples"  # id of an input whose LATENT is only shown: its mask and its noise do not matter
FEWEST_DIMS, MOST_DIMS = 3, 5  # of a latent: sound, pictures, videos
META = torch.device("meta")
TENSORS = ("pooled_output",)  # of a CONDITIONING, beside its first; masks may hold infinities
MODEL_PARTS = ("model", "model_options", "clone", "get_model_object")  # that a MODEL has
SOURCE_PARTS = ("source", "data", "modes_of")  # that a GM_SOURCE has


def check_inputs(
    schema: dict[str, io.Input], values: dict[str, Any], chosen: set[str], complete: bool = True
) -> dict[str, Any]:
    """Return the values of a node's inputs, after a check of their types.

    Values of None are left out where the input is optional, and so are empty CONDITIONINGs.

    Args:
        schema: inputs by their ids; values of other names pass.
        chosen: names of the combos that the node itself checks.
        complete: False if values of None stand for links that are not followed yet.

    Raises:
        ValueError: a value is not what the schema says; the message names the input.
    """
    checked = {}
    for name, value in values.items():
        if name not in schema or (value is None and not complete):
            checked[name] = value
        elif not (schema[name].optional and _is_nothing(schema[name], value)):
            try:
                checked[name] = check_value(schema[name], value, name in chosen)
            except _WrongError as error:
                raise ValueError(f"the input {name!r} is {error}") from None
    return checked


def check_lists(
    schema: dict[str, io.Input], values: dict[str, Any], chosen: set[str], complete: bool = True
) -> dict[str, Any]:
    """Return the inputs of a node that takes all of them as lists; see `check_inputs`."""
    checked = {}
    for name, value in values.items():
        found = value if isinstance(value, list) else [value]
        each = [check_inputs(schema, {name: one}, chosen, complete) for one in found]
        kept = [one[name] for one in each if name in one]
        if kept:
            checked[name] = kept
    return checked


def _is_nothing(kind: io.Input, value: Any) -> bool:
    """Return whether a value is that of an input that nothing is connected to."""
    empty = kind.io_type == "CONDITIONING" and isinstance(value, (list, tuple)) and not value
    return value is None or empty


class _WrongError(Exception):
    """A value that is not what its input takes: what it is, and what is expected."""


def check_value(kind: io.Input, value: Any, chosen: bool = False) -> Any:
    """Return the value of one input, after a check of its type.

    Args:
        chosen: True for a combo that the node itself checks.
    """
    if isinstance(kind, io.Combo.Input):
        return _check_text(kind, value) if chosen else _check_choice(kind, value)
    check = CHECKS.get(kind.io_type)
    return check(kind, value) if check else value


def _check_text(kind: io.Input, value: Any) -> str:
    if not isinstance(value, str):
        raise _WrongError(f"{_seen(value)}; connect or write a text")
    if len(value) > LONGEST_TEXT:
        raise _WrongError(f"a text of {len(value):,} characters; the longest has {LONGEST_TEXT:,}")
    return value


def _check_choice(kind: io.Combo.Input, value: Any) -> str:
    options = list(kind.options or [])
    if not isinstance(value, str) or value not in options:
        raise _WrongError(f"{_seen(value)}; choose one of {quoted(options)}")
    return value


def _check_number(kind: io.Int.Input | io.Float.Input, value: Any) -> int | float:
    """Return a number in the range of its input; a whole one for an integer."""
    value, whole = _plain(value), isinstance(kind, io.Int.Input)
    expected = (
        f"a whole number from {kind.min} to {kind.max}"
        if whole
        else (f"a number from {kind.min:g} to {kind.max:g}")
    )
    if not isinstance(value, numbers.Real):
        raise _WrongError(f"{_seen(value)}; it must be {expected}")
    is_whole = isinstance(value, numbers.Integral)
    sound = is_whole or math.isfinite(value)
    if whole and kind.max == SEEDS - 1 and is_whole and -SEEDS // 2 <= value < 0:
        value = int(value) + SEEDS
    elif not whole and sound:
        nearest = min(max(value, kind.min), kind.max)
        value = nearest if abs(value - nearest) <= ROUNDING * (kind.max - kind.min) else value
    if not sound or not kind.min <= value <= kind.max or (whole and value != int(value)):
        raise _WrongError(f"{quoted(value)}; it must be {expected}")
    return int(value) if whole else float(value)


def _plain(value: Any) -> Any:
    """Return a number as Python's own, if it is a scalar of NumPy or torch."""
    is_scalar = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return value.item() if is_scalar and getattr(value, "device", None) != META else value


def _check_switch(kind: io.Input, value: Any) -> bool:
    value = _plain(value)
    if not isinstance(value, numbers.Integral) or value not in (0, 1):
        raise _WrongError(f"{_seen(value)}; it must be true or false")
    return bool(value)


def _check_model(kind: io.Input, value: Any) -> Any:
    if not all(hasattr(value, part) for part in MODEL_PARTS):
        raise _WrongError(f"{_seen(value)}; connect a MODEL, from a loader")
    return value


def _check_source(kind: io.Input, value: Any) -> Any:
    if not all(hasattr(value, part) for part in SOURCE_PARTS):
        raise _WrongError(f"{_seen(value)}; connect 'GM Load Mixture Source'")
    return value


def _check_sampler(kind: io.Input, value: Any) -> Any:
    if not hasattr(value, "sample"):
        raise _WrongError(f"{_seen(value)}; connect a SAMPLER, such as that of KSamplerSelect")
    return value


def _check_vae(kind: io.Input, value: Any) -> Any:
    if not hasattr(value, "decode"):
        raise _WrongError(f"{_seen(value)}; connect a VAE, such as that of Load VAE")
    return value


def _check_images(kind: io.Input, value: Any) -> Tensor:
    """Return IMAGEs (B, H, W, 3 or more) of finite numbers."""
    if not _is_array(value) or value.ndim != 4 or 0 in value.shape or value.shape[-1] < 3:
        raise _WrongError(f"{_seen(value)}; it must be images (batch, height, width, 3)")
    _check_finite("images that hold", value)
    return value


def _check_latent(kind: io.Input, value: Any) -> dict:
    """Return a LATENT with finite samples (B, C, ...)."""
    if not isinstance(value, dict) or "samples" not in value:
        raise _WrongError(f"{_seen(value)}; connect a LATENT, with 'samples' in it")
    samples = value["samples"]
    if getattr(samples, "is_nested", False):
        raise _WrongError(
            "a LATENT of several parts, such as a video with its sound; sample it with KSampler or "
            "SamplerCustomAdvanced, whose lists hold gm_ode, gm_sde and gm_policy"
        )
    if not _is_array(samples):
        raise _WrongError(
            f"a LATENT whose samples are {_seen(samples)}; they must be floats of 16 bits or more"
        )
    shape = tuple(samples.shape)
    if not FEWEST_DIMS <= len(shape) <= MOST_DIMS or 0 in shape:
        raise _WrongError(
            f"a LATENT of the shape {shape}; it must be (batch, channels, height, width), or have "
            "one dimension more or less, and none may be 0"
        )
    _check_finite("a LATENT whose samples hold", samples)
    if kind.id == SHOWN:
        return value
    mask = value.get("noise_mask")
    if mask is not None:
        if not _is_array(mask) or not 2 <= mask.ndim <= MOST_DIMS or 0 in mask.shape:
            raise _WrongError(f"a LATENT whose noise_mask is {_seen(mask)}; connect a MASK")
        _check_finite("a LATENT whose noise_mask holds", mask)
    indices = value.get("batch_index")
    if indices is not None:
        indices = indices.tolist() if getattr(indices, "ndim", 0) == 1 else indices
        indices = list(indices) if isinstance(indices, (list, tuple, range)) else []
        if len(indices) not in (1, len(samples)) or not all(_is_index(index) for index in indices):
            raise _WrongError(
                f"a LATENT whose batch_index is {quoted(value['batch_index'])}; it must be a list "
                f"of {len(samples)} whole numbers from 0, one for each item"
            )
    return value


def _is_array(value: Any) -> bool:
    """Return whether a value is an ordinary tensor of floats that arithmetic is defined for."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.itemsize > 1
        and value.layout == torch.strided
        and value.device.type != "meta"
    )


def _is_index(value: Any) -> bool:
    """Return whether a value can be a latent's place in a batch."""
    value = _plain(value)
    return isinstance(value, numbers.Integral) and 0 <= value < 2**31


def _check_conditioning(kind: io.Input, value: Any) -> list:
    """Return a CONDITIONING: pairs of a finite tensor, or None, and a dict."""
    if not isinstance(value, (list, tuple)) or not value:
        raise _WrongError(f"{_seen(value)}; connect a CONDITIONING")
    for pair in value:
        if not (
            isinstance(pair, (list, tuple))
            and len(pair) >= 2
            and isinstance(pair[0], (Tensor, type(None)))
            and isinstance(pair[1], dict)
        ):
            raise _WrongError(
                f"a list that holds {_seen(pair)}; a CONDITIONING holds pairs of a tensor and a "
                "dict"
            )
        problem = problem_of(pair[1])
        if problem:
            raise _WrongError(f"a CONDITIONING whose {problem}")
        about = {"tensor": pair[0], **{name: pair[1].get(name) for name in TENSORS}}
        for name, tensor in about.items():
            if _is_array(tensor):
                _check_finite(f"a CONDITIONING whose {quoted(name)} holds", tensor)
    return value


def _check_finite(what: str, tensor: Tensor) -> None:
    if not is_finite(tensor):
        count = count_not_finite(tensor)
        raise _WrongError(
            f"{what} {count} numbers that are not finite (NaN or infinity), from which only black "
            "pictures come; look for the cause in the nodes before"
        )


def _seen(value: Any) -> str:
    """Describe a value for a message."""
    if value is None:
        return "null, nothing"
    if isinstance(value, Tensor):
        where = f" on {value.device}" if value.device.type == "meta" else ""
        return (
            f"a tensor of {value.dtype} ({value.layout}) and the shape {tuple(value.shape)}" + where
        )
    if isinstance(value, (str, numbers.Number)):
        return quoted(value)
    kind = type(value).__name__
    if isinstance(value, dict):
        return f"a {kind} with the keys {quoted(list(value)[:8])}"
    if isinstance(value, (list, tuple)):
        return f"a {kind} of {len(value)} values"
    return f"a {kind}"


CHECKS: dict[str, Callable[[Any, Any], Any]] = {
    "STRING": _check_text,
    "INT": _check_number,
    "FLOAT": _check_number,
    "BOOLEAN": _check_switch,
    "MODEL": _check_model,
    "GM_SOURCE": _check_source,
    "LATENT": _check_latent,
    "SAMPLER": _check_sampler,
    "VAE": _check_vae,
    "IMAGE": _check_images,
    "CONDITIONING": _check_conditioning,
}
