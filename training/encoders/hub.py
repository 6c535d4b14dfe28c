"""Find the parts of autoencoders and encoders in folders and on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gmflow_core.files.diffusers_vae import vae_files
from gmflow_core.files.errors import MOST_SAID, quoted, reading
from gmflow_core.files.hub import HUB_ID
from gmflow_core.models.vae import SD_VAE

PARTS = "rae.json"  # names the parts of an RAE


def download(name: str) -> Path:
    """Download the autoencoder's files of a hub repository, or find them in the cache.

    Returns:
        The folder of the snapshot.

    Raises:
        FileNotFoundError: there is no such repository, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(name):
        return Path(snapshot_download(name, allow_patterns=vae_files("", "vae/")))


def local_or_hub(name: str, folder: Path) -> str:
    """Return the path `name` inside `folder` if it exists there, otherwise `name` as a hub id."""
    return str(folder / name) if _exists(name, folder) else name


def _exists(name: str, folder: Path) -> bool:
    """Return whether there is a file or a folder `name` in `folder`.

    Raises:
        FileError: no file can have that name.
    """
    what = f"names {quoted(name)}, which no file can be called"
    with reading(folder / PARTS, "correct it", what):
        return (folder / name).exists()


def find_file(name: str, folder: Path) -> Path:
    """Return the file `name` in `folder`, or download it if `name` is OWNER/NAME/PATH on the hub.

    Raises:
        FileNotFoundError: the file is in neither place.
        FileError: no file can have that name.
    """
    if _exists(name, folder) and (folder / name).is_file():
        return folder / name
    owner, _, rest = name.partition("/")
    repository, _, inside = rest.partition("/")
    if not (inside and HUB_ID.fullmatch(f"{owner}/{repository}")):
        raise FileNotFoundError(
            f"there is no file {quoted(str(folder / name), MOST_SAID)}, which {folder / PARTS} "
            "names; put it there"
        )
    from huggingface_hub import hf_hub_download

    with hub_errors(f"{owner}/{repository}", inside):
        return Path(hf_hub_download(f"{owner}/{repository}", inside))


@contextmanager
def hub_errors(name: str, file: str = "") -> Iterator[None]:
    """Turn the hub's errors about a repository, or one of its files, into a message with a remedy.

    Raises:
        FileNotFoundError: in place of huggingface_hub's own errors.
    """
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    whole = f"{name} {file}".rstrip()
    try:
        yield
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"--vae {name} is neither a local folder nor a repository on huggingface.co; "
            f"give one of the two, e.g. {SD_VAE}"
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"the VAE {whole} is not on this machine, and the hub cannot be reached or does not "
            f"have it; download it elsewhere (hf download {whole} --local-dir FOLDER), copy the "
            "folder here, and give --vae FOLDER"
        ) from error
