"""Read a GM-DiT in the folder layout of diffusers, on disk or on the Hugging Face hub.

    model_index.json   the parts' class names; `id2label`: the labels' names
    transformer/       config.json and diffusion_pytorch_model[.bf16].safetensors, whole or in
                       shards with an index
    spectrum_net/      the same for the spectrum network; optional
    vae/config.json    scaling_factor of the latents; optional

This file knows the layout and its names; `checkpoint.py` reads the tensors, whose names are ours.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ..models.settings import MOST_CLASSES
from .data_record import checked_data
from .errors import FileError, is_file_name, printable, quoted
from .hub import folder_of
from .json_files import read_json

PREFIXES = {"transformer": "", "spectrum_net": "spectrum_net."}  # of tensor names in our GMDiT
CLASSES = {  # class names in config.json, with or without a leading underscore
    "transformer": "GMDiTTransformer2DModel",
    "spectrum_net": "SpectrumMLP",
}
CONFIG = {  # the transformer's settings -> fields of GMDiTConfig
    "num_gaussians": "num_components",
    "in_channels": "channels",
    "sample_size": "latent_size",
    "patch_size": "patch_size",
    "num_embeds_ada_norm": "num_classes",
    "num_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "attention_head_dim": "head_dim",
    "logstd_inner_dim": "log_std_dim",
    "gm_num_logstd_layers": "log_std_layers",
    "constant_logstd": "constant_log_std",
}
FIXED = {  # settings with the only values that our GMDiT supports; others do not affect sampling
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_type": ("ada_norm_zero",),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-5,),
}
SD_SCALING = 0.18215  # scaling factor of Stable Diffusion's VAE
WEIGHTS = "diffusion_pytorch_model"
AGAIN = "download the folder again"  # advice in messages
LARGEST_CONFIG = 16 * 2**20  # bytes of a JSON file
VARIANTS = (".bf16", "")  # the first one found is read
CONFIG_FILES = [
    "model_index.json",
    "transformer/*.json",
    "spectrum_net/*.json",
    "scheduler/*.json",
    "vae/*.json",
]
WEIGHT_FILES = {
    ".bf16": [f"{WEIGHTS}*.bf16*.safetensors"],
    "": [f"{WEIGHTS}.safetensors", f"{WEIGHTS}-*.safetensors"],
}


def published_metadata(source: str | Path) -> dict[str, Any]:
    """Return the metadata of such a folder as `read_metadata` does, from its JSON files alone.

    Warns if the spectrum network is named but missing; GM-SDE then draws without it.

    Raises:
        ValueError: it is not a GM-DiT that our network supports; the message quotes the setting.
        OSError: the hub has no such model, or cannot be reached.
    """
    folder = folder_of(source, CONFIG_FILES)
    if not (folder / "transformer" / "config.json").exists():
        raise FileError(
            source,
            "is a folder without transformer/config.json, so not a published GM-DiT",
            "give the .safetensors file inside it, or the folder that holds model_index.json and "
            "transformer/",
        )
    index = _optional_json(folder / "model_index.json")
    config = _transformer_config(_part_config(folder, "transformer", source), source)
    if (folder / "spectrum_net").is_dir():
        spectrum = _part_config(folder, "spectrum_net", source)
        config["spectrum_layers"] = _spectrum_layers(spectrum, config, source)
    elif isinstance(index.get("spectrum_net"), list) and any(index["spectrum_net"]):
        warnings.warn(
            f"{printable(str(source))}: model_index.json names a spectrum_net, but the folder "
            "spectrum_net is missing; GM-SDE will go without",
            stacklevel=3,
        )
    vae = _optional_json(folder / "vae" / "config.json")
    data = {"space": "sd-vae", "scaling_factor": vae.get("scaling_factor", SD_SCALING)}
    if isinstance(index.get("id2label"), dict):
        data["labels"] = _labels(index["id2label"], config["num_classes"], source)
    data = checked_data(data, source)
    return {"model_class": "GMDiT", "config": config, "training": {}, "data": data}


def published_weights(source: str | Path) -> list[tuple[str, Path]]:
    """List the files of weights in such a folder, downloaded from the hub if need be.

    Returns:
        Pairs of (the prefix of the file's tensors in our GMDiT, the file). Only one variant of
        each part is downloaded and listed: bf16 if there is one, else full precision.

    Raises:
        ValueError: there are none in safetensors format.
        OSError: as `published_metadata`.
    """
    patterns = CONFIG_FILES + [
        f"{part}/{name}" for part in PREFIXES for name in WEIGHT_FILES[".bf16"]
    ]
    folder = folder_of(source, patterns)
    parts = [part for part in PREFIXES if (folder / part).is_dir()]
    without = [part for part in parts if not any(f.exists() for f in _part_files(folder, part))]
    if without and folder != Path(source):  # the hub has these in full precision only
        patterns += [f"{part}/{name}" for part in without for name in WEIGHT_FILES[""]]
        folder = folder_of(source, patterns)
    files = []
    for part in parts:
        found = _part_files(folder, part)
        _check_part_files(found, folder / part, f"{source}/{part}")
        files += [(PREFIXES[part], path) for path in found]
    return files


def _part_files(folder: Path, part: str) -> list[Path]:
    """Return the files of a part's weights, whole or in shards; [] if there are none.

    A shard that the index names is listed even if its file is missing.
    """
    for variant in VARIANTS:
        whole = folder / part / f"{WEIGHTS}{variant}.safetensors"
        if whole.exists():
            return [whole]
        index = folder / part / f"{WEIGHTS}.safetensors.index{variant}.json"
        if index.exists():
            shards = _json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(map(is_file_name, shards.values())):
                found = "has a weight_map that does not name files beside it"
                raise FileError(index, found, AGAIN)
            return [folder / part / name for name in sorted(set(shards.values()))]
    return []


def _check_part_files(files: list[Path], folder: Path, where: str) -> None:
    """Check that a part has files of weights, and that all of them are there.

    Raises:
        ValueError: there are none, or one is missing.
    """
    if not files:
        names = sorted(path.name for path in folder.iterdir())
        fix = AGAIN
        if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names):
            fix = (
                "pickle files, which could run any code when opened, are never read: use the "
                ".safetensors version of the model"
            )
        raise FileError(
            where,
            f"holds no {WEIGHTS}.bf16.safetensors or {WEIGHTS}.safetensors, only {quoted(names)}",
            fix,
        )
    for path in files:
        if not path.exists():
            raise FileError(f"{where}/{path.name}", "is missing, but the index names it", AGAIN)


def _optional_json(path: Path) -> dict[str, Any]:
    """Read the settings in a JSON file; {} if there is no such file."""
    return _json(path) if path.exists() else {}


def _json(path: Path) -> dict[str, Any]:
    """Read the settings in a JSON file."""
    found = read_json(path, AGAIN, LARGEST_CONFIG)
    if not isinstance(found, dict):
        raise FileError(path, f"holds a {type(found).__name__} instead of settings", AGAIN)
    return found


def _part_config(folder: Path, part: str, source: str | Path) -> dict[str, Any]:
    """Read a part's config.json and check its class."""
    path = folder / part / "config.json"
    where = f"{source}/{part}/config.json"
    if not path.exists():
        raise FileError(where, "is missing", AGAIN)
    config = _json(path)
    name = config.get("_class_name", CLASSES[part])
    if str(name).lstrip("_") != CLASSES[part]:
        raise FileError(
            where,
            f"is of a {quoted(name)}, not of a {CLASSES[part]}",
            "load other models with their own loader",
        )
    return config


def _transformer_config(there: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """Convert the transformer's settings to those of a GMDiTConfig without a spectrum network."""
    where = f"{source}/transformer/config.json"
    missing = sorted(CONFIG.keys() - there.keys() - {"constant_logstd"})
    if missing:
        raise FileError(where, f"lacks {', '.join(missing)}", AGAIN)
    for name in CONFIG.keys() - {"constant_logstd"}:
        if not isinstance(there[name], int):
            raise FileError(
                where,
                f"has {name} = {quoted(there[name])} instead of a whole number",
                "this is a model of another kind",
            )
    if there["num_embeds_ada_norm"] > MOST_CLASSES:
        raise FileError(
            where,
            f"has {there['num_embeds_ada_norm']:,} classes; the most is {MOST_CLASSES:,}",
            AGAIN,
        )
    fixed = {**FIXED, "out_channels": (None, there["in_channels"])}
    for name, known in fixed.items():
        if there.get(name, known[0]) not in known:
            raise FileError(
                where,
                f"has {name} = {quoted(there[name])}; GMFlow's GMDiT knows only "
                f"{' or '.join(map(repr, known))}",
                "this is a model of another kind",
            )
    return {ours: there.get(name) for name, ours in CONFIG.items()} | {"spectrum_layers": None}


def _spectrum_layers(
    there: dict[str, Any], config: dict[str, Any], source: str | Path
) -> list[int]:
    """Return the widths of the spectrum network's hidden layers, after a check of its size."""
    where = f"{source}/spectrum_net/config.json"
    size = [config["channels"], config["latent_size"], config["latent_size"]]
    if there.get("base_size") != size:
        raise FileError(
            where,
            f"has base_size = {quoted(there.get('base_size'))}, but the transformer works on "
            f"latents {size}",
            "the two are not of the same model",
        )
    if not isinstance(there.get("layers"), list):
        found = f"has layers = {quoted(there.get('layers'))} instead of a list of widths"
        raise FileError(where, found, AGAIN)
    return there["layers"]


def _labels(id2label: dict[str, Any], num_classes: int, source: str | Path) -> list[str]:
    """List the labels' names by number; those that are missing are called "class N"."""
    if not all(key.isdecimal() for key in id2label):
        wrong = next(key for key in id2label if not key.isdecimal())
        raise FileError(
            f"{source}/model_index.json",
            f"has the key {quoted(wrong)} in id2label",
            "the keys must be numbers of labels",
        )
    names = (id2label.get(str(label), f"class {label}") for label in range(num_classes))
    return [name if isinstance(name, str) else quoted(name) for name in names]
