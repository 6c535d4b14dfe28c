"""Measure the cost of importing the extension in a process that has imported ComfyUI."""

from __future__ import annotations

from tests.benchmarks.extension_import import HEAVY, measure


def test_the_extension_imports_nothing_heavy() -> None:
    found = measure()
    assert found["loaded"]
    assert not [name for name in found["modules"] if name.split(".")[0] in HEAVY]
