"""Find models and mixture sources in the folders of ComfyUI."""

from __future__ import annotations

import os

import folder_paths

from ...gmflow_core.files.checkpoint import SHIPPED
from ...gmflow_core.files.hub import cached_folder
from ...gmflow_core.files.labels import distinct, known_names

MODELS, SOURCES = "gmflow", "gmflow_sources"  # our folders in models/
LORAS, DIFFUSION_MODELS = "loras", "diffusion_models"  # ComfyUI's
MARKS = ("model_index.json", "transformer/config.json")  # of a model's folder, as diffusers has it
PARTS = ("", "transformer", "spectrum_net", "vae")  # folders in it that hold files
PUBLISHED = ("Lakonik/gmflow_imagenet_k8_ema",)  # models on the hub


def register_folders() -> None:
    """Register our folders with ComfyUI.

    Those of extra_model_paths.yaml, which are registered already, come first, then models/gmflow
    and models/gmflow_sources, and last the shipped models.
    """
    _register(MODELS, folder_paths.supported_pt_extensions, str(SHIPPED))
    _register(SOURCES, {".safetensors"})


def _register(folder: str, extensions: set[str], *further: str) -> None:
    """Make models/`folder`, and register it and further paths for files with these extensions."""
    default = os.path.join(folder_paths.models_dir, folder)
    os.makedirs(default, exist_ok=True)
    for path in (default, *further):
        folder_paths.add_model_folder_path(folder, path)
    paths, _ = folder_paths.folder_names_and_paths[folder]
    folder_paths.folder_names_and_paths[folder] = (paths, extensions)


def installed_models() -> dict[str, str]:
    """Return name and path of every installed model: files, and folders as diffusers has them."""
    folders: dict[str, str] = {}
    for base in folder_paths.get_folder_paths(MODELS):
        for path, inside, _ in os.walk(base, followlinks=True):
            if path != base and any(os.path.exists(os.path.join(path, mark)) for mark in MARKS):
                folders.setdefault(os.path.relpath(path, base), path)
                inside.clear()
    files = {
        name: path
        for name, path in _installed_files(MODELS).items()
        if path not in shipped_sources().values()
        and not any(name.startswith(folder + os.sep) for folder in folders)
    }
    return dict(sorted({**files, **folders}.items()))


def installed_sources() -> dict[str, str]:
    """Return name and path of every mixture source that is installed or shipped."""
    return dict(sorted({**shipped_sources(), **_installed_files(SOURCES)}.items()))


def shipped_sources() -> dict[str, str]:
    """Return name and path of the mixture sources shipped with the extension."""
    return {path.name: str(path) for path in sorted(SHIPPED.glob("*source*.safetensors"))}


def _installed_files(folder: str) -> dict[str, str]:
    """Return name and path of every file that ComfyUI lists for a folder."""
    names = folder_paths.get_filename_list(folder)
    return {name: path for name in names if (path := folder_paths.get_full_path(folder, name))}


def find_model(model_name: str, hub_id_or_path: str = "") -> str:
    """Return what `load_checkpoint` has to read.

    That is the path of an installed model, or `hub_id_or_path` if it is given; of a hub id, an
    installed folder of the same name is preferred to a download.

    Raises:
        ValueError: there is no such model.
    """
    models = installed_models()
    other = hub_id_or_path.strip().removeprefix("https://huggingface.co/")
    if not other:
        return _find(model_name, models, MODELS, "model")
    path = os.path.expanduser(other)
    if os.path.exists(path) or os.path.isabs(path):
        return path
    last = other.rpartition("/")[2]
    same = (
        model
        for name, model in models.items()
        if os.path.basename(name) == last and os.path.isdir(model)
    )
    return next(same, path)


def find_source(name: str) -> str:
    """Return the path of an installed mixture source.

    Raises:
        ValueError: there is none of that name.
    """
    return _find(name, installed_sources(), SOURCES, "mixture source")


def _find(name: str, paths: dict[str, str], folder: str, kind: str) -> str:
    """Return the path of the file or folder `name` among the installed ones.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in paths:
        others = f", or choose one of {', '.join(paths)}" if paths else ""
        folders = [path for path in folder_paths.get_folder_paths(folder) if path != str(SHIPPED)]
        raise ValueError(
            f"there is no {kind} {name!r} in {', '.join(folders)}; put it there and press R{others}"
        )
    return paths[name]


def files_of(model: str) -> list[str]:
    """Return the path of a model, and, if it is a folder, those of the files in it."""
    files = [model]
    for part in PARTS:
        folder = os.path.join(model, part)
        if os.path.isdir(folder):
            files += sorted(entry.path for entry in os.scandir(folder))
    return files


# Class names of the models loaded so far. Module state, as ComfyUI asks for the list of names, the
# options of a node's input, without a model at hand.
_loaded_names: dict[str, None] = {}


def remember_names(labels: list[str]) -> None:
    """Add the classes of a loaded model to the names that `class_names` returns."""
    _loaded_names.update(dict.fromkeys(distinct(labels)))


def class_names() -> list[str]:
    """Return the class names of installed models, of those in the hub's cache, and of loaded ones.

    Each name is listed once.
    """
    cached = [folder for folder in map(cached_folder, PUBLISHED) if folder is not None]
    names = known_names([*installed_models().values(), *map(str, cached)])
    return list(dict.fromkeys([*names, *_loaded_names]))
