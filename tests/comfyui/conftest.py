"""Start a real ComfyUI on the CPU with this repository and a stand-in for text encoders in it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .client import Comfy
from .installation import COMFYUI, GGUF, HOW_TO, REPOSITORY, comfyui_python, is_installed
from .stand_in_files import install_text_stand_in

OPTIONS = ("--cpu", "--disable-api-nodes", "--preview-method", "auto")
DATABASE = ("--database-url", "sqlite:///:memory:")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a ComfyUI, skip every test of this folder."""
    if not is_installed():
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.skip(f"no ComfyUI in {COMFYUI}: {HOW_TO}"))


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    """A running server; its ``base`` holds models/, input/ and output/ for the tests' files."""
    base = tmp_path_factory.mktemp("comfyui")
    for name in ("custom_nodes", "input", "models", "output", "user"):
        (base / name).mkdir()
    install(base / "custom_nodes" / "gmflow")
    install_text_stand_in(base)
    if GGUF.is_dir():
        install(base / "custom_nodes" / "ComfyUI-GGUF", GGUF)
    extra = base / "extra_model_paths.yaml"
    extra.write_text(f"elsewhere:\n  base_path: {base / 'elsewhere'}\n  gmflow: gm\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [comfyui_python(), "main.py", *OPTIONS, *DATABASE, "--port", str(port)]
    command += ["--base-directory", str(base), "--extra-model-paths-config", str(extra)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with (base / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=COMFYUI, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    server = Comfy(f"http://127.0.0.1:{port}", base, base / "server.log", process)
    try:
        server.wait_ready(timeout=120)
        yield server
    finally:
        server.close()


def install(place: Path, extension: Path = REPOSITORY) -> None:
    """Link an extension into custom_nodes; copy it where links are impossible."""
    try:
        place.symlink_to(extension, target_is_directory=True)
    except OSError:
        left_out = shutil.ignore_patterns(".*", "__pycache__", "outputs", "tests")
        shutil.copytree(extension, place, ignore=left_out)
