"""Errors about files, and text from outside in messages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

MOST_QUOTED = 200  # characters of a value that a message quotes
MOST_SAID = 2000  # characters of a message
NO_MEMORY = "DefaultCPUAllocator: "  # in PyTorch's RuntimeError when the CPU has no memory
LONGEST_FILE_NAME = 255  # bytes of a file's name that systems take
REPEAT = "if it was downloaded or copied, do that again"  # usual advice for a damaged file


class FileError(ValueError):
    """A file that cannot be used: its name, what was found, and what to do.

    Args:
        path: the file.
        found: what is wrong with it, such as "holds 3 tensors instead of 5".
        advice: what the user can do; none if empty.
    """

    def __init__(self, path: str | Path, found: str, advice: str = REPEAT):
        super().__init__(printable(f"{path} {found}{'; ' if advice else ''}{advice}", MOST_SAID))
        self.path = path


class WriteError(OSError):
    """A file that cannot be written: its name, the reason, the need, and what stays intact."""


@contextmanager
def reading(path: str | Path, advice: str = REPEAT, what: str = "is damaged") -> Iterator[None]:
    """Raise errors of any kind that reading a file causes as a `FileError`.

    Damaged files make libraries raise many kinds of errors: of their own, RecursionError,
    MemoryError, KeyError and others. `FileNotFoundError`, `FileError` and `WriteError` pass
    unchanged.

    Args:
        path, advice: as for `FileError`.
        what: what is wrong with the file; the error's own message follows it in brackets.
    """
    try:
        yield
    except (FileError, FileNotFoundError, WriteError):
        raise
    except Exception as error:
        raise FileError(path, f"{what} ({reason(error)})", advice) from error


def reason(error: BaseException) -> str:
    """Return the message of an error in one printable line; its type if it has none."""
    if isinstance(error, OSError) and error.strerror:
        return printable(error.strerror, MOST_QUOTED)
    if isinstance(error, KeyError) and error.args:
        return f"{quoted(error.args[0])} is missing"
    try:
        text = " ".join(str(error).split())
    except RecursionError:
        text = ""
    return printable(text, MOST_QUOTED) or type(error).__name__


def quoted(value: object, most: int = MOST_QUOTED) -> str:
    """Return the `repr` of a value from outside, safe to print and at most `most` characters long.

    Text is cut before it is quoted, and a nested value that is too deep to print becomes its
    type's name.
    """
    if isinstance(value, (str, bytes)):
        value = value[: most + 1]
    try:
        return printable(repr(value), most)
    except (RecursionError, ValueError, MemoryError):  # ValueError: integers of many digits
        return f"<{type(value).__name__}>"


def printable(text: str, most: int | None = None) -> str:
    r"""Return text that every terminal, log and encoding can take, cut at `most` characters.

    Control characters other than line breaks, lone surrogates and direction marks are written as
    escapes, such as "\ud800".
    """
    if most is not None and len(text) > most:
        text = text[: most - 3] + "..."
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def make_printable(error: BaseException) -> None:
    """Replace the text in an error, and in those that led to it, by what `printable` returns.

    Logging an error with a lone surrogate in its message would raise another one.
    """
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        error = left.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        left += [error.__cause__, error.__context__]
        if not _is_printable(error):
            error.args = tuple(printable(a) if isinstance(a, str) else a for a in error.args)
            if not _is_printable(error):
                error.args = (reason(error),)


def _is_printable(error: BaseException) -> bool:
    """Return whether the error's message holds nothing that `printable` would change."""
    try:
        text = str(error)
    except Exception:  # an error whose own __str__ fails cannot be printed either
        return False
    return printable(text) == text


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the device's or the machine's memory was not enough."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or NO_MEMORY in str(error)


def is_file_name(name: object) -> bool:
    """Return whether `name`, from a file, can be the name of another file in the same folder."""
    if not isinstance(name, str) or not name.isprintable() or set(name) & set("/\\:"):
        return False
    return 0 < len(name.encode()) <= LONGEST_FILE_NAME and not name.startswith(".")


def check_regular_file(path: str | Path) -> None:
    """Check that `path` is a file with a content of its own, before something opens it.

    Opening a named pipe waits for its other end, which may never come.

    Raises:
        FileNotFoundError: there is nothing of that name.
        FileError: it is a folder, a pipe, a device, or a name that no file can have.
    """
    try:
        exists = os.path.exists(path)
    except (ValueError, OSError) as error:  # a NUL character or a lone surrogate
        raise FileError(quoted(str(path)), "is no name of a file", "check its spelling") from error
    if not exists:
        raise FileNotFoundError(f"there is no file {printable(str(path))}")
    if not os.path.isfile(path):
        kind = "folder" if os.path.isdir(path) else "pipe, socket or device"
        raise FileError(path, f"is a {kind}, not a file", "give a file")
