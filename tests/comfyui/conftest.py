"""Starts a real ComfyUI on the CPU with this repository as its only extension, beside a stand-in for text encoders.

ComfyUI is looked for in ``COMFYUI_PATH``, then in ``~/comfy/ComfyUI``; it runs with ``COMFYUI_PYTHON``, then with
the Python in its folder ``.venv``, else with the running one. ComfyUI-GGUF, for the tests that need it, is looked for in
``COMFYUI_GGUF_PATH``, then in ``~/comfy/ComfyUI-GGUF``.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .bases import install_text_stand_in
from .client import Comfy

REPOSITORY = Path(__file__).resolve().parents[2]
HOW_TO = (
    "clone https://github.com/comfyanonymous/ComfyUI to ~/comfy/ComfyUI or set COMFYUI_PATH, "
    "make a .venv there and install torch, torchvision, torchaudio and its requirements.txt"
)
GGUF = Path(os.environ.get("COMFYUI_GGUF_PATH") or "~/comfy/ComfyUI-GGUF").expanduser().absolute()
GGUF_HOW_TO = (
    "clone https://github.com/city96/ComfyUI-GGUF to ~/comfy/ComfyUI-GGUF or set COMFYUI_GGUF_PATH, and install gguf in the "
    "Python that runs ComfyUI and in the one that runs the tests"
)
COMFYUI = Path(os.environ.get("COMFYUI_PATH") or "~/comfy/ComfyUI").expanduser().absolute()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a ComfyUI, skip every test of this folder."""
    if not (COMFYUI / "main.py").is_file():
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.skip(f"no ComfyUI in {COMFYUI}: {HOW_TO}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say whether the tests of this folder ran, and against which ComfyUI."""
    reports = {
        kind: len(
            {r.nodeid for r in terminalreporter.stats.get(kind, []) if "tests/comfyui/" in r.nodeid}
        )
        for kind in ("passed", "failed", "error", "skipped")
    }
    counts = ", ".join(f"{count} {kind}" for kind, count in reports.items() if count)
    if not counts:
        return
    if (COMFYUI / "comfyui_version.py").is_file():
        version = re.search(r'"(.+?)"', (COMFYUI / "comfyui_version.py").read_text())
        terminalreporter.write_line(
            f"ComfyUI tests ran against ComfyUI {version and version[1]}: {counts}"
        )
    else:
        terminalreporter.write_line(f"ComfyUI tests did not run, as there is no ComfyUI: {counts}")


def comfyui_python() -> str:
    """The Python that runs ComfyUI."""
    places = [COMFYUI / ".venv" / "bin" / "python", COMFYUI / ".venv" / "Scripts" / "python.exe"]
    own = next((str(place) for place in places if place.is_file()), sys.executable)
    return os.environ.get("COMFYUI_PYTHON") or own


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
    options = [
        "--cpu",
        "--disable-api-nodes",
        "--database-url",
        "sqlite:///:memory:",
        "--preview-method",
        "auto",
    ]
    command = [
        comfyui_python(),
        "main.py",
        *options,
        "--base-directory",
        str(base),
        "--port",
        str(port),
    ]
    command += ["--extra-model-paths-config", str(extra)]
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
    """Put an extension, this repository, among the extensions: as a link, or as a copy where links are impossible."""
    try:
        place.symlink_to(extension, target_is_directory=True)
    except OSError:
        shutil.copytree(
            extension, place, ignore=shutil.ignore_patterns(".*", "__pycache__", "outputs", "tests")
        )
