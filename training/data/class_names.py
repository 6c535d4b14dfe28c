"""Read readable names of classes from JSON, or from Python as ImageNet's users pass it around.

    {0: 'tench, Tinca tinca',
     1: 'goldfish, Carassius auratus',
     ...}

That is imagenet1000_clsidx_to_labels.txt, whose numbers are those of the sorted class folders. The
file of that name in GMFlow's own repository has no braces. Lists and comments are read too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from gmflow_core.files.data_record import LONGEST_NAME
from gmflow_core.files.errors import FileError, check_regular_file, printable, quoted, reading
from gmflow_core.files.json_files import parse_json

ADVICE = "give --class-names a JSON file, or a Python dict or list, of names, or leave it out"
LARGEST = 4 * 2**20  # bytes of a file of names
TOKEN = re.compile(r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"|\d{1,18}|[{}\[\]:,]""")
SPACE = re.compile(r"(?:\s|#[^\n]*)*")  # and comments


def read_class_names(path: Path | None, folders: list[str]) -> list[str]:
    """Read readable names of the class folders; without a file, return `folders`.

    The file holds a list in the order of the folders, {folder: name}, or {number: name}, as JSON or
    as Python. What cannot be printed in a name is written as an escape.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is no such list or dict, or does not name every class.
    """
    if path is None:
        return [printable(folder, LONGEST_NAME) for folder in folders]
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; {ADVICE}")
    names = _read(path)
    if isinstance(names, dict):
        by_folder = any(folder in names for folder in folders)
        keys = folders if by_folder else [str(label) for label in range(len(folders))]
        missing = [key for key in keys if key not in names]
        if missing:
            raise ValueError(
                f"{path} names {len(names)} classes but not {quoted(missing[0])}; add it"
            )
        if by_folder or len(names) == len(folders):  # else the numbers are those of other folders
            names = [names[key] for key in keys]
        else:
            names = list(names.values())
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} must hold a list of names, or an object of them")
    if len(names) != len(folders):
        raise ValueError(
            f"{path} names {len(names)} classes, but the images are in {len(folders)} class folders"
        )
    return [printable(name, LONGEST_NAME) for name in names]


def _read(path: Path) -> Any:
    """Read the content of a file of names; a Python dict has its keys as text, as JSON has."""
    check_regular_file(path)
    with reading(path, ADVICE, "cannot be read"), open(path, "rb") as file:
        raw = file.read(LARGEST + 1)
    if len(raw) > LARGEST:
        raise FileError(path, f"has more than {LARGEST:,} bytes, too many for its kind", ADVICE)
    with reading(path, ADVICE, "is no text"):
        text = raw.decode("utf-8-sig")
    try:
        return parse_json(text, path)
    except FileError:
        return parse_python_names(text, path)


def parse_python_names(text: str, path: Path) -> dict[str, str] | list[str]:
    """Parse a Python list of names, or a dict of them by number or folder; nothing in it is run.

    Only whole numbers and plain strings are read, one after the other, so that neither nesting nor
    operators can take time or memory.

    Raises:
        FileError: it holds something else.
    """
    tokens = _tokens(text)
    names: dict[str, str] = {}
    sign, place = opening, _ = next(tokens)
    closing = {"{": "}", "[": "]"}.get(opening, "")
    if closing:
        sign, place = next(tokens)
    while sign != closing:
        key = str(len(names))
        if opening != "[":
            key, (colon, _), (sign, _) = _value(sign, path), next(tokens), next(tokens)
            if key is None or colon != ":":
                raise _stranger(text, place, closing, path)
        if sign[:1] not in ("'", '"'):
            raise _stranger(text, place, closing, path)
        if key in names:
            raise FileError(path, f"names the class {quoted(key)} twice", "correct it")
        names[key] = _value(sign, path)
        sign, place = next(tokens)
        if sign == ",":
            sign, place = next(tokens)
        elif sign != closing:
            raise _stranger(text, place, closing, path)
    sign, place = next(tokens)
    if sign:
        raise _stranger(text, place, "", path)
    return list(names.values()) if opening == "[" else names


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    """Split a text into strings, numbers and signs, each with its place; "" for ever at its end.

    What is none of these comes as one character.
    """

    def split() -> Iterator[tuple[str, int]]:
        place = SPACE.match(text).end()
        while place < len(text):
            token = TOKEN.match(text, place)
            end = token.end() if token else place + 1
            yield text[place:end], place
            place = SPACE.match(text, end).end()

    return chain(split(), repeat(("", len(text))))


def _value(token: str, path: Path) -> str | None:
    """Return a string's content, or a number, as text; None for anything else."""
    if token[:1].isdecimal():
        return str(int(token))
    if len(token) < 2:
        return None
    with reading(path, ADVICE, "holds a string that cannot be read"):
        return ast.literal_eval(token)


def _stranger(text: str, place: int, closing: str, path: Path) -> FileError:
    """Return the error of a text that holds something else at a place."""
    rest = text[place : place + 60].strip()
    found = f"{quoted(rest)} stands in it" if rest else f"its {closing or 'end'} is missing"
    return FileError(path, f"is neither JSON nor a Python list or dict of names: {found}", ADVICE)
