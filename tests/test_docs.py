"""The pages (*.md, docs/*.md): links, anchors, paths and commands exist; tables equal files."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import json
import re
import sys
from pathlib import Path
from unittest import mock
from urllib.parse import unquote

import pytest
from PIL import Image

from tests.docs_tables import REPOSITORY, TABLE, pages, with_tables

PAGES = {page.relative_to(REPOSITORY).as_posix(): page.read_text("utf-8") for page in pages()}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PARAGRAPHS = re.compile(r"\n\s*\n|\n(?=\s*(?:[|#]|[-*] |\d+\. |<!--))")  # between them
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"(?<![\w/.-])(?:gmflow_core|nodes|training|tests|docs|workflows)/[\w./-]*")
COMMAND = re.compile(
    r"-m ((?:training|tests)(?:\.[a-z_]+)*)(?![\w.])([^;&|]*)|(?<![\w-])gmflow ([^;&|]*)"
)
OPTION = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")
README_SIZE = 10_240  # bytes
TOOL = re.compile(r"python -m (tests(?:\.[a-z_]+)*)(?![\w.])")
STARTED = {"tests.forked", "tests.robustness.eight_bit"}  # by tests, with arguments of their own

each_page = pytest.mark.parametrize("name", PAGES)


def tools() -> list[str]:
    """Return the modules of tests that pages and docstrings give as commands."""
    sources = (path.read_text("utf-8") for path in (REPOSITORY / "tests").rglob("*.py"))
    found = {name for text in (*PAGES.values(), *sources) for name in TOOL.findall(text)}
    return sorted(found - STARTED)


def code(text: str) -> list[str]:
    """Return the code of a page: lines of its blocks, continued ones joined, and inline spans.

    A span that breaks over lines is one, with spaces for the breaks; none goes past a paragraph.
    """
    lines = [
        line for _, block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()
    ]
    spans = [
        re.sub(r"\s*\n\s*", " ", span)
        for paragraph in PARAGRAPHS.split(FENCE.sub("\n", text))
        for span in re.findall(r"`([^`]+)`", paragraph)
    ]
    return [re.sub(r"(^|\s)#.*", "", line) for line in lines + spans]


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ +(.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def broken_links(name: str, text: str) -> list[str]:
    """Return the relative links of a page whose file or anchor does not exist."""
    broken = []
    for link in LINK.findall(FENCE.sub("", text)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (REPOSITORY / name).parent / path if path else REPOSITORY / name
        if not target.exists() or (anchor and anchor not in anchors(target.read_text("utf-8"))):
            broken.append(link)
    return broken


@functools.cache
def options_of(module: str, *words: str) -> frozenset[str]:
    """Return the options that the help of a command names; none if there is no such command."""
    said, ended = io.StringIO(), None
    with (
        mock.patch.object(sys, "argv", [module, *words, "--help"]),
        mock.patch.dict("os.environ", COLUMNS="200"),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        try:
            importlib.import_module(module).main()
        except SystemExit as end:
            ended = end.code
    return frozenset() if ended else frozenset(re.findall(OPTION, said.getvalue()))


def is_right(module: str, rest: str) -> bool:
    """Return whether a module, its subcommand and its options exist; `rest` stands behind it."""
    found = importlib.util.find_spec(module)
    if found is None:
        return False
    words = re.findall(r"^\s*([a-z]\w*)(?=\s|$)", rest)
    options = re.findall(OPTION, rest)
    if not words and not options:
        return True
    entry = f"{module}.__main__" if found.submodule_search_locations else module
    return {"--help", *options} <= options_of(entry, *words)


def wrong_commands(text: str) -> list[str]:
    """Return the commands of a page whose module, subcommand or options do not exist."""
    return [
        line
        for line in code(text)
        for module, rest, shell in COMMAND.findall(line)
        if not is_right(module or "gmflow_core.cli", rest or shell)
    ]


@each_page
def test_links_and_anchors_exist(name: str) -> None:
    assert broken_links(name, PAGES[name]) == []


@each_page
def test_paths_exist(name: str) -> None:
    named = {path.rstrip(".") for line in code(PAGES[name]) for path in PATH.findall(line)}
    assert [path for path in sorted(named) if not (REPOSITORY / path).exists()] == []


@each_page
def test_commands_exist(name: str) -> None:
    assert wrong_commands(PAGES[name]) == []


@pytest.mark.parametrize("module", tools())
def test_help_of_a_tool_does_nothing_else(module: str) -> None:
    """Most of them measure for minutes and write files of this repository."""
    package = importlib.util.find_spec(module).submodule_search_locations
    module = f"{module}.__main__" if package else module
    source = Path(importlib.util.find_spec(module).origin).read_text("utf-8")
    assert "ArgumentParser(" in source  # else it would run now
    assert "--help" in options_of(module)


@each_page
def test_tables_equal_their_files(name: str) -> None:
    """`python -m tests.docs_tables` writes them."""
    assert with_tables(PAGES[name]) == PAGES[name]


def test_every_result_is_quoted() -> None:
    """Files of figures stand behind a table, pictures on a page."""
    results = REPOSITORY / "docs"
    quoted = {match[1] for text in PAGES.values() for match in TABLE.finditer(text)}
    tables = {path.relative_to(REPOSITORY).as_posix() for path in results.rglob("*.csv")}
    assert tables <= quoted
    shown = {
        ((REPOSITORY / name).parent / link).resolve()
        for name, text in PAGES.items()
        for link in LINK.findall(text)
    }
    pictures = {path for kind in ("png", "jpg") for path in results.rglob(f"*.{kind}")}
    assert pictures <= shown


def test_readme_leads_to_everything() -> None:
    readme = PAGES["README.md"]
    assert len(readme.encode()) <= README_SIZE
    assert {f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md")} <= {
        link.partition("#")[0] for link in LINK.findall(readme)
    }


def test_every_workflow_is_listed() -> None:
    """A line with a link in docs/nodes.md, and its number in the README's table of cards."""
    workflows = {path.name for path in (REPOSITORY / "workflows").glob("*.json")}
    assert workflows <= {Path(unquote(link)).name for link in LINK.findall(PAGES["docs/nodes.md"])}
    rows = re.findall(r"^\| \*\*([\d, -]+)\*\*", PAGES["README.md"], re.MULTILINE)
    ranges = [part.split("-") for row in rows for part in row.split(", ")]
    numbers = [number for ends in ranges for number in range(int(ends[0]), int(ends[-1]) + 1)]
    assert sorted(numbers) == sorted(int(name.split()[1]) for name in workflows)


