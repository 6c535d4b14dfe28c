"""Load RAEs and their parts from files; `training.rae` lists the names that RAEs have."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from gmflow_core.files.checkpoint import read_metadata, save_checkpoint
from gmflow_core.files.diffusers_vae import CONFIG, WEIGHTS
from gmflow_core.files.errors import FileError, check_regular_file, quoted, reading
from gmflow_core.files.json_files import EDITED, read_json
from gmflow_core.files.safetensors_files import check_finite, read_safetensors
from gmflow_core.files.targets import check_is_own
from gmflow_core.models.ditdh import LABEL_TABLE, DiTDH
from gmflow_core.models.settings import check_settings
from gmflow_core.source.files import load_source
from training.common.files import load_pytorch
from training.encoders.encoder import (
    FAMILIES,
    Encoder,
    import_transformers,
    load_encoder,
    load_network,
)
from training.encoders.hub import PARTS, download, find_file, local_or_hub
from training.encoders.rae import RAE, load_decoder

MOST_HEADS, LARGEST_INPUT = 1024, 8192
EPS = 1e-5  # added to the variances of the latents
COLLECTION = "nyu-visionx/RAE-collections"
# encoder_type of an AutoencoderRAE -> model_type of transformers, image side of its position table
ENCODER_TYPES = {
    "dinov2": ("dinov2_with_registers", 518),
    "siglip2": ("siglip_vision_model", 256),
    "mae": ("vit_mae", 224),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Parts of an RAE; the fields of rae.json.

    Args:
        encoder: folder or hub id of a model of transformers.
        decoder: file of the decoder's weights (.safetensors or .pt).
        statistics: file of the latents' mean and variance (.safetensors or .pt).
        decoder_heads: attention heads of the decoder; its weights do not tell their number.
        input_size: side of the encoder's input images in pixels; its family's default if None.
    """

    encoder: str
    decoder: str | None = None
    statistics: str | None = None
    decoder_heads: int = 16
    input_size: int | None = None


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


def is_rae(source: str | Path) -> bool:
    """Return whether `source` is one of `PRESETS`, or a local folder that holds an RAE."""
    folder = Path(source)
    return (
        str(source) in PRESETS or (folder / PARTS).exists() or diffusers_config(folder) is not None
    )


def load_rae(
    source: str | Path, device: str | torch.device = "cpu", *, measured: bool = False
) -> RAE:
    """Load an RAE.

    Args:
        source: one of `PRESETS`; a folder with rae.json or with an AutoencoderRAE of diffusers;
            or the hub's name of an AutoencoderRAE.
        measured: its latents are to be measured: the statistics are not read, so that rae.json may
            name a file that is not there yet, nor is the decoder of `PRESETS`. Any other decoder
            is, as its patches tell the pixels of a token.

    Raises:
        ModuleNotFoundError: transformers or diffusers is not installed.
        FileNotFoundError: a part is missing, or the hub cannot be reached; the message says what
            to do.
        ValueError: the files are not an RAE's, or do not fit each other.
    """
    folder = Path(source)
    if str(source) not in PRESETS and not folder.is_dir():
        folder = download(str(source))
    config = diffusers_config(folder)
    if config is not None:
        return load_diffusers(folder, config).to(device)
    parts = PRESETS[str(source)] if str(source) in PRESETS else read_parts(folder)
    if measured:
        decoder = None if str(source) in PRESETS else parts.decoder
        parts = dataclasses.replace(parts, decoder=decoder, statistics=None)
    encoder = load_encoder(local_or_hub(parts.encoder, folder), parts.input_size)
    decoder, mean, std = None, None, None
    if parts.decoder is not None:
        path = find_file(parts.decoder, folder)
        try:
            decoder = load_decoder(read_weights(path), encoder.grid, parts.decoder_heads)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if parts.statistics is not None:
        mean, std = load_statistics(find_file(parts.statistics, folder))
    return RAE(encoder, decoder, mean, std).to(device)


