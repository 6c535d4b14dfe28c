"""Let one process at a time work on a folder."""

from __future__ import annotations

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

from .atomic import WriteError, remove_leftovers
from .errors import printable, quoted, reason

LOCK, OWNER = ".gmflow.lock", ".gmflow.owner"  # the lock, and who holds it


class LockedError(ValueError):
    """A folder that another process works on."""


@contextmanager
def locked(folder: str | Path, command: str = "") -> Iterator[None]:
    """Hold the lock of a folder, and remove what killed processes left in it.

    The lock is the operating system's (flock, or Windows' own): it ends with the process, however
    that ends, and holds between the machines of a network folder if that supports locks. Where it
    does not, a warning says so, and the block runs without.

    Args:
        folder: where the job writes; created if missing.
        command: what runs, for the message of another process.

    Raises:
        LockedError: another process holds it; the message names it.
        WriteError: the folder cannot be created or written.
    """
    folder = Path(folder)
    lock = FileLock(folder / LOCK)
    held = True
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise LockedError(
            f"{printable(str(folder))} is in use by {_owner(folder)}; wait for it or stop it, or "
            "give another folder"
        ) from None
    except (NotImplementedError, OSError) as error:
        if not os.access(folder, os.W_OK) or not folder.is_dir():
            raise WriteError(
                f"{printable(str(folder))} cannot be written ({reason(error)}): choose another "
                "folder; what is in it is unchanged"
            ) from error
        held = False
        warnings.warn(
            f"{folder} is on a disk without file locks ({reason(error)}): do not start two "
            "commands on it at the same time",
            stacklevel=3,
        )
    try:
        if held:
            _sign(folder, command)
            remove_leftovers(folder)
        yield
    finally:
        if held:
            with suppress(OSError):
                (folder / OWNER).unlink()
            lock.release()


def _sign(folder: Path, command: str) -> None:
    """Write who holds the lock, for the message of another process."""
    owner = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "command": command or " ".join(sys.argv),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with suppress(OSError):  # a full disk: the lock holds without it
        (folder / OWNER).write_text(json.dumps(owner))


def _owner(folder: Path) -> str:
    """Describe the process that holds the lock."""
    try:
        owner = json.loads((folder / OWNER).read_text(encoding="utf-8")[:4096])
        return (
            f"process {int(owner['process'])} on {quoted(owner['host'])} since "
            f"{quoted(owner['since'])} ({quoted(owner['command'])})"
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"
