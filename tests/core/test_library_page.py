"""The examples of docs/library.md run, one after the other, and say the truth about shapes."""

import ast
import functools
import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHAPE = re.compile(r"^([a-z_][\w.]*)(?: = .*)?  # (\(\d[\d, ]*\))", re.MULTILINE)


def test_examples_run_and_their_shapes_are_right(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs/library.md").read_text(encoding="utf-8")
    blocks = [block for block in BLOCK.findall(text) if "a hub id" not in block]
    assert len(blocks) >= 6
    script = "\n".join(blocks).replace("10_000", "100")
    (tmp_path / "examples.py").write_text(script, encoding="utf-8")
    names = runpy.run_path(str(tmp_path / "examples.py"))
    shapes = SHAPE.findall(script)
    assert {name for name, _ in shapes} >= {"nats", "trajectory.sigmas", "trajectory.x0"}
    for name, shape in shapes:
        first, *others = name.split(".")
        value = functools.reduce(getattr, others, names[first])
        assert tuple(value.shape) == ast.literal_eval(shape), name
