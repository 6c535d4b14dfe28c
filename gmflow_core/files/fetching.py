"""Fetch files from the Hugging Face hub into a folder: resumable, and checked afterwards.

The hub's own client finishes a file that was begun only within one process. Here the part that has
arrived stays beside the file, as .NAME.DIGEST.part, and the next start goes on from it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .atomic import DISK_FULL, check_target, create_folder
from .errors import FileError, WriteError, is_file_name, printable, quoted
from .hub import hub_reason
from .locks import locked_file

BLOCK = 2**22  # bytes that are read at a time
CONTINUE = "what was fetched stays, and the same command goes on from it"
NO_HUB = "fetching from the Hugging Face hub needs huggingface_hub: pip install huggingface_hub"


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub, as the hub describes it.

    Args:
        repository: "owner/name".
        path: in the repository.
        revision: the commit.
        size: bytes; None if the hub does not say.
        sha256: digest of the content; None for small files, which git keeps.
        git_sha1: git's digest of these; None if the hub does not say.
    """

    repository: str
    path: str
    revision: str
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None

    def problem(self, path: Path) -> str:
        """Return what is wrong with a copy of the file; "" for nothing that can be known."""
        size = path.stat().st_size
        if self.size is not None and size != self.size:
            return f"has {size:,} bytes instead of {self.size:,}"
        for name, wanted, digest in (
            ("SHA-256", self.sha256, hashlib.sha256()),
            ("SHA-1 of git", self.git_sha1, hashlib.sha1(b"blob %d\0" % size)),  # noqa: S324
        ):
            if wanted:
                with open(path, "rb") as stream:
                    while block := stream.read(BLOCK):
                        digest.update(block)
                found = digest.hexdigest()
                return "" if found == wanted else f"has the {name} {found} instead of {wanted}"
        return ""

    @property
    def is_checked(self) -> bool:
        """True if the hub gives a digest of the content."""
        return bool(self.sha256 or self.git_sha1)


def remote_files(repository: str, patterns: Sequence[str]) -> list[RemoteFile]:
    """Ask the hub for the files of a repository that match, with their sizes and digests.

    Raises:
        ValueError: huggingface_hub is not installed, or no file matches.
        OSError: the hub has no such repository, or cannot be reached.
    """
    with _reached(repository) as hub:
        about = hub.HfApi().model_info(repository, files_metadata=True)
    files = []
    for each in about.siblings or []:
        if any(fnmatchcase(each.rfilename, pattern) for pattern in patterns):
            if not all(map(is_file_name, each.rfilename.split("/"))):
                raise FileError(repository, f"has a file {quoted(each.rfilename)}", "report it")
            sha256 = getattr(each.lfs, "sha256", None)
            git = None if each.lfs else each.blob_id
            revision = about.sha or "main"
            files.append(RemoteFile(repository, each.rfilename, revision, each.size, sha256, git))
    if not files:
        found = f"has no file {' or '.join(patterns)} on the hub"
        raise FileError(repository, found, "it was published otherwise: look at its page there")
    return sorted(files, key=lambda file: file.path)


def unmatched(files: Sequence[RemoteFile], patterns: Sequence[str]) -> list[str]:
    """Return the patterns that no file of a repository matches."""
    return [p for p in patterns if not any(fnmatchcase(file.path, p) for file in files)]


def fetch_into(file: RemoteFile, path: Path, force: bool = False) -> bool:
    """Fetch a file to `path`, from where an earlier start was stopped; return whether it was new.

    Args:
        force: replace another file that is there.

    Raises:
        FileError: the content is not what the hub describes; or another file is there.
        LockedError: another process fetches it.
        WriteError: it cannot be written.
        OSError: the hub cannot be reached, or the connection broke.
    """
    check_target(path)
    create_folder(path.parent)
    with locked_file(path):
        if path.exists():
            problem = file.problem(path)
            if not problem:
                return False
            if not force:
                found = f"is there already and is another file: it {problem}"
                raise FileError(path, found, "move it away, or give --force to replace it")
        part = part_of(file, path)
        with _reached(file.repository, file.path), _room(path):
            _download(file, part)
        problem = file.problem(part)
        if problem:
            part.unlink()
            found = f"was damaged on its way: it {problem}"
            raise FileError(path, found, "run the command again, which fetches it anew")
        os.replace(part, path)
    return True


