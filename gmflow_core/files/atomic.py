"""Write a file atomically: readers find the old file or the whole new one, never a part.

All files of results are written through `atomic_write`; TensorBoard writes its own log. It works in
a temporary folder beside the file, named ".gmflow-HOST-PROCESS-RANDOM.tmp"; that of a killed
process stays behind until `remove_leftovers` finds that its owner has ended.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from .errors import WriteError, printable, reason

PART = "part.tmp"  # the file in a temporary folder; its ending keeps it out of lists of models
FOLDER = re.compile(r"\.gmflow-([A-Za-z0-9_]*)-(\d+)-\w+\.tmp")
ABANDONED = 86400  # seconds without a change after which another machine's folder is removed
DISK_FULL = (28, 122)  # ENOSPC, EDQUOT
NO_PERMISSION = (1, 13, 30)  # EPERM, EACCES, EROFS
OUTERMOST = 0xEFFFFFFC  # number of Linux's first namespace of processes, outside of containers

_ours: set[str] = set()  # names of the temporary folders in use by this process


@contextmanager
def atomic_write(path: str | Path, need: int | None = None) -> Iterator[Path]:
    """Yield a temporary path, and rename it to `path` on success.

    The data is synced to disk before the rename, so even a power cut leaves a whole file. If the
    block raises an exception, the temporary file is removed and `path` stays as it was. Missing
    folders are created. Permissions follow the umask.

    Args:
        path: the file to write.
        need: bytes that the file will take, for the message; None: as many as were written.

    Raises:
        WriteError: it cannot be written.
    """
    path = Path(path)
    folder = None
    try:
        try:
            check_target(path)
            create_folder(path.parent)
            folder = _temporary_folder(path.parent)
            # that of the folder follows the umask, which cannot be read without changing it
            mode = stat.S_IMODE(folder.stat().st_mode)
            folder.chmod(mode | stat.S_IRWXU)  # the umask may deny even this process
            temporary = folder / PART
            yield temporary
            _sync(temporary)
            temporary.chmod(mode & 0o666)
            os.replace(temporary, path)
        except WriteError:  # of a file that the block wrote
            raise
        except (OSError, SafetensorError) as error:
            raise _write_error(path, error, need, folder) from error
    finally:
        if folder is not None:
            _remove(folder)
            _ours.discard(folder.name)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to `path`, which must not exist, on success.

    Raises:
        WriteError: it cannot be written.
    """
    path, folder = Path(path), None
    try:
        try:
            create_folder(path.parent)
            folder = _temporary_folder(path.parent)
            (folder / PART).mkdir()
            yield folder / PART
            os.rename(folder / PART, path)
        except OSError as error:
            raise _write_error(path, error, None, None) from error
    finally:
        if folder is not None:
            _remove(folder)
            _ours.discard(folder.name)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a folder in the system's place for temporary files (TMPDIR), and remove it.

    What killed processes left there is removed first.

    Raises:
        OSError: there can be none.
    """
    remove_leftovers(tempfile.gettempdir())
    folder = _temporary_folder(Path(tempfile.gettempdir()), 0o700)  # as others use that place
    try:
        yield folder
    finally:
        _remove(folder)
        _ours.discard(folder.name)


def check_target(path: str | Path) -> None:
    """Check, before the work that makes its content, that a file can be written.

    Raises:
        WriteError: there is a folder, a pipe or a device of its name, no file can have that name,
            or writing is not permitted there.
    """
    path, folder = Path(path), Path(path).parent
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            mode = os.stat(path).st_mode
            if not stat.S_ISREG(mode):
                kind = "folder" if stat.S_ISDIR(mode) else "pipe, socket or device"
                text = f"{path} cannot be written: it is a {kind}; give the name of a file"
                raise WriteError(printable(text))
        while not os.path.exists(folder) and folder != folder.parent:
            folder = folder.parent
        if not os.path.isdir(folder):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except WriteError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL character or a lone surrogate
        raise _write_error(path, error, None, None) from error


def create_folder(folder: Path) -> None:
    """Create a folder, and those above it, if they are missing.

    Raises:
        OSError: it cannot be created, or no folder can have that name.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except RecursionError:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG)) from None
    except ValueError as error:  # a NUL character or a lone surrogate
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from error


