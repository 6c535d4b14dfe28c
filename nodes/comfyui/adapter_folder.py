"""Adapters to choose from: files in ComfyUI's folder of LoRAs, and published ones to download."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass

import comfy.model_management
import comfy.utils

from ...gmflow_core.files.errors import FileError
from ...gmflow_core.files.hub import tidy_source
from ...gmflow_core.files.hub_file import ENDING, USUAL, HubFile, described, parse_hub_file
from ...gmflow_core.files.published import ADAPTERS as PUBLISHED
from ...gmflow_core.files.safetensors_files import peek_header
from ...gmflow_core.models.adapter_heads import is_head_key
from .adapter_file import ENDINGS, PREFIX
from .files import fingerprint
from .model_folders import find_lora, lora_names, lora_path
from .notices import notice

DOWNLOAD = " (download)"  # after the name of a published one
MOST_SECONDS = 2.0  # for new files' headers in one listing; the others are read in the next one
# What was found in files, by path: their stamp, and whether they are adapters. Module state, as
# ComfyUI asks for the list many times a prompt.
_looked_at: dict[str, tuple[list[float], bool]] = {}


@dataclass(frozen=True)
class AdapterFile:
    """An adapter's file, here or on the hub.

    Args:
        name: for messages; the number of steps in it counts.
        place: a path, or a file on the hub.
    """

    name: str
    place: str | HubFile

    def stamp(self) -> list:
        """Return what changes when the file is replaced."""
        return fingerprint(str(self.place))

    def shown(self) -> list:
        """Return what changes when the file is replaced, downloaded, or gone from the hub's cache.

        It is for what is told of the file: an adapter that is downloaded is the same as before.
        """
        cached = None if isinstance(self.place, str) else self.place.cached()
        return self.stamp() if cached is None else fingerprint(str(self.place), str(cached))

    def path(self) -> str:
        """Return the file's path, downloaded first where it is not here.

        Raises:
            ValueError, OSError: it cannot be downloaded.
        """
        return self.place if isinstance(self.place, str) else downloaded(self.place)


def adapter_names() -> list[str]:
    """Return the names to choose from: adapters, published ones to download, then other LoRAs.

    The published ones are always listed, as workflows name them: one that is in models/loras is
    taken from there.
    """
    names = lora_names()
    ours = _adapters_of(names)
    others = [name for name in names if name not in ours]
    return [*ours, *(name + DOWNLOAD for name in PUBLISHED), *others]


def _adapters_of(names: list[str]) -> list[str]:
    """Return those of the files in models/loras that are adapters, by the header of each."""
    end = time.monotonic() + MOST_SECONDS
    return [name for name in names if name.lower().endswith(ENDINGS) and _is_adapter(name, end)]


def _is_adapter(name: str, end: float) -> bool:
    """Return whether a file is an adapter; False if it is a new one, and it is too late to look."""
    path = lora_path(name)
    if path is None:
        return False
    stamp, known = fingerprint(path), _looked_at.get(path)
    if known is None or known[0] != stamp:
        if time.monotonic() > end:
            return False
        found = any(is_head_key(key.removeprefix(PREFIX)) for key in peek_header(path))
        known = _looked_at[path] = (stamp, found)
    return known[1]


def _same(name: str, names: list[str]) -> str | None:
    """Return the file or folder of a name among those in models/loras, None if there is none."""
    for each in names:
        parts = each.replace("\\", "/").split("/")
        if name in parts[:-1] or os.path.splitext(parts[-1])[0] == name:
            return each
    return None


def find_adapter(name: str, hub_id_or_path: str = "") -> AdapterFile:
    """Return the file that a node's inputs mean; nothing is downloaded yet.

    A file or folder of the same name in models/loras is preferred to a download.

    Args:
        name: of a file in models/loras, or one of PUBLISHED with DOWNLOAD behind it.
        hub_id_or_path: a path, or a file on the hub, instead.

    Raises:
        ValueError: there is no such file.
    """
    if hub_id_or_path.strip():
        return _elsewhere(hub_id_or_path)
    published = name.removesuffix(DOWNLOAD)
    if published != name and published in PUBLISHED:
        return _published(HubFile(PUBLISHED[published], published))
    try:
        return AdapterFile(name, find_lora(name))
    except ValueError as error:
        stem = os.path.splitext(name.replace("\\", "/").rpartition("/")[2])[0]
        same = _same(stem, _adapters_of(lora_names()))
        if same is not None:
            return AdapterFile(same, find_lora(same))
        if stem in PUBLISHED:
            raise ValueError(f"{error}, or choose {stem}{DOWNLOAD}") from error
        raise


def _published(file: HubFile) -> AdapterFile:
    """Return a file on the hub, or the one of its name in models/loras."""
    same = None if file.revision else _same(file.name, _adapters_of(lora_names()))
    return AdapterFile(same, find_lora(same)) if same else AdapterFile(file.name, file)


def _elsewhere(text: str) -> AdapterFile:
    """Return the file that hub_id_or_path means.

    Raises:
        ValueError: it means none.
    """
    try:
        path = tidy_source(text)
        if os.path.isdir(path):
            path = _only_file(path)
        if os.path.isfile(path):
            return AdapterFile("/".join(path.replace("\\", "/").split("/")[-2:]), path)
        file = parse_hub_file(text)
    except ValueError as error:
        raise ValueError(f"hub_id_or_path: {error}") from error
    if file is None:
        raise ValueError(f"hub_id_or_path: {described(text)}")
    return _published(file)


def _only_file(folder: str) -> str:
    """Return the safetensors file in a folder.

    Raises:
        FileError: there is none, or several.
    """
    with os.scandir(folder) as entries:
        names = sorted(each.name for each in entries if each.name.lower().endswith(ENDING))
    if USUAL in names:
        names = [USUAL]
    if len(names) != 1:
        found = ", ".join(names[:8]) or "none"
        raise FileError(folder, f"holds no single safetensors file ({found})", "name the file")
    return os.path.join(folder, names[0])


def downloaded(file: HubFile) -> str:
    """Return the path of a file on the hub, downloaded into the hub's cache unless it is there.

    The node that runs shows a progress bar, and can be interrupted.

    Raises:
        ValueError, OSError: it cannot be downloaded.
    """
    cached = file.cached()
    if cached is not None:
        return str(cached)
    notice(f"downloading {file} from the Hugging Face hub, once", logging.INFO)
    bar = comfy.utils.ProgressBar(100)

    def report(done: int, total: int) -> None:
        if comfy.model_management.processing_interrupted():
            raise InterruptedError("the download was interrupted")
        bar.update_absolute(done, total)

    try:
        return str(file.download(report))
    except OSError:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise
