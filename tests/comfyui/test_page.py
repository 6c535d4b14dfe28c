"""Use the extension in ComfyUI's page, as a person does."""

from __future__ import annotations

import numpy as np

from .client import Comfy
from .page import ComfyPage
from .stand_in_files import WORKFLOWS, workflow_named


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
