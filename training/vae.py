"""The autoencoder between images and latents: diffusers' AutoencoderKL, from a folder or the hub.

The other kind, `training.rae_networks.RAE`, has the same few names: `latent_shape`, `factor`, `space`, `scaling_factor`,
`needs_noise`, `encode` and `decode`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from training.rae_networks import RAE

SD_VAE = "stabilityai/sd-vae-ft-ema"
WEIGHTS = "diffusion_pytorch_model"


class VAE(nn.Module):
    """AutoencoderKL in float32, frozen; latents are scaled to about unit variance by its own `scaling_factor`."""

    space = "sd-vae"
    needs_noise = True  # latents are samples of a posterior

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.float().eval().requires_grad_(False)
        self.scaling_factor: float = network.config.scaling_factor
        self.shift_factor: float = network.config.shift_factor or 0.0
        self.factor = 2 ** (len(network.config.block_out_channels) - 1)  # pixels per latent pixel, each way

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of a picture.

        Raises:
            ValueError: the picture does not divide into whole latent pixels.
        """
        if height % self.factor or width % self.factor:
            raise ValueError(f"pictures of {width}x{height} do not fit this VAE; give a multiple of {self.factor}")
        return self.network.config.latent_channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """One sample of the posterior of each picture, scaled.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            noise: (B, C, h, w), standard normal, as `latent_shape` says.

        Returns:
            (B, C, h, w) float32.
        """
        posterior = self.network.encode(images.float()).latent_dist
        return (posterior.mean + posterior.std * noise - self.shift_factor) * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of scaled latents (B, C, h, w); about [-1, 1], not clamped."""
        return self.network.decode(latents.float() / self.scaling_factor + self.shift_factor).sample


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
    from training.rae_files import is_rae, load_rae

    if is_rae(source):
        return load_rae(source, device)
    folder = Path(source) if Path(source).is_dir() else download(str(source))
    if is_rae(folder):
        return load_rae(folder, device)
    try:
        from diffusers import AutoencoderKL
    except (ImportError, RuntimeError) as error:  # diffusers imports lazily, and says RuntimeError of what it depends on
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
        raise ValueError(f"{folder} is not a whole AutoencoderKL ({error}); download it again") from error
    if report["missing_keys"]:
        missing = report["missing_keys"]
        raise ValueError(f"{folder} is not an AutoencoderKL: {len(missing)} tensors are missing, first {missing[0]}")
    return VAE(network).to(device)


def _weights(variant: str | None) -> str:
    return f"{WEIGHTS}.{variant}.safetensors" if variant else f"{WEIGHTS}.safetensors"


def download(name: str) -> Path:
    """The VAE's files of a hub repository, from the cache if they are there."""
    from huggingface_hub import snapshot_download

    patterns = [f"{sub}{file}" for sub in ("", "vae/") for file in ("config.json", f"{WEIGHTS}*.safetensors")]
    with hub_errors(name):
        return Path(snapshot_download(name, allow_patterns=patterns))


@contextmanager
def hub_errors(name: str, file: str = "") -> Iterator[None]:
    """Errors of the hub about a repository, or a file of it, become a FileNotFoundError that says what to do."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

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
