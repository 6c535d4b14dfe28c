"""Help pages, names and tooltips in English and Chinese, as the page fetches them."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from .client import Comfy
from .help_pictures import IMAGES
from .installation import REPOSITORY
from .locale_files import LOCALES, english, names, own_nodes
from .test_message_texts import text_of

LANGUAGES = ("en", "zh")
PAGES = REPOSITORY / "web" / "docs"
NODES = sorted(path.stem for path in PAGES.glob("*.md"))
DEFAULT = {"en": r"\*\*{}\*\* \(([\d.]+)", "zh": r"\*\*{}\*\*\uff08默认 ([\d.]+)"}
LINES = 25, 60  # of a page
PICTURE_SIZE, PICTURES_SIZE = 60_000, 1_500_000  # the most bytes of one, and of all
FORMAT = re.compile(r"[{}@|]")  # the page reads names and descriptions as message formats
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
CHINESE = re.compile(r"[\u4e00-\u9fff]")
MESSAGES = re.compile(r"^## (?:Messages|提示信息|提示)\n(.*)", re.MULTILINE | re.DOTALL)
CODE = ("nodes", "gmflow_core")
COMPOSED = {  # messages that the code puts together from parts; values are left out
    "model_name: there is no model": "there is no ",
    "there is no mixture source": "there is no ",
    "connect RandomNoise to noise": " to noise, in the place of ",
    "no effect: x and y, as place is most uncertain": "x and y",
    "cfg … does not fit: this base model has its guidance built in": " does not fit: ",
    "cfg … does not fit: set cfg of … to a weight in [0, 1)": " to a weight in [0, 1)",
    "RescaleCFG does not go with GM Probabilistic Guidance": " does not go with GM Probabilistic ",
    "says gmflow.": "says ",
    "not finished, stopped at iteration …: the loss has grown": "the loss has grown",
}


@pytest.fixture(scope="module")
def nodes(comfy: Comfy) -> dict[str, Any]:
    return own_nodes(comfy.object_info())


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple, str]]:
    """Yield the texts of a tree with their paths."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def page_of(comfy: Comfy, node: str, language: str) -> str:
    """Return a help page; for English the page falls back to the file without a language."""
    name = f"{node}.md" if language == "en" else f"{node}/{language}.md"
    return comfy.read(f"/extensions/gmflow/docs/{name}").decode("utf-8")


def numbers_of(about: dict[str, Any]) -> dict[str, float]:
    """Return the defaults of a node's inputs that are raised and lowered, by name."""
    inputs = {**about["input"].get("required", {}), **about["input"].get("optional", {})}
    return {
        name: options[0]["default"]
        for name, (kind, *options) in inputs.items()
        if kind in ("INT", "FLOAT") and not options[0].get("control_after_generate")
    }


# Names and tooltips


def test_english_names_are_those_of_the_schemas(nodes: dict[str, Any]) -> None:
    """`python -m tests.comfyui.locale_files` writes them."""
    assert names("en") == {name: english(about) for name, about in nodes.items()}


def test_every_input_and_output_has_a_tooltip(nodes: dict[str, Any]) -> None:
    missing = [path for path, text in leaves(names("en")) if not text]
    assert missing == []


def test_chinese_names_every_node_input_and_output() -> None:
    """Nothing is left out or left over, and every explanation is in Chinese."""
    ours, theirs = dict(leaves(names("en"))), dict(leaves(names("zh")))
    assert theirs.keys() == ours.keys()
    explained = {path: text for path, text in theirs.items() if path[-1] != "name"}
    latin = [path for path, text in explained.items() if not CHINESE.search(text)]
    assert latin == [("GMFlowSigmas", "display_name")]


def test_chinese_numbers_are_those_of_the_english_texts() -> None:
    ours, theirs = dict(leaves(names("en"))), dict(leaves(names("zh")))
    differing = {
        path: (ours[path], text)
        for path, text in theirs.items()
        if Counter(NUMBER.findall(text)) != Counter(NUMBER.findall(ours[path]))
    }
    assert differing == {}


