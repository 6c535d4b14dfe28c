"""Load a VAE of diffusers from a folder or the Hugging Face hub; needs diffusers only then.

A folder holds config.json and diffusion_pytorch_model[.bf16|.fp16].safetensors, itself or in its
subfolder vae/.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..models.vae import SD_VAE, VAE
from .errors import REPEAT, FileError, quoted, reading, reason
from .hub import folder_of, is_published, tidy_source
from .json_files import read_json
from .safetensors_files import check_finite, open_safetensors

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model"
SUBFOLDER = "vae"  # of a model's folder
VARIANTS = (None, "bf16", "fp16")  # of the weights' file; the first one found is read
VAE_CLASS = "AutoencoderKL"
SIZES = ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups")
MOST_BLOCKS, LARGEST_SIZE = 16, 4096  # of a VAE's config
INSTALL = (
    'pip install "diffusers>=0.37" "transformers>=4.48" (in a clone: the extra ".[diffusers]"), '
    "and if the message names torchvision, uninstall it or install the build that matches torch"
)


def load_vae(source: str | Path, device: str | torch.device = "cpu") -> VAE:
    """Load an AutoencoderKL of diffusers.

    Args:
        source: folder in diffusers' layout, with config.json or with a subfolder vae; or the hub
            id of one, of which only the VAE's files are downloaded.
        device: where its weights are put, in float32.

    Raises:
        ModuleNotFoundError: diffusers is not installed.
        FileNotFoundError: there is no VAE at `source`.
        ValueError: the files are not an AutoencoderKL.
        OSError: the hub has no such model, or cannot be reached.
    """
    source = tidy_source(source)
    if not is_published(source):
        raise FileNotFoundError(
            f"there is no VAE {quoted(source)}: give a folder in diffusers' layout, or the hub id "
            f"(owner/name) of one, such as {SD_VAE}"
        )
    return load_vae_folder(vae_folder(folder_of(source, vae_files("", f"{SUBFOLDER}/")))).to(device)


def own_vae(source: str | Path) -> Path | None:
    """Return the folder of the VAE that a published model brings along; None if it has none.

    Args:
        source: folder in diffusers' layout, or hub id of one, whose VAE is downloaded; any other
            source has none.

    Raises:
        OSError: the hub has no such model, or cannot be reached.
    """
    source = tidy_source(source)
    if not is_published(source):
        return None
    folder = folder_of(source, vae_files(f"{SUBFOLDER}/")) / SUBFOLDER
    found = any((folder / weight_file(variant)).exists() for variant in VARIANTS)
    return folder if found and (folder / CONFIG).exists() else None


def vae_files(*places: str) -> list[str]:
    """Return the patterns of a VAE's files on the hub, in each of these places ("" or "vae/")."""
    return [f"{place}{file}" for place in places for file in (CONFIG, f"{WEIGHTS}*.safetensors")]


def vae_folder(folder: Path) -> Path:
    """Return the folder that holds the VAE itself: `folder`, or its subfolder vae."""
    inner = folder / SUBFOLDER
    return inner if not (folder / CONFIG).exists() and (inner / CONFIG).exists() else folder


def load_vae_folder(folder: Path) -> VAE:
    """Load a diffusers AutoencoderKL from a folder with config.json and weights.

    Raises:
        ModuleNotFoundError, FileNotFoundError, ValueError: see `load_vae`.
    """
    try:
        from diffusers import AutoencoderKL
    except (ImportError, RuntimeError) as error:  # RuntimeError: from diffusers' lazy imports
        raise ModuleNotFoundError(
            f"the VAE needs diffusers, which does not import ({error}); {INSTALL}"
        ) from error
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(
            f"{folder} holds no VAE (neither config.json nor vae/config.json); "
            f"give a folder in diffusers' layout such as a download of {SD_VAE}"
        )
    variants = [v for v in VARIANTS if (folder / weight_file(v)).exists()]
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
    if config.get("_class_name", VAE_CLASS) != VAE_CLASS:
        found = f"is of a {quoted(config['_class_name'])}, not of an {VAE_CLASS}"
        raise FileError(path, found, "give the folder of one")
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
