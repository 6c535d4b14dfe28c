"""List the files of folders that may hold anything: links that lead back, pipes, 100,000 files."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ...gmflow_core.files.errors import printable

MOST_NAMES = 20_000  # that a node's list of choices holds
MOST_ENTRIES = 200_000  # files and folders that are looked at
MOST_SECONDS = 10.0  # for one listing
FRESH = 2.0  # seconds in which a folder can change again without another modification time
HIDDEN = ".git"  # folders that are left out, as ComfyUI does


@dataclass
class Listing:
    """Names and paths found in folders.

    Args:
        found: name, as it is shown, and path.
        stamps: time of the last change of every folder that was read, None if it is not there; and
            of links that lead nowhere, as to a disk that is not there yet.
    """

    found: dict[str, str] = field(default_factory=dict)
    stamps: dict[str, int | None] = field(default_factory=dict)
    is_kept: bool = True  # False if a folder was changed a moment ago

    def is_current(self) -> bool:
        """Return whether no folder has changed since."""
        return self.is_kept and all(_time_of(path) == then for path, then in self.stamps.items())


_listed: dict[tuple, Listing] = {}  # module state: ComfyUI asks for the lists many times a prompt
_said: set[str] = set()  # that were logged


def list_files(
    folders: list[str], endings: tuple[str, ...], is_model: Callable[[str], list[str]] | None = None
) -> dict[str, str]:
    """Return shown names and paths of the files in folders and their subfolders, sorted.

    A folder that is reached twice, through links, is read once. What cannot be read is left out,
    and so is what is neither a file nor a folder. A name of the first folder hides that of a later
    one. At most MOST_NAMES names are returned.

    Args:
        folders: those that do not exist are skipped.
        endings: of the files' names, in lower case.
        is_model: returns the marks of a subfolder that is listed itself, instead of its files.
    """
    key = (tuple(folders), endings)
    known = _listed.get(key)
    if known is None or not known.is_current():
        known = _listed[key] = _walk(folders, endings, is_model)
    return known.found


def _walk(
    folders: list[str], endings: tuple[str, ...], is_model: Callable[[str], list[str]] | None
) -> Listing:
    """Read the folders."""
    listing, seen, entries = Listing(), set(), 0
    end = time.monotonic() + MOST_SECONDS
    for base in folders:
        left = [base]
        while left:
            folder = left.pop()
            listing.stamps[folder] = _time_of(folder)
            place = _place_of(folder)
            if place is None or place in seen:
                continue
            seen.add(place)
            marks = is_model(folder) if is_model and folder != base else []
            if marks:
                _add(listing, folder, base)
                inner = {os.path.dirname(mark) for mark in marks} - {folder}
                listing.stamps.update({path: _time_of(path) for path in inner})
                continue
            files, inside, lost = _entries_of(folder, MOST_ENTRIES - entries)
            entries += len(files) + len(inside) + len(lost)
            listing.stamps.update({os.path.join(folder, name): None for name in lost})
            left += [os.path.join(folder, name) for name in reversed(inside) if name != HIDDEN]
            for name in files:
                if name.lower().endswith(endings):
                    _add(listing, os.path.join(folder, name), base)
            full = len(listing.found) >= MOST_NAMES or entries >= MOST_ENTRIES
            if full or time.monotonic() > end:
                say_once(
                    f"{printable(base)} holds too much to list: only {len(listing.found)} names "
                    "are shown; move what is no model elsewhere, or give a path to the node"
                )
                break
    now = time.time_ns()
    listing.is_kept = all(now - (then or 0) > FRESH * 1e9 for then in listing.stamps.values())
    listing.found = dict(sorted(listing.found.items())[:MOST_NAMES])
    return listing


def shown(name: str) -> str:
    """Return a file's name as a list of choices shows it; most names are shown as they are."""
    return printable(name).replace("\n", "\\n")


def _add(listing: Listing, path: str, base: str) -> None:
    """Add a path under the name that is shown for it."""
    listing.found.setdefault(shown(os.path.relpath(path, base)), path)


def file_names(folder: str) -> list[str]:
    """Return the names of the files in a folder; none if it cannot be read."""
    return _entries_of(folder, MOST_NAMES)[0]


def _entries_of(folder: str, most: int) -> tuple[list[str], list[str], list[str]]:
    """Return the names of files, of folders, and of links that lead nowhere in a folder, sorted.

    Files and folders behind links count as such.
    """
    files, folders, lost = [], [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    if entry.is_dir():
                        folders.append(entry.name)
                    elif entry.is_file():
                        files.append(entry.name)
                    elif entry.is_symlink() and not os.path.exists(entry.path):
                        lost.append(entry.name)
                except OSError:  # a link that leads back to itself, among others
                    continue
                if len(files) + len(folders) + len(lost) >= most:
                    break
    except (OSError, ValueError):  # no permission, gone, or a name that no folder can have
        pass
    return sorted(files), sorted(folders), sorted(lost)


def _place_of(path: str) -> tuple[int, int] | None:
    """Return what identifies a folder, whatever links lead to it; None if there is none."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return None
    return (stat.st_dev, stat.st_ino) if os.path.isdir(path) else None


def _time_of(path: str) -> int | None:
    """Return when a folder's content or permissions changed, in nanoseconds; None if it is gone."""
    try:
        stat = os.stat(path)
        return max(stat.st_mtime_ns, stat.st_ctime_ns)
    except (OSError, ValueError):
        return None


def say_once(message: str) -> None:
    """Log a warning, unless it was logged before."""
    if message not in _said:
        _said.add(message)
        logging.warning("GMFlow: %s", printable(message))
