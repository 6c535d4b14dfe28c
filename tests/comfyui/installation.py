"""Where ComfyUI and ComfyUI-GGUF are on this machine, and how to get them.

ComfyUI is looked for in ``COMFYUI_PATH``, then in ``~/comfy/ComfyUI``. It runs with
``COMFYUI_PYTHON``, then with the Python in its folder ``.venv``, else with the running one.
ComfyUI-GGUF is looked for in ``COMFYUI_GGUF_PATH``, then in ``~/comfy/ComfyUI-GGUF``.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
COMFYUI = Path(os.environ.get("COMFYUI_PATH") or "~/comfy/ComfyUI").expanduser().absolute()
HOW_TO = (
    "clone https://github.com/comfyanonymous/ComfyUI to ~/comfy/ComfyUI or set COMFYUI_PATH, "
    "make a .venv there and install torch, torchvision, torchaudio and its requirements.txt"
)
OF_THE_PAGE = re.compile(  # files of tests that open the page
    r"tests/comfyui/test_(blueprints|first_hour|harness|moved_in|page\w*|templates)\.py"
)
OF_ONE_PROCESS = re.compile(  # tests whose scripts run in one process of ComfyUI, in forks of it
    r"tests/comfyui/test_(any_model\.py(?!::test_(prompt|interrupt)_)"
    r"|(around_samplers|dynamic_memory|int8_layers|piflow|plain_models|train_adapter)\.py)"
)
GGUF = Path(os.environ.get("COMFYUI_GGUF_PATH") or "~/comfy/ComfyUI-GGUF").expanduser().absolute()
GGUF_HOW_TO = (
    "clone https://github.com/city96/ComfyUI-GGUF to ~/comfy/ComfyUI-GGUF or set "
    "COMFYUI_GGUF_PATH, and install gguf in the Python that runs ComfyUI and in the one that "
    "runs the tests"
)


def is_installed() -> bool:
    """Return whether there is a ComfyUI."""
    return (COMFYUI / "main.py").is_file()


def comfyui_version() -> str | None:
    """Return ComfyUI's version; None if there is no ComfyUI."""
    file = COMFYUI / "comfyui_version.py"
    found = re.search(r'"(.+?)"', file.read_text()) if file.is_file() else None
    return found and found[1]


def has_gradients() -> bool:
    """Return whether this ComfyUI can train: its kernels have gradients or can be switched off."""
    math, manager = (COMFYUI / "comfy" / n for n in ("ldm/flux/math.py", "model_management.py"))
    return "ck.apply_rope" not in math.read_text() or "in_training" in manager.read_text()


def comfyui_python() -> str:
    """Return the path of the Python that runs ComfyUI."""
    places = [COMFYUI / ".venv" / "bin" / "python", COMFYUI / ".venv" / "Scripts" / "python.exe"]
    own = next((str(place) for place in places if place.is_file()), sys.executable)
    return os.environ.get("COMFYUI_PYTHON") or own
