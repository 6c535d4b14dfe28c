"""List the class names of checkpoints, and find the label that a user's text means."""

from __future__ import annotations

import difflib
import functools
import os
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ..flow.checks import as_whole, listed, said
from .checkpoint import read_metadata
from .errors import MOST_QUOTED, printable, quoted

MOST_LISTED = 8  # classes that an error names of many
MOST_IN_FULL, LONGEST_IN_FULL = 20, 400  # classes, and characters, up to which it names them all
LONGEST_SAID = 80  # characters of each
MOST_NAMES = 20_000  # that `known_names` lists
MOST_READ = 1_000  # checkpoints whose names it reads
MOST_SECONDS = 5.0  # that it takes
MOST_COMPARED = 10_000  # names that are searched for a similar one
MOST_DIGITS = 18  # of a class's number
LARGEST_HEADER = 16 * 2**20  # bytes of the part of a file that holds its names


def known_names(paths: Iterable[str]) -> tuple[list[str], bool]:
    """List the class names of these checkpoints, each once, in order, as `distinct` spells them.

    What cannot be read is left out: loading it says why. The list holds at most MOST_NAMES, from at
    most MOST_READ checkpoints, as many as can be read in MOST_SECONDS.

    Returns:
        The names, and whether they are all.
    """
    names: dict[str, None] = {}
    end = time.monotonic() + MOST_SECONDS
    for count, path in enumerate(paths):
        if count >= MOST_READ or time.monotonic() > end:
            return list(names), False
        names.update(dict.fromkeys(_names_of(path, *_stamp(path))))
        if len(names) > MOST_NAMES:
            return list(names)[:MOST_NAMES], False
    return list(names), True


def distinct(names: Sequence[str]) -> list[str]:
    """Return unique names for `find_label`: "name (number)" where two classes share a name."""
    counts = Counter(folded(name) for name in names)
    return [
        name if counts[folded(name)] == 1 else f"{name} ({label})"
        for label, name in enumerate(names)
    ]


def folded(text: str) -> str:
    """Return a text as it is compared: without case, an accented letter as one character (NFC)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


@functools.lru_cache(maxsize=MOST_READ)
def _names_of(path: str, *stamp: float) -> tuple[str, ...]:
    """Return the class names of one checkpoint; none if it cannot be read (loading says why).

    The stamp is part of the cache's key: a changed file is read again.
    """
    try:
        if _header_size(path) > LARGEST_HEADER:
            return ()
        names = read_metadata(path)["data"].get("labels") or []
        # interned: many checkpoints have the same names
        return tuple(sys.intern(str(name)) for name in distinct(names[: MOST_NAMES + 1]))
    except Exception:  # one bad file must not take the list away
        return ()


def _header_size(path: str) -> int:
    """Return the bytes that have to be read and parsed for the names of a checkpoint."""
    if os.path.isdir(path):
        return os.path.getsize(_index_of(path))
    with open(path, "rb") as file:
        return int.from_bytes(file.read(8), "little")


def _index_of(folder: str) -> str:
    """Return the file of a model's folder that holds the names."""
    return os.path.join(folder, "model_index.json")


