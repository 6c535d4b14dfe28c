"""Mount small and read-only disks; where that is not permitted, stand-ins for them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .contents import emptied

ROOMY = 512 * 2**20  # bytes of a disk with room for everything
PAGE = 4096


def can_mount() -> bool:
    """Return whether this process may mount a tmpfs."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    probe = emptied(Path("/tmp") / f"gmflow_mount_{os.getpid()}")  # noqa: S108
    try:
        if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", probe], capture_output=True).returncode:
            return False
        subprocess.run(["umount", probe], check=True)
        return True
    finally:
        probe.rmdir()


class Disk:
    """A disk mounted at a folder, whose size and permission can be changed."""

    def __init__(self, folder: Path):
        self.folder = folder

    def used(self) -> int:
        """Return the bytes that are taken."""
        about = os.statvfs(self.folder)
        return (about.f_blocks - about.f_bfree) * about.f_frsize

    def leave_room(self, bytes_: int) -> None:
        """Shrink or grow the disk, so that so many bytes are free."""
        size = -(-(self.used() + bytes_) // PAGE) * PAGE
        self._remount(f"size={max(size, PAGE)}")

    def set_read_only(self, on: bool) -> None:
        """Forbid or permit writing."""
        self._remount("ro" if on else "rw")

    def _remount(self, option: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{option}", self.folder], check=True)


@contextmanager
def mounted(folder: Path) -> Iterator[Disk]:
    """Mount an empty, roomy tmpfs at a folder for the block."""
    folder = emptied(folder)
    command = ["mount", "-t", "tmpfs", "-o", f"size={ROOMY}", "tmpfs", folder]
    subprocess.run(command, check=True)
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextmanager
def without_permission(folder: Path) -> Iterator[None]:
    """Take the permission to write from a folder and those in it; without effect on root."""
    folders = [path for path in (folder, *folder.rglob("*")) if path.is_dir()]
    try:
        for path in folders:
            path.chmod(0o555)
        yield
    finally:
        for path in folders:
            path.chmod(0o755)
