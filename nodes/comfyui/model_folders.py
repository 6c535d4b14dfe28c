"""Find models and mixture sources in the folders of ComfyUI."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import folder_paths

from ...gmflow_core.files.checkpoint import SHIPPED
from ...gmflow_core.files.errors import quoted, reason
from ...gmflow_core.files.hub import cached_folder, is_published, tidy_source
from ...gmflow_core.files.labels import MOST_READ, MOST_SECONDS, distinct, known_names
from ...gmflow_core.files.published import IMAGENET
from .listing import MOST_NAMES, file_names, list_files, say_once, shown

MODELS, SOURCES = "gmflow", "gmflow_sources"  # our folders in models/
LORAS, DIFFUSION_MODELS = "loras", "diffusion_models"  # ComfyUI's
MARKS = ("model_index.json", "transformer/config.json")  # of a model's folder, as diffusers has it
PARTS = ("", "transformer", "spectrum_net", "vae")  # folders in it that hold files
ENDINGS = (".safetensors", ".sft")  # of files that we load
PICKLES = (".ckpt", ".pt", ".pt2", ".bin", ".pth", ".pkl")  # of files that could run code
MOST_OFFERED = 20  # names that an error lists
PUBLISHED = (IMAGENET,)  # models on the hub


def register_folders() -> None:
    """Register our folders with ComfyUI.

    Those of extra_model_paths.yaml, which are registered already, come first, then models/gmflow
    and models/gmflow_sources, and last the shipped models.
    """
    _register(MODELS, str(SHIPPED))
    _register(SOURCES)


def _register(folder: str, *further: str) -> None:
    """Make models/`folder`, and register it and further paths for files that we can load."""
    default = os.path.join(folder_paths.models_dir, folder)
    try:
        os.makedirs(default, exist_ok=True)
    except OSError as error:  # read-only, or a file of that name
        say_once(f"{default} cannot be made ({reason(error)}); models are not looked for there")
    for path in (default, *further):
        folder_paths.add_model_folder_path(folder, path)
    paths, _ = folder_paths.folder_names_and_paths[folder]
    folder_paths.folder_names_and_paths[folder] = (paths, set(ENDINGS))


def installed_models() -> dict[str, str]:
    """Return name and path of every installed model: files, and folders as diffusers has them."""
    found = {**shipped_models(), **_installed(MODELS, _marks_of)}
    return dict(sorted(found.items()))


def installed_sources() -> dict[str, str]:
    """Return name and path of every mixture source that is installed or shipped."""
    return dict(sorted({**shipped_sources(), **_installed(SOURCES)}.items()))


def shipped_models() -> dict[str, str]:
    """Return name and path of the models shipped with the extension."""
    sources = shipped_sources()
    paths = sorted(SHIPPED.glob("*.safetensors"))
    return {path.name: str(path) for path in paths if path.name not in sources}


def shipped_sources() -> dict[str, str]:
    """Return name and path of the mixture sources shipped with the extension."""
    return {path.name: str(path) for path in sorted(SHIPPED.glob("*source*.safetensors"))}


def _marks_of(folder: str) -> list[str]:
    """Return the files that make a folder a model in the layout of diffusers."""
    return [path for mark in MARKS if os.path.isfile(path := os.path.join(folder, mark))]


def _installed(folder: str, is_model: Callable[[str], list[str]] | None = None) -> dict[str, str]:
    """Return name and path of what the users' own folders of that kind hold."""
    paths = [path for path in folder_paths.get_folder_paths(folder) if path != str(SHIPPED)]
    return list_files(paths, ENDINGS, is_model)


def find_model(model_name: str, hub_id_or_path: str = "") -> str:
    """Return what `load_checkpoint` has to read.

    That is the path of an installed model, or `hub_id_or_path` if it is given; of a hub id, an
    installed folder of the same name is preferred to a download.

    Raises:
        ValueError: there is no such model.
    """
    models = installed_models()
    try:
        source = tidy_source(hub_id_or_path)
    except ValueError as error:
        raise ValueError(f"hub_id_or_path: {error}") from error
    if not source:
        return blamed("model_name", _find, model_name, models, MODELS, "model")
    if os.path.exists(source):
        return source
    hub_name = source.partition("@")[0] if source.count("/") == 1 else source
    last = hub_name.rpartition("/")[2]
    same = (
        model
        for name, model in models.items()
        if os.path.basename(name) == last and os.path.isdir(model)
    )
    found = source if "@" in source else next(same, source)
    if not is_published(found):
        raise ValueError(
            f"hub_id_or_path: there is no checkpoint {quoted(source)}: no such file or folder, and "
            "no hub id (owner/name) either"
        )
    return found


def blamed(setting: str, find: Callable, *args: Any) -> Any:
    """Return what `find` does, and begin its errors with the input that is wrong.

    ComfyUI puts what a validation says on every input that it reads, the right ones too.

    Raises:
        ValueError: the name in that input is wrong.
    """
    try:
        return find(*args)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error


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
    for spelling in (name, shown(name), name.strip().replace("\\", "/").strip("/")):
        if spelling in paths:
            return paths[spelling]
    folders = [path for path in folder_paths.get_folder_paths(folder) if path != str(SHIPPED)]
    unlisted = _unlisted(name, folders, is_folder=folder == MODELS)
    if unlisted is not None:
        return unlisted
    if name.lower().endswith(PICKLES):
        raise ValueError(
            f"{quoted(name)} is a pickle file, which could run any code when opened, so GMFlow "
            f"never reads one; put the .safetensors version of the {kind} into {folders[0]}"
        )
    some, rest = ", ".join(list(paths)[:MOST_OFFERED]), len(paths) - MOST_OFFERED
    more = f" and {rest} more" if rest > 0 else ""
    others = f", or choose one of {some}{more}" if paths else ""
    raise ValueError(
        f"there is no {kind} {quoted(name)} in {', '.join(folders)}; put it there and press "
        f"R{others}"
    )