@pytest.mark.parametrize("language", LANGUAGES)
def test_page_reads_names_as_they_are(comfy: Comfy, language: str) -> None:
    served = comfy.get("/i18n")[language]
    assert served["nodeDefs"] == names(language)
    texts = (text for path, text in leaves(served["nodeDefs"]) if path[-1] != "tooltip")
    assert [text for text in texts if FORMAT.search(text)] == []


def test_categories_are_those_of_the_nodes(comfy: Comfy, nodes: dict[str, Any]) -> None:
    """The Chinese names of categories that ComfyUI has none for belong to nodes."""
    parts = {part for about in nodes.values() for part in about["category"].split("/")}
    assert {"mixture source", "view"} <= comfy.get("/i18n")["zh"]["nodeCategories"].keys() <= parts


# Help pages


def test_every_node_has_its_pages(nodes: dict[str, Any]) -> None:
    assert nodes.keys() == set(NODES)
    folders = {path.parent.name for path in PAGES.glob("*/*.md")}
    assert folders == nodes.keys()
    assert {path.name for path in LOCALES.iterdir()} == set(LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node", NODES)
def test_page_names_all_of_a_node(
    comfy: Comfy, nodes: dict[str, Any], node: str, language: str
) -> None:
    """Title, inputs, outputs and defaults are those of the node; its pictures are served."""
    text, about = page_of(comfy, node, language), names(language)[node]
    assert text.startswith(f"# {about['display_name']}\n")
    if language == "en":
        assert LINES[0] <= len(text.splitlines()) <= LINES[1]
    named = [
        each["name"] for group in ("inputs", "outputs") for each in about.get(group, {}).values()
    ]
    assert [name for name in named if f"**{name}**" not in text] == []
    for name, default in numbers_of(nodes[node]).items():
        label = re.escape(about["inputs"][name]["name"])
        stated = re.search(DEFAULT[language].format(label), text)
        assert stated, f"{name}: the page says no default"
        assert float(stated[1].rstrip(".")) == default, name
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", text)
    assert pictures
    for picture in pictures:
        assert len(comfy.read(f"/extensions/gmflow/docs/{picture}")) < PICTURE_SIZE
    links = re.findall(r"(?<!!)\[[^\]]*\]\((?!https://)", text)
    assert links == []  # inside ComfyUI they would lead nowhere


def said_in_code() -> set[str]:
    """Return the texts in the code, values in them as "…"; what `no_effect` says as it is shown."""
    texts = set()
    for path in (path for folder in CODE for path in (REPOSITORY / folder).rglob("*.py")):
        for each in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(each, (ast.JoinedStr, ast.Constant, ast.BinOp)):
                texts.add(re.sub(r"\{.*?\}", "…", text_of(each, {})))
            elif isinstance(each, ast.Call) and ast.unparse(each.func) == "no_effect":
                what, why = (re.sub(r"\{.*?\}", "…", text_of(part, {})) for part in each.args)
                texts.add(f"no effect: {what}, as {why}")
    return texts


def test_quoted_messages_are_said_by_the_code() -> None:
    """In every language, as nodes speak English; a "…" stands for values and words left out."""
    said, quoted, unknown = said_in_code(), set(), []
    for path in PAGES.rglob("*.md"):
        named = {text for _, text in leaves(names("zh")) if "zh" in path.name}
        for text in re.findall(r"(?<!\*)\*([^*]+)\*", MESSAGES.search(path.read_text("utf-8"))[1]):
            quote = " ".join(text.split()).strip("… ")
            quoted.add(quote)
            parts = re.escape(COMPOSED.get(quote, quote)).replace("…", ".*")
            known = quote in named or any(re.search(parts, each, re.DOTALL) for each in said)
            unknown += [] if known else [(path.relative_to(PAGES).as_posix(), quote)]
    assert unknown == []
    assert quoted >= COMPOSED.keys()


def test_pictures_are_shown_and_small() -> None:
    texts = "".join(path.read_text("utf-8") for path in PAGES.rglob("*.md"))
    pictures = list(IMAGES.iterdir())
    assert [path.name for path in pictures if f"(images/{path.name})" not in texts] == []
    assert sum(path.stat().st_size for path in pictures) < PICTURES_SIZE
