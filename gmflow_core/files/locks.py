"""Let one process at a time work on a folder, or write a file."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .atomic import DISK_FULL, WriteError, create_folder, remove_leftovers
from .errors import printable, quoted, reason

LOCK, OWNER = ".gmflow.lock", ".gmflow.owner"  # the lock, and who holds it
LONGEST = 500  # characters of a command in a message


class LockedError(ValueError):
    """A folder or a file that another process works on."""


@contextmanager
def locked(folder: str | Path, command: str = "") -> Iterator[None]:
    """Hold the lock of a folder, and remove what killed processes left in it.

    See `_held`; the lock's file stays behind, as removing it could let two processes in.

    Raises:
        LockedError: another process holds it; the message names it.
        WriteError: the folder cannot be created or written.
        ValueError: it is the working folder.
    """
    with _held(Path(folder), Path(folder), LOCK, OWNER, command):
        yield


@contextmanager
def locked_file(path: str | Path, command: str = "") -> Iterator[None]:
    """Hold the lock of one file (or folder) that a job writes, with a lock file beside it.

    Other files of the same folder stay free. See `locked`.

    Raises:
        LockedError, WriteError, ValueError: as `locked`.
    """
    path = Path(path)
    # a digest, as the name itself could be too long with anything added
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    with _held(path.parent, path, f".gmflow-{name}.lock", f".gmflow-{name}.owner", command):
        yield


@contextmanager
def _held(
    folder: Path, what: Path, lock_name: str, owner_name: str, command: str
) -> Iterator[None]:
    """Hold a lock, and remove what killed processes left in the folder.

    The lock is the operating system's (flock, or Windows' own): it ends with the process, however
    that ends, and holds between the machines of a network folder if that supports locks. Where it
    does not, a warning says so, and the block runs without.

    Args:
        folder: where the lock's file lies; created if missing.
        what: folder or file that the lock is of, for messages.
        lock_name, owner_name: of the lock's file, and of the one that says who holds it.
        command: what runs, for the message of another process.
    """
    if what == Path():  # which an unset variable of a shell gives
        raise ValueError(
            "the folder to write is '.', the working folder, or an empty name; name another one"
        )
    lock, owner = FileLock(folder / lock_name), folder / owner_name
    held = True
    try:
        create_folder(folder)
        lock.acquire(timeout=0)
    except Timeout:
        if not os.path.exists(folder / lock_name):  # /proc and the like: no file can be there
            raise WriteError(
                f"{printable(str(what))} cannot be written: no file can be created in its folder; "
                "choose another"
            ) from None
        raise LockedError(
            f"{printable(str(what))} is in use by {_owner(owner)}; wait for it or stop it, or "
            f"give another {'folder' if what == folder else 'name'}"
        ) from None
    except (NotImplementedError, OSError) as error:
        if getattr(error, "errno", None) in DISK_FULL:
            raise WriteError(
                f"{printable(str(what))} cannot be written: the disk is full; make room, or choose "
                "another folder; what is there is unchanged"
            ) from error
        if not _can_write(folder):
            raise WriteError(
                f"{printable(str(what))} cannot be written ({reason(error)}): choose another "
                "folder; what is there is unchanged"
            ) from error
        held = False
        warnings.warn(
            f"{folder} is on a disk without file locks ({reason(error)}): do not start two "
            "commands on it at the same time",
            stacklevel=3,
        )
    try:
        if held:
            _sign(owner, command)
            remove_leftovers(folder)
        yield
    finally:
        if held:
            with suppress(OSError):
                owner.unlink()
            lock.release()


def _can_write(folder: Path) -> bool:
    """Return whether files can be created in a folder, as far as its permissions say."""
    try:
        return os.access(folder, os.W_OK) and folder.is_dir()
    except (OSError, ValueError):  # ValueError: a NUL character or a lone surrogate
        return False


def _sign(path: Path, command: str) -> None:
    """Write who holds the lock, for the message of another process."""
    owner = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "command": (command or " ".join(sys.argv))[:LONGEST],
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with suppress(OSError):  # a full disk: the lock holds without it
        path.write_text(json.dumps(owner))


def _owner(path: Path) -> str:
    """Describe the process that holds the lock."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8")[:4096])
        return (
            f"process {int(owner['process'])} on {quoted(owner['host'])} since "
            f"{quoted(owner['since'])} ({quoted(owner['command'])})"
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"
