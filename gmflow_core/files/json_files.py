"""Read JSON from files that may be damaged or hostile, and write JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .atomic import atomic_write
from .errors import FileError, check_regular_file, quoted, reading

DEEPEST = 64  # levels of nesting
LARGEST = 64 * 2**20  # bytes of a file
EDITED = "the file was edited or damaged"


def read_json(path: str | Path, advice: str = EDITED, largest: int = LARGEST) -> Any:
    """Read a JSON file of at most `largest` bytes and DEEPEST levels.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: it is no such JSON, too large, or cannot be read.
    """
    check_regular_file(path)
    with reading(path, advice, "cannot be read"), open(path, "rb") as file:
        raw = file.read(largest + 1)
    if len(raw) > largest:
        raise FileError(path, f"has more than {largest:,} bytes, too many for its kind", advice)
    with reading(path, advice, "is no JSON"):
        text = raw.decode("utf-8-sig")
    return parse_json(text, path, advice)


def parse_json(text: str, path: str | Path, advice: str = EDITED, what: str = "content") -> Any:
    """Parse JSON that stands in a file, such as in a safetensors file's metadata.

    Args:
        text: the JSON.
        path, advice: as for `FileError`.
        what: what the text is, such as "config".

    Raises:
        FileError: it is no JSON, or nested deeper than DEEPEST levels.
    """
    with reading(path, advice, f"has no readable {what}"):
        value = json.loads(text)
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [part for each in level if isinstance(each, (dict, list)) for part in _parts(each)]
        if not level:
            return value
    raise FileError(path, f"has a {what} nested more than {DEEPEST} levels deep", advice)


def _parts(value: dict | list) -> list:
    """List what a list or an object of JSON contains."""
    return list(value.values() if isinstance(value, dict) else value)


def json_object(text: str, path: str | Path, what: str, advice: str = EDITED) -> dict[str, Any]:
    """Parse JSON that has to be an object; the arguments are those of `parse_json`.

    Raises:
        FileError: it is something else.
    """
    value = parse_json(text, path, advice, what)
    if not isinstance(value, dict):
        raise FileError(path, f"has the {what} {quoted(value)} instead of an object", advice)
    return value


def write_json(path: str | Path, value: Any, indent: int = 1) -> None:
    """Write a JSON file, atomically.

    Text stays as it is, except that names of files which are not UTF-8 are written as escapes.

    Raises:
        WriteError: it cannot be written.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raw = (json.dumps(value, indent=indent) + "\n").encode()
    with atomic_write(path) as temporary:
        temporary.write_bytes(raw)
