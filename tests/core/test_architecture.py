"""Check that the folders' arrows point down only, from the imports, without running any module."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("gmflow_core", "nodes", "training")
LINES, FUNCTION_LINES = 450, 70  # the most that a file and a function may have

# What each folder of gmflow_core may import of gmflow_core, beside itself. Files that lie at the
# top of gmflow_core count as folders.
LAYERS = {
    "gaussians": (),
    "flow": ("gaussians",),
    "fast": ("gaussians", "flow"),
    "models": ("gaussians", "flow"),
    "files": ("flow", "models"),
    "source": ("gaussians", "flow", "files"),
    "quantization": (),
    "pictures": (),
    "charts": ("pictures",),
    "sampling": ("gaussians", "flow", "fast", "source"),
    "diffusers": ("gaussians", "flow", "models", "files", "sampling"),
    "toys": ("gaussians", "flow", "sampling", "pictures"),
    "terminal": ("files",),
    "pipeline": ("models", "files", "source", "sampling", "pictures"),
    "adapter_command": ("files",),
    "fetch_command": ("files",),
    "sample_arguments": ("models", "files", "sampling"),
    "sample_command": (
        *("flow", "models", "files", "sampling", "toys", "pictures"),
        *("pipeline", "sample_arguments"),
    ),
    "demo_command": (
        *("files", "sampling", "toys", "pictures"),
        *("pipeline", "sample_command"),
    ),
    "__main__": ("cli",),
    "cli": (
        *("models", "files", "terminal", "sample_arguments"),
        *("adapter_command", "demo_command", "fetch_command", "sample_command"),
    ),
}
FOREIGN = {  # what a package never imports
    "gmflow_core": ("comfy", "comfy_api", "comfy_execution", "diffusers", "folder_paths"),
    "nodes": ("diffusers", "accelerate"),
    "training": ("comfy", "comfy_api", "comfy_execution", "folder_paths"),
}
TRAINING_LAYERS = {  # the same for the folders of training
    "common": (),
    "encoders": ("common",),
    "data": ("common", "encoders"),
    "source": ("common", "encoders", "data"),
    "evaluation": ("common", "encoders", "data"),
    "loop": ("common", "encoders", "data", "evaluation"),
    "experiments": ("common", "data", "evaluation", "loop"),
}
FORMULAS = ("gaussians", "flow", "sampling")  # folders that hold mathematics and no machinery
FORBIDDEN = {
    *("is_compiling", "compile", "compiler", "jit", "is_scripting"),
    *("__dict__", "vars", "__setattr__", "cached_property"),
}


def modules_of(package):
    """Return the modules of a package by dotted name; a folder is known by its own name."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = {name: path for package in PACKAGES for name, path in modules_of(package).items()}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imported(name):
    """Return the dotted names that a module imports, within functions too, relative ones resolved.

    `from a import b` counts as a.b where that is a module of ours, else as a.
    """
    package = name.split(".") if MODULES[name].stem == "__init__" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:  # nodes/ says ..gmflow_core: the repository's root is a package there
                base = package[: len(package) + 1 - node.level] + base
            start = ".".join(base)
            for alias in node.names:
                whole = f"{start}.{alias.name}"
                found.add(whole if whole in MODULES else start)
    return found


IMPORTS = {name: imported(name) for name in MODULES}


def folder_of(module):
    """Return the folder of gmflow_core, or the file at its top, that a module belongs to."""
    return module.split(".")[1] if module.count(".") else "__init__"


def test_imports_form_no_circle():
    ours = {name: {each for each in IMPORTS[name] if each in MODULES} for name in MODULES}
    try:
        graphlib.TopologicalSorter(ours).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_nothing_foreign(package):
    """nodes and training never meet, and gmflow_core knows neither ComfyUI nor diffusers."""
    others = {each for each in PACKAGES if each not in (package, "gmflow_core")}
    wrong = [
        f"{name} imports {each}"
        for name in modules_of(package)
        for each in sorted(IMPORTS[name])
        if each.split(".")[0] in others | set(FOREIGN[package])
        and not (each.split(".")[0] == "diffusers" and "diffusers" in name)
    ]
    assert not wrong, "\n".join(wrong)


