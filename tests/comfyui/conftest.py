"""One server and one page of it for all tests of a process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .client import Comfy
from .installation import COMFYUI, HOW_TO, is_installed
from .page import ComfyPage, open_browser, open_page
from .server import running
from .stand_in_files import WORKFLOWS, write_workflow_files

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext


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


@pytest.fixture(scope="session")
def browser() -> Iterator[BrowserContext]:
    """A browser for all pages of this process."""
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="session")
def workflow_files(comfy: Comfy) -> None:
    """Write the files that the workflows name, or the page would ask for them."""
    for path in WORKFLOWS.glob("*.json"):
        write_workflow_files(comfy.base, path.stem)
    comfy.object_info()


@pytest.fixture(scope="session")
def only_page(comfy: Comfy, browser: BrowserContext, workflow_files: None) -> Iterator[ComfyPage]:
    """The page, which takes longer to load than most tests to use it."""
    with open_page(comfy, browser) as page:
        yield page


@pytest.fixture
def page(only_page: ComfyPage) -> ComfyPage:
    """The page with an empty graph, in the default design."""
    only_page.clear()
    return only_page
