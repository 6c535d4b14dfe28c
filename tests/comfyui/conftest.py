"""One server and one page of it for all tests of a process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .client import Comfy
from .installation import COMFYUI, HOW_TO, OF_THE_PAGE, is_installed
from .page import ComfyPage, open_browser, open_page
from .server import running
from .stand_in_files import WORKFLOWS, write_workflow_files

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

OPENED = pytest.StashKey[ExitStack]()


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
def opened(request: pytest.FixtureRequest) -> Iterator[ExitStack]:
    """What the tests of the page have opened; closed after the last of them."""
    with ExitStack() as stack:
        request.config.stash[OPENED] = stack
        yield stack


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Close the browser when no test of the page follows.

    It cannot be closed later: a process that is forked meanwhile, such as a loader of data, keeps
    its pipes open, and the browser waits for their end.
    """
    following = "" if nextitem is None else nextitem.nodeid
    together = "PYTEST_XDIST_WORKER" in os.environ  # a worker has the page's tests in one go
    near = OF_THE_PAGE.match(following) if together else following.startswith("tests/comfyui/")
    if not near and OPENED in item.config.stash:
        item.config.stash[OPENED].close()


@pytest.fixture(scope="session")
def browser(opened: ExitStack) -> BrowserContext:
    """A browser for all pages of this process."""
    return opened.enter_context(open_browser())


@pytest.fixture(scope="session")
def workflow_files(comfy: Comfy) -> None:
    """Write the files that the workflows name, or the page would ask for them."""
    for path in WORKFLOWS.glob("*.json"):
        write_workflow_files(comfy.base, path.stem)
    comfy.object_info()


@pytest.fixture(scope="session")
def only_page(
    comfy: Comfy, browser: BrowserContext, opened: ExitStack, workflow_files: None
) -> ComfyPage:
    """The page, which takes longer to load than most tests to use it."""
    return opened.enter_context(open_page(comfy, browser))


@pytest.fixture
def page(only_page: ComfyPage) -> ComfyPage:
    """The page with an empty graph, in the default design."""
    only_page.clear()
    return only_page
