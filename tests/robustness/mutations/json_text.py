"""Change JSON: each value by each type, keys, depth, and the text itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

MARK = "@the changed value@"
VALUES = {  # as they stand in the text, since json cannot write them all
    "null": "null",
    "true": "true",
    "0": "0",
    "1": "1",
    "-1": "-1",
    "a fraction": "0.5",
    "a large number": "1000000",
    "10^12": "1000000000000",
    "2^63": "9223372036854775808",
    "a number of 400 digits": "9" * 400,
    "a number of 5000 digits": "9" * 5000,
    "1e308": "1e308",
    "1e999": "1e999",
    "NaN": "NaN",
    "-Infinity": "-Infinity",
    "no text": '""',
    "text": '"x"',
    "a number as text": '"8"',
    "100,000 characters": '"' + "x" * 100_000 + '"',
    "a lone surrogate": r'"\ud800"',
    "control characters": r'"a\u0000b\u001b[31m\r\n"',
    "a path outside": '"../../../../etc/passwd"',
    "an absolute path": '"/dev/zero"',
    "an empty list": "[]",
    "a list": '[1, null, "x", {}]',
    "a long list": "[" + "0, " * 50_000 + "0]",
    "an empty object": "{}",
    "an object": '{"a": {"b": [1]}, "0": null}',
    "500 levels": "[" * 500 + "]" * 500,
    "100,000 levels": "[" * 100_000 + "]" * 100_000,
    "100,000 objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "no JSON": "{",
}
TEXTS = {
    "nothing": "",
    "a byte order mark": "\ufeff",
    "a second document": "{}",
    "a NUL": "\0",
    "no UTF-8": "\udcff\udcfe",
}


def change_json(path: Path, rng: Random) -> str:
    """Change one value, one key or the whole text of a JSON file."""
    text, about = changed(path.read_text(encoding="utf-8"), rng)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return f"{path.name}: {about}"


def changed(text: str, rng: Random) -> tuple[str, str]:
    """Return a changed JSON text, and what was changed."""
    content = json.loads(text)
    places = list(_places(content))
    way = rng.random()
    if way < 0.05:
        name = rng.choice(list(TEXTS))
        new = text[: rng.randrange(len(text) + 1)] if name == "nothing" else TEXTS[name]
        return (new + text if name == "a byte order mark" else new if name == "nothing"
                else text + new), f"the text with {name} at its border"  # fmt: skip
    if way < 0.1 or not places:
        name = rng.choice(list(VALUES))
        return VALUES[name], f"the whole is {name}"
    holder, key = rng.choice(places)
    shown = f"{key!r}"[:60]
    if way < 0.2:
        del holder[key]
        return json.dumps(content), f"{shown} removed"
    if way < 0.25 and isinstance(holder, dict):
        new = rng.choice((f"{key}x", "", "x" * 100_000, "\ud800", "__class__"))
        holder[new] = holder.pop(key)
        return json.dumps(content), f"{shown} renamed"
    if way < 0.35 and isinstance(holder[key], list):
        holder[key] = rng.choice((holder[key][:-1], holder[key] * 2, holder[key][:1] * 1000))
        return json.dumps(content), f"{shown} shortened or lengthened"
    name = rng.choice(list(VALUES))
    value = VALUES[name]
    if way < 0.4 and isinstance(holder, dict):
        value = f"{json.dumps(holder[key])}, {json.dumps(key)}: {value}"
        name = f"twice, then {name}"
    holder[key] = MARK
    return json.dumps(content).replace(json.dumps(MARK), value, 1), f"{shown} is {name}"


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place in nested JSON, as its holder and its key there; at most 2000."""
    left = [content]
    for holder in left:
        if len(left) > 2000:
            return
        keys = holder if isinstance(holder, dict) else ()
        for key in range(len(holder)) if isinstance(holder, list) else keys:
            yield holder, key
            if isinstance(holder[key], (dict, list)):
                left.append(holder[key])
