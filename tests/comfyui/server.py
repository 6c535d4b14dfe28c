"""Start a real ComfyUI on the CPU with this repository and a stand-in for text encoders in it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .client import Comfy
from .installation import COMFYUI, GGUF, REPOSITORY, comfyui_python
from .stand_in_files import install_text_stand_in

OPTIONS = ("--cpu", "--disable-api-nodes", "--preview-method", "auto")
DATABASE = ("--database-url", "sqlite:///:memory:")


@contextmanager
def running(
    base: Path,
    before_start: Callable[[], None] | None = None,
    extensions: Mapping[str, Path] | None = None,
) -> Iterator[Comfy]:
    """Yield a running server, and stop it at the end.

    Args:
        base: a folder, for models/, input/ and output/; folders that are there are kept.
        before_start: called in the server's process before it starts, to set limits.
        extensions: folders or files of extensions by name, loaded after the stand-in for text
            encoders; if None, this repository and, where it is installed, ComfyUI-GGUF.
    """
    for name in ("custom_nodes", "input", "models", "output", "user"):
        (base / name).mkdir(exist_ok=True)
    if extensions is None:
        install(base / "custom_nodes" / "gmflow")
    install_text_stand_in(base)
    if extensions is None and GGUF.is_dir():
        install(base / "custom_nodes" / "ComfyUI-GGUF", GGUF)
    extra, elsewhere = base / "extra_model_paths.yaml", base / "elsewhere"
    places = {"base_path": elsewhere, "gmflow": "gm"}
    if extensions:
        places["custom_nodes"] = "later"  # ComfyUI loads the extensions of a further folder later
        (elsewhere / "later").mkdir(parents=True, exist_ok=True)
        for name, extension in extensions.items():
            install(elsewhere / "later" / name, extension)
    lines = ["elsewhere:", *(f"  {name}: {place}" for name, place in places.items())]
    extra.write_text("\n".join([*lines, ""]))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [comfyui_python(), "main.py", *OPTIONS, *DATABASE, "--port", str(port)]
    command += ["--base-directory", str(base), "--extra-model-paths-config", str(extra)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with (base / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=COMFYUI,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=before_start,
        )
    server = Comfy(f"http://127.0.0.1:{port}", base, base / "server.log", process)
    try:
        server.wait_ready(timeout=300)
        yield server
    finally:
        server.close()


def install(place: Path, extension: Path = REPOSITORY) -> None:
    """Link an extension into custom_nodes, unless it is there; where links fail, copy it."""
    if place.exists():
        return
    try:
        place.symlink_to(extension, target_is_directory=True)
    except OSError:
        left_out = shutil.ignore_patterns(".*", "__pycache__", "outputs", "tests")
        shutil.copytree(extension, place, ignore=left_out)
