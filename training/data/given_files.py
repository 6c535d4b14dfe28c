"""Keep commands from replacing or deleting what they were given."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from gmflow_core.files.errors import printable
from training.data.image_folder import image_endings


def check_kept(files: Iterable[Path], done: str, **given: object) -> None:
    """Check that files which a command writes or deletes are none that it was given.

    Args:
        files: the files, or folders that are replaced as a whole.
        done: what happens to them, such as "replaced".
        given: values of options by the options' names: a path or several, a name of the hub, or
            None. Of a folder, its pictures are given.

    Raises:
        ValueError: one is.
    """
    paths = {path: _real(path) for path in files}
    for name, value in given.items():
        for each in value if isinstance(value, tuple) else (value,):
            if each is None or not os.path.exists(source := _real(each)):
                continue
            for path, real in paths.items():
                picture = path.suffix.lower() in image_endings() and os.path.exists(real)
                if is_inside(source, real) or (picture and is_inside(real, source)):
                    text = (
                        f"{path} would be {done}, and --{name.replace('_', '-')} {each} gives it "
                        "to this command; give another --out"
                    )
                    raise ValueError(printable(text))


def check_outside(out: Path, **given: object) -> None:
    """Check that a command's folder lies in no folder whose pictures it was given.

    Args:
        out: its folder.
        given: as `check_kept`.

    Raises:
        ValueError: it does, so that its own pictures would be taken for some of these.
    """
    for name, value in given.items():
        for each in value if isinstance(value, tuple) else (value,):
            if each is not None and os.path.isdir(each) and is_inside(_real(out), _real(each)):
                text = (
                    f"--out {out} is in --{name.replace('_', '-')} {each}, so pictures written "
                    "there would be taken for given ones; give another --out"
                )
                raise ValueError(printable(text))


def is_inside(path: str, folder: str) -> bool:
    """Return whether one of two absolute paths is the other, or lies in it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _real(path: object) -> str:
    """Return an absolute path without links; `path` as it is if no file can have that name."""
    try:
        return os.path.realpath(str(path))
    except (OSError, ValueError):
        return str(path)
