"""Hostile values for the inputs of nodes."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path
from typing import Any

NUMBERS = (0, -1, 1, 2, 7, 10**6, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e-30, 1e30)
NUMBERS += (1e308, -1e308, math.nan, math.inf, -math.inf, "NaN", "Infinity", "1e999", True, False)
TEXTS = (
    "",
    " ",
    "\n",
    "\t\r\n",
    "\ud800",
    "digits\udcff.safetensors",
    "a\x00b",
    "\x1b[31mred\x1b[0m",
    "\u202egnp.\u2066",
    "\u200b",
    "%s %d {0} {name} $HOME `id`",
    "x" * 5000,
    "0\n" * 1000,
    "..",
    ".",
    "/",
    "~",
    "//",
    "\\\\server\\share",
    "C:\\models\\x.safetensors",
    "../../../../etc/passwd",
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/mem",
    "/proc/self/environ",
    "/nowhere/nothing.safetensors",
    "owner/name",
    "a/b/c/d",
    "owner/" + "n" * 300,
    "https://huggingface.co/owner/name/tree/main",
    "https://localhost:1/owner/name",
    "file:///nowhere",
    "file:///etc/passwd",
    "'digits_k8.safetensors'",
    "None",
    "null",
    "[1, 2]",
    "1,2,3",
    "0-999999999999",
    "9" * 5000,
    "-1",
    "1e9",
    "CON",
    "é" * 300,
    "\U0001f600",
    "<script>alert(1)</script>",
)
LONG = "y" * 1_000_000


KINDS = {  # of values that ComfyUI's own checks let through to an input of a type
    "STRING": ("text", "text", "text", "file", "long", "number"),
    "INT": ("number", "near", "near"),
    "FLOAT": ("number", "number", "near"),
    "BOOLEAN": ("number", "text"),
}
LITERALS = ("null", "number", "text", "list", "object", "deep", "file")  # for all other types
ALL = ("null", "number", "text", "long", "file", "link", "list", "object", "deep", "near")


def hostile_value(
    rng: random.Random, prompt: dict[str, Any], files: list[str], found: Any, type_: str
) -> Any:
    """Draw a value.

    Args:
        prompt: links point to its nodes.
        files: paths of hostile files.
        found: the value of a good prompt, which is sometimes changed slightly.
        type_: of the input, such as "INT".
    """
    kind = rng.choice(ALL if rng.random() < 0.3 else KINDS.get(type_, LITERALS))
    if kind == "number":
        return rng.choice(NUMBERS)
    if kind == "text":
        return rng.choice(TEXTS)
    if kind == "long":
        return LONG if rng.random() < 0.2 else rng.choice(TEXTS) * rng.choice((2, 50))
    if kind == "file":
        return rng.choice(files)
    if kind == "link":
        return [rng.choice([*prompt, "nowhere", 0, None]), rng.choice((0, 0, 1, 2, 3, 99, -1, "0"))]
    if kind == "list":
        small = [rng.choice((*NUMBERS, *TEXTS[:6], None)) for _ in range(rng.choice((0, 1, 3, 50)))]
        return rng.choice((small, [small], [[small, {"samples": small}]]))
    if kind == "object":
        keys = rng.sample(("samples", "__type__", "__value__", "model", "", "\ud800", "0"), 3)
        return {key: rng.choice((*NUMBERS, *TEXTS[:6], None, [], {})) for key in keys}
    if kind == "deep":
        value: Any = 0
        for _ in range(rng.choice((5, 100, 400))):
            value = [value] if rng.random() < 0.5 else {"samples": value}
        return value
    return _near(rng, found) if kind == "near" else None


def _near(rng: random.Random, found: Any) -> Any:
    """Change a good value slightly."""
    if isinstance(found, bool) or found is None:
        return rng.choice((0, 1, "true", [found]))
    if isinstance(found, (int, float)):
        factor = rng.choice((-1, 0, 1e3, 1e6, 1e9, 0.5, math.nan))
        return rng.choice((found * factor, str(found), found + 0.5, [found], -found - 1))
    if isinstance(found, str):
        place = rng.randint(0, len(found))
        extra = rng.choice(("\ud800", "\x00", " ", "/", "\n", "../", '"', "'", "\u200b"))
        return found[:place] + extra + found[place:]
    if isinstance(found, list) and len(found) == 2:
        return rng.choice(
            ([found[0]], [*found, 0], [found[0], str(found[1])], [found], found[::-1])
        )
    return None


def write_hostile_files(folder: Path) -> list[str]:
    """Write files of odd kinds, and return their paths."""
    folder.mkdir()
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "short.safetensors").write_bytes(b"\xff" * 7)
    (folder / "huge_header.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    (folder / "text.safetensors").write_text("no tensors\n" * 100)
    (folder / "pickle.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    (folder / "folder.safetensors").mkdir()
    (folder / "model_index.json").write_text("[" * 5000)
    (folder / "dangling.safetensors").symlink_to("nowhere")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / "long_name").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    raw = os.fsencode(folder) + b"/\xff\xfe.safetensors"
    Path(os.fsdecode(raw)).write_bytes(b"x")
    return sorted([str(folder), *map(str, folder.iterdir()), "/dev/zero", "/dev/null"])
