"""Single safetensors files in a model's folders on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from .errors import FileError, quoted
from .hub import HUB_ID, PAGES, names_on_hub, snapshot, tidy_source

ENDING = ".safetensors"
USUAL = "diffusion_pytorch_model.safetensors"  # the name that diffusers gives to a file of weights
MOST_SHOWN = 8  # names of files in an error
IN_PAGE = re.compile(rf"/(?:{'|'.join(PAGES)})/(?:refs/[^/]+/[^/]+|[^/]+)/(.+)")
PART = re.compile(r"[\w][\w.+-]*")  # of a path within a repository


@dataclass(frozen=True)
class HubFile:
    """A safetensors file on the hub.

    Args:
        repository: "owner/name".
        path: path of the file, or of the folder that holds it; "" for the top folder.
        revision: a branch, tag or commit; None for the newest.
    """

    repository: str
    path: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{revision}{':' if self.path else ''}{self.path}"

    @property
    def name(self) -> str:
        """Name of the file, or of its folder where the file has the usual name."""
        return title_of(self.path or self.repository)

    def cached(self) -> Path | None:
        """Return the file if it is in the hub's cache; never go online."""
        try:
            return self._file_in(self._snapshot(local_files_only=True))
        except (OSError, ValueError):  # not there, or no huggingface_hub
            return None

    def download(self, report: Callable[[int, int], None] | None = None) -> Path:
        """Return the file from the hub's cache, downloaded first unless it is there.

        Args:
            report: called with the bytes that are done and those in all, from other threads; what
                it raises stops the download.

        Raises:
            ValueError: there is no such file, or several; or huggingface_hub is not installed.
            OSError: the hub has no such model, or cannot be reached.
        """
        cached = self.cached()
        if cached is not None:
            return cached
        file = replace(self, path=self._only_of(self._names()))
        return file._file_in(file._snapshot(**({"tqdm_class": _bar(report)} if report else {})))

    def _names(self) -> list[str]:
        """Return the paths on the hub of the files that may be meant."""
        if self.path.endswith(ENDING):
            return [self.path]
        names = names_on_hub(self.repository, self.revision, str(self))
        return [name for name in names if name.rpartition("/")[0] == self.path]

    def _only_of(self, names: list[str]) -> str:
        """Return the safetensors file among paths: the only one, or that of the usual name.

        Raises:
            FileError: there is none, or several.
        """
        found = sorted(name for name in names if name.endswith(ENDING))
        usual = [name for name in found if name.rpartition("/")[2] == USUAL]
        if len(found) == 1 or usual:
            return (usual or found)[0]
        shown = ", ".join(name.rpartition("/")[2] for name in found[:MOST_SHOWN]) or "none"
        more = f" and {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else ""
        raise FileError(
            str(self),
            f"is not the place of one safetensors file on the hub: {shown}{more} found",
            "give the file's address on the hub, or owner/name:folder",
        )

    def _snapshot(self, **options: Any) -> Path:
        """Return the folder of the repository in the hub's cache."""
        inside = f"{self.path}/" if self.path else ""
        patterns = [self.path] if self.path.endswith(ENDING) else [f"{inside}*{ENDING}"]
        deeper = [f"{inside}*/*"]  # * stands for folders too
        return snapshot(
            self.repository, self.revision, patterns, str(self), ignore_patterns=deeper, **options
        )

    def _file_in(self, folder: Path) -> Path:
        """Return the file in a copy of the repository.

        Raises:
            FileError: there is none, or several.
        """
        place = folder / self.path
        if place.is_file():
            return place
        names = [path.relative_to(folder).as_posix() for path in place.glob(f"*{ENDING}")]
        return folder / self._only_of(names)


def title_of(path: str) -> str:
    """Return the name of a file, or that of its folder where the file has the usual name."""
    parts = path.replace("\\", "/").split("/")
    return parts[-2] if parts[-1] == USUAL and len(parts) > 1 else parts[-1]


def parse_hub_file(text: str) -> HubFile | None:
    """Return the file that a text names, None if the text is not of that kind.

    That is "owner/name:folder" (or :folder/file.safetensors), "owner/name/folder",
    "owner/name@revision:folder", or the address of a page of the hub.

    Raises:
        ValueError: it is the address of something else.
    """
    text = text.strip()
    found = IN_PAGE.search(text.partition("#")[0].partition("?")[0])
    source = tidy_source(text)
    name, _, path = source.partition(":")
    if path and HUB_ID.fullmatch(name):
        return _checked(name, path)
    if HUB_ID.fullmatch(source):
        return _checked(source, unquote(found[1]) if found else "")
    if source.count("/") > 1:
        owner, name, path = source.split("/", 2)
        if HUB_ID.fullmatch(f"{owner}/{name}"):
            return _checked(f"{owner}/{name}", path)
    return None


def _checked(name: str, path: str) -> HubFile | None:
    """Return a file of the repository "owner/name" or "owner/name@revision".

    It is None if the path leaves the repository.
    """
    repository, _, revision = name.partition("@")
    parts = [part for part in path.split("/") if part]
    if not all(map(PART.fullmatch, parts)):
        return None
    return HubFile(repository, "/".join(parts), revision or None)


def _bar(report: Callable[[int, int], None]) -> type:
    """Return a progress bar for huggingface_hub that also reports bytes.

    The hub's client has one bar for bytes received and one for bytes written, of the same total,
    and one for files.
    """
    from huggingface_hub.utils import tqdm

    done: dict[int, float] = {}

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any):
            self.of_bytes = options.get("unit") == "B"
            done[id(self)] = options.get("initial") or 0
            super().__init__(*args, **options)

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self.of_bytes:
                done[id(self)] += n or 0
                if self.total:
                    report(int(min(max(done.values()), self.total)), int(self.total))
            return shown

    return Bar


def described(text: object) -> str:
    """Return how to name a file on the hub, for messages that quote what was given instead."""
    return (
        f"{quoted(text)} is no file or folder here, and names no file on the hub either; write "
        "owner/name:folder (such as Lakonik/pi-FLUX.1:gmflux_k8_piid_4step), the file's address, "
        "or a path"
    )
