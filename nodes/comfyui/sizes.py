"""Refuse tensors that no machine has the memory for, before they are made."""

from __future__ import annotations

import math

LARGEST = 2**30  # numbers, 4 GB in float32


def check_size(what: str, count: int, shape: tuple[int, ...], advice: str) -> None:
    """Check that `count` tensors of a shape can be made.

    Args:
        what: what they are, in the plural, such as "images".
        advice: what to do if they cannot.

    Raises:
        ValueError: they have more than LARGEST numbers.
    """
    if count * math.prod(shape) > LARGEST:
        raise ValueError(
            f"{count:,} {what} of the shape {tuple(shape)} are too many for the memory: they hold "
            f"{count * math.prod(shape):,} numbers, and the most is {LARGEST:,}; {advice}"
        )