def _stamp(path: str) -> tuple[float, ...]:
    """Return the modification time and size of the file that holds the names."""
    try:
        stat = os.stat(_index_of(path) if os.path.isdir(path) else path)
    except (OSError, ValueError):
        return (0.0,)
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def find_label(text: str, names: Sequence[str], num_classes: int) -> int:
    """Find the label that `text` means.

    In this order: a class's whole name (as `distinct` spells it), one of the comma-separated
    synonyms in a name, a class's number, a part of exactly one name. Case does not matter, nor
    whether an accent is a character of its own, as in names from macOS.

    Args:
        text: what the user wrote.
        names: the classes' names by number; empty if the checkpoint gives none.
        num_classes: number of classes.

    Raises:
        ValueError: it fits no class, or several; the message lists the nearest.
    """
    wanted, told = folded(text.strip()), quoted(text.strip())
    names, wholes, synonyms = _spellings(tuple(names))
    whole = [label for label, name in enumerate(wholes) if wanted == name]
    whole = whole or [label for label, parts in enumerate(synonyms) if wanted in parts]
    if not whole and wanted.isdecimal():
        digits = wanted.lstrip("0") or "0"
        number = int(digits) if len(digits) <= MOST_DIGITS else num_classes
        return checked_number(number, num_classes, wanted)
    found = whole or [label for label, name in enumerate(wholes) if wanted and wanted in name]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{told} fits {len(found)} classes: {_listed(found, names)}. "
            "Give a whole name or a number"
        )
    if not names:
        raise ValueError(
            f"{told}: this checkpoint names no classes; give a number from 0 to {num_classes - 1}"
        )
    raise ValueError(
        f"this model has no class {told}; {_nearest(wanted, synonyms, names)}. "
        f"A number from 0 to {num_classes - 1} will do too"
    )


def label_numbers(labels: Any, names: Sequence[str], num_classes: int) -> list[int]:
    """Return the numbers of classes that are given by name or number, in a list or one alone.

    Args:
        labels: a whole number is a class's number, whatever the classes are called; a text is
            looked up by `find_label`.
        names, num_classes: as for `find_label`.

    Raises:
        ValueError: one fits no class, or several, or is neither text nor whole number.
    """
    return [
        find_label(each, names, num_classes)
        if isinstance(each, str)
        else checked_number(_whole(each), num_classes)
        for each in listed(labels)
    ]


def _whole(label: Any) -> int:
    """Return the number that a label is."""
    number = as_whole(label)
    if number is None:
        raise ValueError(
            f"{said(label)} is no label; give the name of a class, or its number as a whole number"
        )
    return number


def checked_number(label: int, num_classes: int, text: str | None = None) -> int:
    """Return the number of a class, below `num_classes`.

    Args:
        text: how the user wrote it, if not as a number.

    Raises:
        ValueError: there is no such class.
    """
    if 0 <= label < num_classes:
        return label
    raise ValueError(
        f"there is no class {printable(text or quoted(label), MOST_QUOTED)}; this model's are "
        f"numbered from 0 to {num_classes - 1}"
    )


@functools.lru_cache(maxsize=4)
def _spellings(names: tuple[str, ...]) -> tuple[list[str], list[str], list[list[str]]]:
    """Return the distinct names of classes, these as `folded`, and the synonyms in each."""
    names = distinct(names)
    wholes = [folded(name) for name in names]
    return names, wholes, [[part.strip() for part in name.split(",")] for name in wholes]


def _nearest(wanted: str, synonyms: Sequence[Sequence[str]], names: Sequence[str]) -> str:
    """List the classes with the closest spelling; all classes if none is close."""
    every = [part for parts in synonyms for part in parts]
    few = len(every) <= MOST_COMPARED and len(wanted) <= MOST_QUOTED  # comparing takes long
    close = difflib.get_close_matches(wanted, every, MOST_LISTED, 0.5) if few else []
    close = dict.fromkeys(close)
    near = [label for part in close for label, parts in enumerate(synonyms) if part in parts]
    if near:
        return f"near it: {_listed(near, names)}"
    return f"its classes: {_listed(range(len(names)), names)}"


def _listed(labels: Sequence[int], names: Sequence[str]) -> str:
    """Name labels with their numbers, of many the first few; a number that is its name once."""
    said = [
        f"{label} {printable(names[label], LONGEST_SAID)}"
        if names[label] != str(label)
        else names[label]
        for label in labels[:MOST_IN_FULL]
    ]
    if len(labels) <= MOST_IN_FULL and len("; ".join(said)) <= LONGEST_IN_FULL:
        return "; ".join(said)
    rest = len(labels) - MOST_LISTED
    return "; ".join(said[:MOST_LISTED]) + (f"; and {rest} more" if rest > 0 else "")
