"""Load an image autoencoder by name: a VAE or an RAE."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gmflow_core.files.diffusers_vae import load_vae_folder, vae_folder
from gmflow_core.models.vae import SD_VAE, VAE
from training.encoders.hub import download
from training.encoders.rae_files import is_rae, load_rae

if TYPE_CHECKING:
    from training.encoders.rae import RAE


def load_vae(source: str | Path = SD_VAE, device: str | torch.device = "cpu") -> VAE | RAE:
    """Load an AutoencoderKL or an RAE.

    Args:
        source: folder in diffusers' layout, with config.json or with a subfolder vae, or the name
            of such a repository on the hub. Weights are safetensors, in float32 or as the
            variants fp16 and bf16. The names of RAEs are in `training.rae`.

    Raises:
        ModuleNotFoundError: diffusers, or for an RAE transformers, is not installed.
        FileNotFoundError: there is no VAE at `source`, or the hub cannot be reached; the message
            says what to do.
        ValueError: the files are not an AutoencoderKL or an RAE.
    """
    if is_rae(source):
        return load_rae(source, device)
    folder = Path(source) if Path(source).is_dir() else download(str(source))
    if is_rae(folder):
        return load_rae(folder, device)
    return load_vae_folder(vae_folder(folder)).to(device)
