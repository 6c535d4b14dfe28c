"""Tell ids of the Hugging Face hub from paths, and find or download their files."""

from __future__ import annotations

import re
from pathlib import Path

HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(.+))?")
FILE_ENDINGS = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".pkl")
BY_HAND = "download the folder by other means and give its path"  # advice in messages


def is_published(source: str | Path) -> bool:
    """Return whether `source` is a folder or may be the id of one on the hub.

    A hub id is "owner/name" or "owner/name@revision" where no file or folder of that name exists.
    """
    return Path(source).is_dir() or _hub_id(source) is not None


def cached_folder(hub_id: str) -> Path | None:
    """Return the folder of a model in the hub's cache, None if it is not there; never go online."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    index = try_to_load_from_cache(hub_id, "model_index.json")
    return Path(index).parent if isinstance(index, str) else None


def _hub_id(source: str | Path) -> tuple[str, str | None] | None:
    """Parse "owner/name[@revision]"; None for names that exist on disk or are spelt otherwise."""
    name = source if isinstance(source, str) else source.as_posix()
    match = None if Path(source).exists() or name.endswith(FILE_ENDINGS) else HUB_ID.fullmatch(name)
    return match and match.groups()


def folder_of(source: str | Path, patterns: list[str]) -> Path:
    """Return `source` if it is a folder, else download it from the hub and return its snapshot.

    Args:
        source: a folder or hub id, see `is_published`.
        patterns: the files to download, such as "vae/*.json".

    Raises:
        ValueError: huggingface_hub is not installed.
        OSError: the hub has no such model, or cannot be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    name, revision = _hub_id(source)
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"{source} is no file or folder here; to load it from the Hugging Face hub, run "
            f"`pip install huggingface_hub`, or {BY_HAND}"
        ) from error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds, of several packages
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise OSError(
            f"{source} is no file or folder here, and could not be downloaded from the Hugging "
            f"Face hub ({reason[:300]}); check the name and the connection, or {BY_HAND}"
        ) from error
