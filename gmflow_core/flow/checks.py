"""Check whole numbers that callers give: steps, substeps, seeds, numbers of classes."""

from __future__ import annotations

import operator
from typing import Any

MOST_STEPS = 10**6  # of a solver, and substeps
MOST_SAID = 60  # characters of a value that a message quotes


def whole_number(name: str, value: Any, least: int = 1, most: int = MOST_STEPS) -> int:
    """Return a whole number as an int; integers of NumPy and PyTorch are whole numbers too.

    Args:
        name: what it is, for the message.
        value: as the caller gave it.
        least, most: its range, both ends included.

    Raises:
        ValueError: it is no whole number, such as 2.0, True or "2", or out of range.
    """
    number = as_whole(value)
    if number is None or not least <= number <= most:
        raise ValueError(
            f"{name} is {said(value)}; it has to be a whole number from {least} to {_limit(most)}"
        )
    return number


def as_whole(value: Any) -> int | None:
    """Return a value as an int if it is a whole number, as for `whole_number`; else None."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def listed(values: Any) -> list:
    """Return values as a list; a text, a number or the like is a list of itself alone."""
    if isinstance(values, (str, bytes)):
        return [values]
    try:
        return list(values)
    except TypeError:
        return [values]


def said(value: Any) -> str:
    """Return a value in printable ASCII, cut."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # ValueError: an integer of very many digits
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= MOST_SAID else f"{text[: MOST_SAID - 3]}..."


def _limit(number: int) -> str:
    """Return a limit in digits, or as a power of 2 less 1."""
    power = number.bit_length()
    return f"2**{power} - 1" if power > 40 and number == 2**power - 1 else f"{number:,}"
