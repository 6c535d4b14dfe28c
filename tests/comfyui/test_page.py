"""The extension in ComfyUI's page, as a person uses it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from .client import Comfy
from .page import open_page

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"


def test_quickstart_dropped_and_run(comfy: Comfy, tmp_path: Path) -> None:
    """The file dropped onto the canvas, Run pressed: both pictures appear, and the GM one is dark between the squares."""
    with open_page(comfy) as page:
        page.drop_workflow(WORKFLOWS / "checkerboard_quickstart.json")
        assert page.missing_nodes() == []
        page.run()
        gm, stock = page.wait_for_images(timeout=240)
        page.screenshot(tmp_path / "page.png")
    centre = [np.asarray(image.convert("L"), dtype=float)[200:240, 200:240].mean() for image in (gm, stock)]
    assert centre[0] < 15, "the square left of and above the centre is empty"
    assert centre[1] > centre[0]


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.json")), ids=lambda path: path.stem)
def test_template_is_listed_with_its_thumbnail(comfy: Comfy, path: Path) -> None:
    assert path.stem in comfy.get("/api/workflow_templates")["gmflow"]
    assert path.with_suffix(".jpg").is_file()
    assert (WORKFLOWS / "api" / path.name).is_file()