def read_parts(folder: Path) -> Parts:
    """Read rae.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON object with the fields of `Parts`.
    """
    path = folder / PARTS
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} holds no RAE: neither {PARTS} nor the {CONFIG} of an AutoencoderRAE"
        )
    known = ", ".join(field.name for field in dataclasses.fields(Parts))
    content = read_json(path)
    with reading(path, what=f"is not an object with some of {known}"):
        parts = Parts(**content)
        check_settings(parts)
    if not 1 <= parts.decoder_heads <= MOST_HEADS:
        found = f"has decoder_heads {parts.decoder_heads}"
        raise FileError(path, found, f"give 1 to {MOST_HEADS}")
    if parts.input_size is not None and not 1 <= parts.input_size <= LARGEST_INPUT:
        found = f"has input_size {parts.input_size}"
        raise FileError(path, found, f"give 1 to {LARGEST_INPUT}")
    return parts


def diffusers_config(folder: Path) -> dict | None:
    """Return the config of the AutoencoderRAE in a folder in diffusers' layout; None if none."""
    with contextlib.suppress(OSError, ValueError):
        config = read_json(folder / CONFIG)
        rae = isinstance(config, dict) and config.get("_class_name") == "AutoencoderRAE"
        return config if rae else None
    return None


def load_diffusers(folder: Path, config: dict) -> RAE:
    """Load an RAE from a folder in the layout of diffusers' AutoencoderRAE.

    AutoencoderRAE.from_pretrained is not used: it cannot build SigLIP with transformers 5.

    Args:
        config: config.json of the folder. `_latents_std` in the weights is sqrt(var + EPS) of the
            original statistics.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: the config or the weights are not those of an AutoencoderRAE.
    """
    path = folder / f"{WEIGHTS}.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} has a {CONFIG} but no {path.name}; copy the weights there too"
        )
    tensors = read_weights(path)
    transformers = import_transformers()
    _check_sizes(config, tensors, folder / CONFIG)
    try:
        kind, table = ENCODER_TYPES[config["encoder_type"]]
        encoder_config = getattr(transformers, FAMILIES[kind].config)(
            hidden_size=config["encoder_hidden_size"],
            num_hidden_layers=config["encoder_num_hidden_layers"],
            num_attention_heads=config["encoder_hidden_size"] // 64,
            patch_size=config["encoder_patch_size"],
            image_size=table,
        )
        weights = {
            name.removeprefix("encoder."): tensor
            for name, tensor in tensors.items()
            if name.startswith("encoder.")
        }
        network = load_network(None, encoder_config, weights)
        encoder = Encoder(network, config["encoder_input_size"])
        decoder = load_decoder(tensors, encoder.grid, config["decoder_num_attention_heads"])
        return RAE(encoder, decoder, tensors.get("_latents_mean"), tensors.get("_latents_std"))
    except KeyError as error:
        raise ValueError(
            f"{folder / CONFIG} lacks {error}, or has a value of it that this version does not know"
        ) from error
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _check_sizes(config: dict, tensors: dict[str, Tensor], path: Path) -> None:
    """Check the sizes in a config, before anything is built from them, by the number of tensors.

    Raises:
        FileError: one is missing, or no size that the weights can have.
    """
    most = {
        "encoder_hidden_size": max((max(t.shape, default=0) for t in tensors.values()), default=0),
        "encoder_num_hidden_layers": len(tensors),
        "encoder_patch_size": LARGEST_INPUT,
        "encoder_input_size": LARGEST_INPUT,
        "decoder_num_attention_heads": MOST_HEADS,
    }
    for name, largest in most.items():
        value = config.get(name)
        if type(value) is not int or not 1 <= value <= largest:
            raise FileError(
                path, f"has {name} {quoted(value)}, not a number from 1 to {largest}", EDITED
            )
    width = config["encoder_hidden_size"]
    if width % 64:
        raise FileError(path, f"has encoder_hidden_size {width}, no multiple of 64", EDITED)
    if not isinstance(config.get("encoder_type"), str):
        raise FileError(path, f"has encoder_type {quoted(config.get('encoder_type'))}", EDITED)