def _unlisted(name: str, folders: list[str], is_folder: bool) -> str | None:
    """Return the path of a model that the list leaves out; None if there is none.

    A list holds a folder once, whatever links lead to it, and has a length.

    Args:
        is_folder: True if it may also be a folder in the layout of diffusers.
    """
    for path in _paths_below(folders, name.strip().replace("\\", "/")):
        is_file = path.lower().endswith(ENDINGS) and os.path.isfile(path)
        if is_file or (is_folder and path not in folders and _marks_of(path)):
            return path
    return None


def find_diffusion_model(
    name: str, folders: Sequence[str] = (DIFFUSION_MODELS,), advice: str = ""
) -> str:
    """Return the path of a diffusion model's file.

    Args:
        folders: ComfyUI's kinds of folders to look in.
        advice: on what a file of that name needs, for the message.

    Raises:
        ValueError: there is none of that name.
    """
    for folder in folders if "\0" not in name else ():
        path = folder_paths.get_full_path(folder, name)
        if path is not None:
            return path
    places = ", ".join(folder_paths.get_folder_paths(DIFFUSION_MODELS))
    raise ValueError(
        f"there is no diffusion model {quoted(name)} in {places}{advice}; put it there and press R"
    )


def lora_names() -> list[str]:
    """Return the names of the files in ComfyUI's folder of LoRAs, as a list shows them."""
    return list(dict.fromkeys(map(shown, folder_paths.get_filename_list(LORAS)[:MOST_NAMES])))


def find_lora(name: str) -> str:
    """Return the path of a file in ComfyUI's folder of LoRAs.

    Raises:
        ValueError: there is none of that name.
    """
    path = lora_path(name)
    if path is None:  # its name is shown otherwise than it is
        names = (each for each in folder_paths.get_filename_list(LORAS) if shown(each) == name)
        path = next(filter(None, map(lora_path, names)), None)
    if path is None:
        folders = ", ".join(folder_paths.get_folder_paths(LORAS))
        raise ValueError(
            f"there is no adapter {quoted(name)} in {folders}; put it there and press R"
        )
    return path


def lora_path(name: str) -> str | None:
    """Return the path of a LoRA, None if there is none; ComfyUI's own function logs any name."""
    paths = _paths_below(folder_paths.get_folder_paths(LORAS), name)
    return next(filter(os.path.isfile, paths), None)


def _paths_below(folders: list[str], name: str) -> list[str]:
    """Return the paths that a name may stand for in folders: never above them."""
    inside = os.path.relpath(os.path.join(os.sep, name), os.sep)
    return [os.path.normpath(os.path.join(base, inside)) for base in folders]


def files_of(model: str) -> list[str]:
    """Return the path of a model, and, if it is a folder, those of the files in it."""
    files = [model]
    for folder in (os.path.join(model, part) for part in PARTS):
        files += [os.path.join(folder, name) for name in file_names(folder)]
    return files


# Class names of the models loaded so far. Module state, as ComfyUI asks for the list of names, the
# options of a node's input, without a model at hand.
_loaded_names: dict[str, None] = {}


def remember_names(labels: list[str]) -> None:
    """Add the classes of a loaded model to the names that `class_names` returns."""
    left = max(0, MOST_NAMES - len(_loaded_names))
    _loaded_names.update(dict.fromkeys(distinct(labels[:left])))


def class_names() -> list[str]:
    """Return the class names of installed models, of those in the hub's cache, and of loaded ones.

    Each name is listed once, and at most MOST_NAMES in all.
    """
    cached = [folder for folder in map(cached_folder, PUBLISHED) if folder is not None]
    names, is_whole = known_names([*installed_models().values(), *map(str, cached)])
    names = list(dict.fromkeys([*names, *_loaded_names]))
    if not is_whole or len(names) > MOST_NAMES:
        say_once(
            "the models installed have more class names than GM Class Labels can list; write other "
            "names into more_labels"
        )
    return names[:MOST_NAMES]


def classes_by_model() -> dict[str, Any]:
    """Return which model has which class names, for the page.

    Returns:
        `lists`: lists of names, at most MOST_NAMES in all; `models`: the names of models, as the
        choices of GM Load Model or as ids on the hub, and the number of each one's list.
    """
    cached = {name: str(folder) for name in PUBLISHED if (folder := cached_folder(name))}
    lists: dict[tuple[str, ...], int] = {}
    models, left, end = {}, MOST_NAMES, time.monotonic() + MOST_SECONDS
    for name, path in {**cached, **installed_models()}.items():
        names = tuple(known_names([path])[0])
        left -= 0 if names in lists else len(names)
        if left < 0 or len(models) >= MOST_READ or time.monotonic() > end:
            break
        models[name] = lists.setdefault(names, len(lists))
    return {"lists": [list(names) for names in lists], "models": models}
