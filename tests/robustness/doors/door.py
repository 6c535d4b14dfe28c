"""Describe a door: sound files, what a user does with them, and how they are changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from ..children import Limits
from ..mutations import arrays, json_text, pickles, pictures, plain, tensors, trees

Change = Callable[[Path, Random], str]
BYTES: tuple[Change, ...] = (plain.change_bytes,) * 3 + (plain.change_kind,)
CHANGES: dict[str, tuple[Change, ...]] = {
    "safetensors": (
        *(tensors.change_metadata, tensors.change_tensors) * 3,
        tensors.change_header,
        plain.change_length,
        *BYTES,
    ),
    "json": (*(json_text.change_json,) * 9, *BYTES),
    "npy": (*(arrays.change_npy,) * 6, *BYTES),
    "npz": (*(arrays.change_npz,) * 6, *BYTES),
    "pickle": (*(pickles.change_pickle,) * 8, *BYTES),
    "bytes": BYTES,
    "pictures": (pictures.change_pictures,),
    "tree": (trees.change_tree,),
}
OF_FOLDERS = ("pictures", "tree")  # kinds of changes of a whole folder


class Door(NamedTuple):
    """One door.

    Args:
        name: of its row.
        make: writes sound files into an empty folder.
        use: does with the folder what a user does; returns the values that must be finite.
        files: pattern of files in the folder -> kind of their changes, a key of CHANGES.
        share: of the cases, relative to the other doors.
        limits: of each case.
        command: it ends as a command does, with one line "error: ...".
        names: further names that a message may give instead of the folder's.
        inputs: in place of `files`, for a door without files: changes what `use` is called with.
    """

    name: str
    make: Callable[[Path], None]
    use: Callable[..., Any]
    files: dict[str, str]
    share: float = 1
    limits: Limits = Limits()
    command: bool = False
    names: tuple[str, ...] = ()
    inputs: Callable[[Random], tuple[str, Any, tuple[str, ...]]] | None = None

    def change(self, folder: Path, rng: Random) -> str:
        """Change one file of the folder, sometimes two, and return what was done."""
        about = []
        for _ in range(rng.choice((1, 1, 1, 1, 1, 1, 2))):
            pattern = rng.choice(sorted(self.files))
            kind = self.files[pattern]
            found = sorted(folder.glob(pattern))
            found = [p for p in found if (p.is_dir() if kind in OF_FOLDERS else _is_small(p))]
            if found:
                path = rng.choice(found)
                about.append(self._changed(path, kind, rng))
        return "; then ".join(about)

    def _changed(self, path: Path, kind: str, rng: Random) -> str:
        """Apply one change; one that this file's state does not allow becomes one of bytes."""
        change = rng.choice(CHANGES[kind])
        before = None if kind in OF_FOLDERS else path.read_bytes()
        try:
            return change(path, rng)
        except Exception:  # the file is changed already, and of another form now
            if before is None or not path.is_file():
                return f"{path.name}: nothing more"
            path.write_bytes(before)
            return plain.change_bytes(path, rng)


def _is_small(path: Path) -> bool:
    """Return whether a file is one that can be changed further: regular, and not 2 GB long."""
    return path.is_file() and path.stat().st_size < 2**28


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder of sound files for one case."""
    shutil.copytree(source, target, symlinks=True)


def names_in(folder: Path) -> list[str]:
    """Return the folder's path and the names in it; a message about it holds one of them.

    Names without a dot are words like "out" or "train": they count in a path, or in quotes.
    """
    found = {str(folder)}
    for number, (_, folders, files) in enumerate(os.walk(folder)):
        for name in [*folders, *files]:
            found |= {name} if "." in name[1:] else {f"/{name}", f"{name}/", f"'{name}'"}
        if number > 50:
            break
    return sorted(found)
