"""Check that a command's result takes the place of nothing that would be missed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection, Mapping, Set
from contextlib import suppress
from pathlib import Path

from .errors import printable, quoted
from .hub import tidy_source
from .safetensors_files import peek_header

ENDINGS = (".png", ".safetensors")  # of the files that commands write


def path_argument(text: str) -> Path:
    """Return the path that was given as an argument of a command, for argparse.

    Raises:
        ArgumentTypeError: it is empty, or an ending without a name.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError(
            f"{quoted(text)} is no path; give a name, or . for this folder"
        )
    if Path(text).name in ENDINGS:
        raise argparse.ArgumentTypeError(
            f"{quoted(text)} has no name before its ending; give one such as "
            f"result{Path(text).name}"
        )
    return Path(text)


def check_is_new(path: Path, advice: str) -> None:
    """Check that nothing of this name is there.

    Raises:
        FileExistsError: there is.
    """
    if os.path.lexists(path):
        raise FileExistsError(printable(f"{path} is there already; {advice}"))


def check_no_input(out: Path, inputs: Mapping[str, str | Path | None]) -> None:
    """Check that a result does not take the place of what it is made from.

    Args:
        out: the file or folder that is to be written.
        inputs: files, folders or hub ids by their names in messages; None for what is not given.

    Raises:
        ValueError: it would.
    """
    for name, given in inputs.items():
        if given is None or not is_same(out, tidy_source(given)):
            continue
        raise ValueError(
            printable(
                f"--out {out} is {name} itself, which would be overwritten; give another --out"
            )
        )


def check_replaces(out: Path, contents: Collection[Set[str]]) -> None:
    """Check that a .safetensors file is missing, or holds an earlier result of the same kind.

    Args:
        contents: names of the tensors in such results.

    Raises:
        FileExistsError: it is another file.
    """
    if os.path.exists(out) and peek_header(out).keys() - {"__metadata__"} not in contents:
        advice = "and holds no samples, so it is not overwritten; give another --out, or delete it"
        raise FileExistsError(printable(f"{out} is there already, {advice}"))


def check_is_own(out: Path, own: Callable[[Path], bool], command: str) -> None:
    """Check that a file is missing, or that an earlier run of the same command wrote it.

    Args:
        out: the file that is to be written.
        own: says so of a file that is there; of one that it cannot read it may raise.
        command: as in python -m COMMAND.

    Raises:
        FileExistsError: it is another file, or a damaged one.
    """
    if not os.path.lexists(out):
        return
    with suppress(ValueError, OSError):
        if own(out):
            return
    text = f"{out} is there already, and {command} did not write it; give another --out, or delete"
    raise FileExistsError(printable(f"{text} it"))


def is_same(path: str | Path, other: str | Path) -> bool:
    """Return whether two paths lead to the same file or folder, through links too."""
    with suppress(OSError, ValueError):  # one is missing, or no path can be like that
        if os.path.samefile(path, other):
            return True
    try:
        return os.path.realpath(path) == os.path.realpath(other)
    except (OSError, ValueError):
        return False