def test_readme_command_runs_the_tests() -> None:
    """CI reads the command below the mark."""
    command = re.search(r"<!-- test command -->\n```bash\n(.+)\n```", PAGES["README.md"])
    assert command
    assert command[1].endswith("-m pytest")


# The checks themselves


@pytest.mark.parametrize(
    "line",
    [
        "python -m training.no_such_module",
        "python -m training.evaluate --no-such-option 3",
        "gmflow no_such_command",
        "gmflow demo --no-such-option",
        "python -m training.rae statistics --no-such-option",
    ],
)
def test_a_wrong_command_is_found(line: str) -> None:
    assert wrong_commands(f"```bash\n{line}\n```\n") == [line]


def test_a_wrong_command_that_breaks_over_lines_is_found() -> None:
    page = "One tick ` here.\n\n- The extension's `python -m\n  training.{}` trains.\n- `b`\n"
    assert wrong_commands(page.format("checkerboard")) == []
    renamed = page.format("no_such_module")
    assert wrong_commands(renamed) == ["python -m training.no_such_module"]


def test_a_wrong_cell_is_found() -> None:
    page = PAGES["docs/results.md"]
    table = TABLE.search(page)[3]
    digit = re.search(r"\d(?= \|)", table.splitlines()[2]).start() + table.index(
        table.splitlines()[2]
    )
    changed = table[:digit] + str((int(table[digit]) + 1) % 10) + table[digit + 1 :]
    assert with_tables(page.replace(table, changed)) == page


def test_a_broken_link_is_found() -> None:
    links = ["docs/nodes.md#views", "docs/nodes.md#no-such-heading", "docs/no_such_page.md"]
    text = " ".join(f"[text]({link})" for link in links)
    assert broken_links("README.md", text) == links[1:]


def test_gallery_pictures_hold_their_workflows():
    """`python -m tests.comfyui.gallery` makes them."""
    pictures = sorted((REPOSITORY / "docs" / "gallery").glob("*.png"))
    assert len(pictures) >= 6
    for path in pictures:
        (workflow,) = REPOSITORY.glob(f"workflows/GMFlow {path.stem} - *.json")
        with Image.open(path) as picture:
            graph = json.loads(picture.info["workflow"])
        assert graph == json.loads(workflow.read_text(encoding="utf-8")), path.name
        assert f"docs/gallery/{path.name}" in PAGES["README.md"]
