"""Check a checkpoint's record of what its samples are (the `data` of `save_checkpoint`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..models.settings import MOST_CLASSES, is_count, is_number
from .errors import FileError, printable, quoted
from .json_files import EDITED

LONGEST_NAME = 500  # characters of a class's name
CONDITIONINGS = ("mode", "hidden")
MOST_STEPS = 1000
STUDENTS = ("GMFlow", "DX")  # policies of distilled models
STUDENT_RANGES = {"shift": (1e-3, 1e3), "final_step_size": (1e-3, 1), "temperature": (0, 1)}


def checked_data(data: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Return the record with class names that can be printed, after a check of what is known of it.

    Raises:
        FileError: `labels`, `space`, `scaling_factor` or `source` is not what `save_checkpoint`
            writes; the message quotes it.
    """
    labels = data.get("labels")
    if labels is not None:
        if not isinstance(labels, list) or not all(isinstance(name, str) for name in labels):
            raise _wrong("labels", labels, "a list of names", path)
        if len(labels) > MOST_CLASSES:
            raise FileError(path, f"names {len(labels):,} classes; the most is {MOST_CLASSES:,}")
        data = {**data, "labels": [printable(name, LONGEST_NAME) for name in labels]}
    space = data.get("space")
    if space is not None and not isinstance(space, str):
        raise _wrong("space", space, "a name", path)
    factor = data.get("scaling_factor")
    if factor is not None and not (is_number(factor) and factor > 0):
        raise _wrong("scaling_factor", factor, "a positive number", path)
    if data.get("source") is not None:
        _check_source(data["source"], path)
    if data.get("few_steps") is not None:
        _check_few_steps(data["few_steps"], path)
    return data


def _check_few_steps(few_steps: Any, path: str | Path) -> None:
    """Check the record of what a distilled model was made for.

    Raises:
        FileError: it lacks an entry, or has a wrong one.
    """
    if not isinstance(few_steps, dict):
        raise _wrong("few_steps", few_steps, "an object", path)
    steps, policy = few_steps.get("steps"), few_steps.get("policy")
    if not is_count(steps, most=MOST_STEPS):
        raise _wrong("few_steps' steps", steps, f"a number from 1 to {MOST_STEPS}", path)
    if policy not in STUDENTS:
        raise _wrong("few_steps' policy", policy, f"one of {', '.join(STUDENTS)}", path)
    for name, (low, high) in STUDENT_RANGES.items():
        if not is_number(few_steps.get(name), low, high):
            found = few_steps.get(name)
            raise _wrong(f"few_steps' {name}", found, f"a number from {low:g} to {high:g}", path)
    guidance = few_steps.get("guidance", "")
    if not isinstance(guidance, str) or printable(guidance, LONGEST_NAME) != guidance:
        raise _wrong("few_steps' guidance", guidance, "a short text", path)


def _check_source(source: Any, path: str | Path) -> None:
    """Check the record of the mixture source that a model was trained with.

    Raises:
        FileError: it lacks an entry, or has a wrong one.
    """
    if not isinstance(source, dict):
        raise _wrong("source", source, "an object", path)
    if source.get("conditioning") not in CONDITIONINGS:
        expected = f"one of {', '.join(CONDITIONINGS)}"
        raise _wrong("source's conditioning", source.get("conditioning"), expected, path)
    modes = source.get("num_modes")
    if not is_count(modes):
        raise _wrong("source's num_modes", modes, "a number of modes", path)
    shape = source.get("shape")
    if not isinstance(shape, list) or not shape or not all(map(is_count, shape)):
        raise _wrong("source's shape", shape, "a list of sizes", path)


def _wrong(name: str, value: Any, expected: str, path: str | Path) -> FileError:
    return FileError(path, f"has the {name} {quoted(value)} instead of {expected}", EDITED)
