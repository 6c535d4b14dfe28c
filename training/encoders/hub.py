"""Download parts of encoders from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.encoders.vae import SD_VAE

PARTS, CONFIG = "rae.json", "config.json"
WEIGHTS = "diffusion_pytorch_model"


def download(name: str) -> Path:
    """The VAE's files of a hub repository, from the cache if they are there."""
    from huggingface_hub import snapshot_download

    patterns = [
        f"{sub}{file}"
        for sub in ("", "vae/")
        for file in ("config.json", f"{WEIGHTS}*.safetensors")
    ]
    with hub_errors(name):
        return Path(snapshot_download(name, allow_patterns=patterns))


@contextmanager
def hub_errors(name: str, file: str = "") -> Iterator[None]:
    """Errors of the hub about a repository, or a file of it, become a FileNotFoundError that says what to do."""
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
            f"--vae {name} is neither a folder here nor a repository on huggingface.co; give one of the two, e.g. {SD_VAE}"
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"the VAE {whole} is not on this machine and the hub cannot be reached, or does not have it; download it elsewhere "
            f"(hf download {whole} --local-dir FOLDER), copy the folder here, and give --vae FOLDER"
        ) from error
