"""Find GM models in the folders of ComfyUI."""

from __future__ import annotations

import os

import folder_paths

from ...gmflow_core.files.checkpoint import SHIPPED
from ...gmflow_core.files.hub import cached_folder
from ...gmflow_core.files.labels import known_names

FOLDER = "gmflow"
MARKS = (
    "model_index.json",
    "transformer/config.json",
)  # of a model that is a folder, in the layout of diffusers
PUBLISHED = ("Lakonik/gmflow_imagenet_k8_ema",)  # on the hub
seen_names: list[str] = []  # classes of the models loaded so far


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
    files = [
        name for name in names if not any(name.startswith(folder + os.sep) for folder in folders)
    ]
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
    models, other = (
        installed_models(),
        hub_id_or_path.strip().removeprefix("https://huggingface.co/"),
    )
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
    same = [
        model
        for name, model in models.items()
        if os.path.basename(name) == last and os.path.isdir(model)
    ]
    return same[0] if same and not os.path.isabs(path) else path