def _temporary_folder(parent: Path, mode: int = 0o777) -> Path:
    """Create a folder that names this process."""
    prefix = f".gmflow-{_host()}-{os.getpid()}-"
    name = tempfile.mktemp(dir=parent, prefix=prefix, suffix=".tmp")  # noqa: S306 mkdir is atomic
    _ours.add(Path(name).name)  # first, as other threads may look for leftovers
    os.mkdir(name, mode)
    return Path(name)


def _remove(folder: Path) -> None:
    """Remove a temporary folder, even if a strict umask has closed it."""
    for path in (folder, folder / PART):
        with suppress(OSError):
            about = os.lstat(path)
            if stat.S_ISDIR(about.st_mode):
                path.chmod(stat.S_IMODE(about.st_mode) | stat.S_IRWXU)
    shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _host() -> str:
    """Return a name of where process numbers count, in letters, digits and underscores.

    It is the machine's name and a digest, as machines and containers may share a name: of the
    machine's own number, and of the namespace of processes that a container has.
    """
    name, digest = socket.gethostname(), hashlib.sha256()
    namespace = _namespace()
    # a container's file system may be a copy, with the number of another machine
    contained = namespace not in (0, OUTERMOST)
    number = "/proc/sys/kernel/random/boot_id" if contained else "/etc/machine-id"
    with suppress(OSError):
        digest.update(Path(number).read_bytes())
    digest.update(f"{name} {namespace}".encode())
    return f"{re.sub('[^A-Za-z0-9]', '_', name)[:40]}_{digest.hexdigest()[:8]}"


def _namespace() -> int:
    """Return the number of this process's namespace of processes; 0 where there are none."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def remove_leftovers(folder: str | Path) -> list[Path]:
    """Remove what killed processes left in a folder, and return the paths.

    A temporary folder is removed if its process ran on this machine (or in this container) and has
    ended, or if nothing in it has changed for a day. Folders of this very process stay.
    """
    removed = []
    with suppress(OSError):
        for path in Path(folder).glob(".gmflow-*.tmp"):
            match = FOLDER.fullmatch(path.name)
            if match and _is_abandoned(path, match[1], int(match[2])):
                _remove(path)
                removed.append(path)
    return removed


def _is_abandoned(path: Path, host: str, process: int) -> bool:
    """Return whether the owner of a temporary folder has ended, as far as can be known."""
    if path.name in _ours:
        return False
    if host == _host() and has_ended(process):
        return True
    try:
        changed = max(each.stat().st_mtime for each in (path, *path.iterdir()))
    except OSError:
        return False
    return time.time() - changed > ABANDONED


def has_ended(process: int) -> bool:
    """Return whether no process of this number runs; False where that cannot be known."""
    if os.name != "posix":
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _write_error(path: Path, error: Exception, need: int | None, folder: Path | None) -> WriteError:
    """Return the error that says why `path` cannot be written, and what to do."""
    found = re.search(r"os error (\d+)", str(error))  # safetensors' errors carry no number
    number = getattr(error, "errno", None) or (int(found[1]) if found else None)
    size = f", and it needs {_bytes(need)}" if need else ""
    if need is None and folder is not None:
        with suppress(OSError):
            size = f", and it needs more than {_bytes((folder / PART).stat().st_size)}"
    advice = "check the path"
    if number in DISK_FULL:
        advice = f"the disk is full{size}{_free(path)}: make room, or choose another folder"
    elif number in NO_PERMISSION:
        advice = f"writing is not permitted there{size}: choose another folder"
    kept = ""
    with suppress(ValueError):
        kept = "; the file that was there is unchanged" if os.path.exists(path) else ""
    if number in DISK_FULL or number in NO_PERMISSION:
        text = f"{path} cannot be written: {advice}"
    else:
        text = f"{path} cannot be written ({reason(error)}): {advice}"
    return WriteError(printable(f"{text}{kept or '; nothing was written'}"))


def _free(path: Path) -> str:
    """Say how much room is left on the disk of `path`."""
    with suppress(OSError):
        return f" ({_bytes(shutil.disk_usage(path.parent).free)} are free)"
    return ""


def _bytes(count: int) -> str:
    """Return a number of bytes with a unit."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"
