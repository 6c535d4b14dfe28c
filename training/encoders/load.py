"""Load an image autoencoder by name: a VAE or an RAE."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from training.encoders.hub import WEIGHTS, download
from training.encoders.vae import SD_VAE, VAE

if TYPE_CHECKING:
    from training.encoders.rae_networks import RAE


def load_vae(source: str | Path = SD_VAE, device: str | torch.device = "cpu") -> VAE | RAE:
    """Read an AutoencoderKL, or an RAE.

    Args:
        source: a folder in diffusers' layout, with config.json or with a subfolder vae, or the hub's name of one. Weights
            are safetensors, in float32 or as the variants fp16 and bf16. RAEs: see `training.rae`.

    Raises:
        ModuleNotFoundError: diffusers, or for an RAE transformers, is not installed.
        FileNotFoundError: there is no VAE at `source`, or the hub cannot be reached; the message says what to do.
        ValueError: the files there are not an AutoencoderKL.
    """
    from training.encoders.rae_files import is_rae, load_rae

    if is_rae(source):
        return load_rae(source, device)
    folder = Path(source) if Path(source).is_dir() else download(str(source))
    if is_rae(folder):
        return load_rae(folder, device)
    try:
        from diffusers import AutoencoderKL
    except (
        ImportError,
        RuntimeError,
    ) as error:  # diffusers imports lazily, and says RuntimeError of what it depends on
        raise ModuleNotFoundError(
            f'the VAE needs diffusers, which does not import ({error}); pip install -e ".[train]", and if torchvision is named '
            "above, uninstall it or take the build that fits torch"
        ) from error
    if not (folder / "config.json").exists() and (folder / "vae" / "config.json").exists():
        folder = folder / "vae"
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{folder} holds no VAE (neither config.json nor vae/config.json); give a folder in diffusers' layout such as a "
            f"download of {SD_VAE}"
        )
    variants = [v for v in (None, "bf16", "fp16") if (folder / _weights(v)).exists()]
    if not variants:
        raise FileNotFoundError(
            f"{folder} has a config.json but no {WEIGHTS}.safetensors; copy the weights there too (pickle files are never read)"
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
            f"{folder} is not an AutoencoderKL: {len(missing)} tensors are missing, first {missing[0]}"
        )
    return VAE(network).to(device)


def _weights(variant: str | None) -> str:
    return f"{WEIGHTS}.{variant}.safetensors" if variant else f"{WEIGHTS}.safetensors"
