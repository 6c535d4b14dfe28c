"""Check the settings of networks, which may come from a file."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

import torch

from ..flow.policy import DXVelocity

MOST = 2**31 - 1  # the largest whole number that any setting can mean
MOST_LAYERS = 1024  # of each kind
MOST_CLASSES = 10**6
LARGEST_SAMPLE = 2**26  # numbers in one sample, 256 MB
LARGEST_NUMBER = 1e30  # that any setting can mean, far below what a float32 holds


def is_count(value: Any, least: int = 1, most: int = MOST) -> bool:
    """Return whether a value, such as one of JSON, is a whole number in a range."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: Any, least: float = -LARGEST_NUMBER, most: float = LARGEST_NUMBER) -> bool:
    """Return whether a value, such as one of JSON, is a number in a range; NaN never is."""
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and least <= value <= most


def check_settings(config: Any) -> None:
    """Check that the fields of a network's config have the types that its annotations name.

    Converts lists, as JSON gives them, to tuples. Numbers have to be finite, whole numbers between
    -MOST and MOST, and numbers of layers at most MOST_LAYERS.

    Raises:
        ValueError: a field has another type, or a number is out of range; the message quotes it.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, list):
            value = tuple(value)
            object.__setattr__(config, field.name, value)
        kinds = _kinds(hints[field.name])
        if not any(_fits(value, kind) for kind in kinds):
            names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
            raise ValueError(f"{field.name} is {_short(value)}; it must be of type {names}")
        layers = value if field.name.endswith("layers") else 0
        count = len(layers) if isinstance(layers, tuple) else layers
        if (count or 0) > MOST_LAYERS:
            raise ValueError(f"{field.name} has {count} layers; the most is {MOST_LAYERS}")


def check_dx(config: Any) -> None:
    """Check the settings of a network that predicts a DX policy instead of a mixture.

    Raises:
        ValueError: one is out of range, or is of a mixture.
    """
    if config.dx_segment is None:
        return
    DXVelocity(torch.empty(0), config.dx_segment, config.dx_shift)  # checks both
    for name in ("constant_log_std", "spectrum_layers"):
        if getattr(config, name, None) is not None:
            raise ValueError(
                f"{name} is {getattr(config, name)}, and dx_segment {config.dx_segment}; a DX "
                "policy has none"
            )


def _kinds(hint: Any) -> tuple:
    """Return the alternatives of a type annotation."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return typing.get_args(hint)
    return (hint,)


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value is of the kind that an annotation names."""
    if kind is type(None):
        return value is None
    if kind is float:
        return is_number(value)
    if kind is int:
        return is_count(value, -MOST)
    if typing.get_origin(kind) is tuple:  # tuple[int, ...]
        item = typing.get_args(kind)[0]
        return isinstance(value, tuple) and all(_fits(each, item) for each in value)
    return isinstance(value, kind)


def _short(value: Any) -> str:
    """Return the start of a value's `repr`."""
    try:
        text = repr(value)
    except ValueError:  # an integer of many thousand digits
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= 80 else text[:77] + "..."
