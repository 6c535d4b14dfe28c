"""Load an image autoencoder by name: a VAE or an RAE."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from training.encoders.hub import CONFIG, WEIGHTS, download
from training.encoders.rae_files import is_rae, load_rae
from training.encoders.vae import SD_VAE, VAE

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
    if not (folder / CONFIG).exists() and (folder / "vae" / CONFIG).exists():
        folder = folder / "vae"
    return load_kl(folder).to(device)


def load_kl(folder: Path) -> VAE:
    """Load a diffusers AutoencoderKL from a folder with config.json and weights.

    Raises:
        ModuleNotFoundError, FileNotFoundError, ValueError: see `load_vae`.
    """
    try:
        from diffusers import AutoencoderKL
    except (ImportError, RuntimeError) as error:  # RuntimeError: from diffusers' lazy imports
        raise ModuleNotFoundError(
            f"the VAE needs diffusers, which does not import ({error}); "
            'pip install -e ".[train]", and if the message names torchvision, uninstall it or '
            "install the build that matches torch"
        ) from error
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(
            f"{folder} holds no VAE (neither config.json nor vae/config.json); "
            f"give a folder in diffusers' layout such as a download of {SD_VAE}"
        )
    variants = [v for v in (None, "bf16", "fp16") if (folder / weight_file(v)).exists()]
    if not variants:
        raise FileNotFoundError(
            f"{folder} has a config.json but no {WEIGHTS}.safetensors; "
            "copy the weights there too (pickle files are never read)"
        )
    try:
        network, report = AutoencoderKL.from_pretrained(
            folder,
            variant=variants[0],
            torch_dtype=torch.float32,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers and safetensors raise many kinds
        raise ValueError(
            f"{folder} is not a whole AutoencoderKL ({error}); download it again"
        ) from error
    if report["missing_keys"]:
        missing = report["missing_keys"]
        raise ValueError(
            f"{folder} is not an AutoencoderKL: {len(missing)} tensors are missing, "
            f"first {missing[0]}"
        )
    return VAE(network)


def weight_file(variant: str | None) -> str:
    """Return the name of diffusers' weight file for a variant such as fp16."""
    return f"{WEIGHTS}.{variant}.safetensors" if variant else f"{WEIGHTS}.safetensors"
