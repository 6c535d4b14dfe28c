"""Start a real ComfyUI on the CPU with this repository and a stand-in for text encoders in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .client import Comfy
from .installation import COMFYUI, HOW_TO, is_installed
from .server import running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a ComfyUI, skip every test of this folder."""
    if not is_installed():
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.skip(f"no ComfyUI in {COMFYUI}: {HOW_TO}"))


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    """A running server; its ``base`` holds models/, input/ and output/ for the tests' files."""
    with running(tmp_path_factory.mktemp("comfyui")) as server:
        yield server
