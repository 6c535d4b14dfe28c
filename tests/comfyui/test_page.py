"""Use the extension in ComfyUI's page, as a person does."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .client import Comfy
from .page import ComfyPage
from .stand_in_files import WORKFLOWS, workflow_named


def test_quickstart_dropped_and_run(comfy: Comfy, page: ComfyPage, tmp_path: Path) -> None:
    """Drop the file, press Run: both pictures appear, the GM one as even as the board."""
    page.drop_workflow(WORKFLOWS / f"{workflow_named('GM Sampler beside KSampler')}.json")
    assert page.missing_nodes() == []
    prompt_id = page.run()
    page.wait_for_images(timeout=240)
    page.screenshot(tmp_path / "page.png")
    images = comfy.result(prompt_id).images
    gm, stock = (np.asarray(images[node][0].convert("L"), dtype=float) for node in ("5", "9"))

    def corner_to_centre(picture: np.ndarray) -> float:
        """Return the brightness of the upper right square, relative to one at the centre."""
        return picture[30:130, 380:480].mean() / picture[150:250, 265:365].mean()

    assert abs(corner_to_centre(gm) - 1) < 0.15
    assert corner_to_centre(stock) < 0.6
    assert (
        gm[155:245, 150:240].mean() < 0.3 * gm[150:250, 265:365].mean()
    )  # the empty square left of it


def test_digits_dropped_and_run(comfy: Comfy, page: ComfyPage) -> None:
    """Check that the page shows ten rows of ten digits, as the server made them."""
    page.drop_workflow(WORKFLOWS / f"{workflow_named('Coloured digits')}.json")
    assert page.missing_nodes() == []
    prompt_id = page.run()
    page.wait_for_images(timeout=120)
    (images,) = comfy.result(prompt_id).images.values()
    picture = np.asarray(images[0].convert("RGB"), dtype=float)
    assert picture.shape == (4 + 10 * 52, 4 + 10 * 52, 3)  # six times 8 pixels, and a gap of 4
    digits = picture[4:, 4:].reshape(10, 52, 10, 52, 3)[:, :48, :, :48].max(-1)
    ink = (digits > 100).mean((1, 3))
    assert ((ink > 0.1) & (ink < 0.75)).all()
