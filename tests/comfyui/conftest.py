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
    """Skip the tests of this folder without a ComfyUI; keep those that share one on one worker.

    All tests with a server share one. The other tests of a file share a process that they start.
    """
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            if not is_installed():
                item.add_marker(pytest.mark.skip(f"no ComfyUI in {COMFYUI}: {HOW_TO}"))
            group = "server" if "comfy" in item.fixturenames else item.path.stem
            item.add_marker(pytest.mark.xdist_group(f"ComfyUI {group}"))


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
