"""Inert values that stand for what a pickle names: classes, NumPy's types and arrays, objects."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

DIMENSIONS, LONGEST = 32, 2**48  # of an array's shape
SHOWN = 60  # characters of a text that a message shows
TYPES = {  # NumPy's types of numbers, and the letters of the module struct
    **{"b1": "?", "f2": "e", "f4": "f", "f8": "d"},
    **{"i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"},
}
NATIVE = "<" if sys.byteorder == "little" else ">"


class Refused(ValueError):
    """What a pickle does that arrays never need, or that is too much."""


class Record:
    """Stand-in for an object of a class that is not loaded: its attributes and its parts."""

    __slots__ = ("attributes", "parts")

    def __init__(self, parts: list[Any]):
        self.attributes: dict[Any, Any] = {}
        self.parts = parts


class Name:
    """Class or function that a pickle names; `make` returns the value of a call."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[[Any, Any], Any]):
        self.make = make


class Type:
    """Stand-in for numpy.dtype; `code` is like "<f8", None if it is not of numbers."""

    __slots__ = ("code", "text")

    def __init__(self, text: Any):
        self.text = text if isinstance(text, str) else ""
        self.code: str | None = None
        self.set_order(self.text[:1])

    def set_order(self, order: Any) -> None:
        """Take the order of the bytes from a pickle; the machine's own unless it is < or >."""
        bare = self.text.lstrip("<>=|")
        if bare in TYPES:
            self.code = (order if order in ("<", ">") else NATIVE) + bare


class Array:
    """Stand-in for numpy.ndarray, and for joblib's wrapper of an array that follows in the file.

    `raw` is None until the content comes, and stays None if that is not of numbers.
    """

    __slots__ = ("follows", "order", "raw", "shape", "type")

    def __init__(self, follows: bool = False):
        self.follows, self.raw = follows, None

    def fill(self, raw: Any, kind: Any, shape: Any, order: Any) -> Array:
        """Take the content, after a check that its size is that of the shape.

        Args:
            order: "C" or "F"; or axes, as for numpy.transpose of the array in the order "C".
        """
        if not isinstance(kind, Type):
            raise Refused(f"it has an array of the type {named(kind)}")
        if kind.code is None:
            return self
        size = size_of(kind.code, shape)
        in_order = order in ("C", "F") if isinstance(order, str) else are_axes(order, len(shape))
        if not in_order or not isinstance(raw, (bytes, memoryview)):
            raise Refused(f"it has an array in the order {shown(order)} of {named(raw)}")
        if size != len(raw):
            raise Refused(f"it has an array of {len(raw)} bytes whose shape needs {size}")
        self.raw, self.type, self.shape, self.order = raw, kind.code, tuple(shape), order
        return self


def are_axes(order: Any, dimensions: int) -> bool:
    """Return whether a value from outside names each of an array's axes once."""
    if not isinstance(order, (tuple, list)) or len(order) != dimensions:
        return False
    return all(type(axis) is int for axis in order) and sorted(order) == list(range(dimensions))


def size_of(code: str, shape: Any) -> int:
    """Return the bytes of an array of a type and a shape, both from outside.

    Raises:
        Refused: it is no shape.
    """
    if not isinstance(shape, (tuple, list)) or len(shape) > DIMENSIONS:
        raise Refused(f"it has an array whose shape is {named(shape)}")
    size = int(code[2:])
    for n in shape:
        if not isinstance(n, int) or not 0 <= n < LONGEST:
            raise Refused(f"it has an array with a dimension that is {named(n)} or out of range")
        size *= n
    return size


def shown(text: Any) -> str:
    """Return text from a pickle for a message; of other values only what they are."""
    return ascii(text[:SHOWN]) if isinstance(text, str) else named(text)


def named(value: Any) -> str:
    """Say what kind of value this is."""
    return "a function" if isinstance(value, Name) else f"a value of type {type(value).__name__}"
