"""Every message of the nodes says what matters in its first 50 characters, which a page shows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

NODES = Path(__file__).parents[2] / "nodes"
SHOWN = 50  # characters
VALUE = "x" * 8  # stands for a value in a message
# values that are findings themselves, such as the message of another error
FINDINGS = {"error", "found", "what", "described(text)"}
# words by which a message says what is wrong, what was done, or what to do
WORDS = re.compile(
    r"\b(no|not|nothing|cannot|neither|only|without|never|too|few|empty|wrong|damaged|already|"
    r"another|two|useless|longer|after|needs?|needed|lacks|ended|leaves out|keeps a part|assumed|"
    r"interrupted|would|could|conditioned|downloading|saved|install|connect)\b"
)
SUMMARIES = {  # lines that say what a node found, or runs with: the first word is the finding
    "{base.name}, {_kind_of(head)}, {steps} steps or more, {pairs} LoRA pairs at {strength}",
    "{solver}: {', '.join([*about, *filter(None, [guidance])])}",
}


def text_of(node: ast.expr, constants: dict[str, str]) -> str:
    """Return the text of an expression, with expressions in it in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, constants) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left, constants) + text_of(node.right, constants)
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    return f"{{{ast.unparse(node.value if isinstance(node, ast.FormattedValue) else node)}}}"


def messages(source: str) -> Iterator[str]:
    """Yield the texts that a file's code raises or shows on a node."""
    tree = ast.parse(source)
    constants = {
        target.id: each.value.value
        for each in tree.body
        if isinstance(each, ast.Assign) and isinstance(each.value, ast.Constant)
        for target in each.targets
        if isinstance(target, ast.Name) and isinstance(each.value.value, str)
    }
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.args:
            name, arguments = call.func.id, call.args
            if name == "FileError":  # the file, and what was found
                yield " ".join(text_of(each, constants) for each in arguments[:2])
            elif name == "notice" or (name.endswith("Error") and not name.startswith("_")):
                yield text_of(arguments[0], constants)


def says_what_matters(message: str) -> bool:
    shown, values = "", re.split(r"\{((?:[^{}]|\{[^{}]*\})*)\}", message)
    for place, part in enumerate(values):
        if place % 2 and part in FINDINGS and len(shown) < SHOWN:
            return True
        shown += VALUE if place % 2 else part
    return bool(WORDS.search(shown[:SHOWN]))


def test_messages_begin_with_what_matters() -> None:
    texts = [text for path in NODES.rglob("*.py") for text in messages(path.read_text("utf-8"))]
    assert len(texts) > 100
    assert [t for t in texts if t not in SUMMARIES and not says_what_matters(t)] == []
    assert set(texts) >= SUMMARIES


@pytest.mark.parametrize(
    ("code", "good"),
    [
        ("raise ValueError(f'the conditioning has the shape {shape}, and does not fit')", False),
        ("raise ValueError(f'the conditioning does not fit: it has the shape {shape}')", True),
        ("notice('when this workflow was run, it turned out that there was ' + 'no VAE')", False),
        ("notice(TEXT)\nTEXT = 'no VAE'", True),
        ("raise ValueError(f'unet_name: {error}')", True),
        ("raise FileError(path, f'holds the tensors {names} of which some are not finite')", False),
    ],
)
def test_late_findings_are_found(code: str, good: bool) -> None:
    assert [says_what_matters(text) for text in messages(code)] == [good]
