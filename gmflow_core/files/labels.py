"""List the class names of checkpoints, and find the label that a user's text means."""

from __future__ import annotations

import difflib
import functools
import os
from collections import Counter
from collections.abc import Iterable, Sequence

from .checkpoint import read_metadata

MOST_LISTED = 8  # classes that an error names


def known_names(paths: Iterable[str]) -> list[str]:
    """List the class names of these checkpoints, each once, in order, as `distinct` spells them."""
    names = [name for path in paths for name in _names_of(path, *_stamp(path))]
    return list(dict.fromkeys(names))


def distinct(names: Sequence[str]) -> list[str]:
    """Return unique names for `find_label`: "name (number)" where two classes share a name."""
    counts = Counter(name.casefold() for name in names)
    return [
        name if counts[name.casefold()] == 1 else f"{name} ({label})"
        for label, name in enumerate(names)
    ]


@functools.lru_cache(maxsize=256)
def _names_of(path: str, *stamp: float) -> tuple[str, ...]:
    """Return the class names of one checkpoint; none if it cannot be read (loading says why).

    The stamp is part of the cache's key: a changed file is read again.
    """
    try:
        return tuple(
            distinct([str(name) for name in read_metadata(path)["data"].get("labels") or []])
        )
    except (OSError, ValueError):
        return ()


def _stamp(path: str) -> tuple[float, ...]:
    """Return the modification time and size of the file that holds the names."""
    try:
        stat = os.stat(os.path.join(path, "model_index.json") if os.path.isdir(path) else path)
    except OSError:
        return (0.0,)
    return stat.st_mtime, stat.st_size


def find_label(text: str, names: Sequence[str], num_classes: int) -> int:
    """Find the label that `text` means.

    In this order: a class's whole name (as `distinct` spells it), one of the comma-separated
    synonyms in a name, a class's number, a part of exactly one name. Case does not matter.

    Args:
        text: what the user wrote.
        names: the classes' names by number; empty if the checkpoint gives none.
        num_classes: number of classes.

    Raises:
        ValueError: it fits no class, or several; the message lists the nearest.
    """
    wanted = text.strip().casefold()
    names = distinct(names)
    folded = [name.casefold() for name in names]
    synonyms = [[part.strip() for part in name.split(",")] for name in folded]
    whole = [label for label, name in enumerate(folded) if wanted == name]
    whole = whole or [label for label, parts in enumerate(synonyms) if wanted in parts]
    if not whole and wanted.isdecimal():
        if int(wanted) < num_classes:
            return int(wanted)
        raise ValueError(
            f"there is no class {wanted}; this model's are numbered from 0 to {num_classes - 1}"
        )
    found = whole or [label for label, name in enumerate(folded) if wanted and wanted in name]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{text.strip()!r} fits {len(found)} classes: {_listed(found, names)}. "
            "Give a whole name or a number"
        )
    if not names:
        raise ValueError(
            f"{text.strip()!r}: this checkpoint names no classes; "
            f"give a number from 0 to {num_classes - 1}"
        )
    raise ValueError(
        f"this model has no class {text.strip()!r}; {_nearest(wanted, synonyms, names)}. "
        f"A number from 0 to {num_classes - 1} will do too"
    )


def _nearest(wanted: str, synonyms: Sequence[Sequence[str]], names: Sequence[str]) -> str:
    """List the classes with the closest spelling; all classes if none is close."""
    every = [part for parts in synonyms for part in parts]
    close = dict.fromkeys(difflib.get_close_matches(wanted, every, MOST_LISTED, 0.5))
    near = [label for part in close for label, parts in enumerate(synonyms) if part in parts]
    if near:
        return f"near it: {_listed(near, names)}"
    return f"its classes: {_listed(range(len(names)), names)}"


def _listed(labels: Sequence[int], names: Sequence[str]) -> str:
    """Name the first few labels with their numbers."""
    rest = len(labels) - MOST_LISTED
    return "; ".join(f"{label} {names[label]}" for label in labels[:MOST_LISTED]) + (
        f"; and {rest} more" if rest > 0 else ""
    )
