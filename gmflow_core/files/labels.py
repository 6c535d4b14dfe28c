"""Names of classes: which of them are installed, and which label a user means."""

from __future__ import annotations

import difflib
import functools
import os
from collections import Counter
from collections.abc import Iterable, Sequence

from .checkpoint import read_metadata

MOST_LISTED = 8  # classes that an error names


def known_names(paths: Iterable[str]) -> list[str]:
    """The class names of these checkpoints, each once, in order; of classes that share a name, with their numbers."""
    names = [name for path in paths for name in _names_of(path, *_stamp(path))]
    return list(dict.fromkeys(names))


def distinct(names: Sequence[str]) -> list[str]:
    """Names by which `find_label` tells all classes apart: where two are alike, "name (number)"."""
    counts = Counter(name.casefold() for name in names)
    return [
        name if counts[name.casefold()] == 1 else f"{name} ({label})"
        for label, name in enumerate(names)
    ]


@functools.lru_cache(maxsize=256)
def _names_of(path: str, *stamp: float) -> tuple[str, ...]:
    """The class names of one checkpoint; none if it cannot be read (loading it says why)."""
    try:
        return tuple(
            distinct([str(name) for name in read_metadata(path)["data"].get("labels") or []])
        )
    except (OSError, ValueError):
        return ()


def _stamp(path: str) -> tuple[float, ...]:
    """What changes when the names do."""
    try:
        stat = os.stat(os.path.join(path, "model_index.json") if os.path.isdir(path) else path)
    except OSError:
        return (0.0,)
    return stat.st_mtime, stat.st_size


def find_label(text: str, names: Sequence[str], num_classes: int) -> int:
    """The label that `text` means: a class's whole name (as `distinct` has it), one of the synonyms that a comma separates in
    it, its number, or a part of the name that no other class has. Case does not matter.

    Args:
        names: of the classes, by number; empty if the checkpoint gives none.

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
            f"{text.strip()!r} fits {len(found)} classes: {_listed(found, names)}. Give a whole name or a number"
        )
    if not names:
        raise ValueError(
            f"{text.strip()!r}: this checkpoint names no classes; give a number from 0 to {num_classes - 1}"
        )
    close = difflib.get_close_matches(
        wanted, [part for parts in synonyms for part in parts], MOST_LISTED, 0.5
    )
    near = [
        label
        for part in dict.fromkeys(close)
        for label, parts in enumerate(synonyms)
        if part in parts
    ]
    hint = (
        f"near it: {_listed(near, names)}"
        if near
        else f"its classes: {_listed(range(len(names)), names)}"
    )
    raise ValueError(
        f"this model has no class {text.strip()!r}; {hint}. A number from 0 to {num_classes - 1} will do too"
    )


def _listed(labels: Sequence[int], names: Sequence[str]) -> str:
    """The first few, with their numbers."""
    rest = len(labels) - MOST_LISTED
    return "; ".join(f"{label} {names[label]}" for label in labels[:MOST_LISTED]) + (
        f"; and {rest} more" if rest > 0 else ""
    )
