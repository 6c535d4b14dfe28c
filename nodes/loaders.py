"""Nodes that load GM models."""

from __future__ import annotations

import logging
import os

import folder_paths
import torch
from comfy_api.latest import io

from ..gmflow_core import load_checkpoint, read_metadata
from ..gmflow_core.checkpoint import SHIPPED
from ..gmflow_core.labels import distinct, known_names
from ..gmflow_core.published import cached_folder
from .models import gm_model

FOLDER = "gmflow"
MARKS = ("model_index.json", "transformer/config.json")  # of a model that is a folder, in the layout of diffusers
PUBLISHED = ("Lakonik/gmflow_imagenet_k8_ema",)  # on the hub
SMALL = 100e6  # parameters of a model for which fp32 costs little
seen_names: list[str] = []  # classes of the models loaded so far
DTYPES = {"default": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def register_model_folder() -> None:
    """Make the `gmflow` folders known to ComfyUI, in this order: those of extra_model_paths.yaml (there already),
    models/gmflow, the shipped models."""
    default = os.path.join(folder_paths.models_dir, FOLDER)
    os.makedirs(default, exist_ok=True)
    for path in (default, str(SHIPPED)):
        folder_paths.add_model_folder_path(FOLDER, path)
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, folder_paths.supported_pt_extensions)


def installed_models() -> dict[str, str]:
    """Name and path of every model in the `gmflow` folders: files, and folders in the layout of diffusers."""
    folders: dict[str, str] = {}
    for base in folder_paths.get_folder_paths(FOLDER):
        for path, inside, _ in os.walk(base, followlinks=True):
            if path != base and any(os.path.exists(os.path.join(path, mark)) for mark in MARKS):
                folders.setdefault(os.path.relpath(path, base), path)
                inside.clear()
    names = folder_paths.get_filename_list(FOLDER)
    files = [name for name in names if not any(name.startswith(folder + os.sep) for folder in folders)]
    found = {name: path for name in files if (path := folder_paths.get_full_path(FOLDER, name))}
    models = {name: path for name, path in found.items() if path not in shipped_sources()}
    return dict(sorted({**models, **folders}.items()))


def shipped_sources() -> list[str]:
    """Paths of the mixture sources that come with the extension, among the models."""
    return [str(path) for path in sorted(SHIPPED.glob("*source*.safetensors"))]


def class_names() -> list[str]:
    """The class names that are known here: of the installed models, of what the hub's cache has, of what was loaded."""
    cached = [folder for folder in map(cached_folder, PUBLISHED) if folder is not None]
    names = known_names([*installed_models().values(), *map(str, cached)])
    return list(dict.fromkeys([*names, *seen_names]))


def find_model(model_name: str, hub_id_or_path: str = "") -> str:
    """What `load_checkpoint` is to read: the path of an installed model; or `hub_id_or_path`, where an installed folder of the
    same name takes precedence over a download.

    Raises:
        ValueError: there is no such model.
    """
    models, other = installed_models(), hub_id_or_path.strip().removeprefix("https://huggingface.co/")
    if not other:
        if model_name not in models:
            raise ValueError(
                f"there is no model {model_name!r} in {folder_paths.get_folder_paths(FOLDER)}; put it there and press R, or "
                f"choose one of {', '.join(models)}"
            )
        return models[model_name]
    path = os.path.expanduser(other)
    if os.path.exists(path):
        return path
    last = other.rpartition("/")[2]
    same = [model for name, model in models.items() if os.path.basename(name) == last and os.path.isdir(model)]
    return same[0] if same and not os.path.isabs(path) else path


class GMFlowLoader(io.ComfyNode):
    """A GM checkpoint as a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GMFlowLoader",
            display_name="Load GM Model",
            category="GMFlow",
            description="Loads a model that predicts a Gaussian mixture. The MODEL is an ordinary one: stock samplers run on "
            "it and follow the mixture's mean; the GM samplers use the whole mixture.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=list(installed_models()),
                    tooltip="A checkpoint from the models/gmflow folder (or the gmflow folders of extra_model_paths.yaml), or "
                    "one that comes with the extension. A file that training wrote, or a folder in the layout of diffusers "
                    "such as gmflow_imagenet_k8_ema, can be copied there as it is.",
                ),
                io.String.Input(
                    "hub_id_or_path",
                    default="",
                    optional=True,
                    placeholder="hub id or path instead",
                    tooltip="Instead of the choice above: a path, or the id of a model on the Hugging Face hub, such as "
                    "Lakonik/gmflow_imagenet_k8_ema. It is downloaded once, into the hub's cache; a folder of that name in "
                    "models/gmflow is taken instead.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(DTYPES),
                    default="default",
                    optional=True,
                    tooltip="Type of the weights in memory. default: as stored, and fp32 for models below 100 million "
                    "parameters. The mixture's mathematics is in fp32 with every type.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="For the GM samplers, or any stock sampler.")],
        )

    @classmethod
    def validate_inputs(cls, model_name: str, hub_id_or_path: str = "") -> bool | str:
        """The choice must exist, if it counts."""
        try:
            find_model(model_name, hub_id_or_path)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, model_name: str, hub_id_or_path: str = "", weight_dtype: str = "default") -> list:
        """A file that was trained on, or a folder that was replaced, is loaded again."""
        source = find_model(model_name, hub_id_or_path)
        files = [source]
        for folder in ("", "transformer", "spectrum_net", "vae") if os.path.isdir(source) else ():
            place = os.path.join(source, folder)
            files += [entry.path for entry in sorted(os.scandir(place), key=lambda e: e.name)] if os.path.isdir(place) else []
        stats = [os.stat(file) for file in files if os.path.exists(file)]
        return [source, weight_dtype, *((stat.st_mtime, stat.st_size) for stat in stats)]

    @classmethod
    def execute(cls, model_name: str, hub_id_or_path: str = "", weight_dtype: str = "default") -> io.NodeOutput:
        source = find_model(model_name, hub_id_or_path)
        logging.info("GMFlow: loading %s%s", source, "" if os.path.exists(source) else " from the Hugging Face hub")
        metadata = read_metadata(source)
        network, _ = load_checkpoint(source, dtype=DTYPES[weight_dtype])
        if weight_dtype == "default" and sum(p.numel() for p in network.parameters()) < SMALL:
            network = network.float()
        seen_names.extend(name for name in distinct(metadata["data"].get("labels") or []) if name not in seen_names)
        return io.NodeOutput(gm_model(network, metadata["data"]))
