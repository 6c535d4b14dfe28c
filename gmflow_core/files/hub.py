"""Downloads from the Hugging Face hub: which names are hub ids, and where their files lie."""

from __future__ import annotations

import re
from pathlib import Path

HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(.+))?")
FILE_ENDINGS = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".pkl")
BY_HAND = "download the folder by other means and give its path"


def is_published(source: str | Path) -> bool:
    """Whether `source` is a folder, or, where nothing of that name exists, may be a hub's "owner/name[@revision]"."""
    return Path(source).is_dir() or _hub_id(source) is not None


def cached_folder(hub_id: str) -> Path | None:
    """Where the hub's cache has the files of a model that was downloaded before; None if it has not. Never goes online."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    index = try_to_load_from_cache(hub_id, "model_index.json")
    return Path(index).parent if isinstance(index, str) else None


def _hub_id(source: str | Path) -> tuple[str, str | None] | None:
    """("owner/name", revision) of a source that is not on disk and is spelt like one; None for any other."""
    name = source if isinstance(source, str) else source.as_posix()
    match = None if Path(source).exists() or name.endswith(FILE_ENDINGS) else HUB_ID.fullmatch(name)
    return match and match.groups()


def folder_of(source: str | Path, patterns: list[str]) -> Path:
    """`source` if it is a folder; else where its snapshot from the hub is, with the files that match."""
    if Path(source).is_dir():
        return Path(source)
    name, revision = _hub_id(source)
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"{source} is no file or folder here; to load it from the Hugging Face hub, run `pip install huggingface_hub`, "
            f"or {BY_HAND}"
        ) from error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client has many kinds, of several packages
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise OSError(
            f"{source} is no file or folder here, and could not be downloaded from the Hugging Face hub ({reason[:300]}); "
            f"check the name and the connection, or {BY_HAND}"
        ) from error
