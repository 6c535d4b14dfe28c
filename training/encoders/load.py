"""Load an image autoencoder by name: a VAE or an RAE."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gmflow_core.files.errors import REPEAT, FileError, quoted, reading, reason
from gmflow_core.files.json_files import read_json
from gmflow_core.files.safetensors_files import check_finite, open_safetensors
from training.encoders.hub import CONFIG, WEIGHTS, download
from training.encoders.rae_files import is_rae, load_rae
from training.encoders.vae import SD_VAE, VAE

if TYPE_CHECKING:
    from training.encoders.rae import RAE

SIZES = ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups")
MOST_BLOCKS, LARGEST_SIZE = 16, 4096  # of a VAE's config


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
    weights = folder / weight_file(variants[0])
    check_vae_config(folder / CONFIG)
    open_safetensors(weights, "it is not a whole AutoencoderKL; download it again")
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
        found = f"is not a whole AutoencoderKL ({reason(error)})"
        raise FileError(folder, found, "download it again") from error
    if report["missing_keys"]:
        missing = report["missing_keys"]
        raise ValueError(
            f"{folder} is not an AutoencoderKL: {len(missing)} tensors are missing, "
            f"first {missing[0]}"
        )
    for name, tensor in network.state_dict().items():
        check_finite(tensor, name, weights)
    with reading(folder / CONFIG, "download it again", "is damaged"):
        return VAE(network)


def check_vae_config(path: Path) -> None:
    """Check the sizes and blocks in a VAE's config, from which diffusers builds it.

    Raises:
        FileError: a size is out of range, or the lists of blocks differ in length.
    """
    config = read_json(path, REPEAT)
    if not isinstance(config, dict):
        raise FileError(path, f"holds {quoted(config)} instead of an object")
    channels = config.get("block_out_channels", [])
    right = isinstance(channels, list) and len(channels) <= MOST_BLOCKS
    sizes = {f"block_out_channels[{i}]": n for i, n in enumerate(channels if right else [])}
    sizes |= {name: config[name] for name in SIZES if name in config}
    if not right:
        raise FileError(path, f"has block_out_channels {quoted(channels)}, not a list of sizes")
    for name in ("down_block_types", "up_block_types"):
        types = config.get(name, channels)
        if not isinstance(types, list) or len(types) != len(channels):
            found = f"has {name} {quoted(types)} for block_out_channels {quoted(channels)}"
            raise FileError(path, found, "they must be lists of one length")
    for name, value in sizes.items():
        if type(value) is not int or not 1 <= value <= LARGEST_SIZE:
            raise FileError(path, f"has {name} {quoted(value)}, not 1 to {LARGEST_SIZE}")


def weight_file(variant: str | None) -> str:
    """Return the name of diffusers' weight file for a variant such as fp16."""
    return f"{WEIGHTS}.{variant}.safetensors" if variant else f"{WEIGHTS}.safetensors"