def part_of(file: RemoteFile, path: Path) -> Path:
    """Return where the part of a file that has arrived is kept; each content has its own."""
    key = file.sha256 or file.git_sha1 or file.revision
    return path.with_name(f".{path.name[:200]}.{key[:12]}.part")


def fetch_into_cache(file: RemoteFile) -> Path:
    """Fetch a file into the hub's cache, if it is not there, and return its path.

    Raises:
        FileError: the content is not what the hub describes, twice.
        OSError: as `fetch_into`.
    """
    with _reached(file.repository, file.path) as hub:
        for force in (False, True):
            # of the branch, not of the commit: the cache finds it by name only then
            path = Path(hub.hf_hub_download(file.repository, file.path, force_download=force))
            problem = file.problem(path)
            if not problem:
                return path
    raise FileError(path, f"was damaged on its way: it {problem}", "run the command again")


def cache_place(file: RemoteFile) -> Path:
    """Return where a file is in the hub's cache; a path that is not there if it is to be fetched.

    Raises:
        ValueError: huggingface_hub is not installed.
    """
    with _reached(file.repository, file.path) as hub:
        found = hub.try_to_load_from_cache(file.repository, file.path)
        folder = Path(hub.constants.HF_HUB_CACHE)
    return Path(found) if isinstance(found, str) else folder / file.repository / file.path


def check_room(files: Sequence[tuple[RemoteFile, Path]]) -> None:
    """Check that there is room for all files that are not there yet.

    Args:
        files: pairs of a file and its path; they may lie on several disks.

    Raises:
        WriteError: there is not.
    """
    needs: dict[int, list[Any]] = {}
    for file, path in files:
        folder = path.parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        part = part_of(file, path)
        have = path.stat().st_size if path.exists() else part.stat().st_size if part.exists() else 0
        need = needs.setdefault(os.stat(folder).st_dev, [folder, 0])
        need[1] += max(0, (file.size or 0) - have)
    for folder, need in needs.values():
        free = shutil.disk_usage(folder).free
        if need > free:
            raise WriteError(
                printable(
                    f"{folder} has {free / 1e9:.1f} GB free, and {need / 1e9:.1f} GB are still to "
                    "be fetched: make room, choose another folder, or fetch fewer parts (--only)"
                )
            )


def _download(file: RemoteFile, part: Path) -> None:
    """Append to `part` what is missing of a file."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    have = part.stat().st_size if part.exists() else 0
    if have and have == file.size:
        return
    if have > (file.size or have):  # of no use
        part.unlink()
        have = 0
    url = hf_hub_url(file.repository, file.path, revision=file.revision)
    place = get_hf_file_metadata(url).location
    headers = build_hf_headers()
    if urlsplit(place).netloc != urlsplit(url).netloc:  # the key is for the hub alone
        headers.pop("authorization", None)
    with open(part, "ab") as stream:
        http_get(place, stream, resume_size=have, headers=headers, expected_size=file.size)


@contextmanager
def _reached(repository: str, path: str = "") -> Iterator[Any]:
    """Yield huggingface_hub; what its client raises becomes one line that says what to do.

    Raises:
        ValueError: huggingface_hub is not installed.
        OSError: the client has raised an error.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(NO_HUB) from error
    try:
        yield huggingface_hub
    except (WriteError, FileError):
        raise
    except Exception as error:  # of many kinds, of several packages
        name = f"{repository}{':' if path else ''}{path}"
        text = f"{name} cannot be fetched: {hub_reason(error, repository)}; {CONTINUE}"
        raise OSError(printable(text)) from error


@contextmanager
def _room(path: Path) -> Iterator[None]:
    """Raise a `WriteError` if the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        text = f"{path} cannot be written: the disk is full; make room, and {CONTINUE}"
        raise WriteError(printable(text)) from error
