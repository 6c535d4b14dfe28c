"""RAEs in files: where their parts lie, and how they are read; `training/rae.py` tells what can be named."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from training.encoders.encoder import (
    FAMILIES,
    Encoder,
    _network,
    _place,
    _transformers,
    find_file,
    load_encoder,
)
from training.encoders.hub import CONFIG, PARTS, WEIGHTS, download
from training.encoders.rae_networks import RAE, Decoder

EPS = 1e-5  # added to the latents' variances
DIFFUSERS = {  # encoder_type of an AutoencoderRAE -> model_type, and the side of the pictures that its position table is for
    "dinov2": ("dinov2_with_registers", 518),
    "siglip2": ("siglip_vision_model", 256),
    "mae": ("vit_mae", 224),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What an RAE is made of; the fields of rae.json.

    Args:
        encoder: folder or hub id of a model of transformers.
        decoder: file of the decoder's weights (.safetensors or .pt).
        statistics: file of the latents' mean and variance (.safetensors or .pt).
        decoder_heads: attention heads of the decoder, which its weights do not tell.
        input_size: side of the pictures that the encoder is given; that of its kind if None.
    """

    encoder: str
    decoder: str | None = None
    statistics: str | None = None
    decoder_heads: int = 16
    input_size: int | None = None


COLLECTION = "nyu-visionx/RAE-collections"
PRESETS = {
    "rae-dinov2-b": Parts(
        encoder="facebook/dinov2-with-registers-base",
        decoder=f"{COLLECTION}/decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
        statistics=f"{COLLECTION}/stats/dinov2/wReg_base/imagenet1k/stat.pt",
    ),
    "rae-siglip2-b": Parts(
        encoder="google/siglip2-base-patch16-256",
        decoder=f"{COLLECTION}/decoders/siglip2/base_p16_i256/ViTXL_n08/model.pt",
        statistics=f"{COLLECTION}/stats/siglip2/base_p16_i256/ImageNet1k/stat.pt",
    ),
    "rae-mae-b": Parts(
        encoder="facebook/vit-mae-base",
        decoder=f"{COLLECTION}/decoders/mae/base_p16/ViTXL_n08/model.pt",
        statistics=f"{COLLECTION}/stats/mae/base_p16/ImageNet1k/stat.pt",
    ),
}


def load_statistics(path: Path) -> tuple[Tensor | None, Tensor | None]:
    """Mean and standard deviation of the latents from a file with "mean" and "var", of which one may be missing.

    Raises:
        ValueError: it holds neither, or negative variances.
    """
    tensors = read_tensors(path)
    mean, var = tensors.get("mean"), tensors.get("var")
    if mean is None and var is None:
        raise ValueError(
            f"{path} holds {sorted(tensors)[:4]} instead of mean and var; it is no file of latents' statistics"
        )
    if var is not None and not (var >= 0).all():
        raise ValueError(
            f"{path} has variances that are negative or not finite; the file is damaged"
        )
    return mean, None if var is None else (var.float() + EPS).sqrt()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a PyTorch file, of which nothing else is loaded; of the averaged weights if it
    has several.

    Raises:
        ValueError: it is damaged, or holds other things.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        for name in ("ema", "model", "state_dict"):
            if isinstance(content, dict) and isinstance(content.get(name), dict):
                content = content[name]
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); get it again") from error
    except Exception as error:  # unpickling raises many kinds
        raise ValueError(
            f"{path} is not a PyTorch file of tensors alone, which is all that is loaded ({error})"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} instead of named tensors")
    return {name: t for name, t in content.items() if isinstance(t, Tensor)}


def is_rae(source: str | Path) -> bool:
    """Whether `source` names an RAE: one of `PRESETS`, or a folder that holds one."""
    folder = Path(source)
    return (
        str(source) in PRESETS or (folder / PARTS).exists() or _diffusers_config(folder) is not None
    )


def load_rae(source: str | Path, device: str | torch.device = "cpu") -> RAE:
    """Read an RAE.

    Args:
        source: one of `PRESETS`; a folder with rae.json or an AutoencoderRAE; or the hub's name of an AutoencoderRAE.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        FileNotFoundError: a part is missing, or the hub cannot be reached; the message says what to do.
        ValueError: the files are not an RAE's, or do not fit each other.
    """
    folder = Path(source)
    if str(source) not in PRESETS and not folder.is_dir():
        folder = download(str(source))
    config = _diffusers_config(folder)
    if config is not None:
        return _load_diffusers(folder, config).to(device)
    parts = PRESETS[str(source)] if str(source) in PRESETS else read_parts(folder)
    encoder = load_encoder(_place(parts.encoder, folder), parts.input_size)
    decoder, mean, std = None, None, None
    if parts.decoder is not None:
        path = find_file(parts.decoder, folder)
        try:
            decoder = Decoder.from_tensors(read_tensors(path), encoder.grid, parts.decoder_heads)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if parts.statistics is not None:
        mean, std = load_statistics(find_file(parts.statistics, folder))
    return RAE(encoder, decoder, mean, std).to(device)


def read_parts(folder: Path) -> Parts:
    """What rae.json says.

    Raises:
        FileNotFoundError, ValueError: there is none, or it says something else.
    """
    path = folder / PARTS
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} holds no RAE: neither {PARTS} nor the {CONFIG} of an AutoencoderRAE"
        )
    try:
        return Parts(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        known = ", ".join(field.name for field in dataclasses.fields(Parts))
        raise ValueError(f"{path} is not an object with some of {known} ({error})") from error


def _diffusers_config(folder: Path) -> dict | None:
    """The config of an AutoencoderRAE in diffusers' layout, if that is what the folder holds."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return config if config.get("_class_name") == "AutoencoderRAE" else None
    return None


def _load_diffusers(folder: Path, config: dict) -> RAE:
    """An RAE in the layout of diffusers' AutoencoderRAE, whose `_latents_std` is sqrt(var + EPS) of the original statistics."""
    path = folder / f"{WEIGHTS}.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} has a {CONFIG} but no {path.name}; copy the weights there too"
        )
    tensors = read_tensors(path)
    transformers = _transformers()
    try:
        kind, table = DIFFUSERS[config["encoder_type"]]
        encoder_config = getattr(transformers, FAMILIES[kind].config)(
            hidden_size=config["encoder_hidden_size"],
            num_hidden_layers=config["encoder_num_hidden_layers"],
            num_attention_heads=config["encoder_hidden_size"] // 64,
            patch_size=config["encoder_patch_size"],
            image_size=table,
        )
        weights = {
            name.removeprefix("encoder."): t
            for name, t in tensors.items()
            if name.startswith("encoder.")
        }
        encoder = Encoder(_network(None, encoder_config, weights), config["encoder_input_size"])
        decoder = Decoder.from_tensors(tensors, encoder.grid, config["decoder_num_attention_heads"])
        return RAE(encoder, decoder, tensors.get("_latents_mean"), tensors.get("_latents_std"))
    except KeyError as error:
        raise ValueError(
            f"{folder / CONFIG} lacks {error}, or has a value of it that this version does not know"
        ) from error
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
