"""Read readable names of classes from JSON, or from a Python dict as ImageNet's users pass around.

    {0: 'tench, Tinca tinca',
     1: 'goldfish, Carassius auratus',
     ...}

That is imagenet1000_clsidx_to_labels.txt, whose numbers are those of the sorted class folders. The
file of that name in GMFlow's own repository has no braces.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from gmflow_core.files.data_record import LONGEST_NAME
from gmflow_core.files.errors import FileError, check_regular_file, printable, quoted, reading
from gmflow_core.files.json_files import read_json

ADVICE = "give --class-names a JSON file or a Python dict of names, or leave it out"
LARGEST = 4 * 2**20  # bytes of a file of names
STRING = r"""(?:'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*\")"""
KEY = rf"\s*(\d{{1,18}}|{STRING})\s*:"
START = re.compile(r"\s*\{?\s*(?:\d+\s*:|')")  # no JSON begins so
ENTRY = re.compile(rf"{KEY}\s*({STRING})\s*(?:,\s*|\Z)")


def read_class_names(path: Path | None, folders: list[str]) -> list[str]:
    """Read readable names of the class folders; without a file, return `folders`.

    The file holds a list in the order of the folders, {folder: name}, or {number: name}, as JSON or
    as a Python dict. What cannot be printed in a name is written as an escape.

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
    if not START.match(raw[:1000].decode("utf-8-sig", "replace")):
        return read_json(path, ADVICE, LARGEST)
    if len(raw) > LARGEST:
        raise FileError(path, f"has more than {LARGEST:,} bytes, too many for its kind", ADVICE)
    with reading(path, ADVICE, "is no text"):
        text = raw.decode("utf-8-sig")
    return parse_python_dict(text, path)


def parse_python_dict(text: str, path: Path) -> dict[str, str]:
    """Parse a Python dict of names by number or folder; nothing in it is run.

    Only whole numbers and plain strings are read, one after the other, so that neither nesting nor
    operators can take time or memory.

    Raises:
        FileError: it holds something else.
    """
    names: dict[str, str] = {}
    text = text.strip()
    if text[:1] == "{":
        if text[-1:] != "}":
            raise FileError(path, "is no whole dict of names: its } is missing", ADVICE)
        text = text[1:-1].strip()
    place = 0
    while place < len(text):
        entry = ENTRY.match(text, place)
        if entry is None:
            found = f"is no dict of names: {quoted(text[place : place + 60].strip())} stands in it"
            raise FileError(path, found, ADVICE)
        with reading(path, ADVICE, "holds a string that cannot be read"):
            key, name = (ast.literal_eval(part) for part in entry.group(1, 2))
        if str(key) in names:
            raise FileError(path, f"names the class {quoted(key)} twice", "correct it")
        names[str(key)] = name
        place = entry.end()
    return names