def test_folders_of_gmflow_core_import_lower_ones_only():
    wrong = [
        f"{name} imports {each}"
        for name in modules_of("gmflow_core")
        for each in sorted(IMPORTS[name])
        if name != "gmflow_core" and each.split(".")[0] == "gmflow_core"
        if folder_of(each) not in (folder_of(name), *LAYERS[folder_of(name)])
    ]
    assert not wrong, "\n".join(wrong)
    assert set(LAYERS) == {folder_of(name) for name in modules_of("gmflow_core")} - {"__init__"}


def test_the_layers_have_an_order():
    graphlib.TopologicalSorter(LAYERS).prepare()


def test_gaussians_needs_torch_alone():
    standard = {"__future__", "collections", "dataclasses", "functools", "math", "typing"}
    wrong = [
        f"{name} imports {each}"
        for name in modules_of("gmflow_core")
        if folder_of(name) == "gaussians"
        for each in sorted(IMPORTS[name])
        if each.split(".")[0] not in {"gmflow_core", "torch", *standard}
    ]
    assert not wrong, "\n".join(wrong)


def test_node_files_and_commands_are_no_libraries():
    """Files with node classes import no other node file; nobody imports a command of training."""
    tops = {name for name in MODULES if name.count(".") == 1 and MODULES[name].stem != "__init__"}
    wrong = [
        f"{name} imports {each}"
        for name in MODULES
        for each in sorted(IMPORTS[name] & tops)
        if (each.startswith("nodes.") and name != "nodes") or each.startswith("training.")
    ]
    assert not wrong, "\n".join(wrong)


def machinery(node):
    """Return the name of what a formula's code must not hold; "" for other nodes."""
    if isinstance(node, ast.ImportFrom):
        return next((alias.name for alias in node.names if alias.name in FORBIDDEN), "")
    if isinstance(node, ast.Attribute):
        return node.attr if node.attr in FORBIDDEN else ""
    if isinstance(node, ast.Name):
        return node.id if node.id in FORBIDDEN else ""
    return ""


def test_formulas_hold_no_machinery():
    """No branch for a compiler, no compiled form, no write past a frozen dataclass."""
    wrong = []
    for name in modules_of("gmflow_core"):
        if folder_of(name) not in FORMULAS:
            continue
        construction = {
            id(inner)
            for node in ast.walk(TREES[name])
            if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"
            for inner in ast.walk(node)
        }
        for node in ast.walk(TREES[name]):
            found = machinery(node)
            if found and not (found == "__setattr__" and id(node) in construction):
                wrong.append(f"{MODULES[name].relative_to(ROOT)}:{node.lineno} {found}")
    assert not wrong, "\n".join(wrong)


def test_folders_of_training_import_lower_ones_only():
    wrong = [
        f"{name} imports {each}"
        for name in modules_of("training")
        if name.count(".") > 1
        for each in sorted(IMPORTS[name])
        if each.startswith("training.")
        and each.split(".")[1] not in (name.split(".")[1], *TRAINING_LAYERS[name.split(".")[1]])
    ]
    assert not wrong, "\n".join(wrong)
    graphlib.TopologicalSorter(TRAINING_LAYERS).prepare()


def test_files_and_functions_are_short():
    """Nothing is excepted."""
    paths = [path for name in (*PACKAGES, "tests") for path in sorted((ROOT / name).rglob("*.py"))]
    wrong = []
    for path in (*paths, ROOT / "__init__.py"):
        text = path.read_text(encoding="utf-8")
        if (count := len(text.splitlines())) > LINES:
            wrong.append(f"{path.relative_to(ROOT)}: {count} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = node.end_lineno - node.lineno + 1
                if count > FUNCTION_LINES:
                    wrong.append(f"{path.relative_to(ROOT)}: {node.name} has {count} lines")
    assert not wrong, "\n".join(wrong)


def test_every_folder_is_packaged():
    """A wheel holds the folders that pyproject.toml lists."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^packages = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)[1]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "gmflow_core").rglob("*.py")}
    assert set(re.findall(r'"(.+?)"', listed)) == {".".join(each.parts) for each in folders}