def load_statistics(path: Path) -> tuple[Tensor | None, Tensor | None]:
    """Load the mean and the standard deviation of the latents.

    Args:
        path: file with the tensors "mean" and "var", one of which may be missing.

    Returns:
        mean and sqrt(var + EPS); None for a missing one.

    Raises:
        ValueError: the file holds neither, or negative variances.
    """
    tensors = read_weights(path)
    mean, var = tensors.get("mean"), tensors.get("var")
    if mean is None and var is None:
        raise FileError(
            path,
            f"holds {quoted(sorted(tensors)[:4])} instead of mean and var",
            "give a file of the latents' statistics",
        )
    if var is not None and not (var >= 0).all():
        raise FileError(path, "has variances that are negative or not finite: it is damaged")
    return mean, None if var is None else (var.float() + EPS).sqrt()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file or of a PyTorch file.

    Of a PyTorch file that holds several state dicts, the averaged weights ("ema") are taken.
    Nothing but tensors is unpickled.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    check_regular_file(path)
    if path.suffix == ".safetensors":
        tensors = read_safetensors(path)[0]
    else:
        with reading(path, "get it again"):
            tensors = load_pytorch(path)
    for name, tensor in tensors.items():
        check_finite(tensor, name, path)
    return tensors


def convert(
    source: Path,
    out: Path,
    null_class: bool = True,
    mixture: str | None = None,
    unconditional: bool = False,
) -> None:
    """Convert a published DiT^DH network to a GMFlow checkpoint in float32.

    Args:
        source: State dict, .pt or .safetensors; the averaged weights if the file has several.
        out: File to write, .safetensors.
        null_class: The last row of the label embedding means no label, as after training with
            label dropout.
        mixture: Mixture source that the network was trained with (MM-FM), as training.fit_source
            convert writes it; its modes are the labels, unless the network is unconditional.
        unconditional: The network ignores its label embedding, as MM-FM's uncond checkpoints do.
    """
    check_is_own(out, is_converted, "training.rae convert")
    if not source.exists():
        raise FileNotFoundError(
            f"there is no {source}; download it first (hf download {COLLECTION} --local-dir "
            "FOLDER, or gmflow fetch mm-fm)"
        )
    modes = None if mixture is None else load_source(mixture)
    tensors = read_weights(source)
    if unconditional:
        tensors.pop(LABEL_TABLE, None)
    elif modes is not None:
        rows = len(tensors.get(LABEL_TABLE, ()))
        if rows != modes.num_modes:
            raise FileError(
                source,
                f"knows {rows:,} labels, but the mixture has {modes.num_modes:,} modes",
                "give --unconditional if the network ignores its labels, or the right mixture",
            )
        null_class = False
    network = DiTDH.from_published(tensors, null_class)
    config = network.config
    data: dict = {"space": RAE.space}
    if unconditional:
        data["unlabelled"] = True
    if modes is not None:
        modes.require_shape((config.channels, config.latent_size, config.latent_size))
        data["source"] = modes.record("soft", known=not unconditional)
        if not unconditional:
            data["labels"] = [f"mode {m}" for m in range(modes.num_modes)]
    save_checkpoint(network, out, facts={"converted": source.name}, data=data)
    print(f"{out}: {config}")


def is_converted(path: Path) -> bool:
    """Return whether a file is a checkpoint that `convert` wrote; older ones have no facts.

    Raises:
        FileError: it is no checkpoint.
    """
    metadata = read_metadata(path)
    facts = metadata["training"]
    return metadata["model_class"] == DiTDH.__name__ and (not facts or "converted" in facts)
