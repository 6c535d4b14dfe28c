"""Check the test harness itself on ComfyUI's own nodes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from .client import Comfy, PromptError
from .page import ComfyPage

PICTURE = {
    "1": {
        "class_type": "EmptyImage",
        "inputs": {"width": 64, "height": 48, "batch_size": 1, "color": 0xFF8000},
    },
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "harness"}},
}


def upscale(comfy: Comfy, size: int) -> dict:
    """Return a prompt that goes tile by tile through a random upscaler with a progress bar."""
    folder = comfy.base / "models" / "upscale_models"
    folder.mkdir(exist_ok=True)
    shapes = {"body.0": (4, 3, 3, 3), "body.2": (12, 4, 3, 3)}
    weights = {f"{name}.weight": 0.1 * torch.randn(shape) for name, shape in shapes.items()}
    weights |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in shapes.items()}
    save_file({**weights, "body.1.weight": torch.ones(4)}, folder / "random.safetensors")
    return {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": size, "height": size, "batch_size": 1, "color": 0xFFFFFF},
        },
        "2": {"class_type": "UpscaleModelLoader", "inputs": {"model_name": "random.safetensors"}},
        "3": {
            "class_type": "ImageUpscaleWithModel",
            "inputs": {"upscale_model": ["2", 0], "image": ["1", 0]},
        },
        "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}},
    }


def workflow(source: str = "EmptyImage") -> dict:
    """Return a workflow that makes a picture of one colour, in the format that the page saves."""
    colour = {
        "id": 1,
        "type": source,
        "pos": [100, 150],
        "size": [300, 150],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}],
        "properties": {"Node name for S&R": source},
        "widgets_values": [256, 192, 1, 0x2060FF],
    }
    show = {
        "id": 2,
        "type": "PreviewImage",
        "pos": [500, 150],
        "size": [320, 320],
        "flags": {},
        "order": 1,
        "mode": 0,
        "inputs": [{"name": "images", "type": "IMAGE", "link": 1}],
        "outputs": [],
        "properties": {"Node name for S&R": "PreviewImage"},
        "widgets_values": [],
    }
    links = [[1, 1, 0, 2, 0, "IMAGE"]]
    return {
        "last_node_id": 2,
        "last_link_id": 1,
        "nodes": [colour, show],
        "links": links,
        "groups": [],
        "version": 0.4,
    }


def test_prompt_gives_its_picture(comfy: Comfy) -> None:
    result = comfy.run(PICTURE)
    assert result.status == "success"
    assert result.image.size == (64, 48)
    np.testing.assert_allclose(result.array[0, 0, :3], [1, 128 / 255, 0], atol=1 / 255)
    assert (comfy.base / "output" / result.outputs["2"]["images"][0]["filename"]).is_file()
    assert "1" in comfy.run(PICTURE).cached


def test_rejected_prompt_names_node_and_input(comfy: Comfy) -> None:
    prompt = {
        **PICTURE,
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": -5, "height": 48, "batch_size": 1, "color": 0},
        },
    }
    with pytest.raises(PromptError, match=r"node 1: EmptyImage: .*width"):
        comfy.run(prompt)
    assert comfy.run(prompt, expect_error=True).status == "rejected"


def test_failed_node_is_named(comfy: Comfy) -> None:
    (comfy.base / "models" / "vae").mkdir(exist_ok=True)
    save_file({"nothing": torch.zeros(1)}, comfy.base / "models" / "vae" / "broken.safetensors")
    prompt = {
        "1": {"class_type": "VAELoader", "inputs": {"vae_name": "broken.safetensors"}},
        "2": {"class_type": "VAEDecode", "inputs": {"vae": ["1", 0], "samples": ["3", 0]}},
        "3": {
            "class_type": "EmptyLatentImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1},
        },
        "4": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
    }
    result = comfy.run(prompt, expect_error=True)
    assert result.status == "error"
    assert set(result.errors) <= {"1", "2"}
    assert "VAE" in "".join(result.errors.values())


def test_progress_and_order(comfy: Comfy) -> None:
    result = comfy.run(upscale(comfy, 1024))
    assert result.image.size == (2048, 2048)
    assert result.executed[-2:] == ["3", "4"]
    steps = [step for step in result.progress if step.node == "3"]
    assert [step.value for step in steps] == sorted(step.value for step in steps)
    assert steps[-1].value == steps[-1].max > 4


def test_interrupt(comfy: Comfy) -> None:
    prompt_id = comfy.submit(upscale(comfy, 4096))
    comfy.wait_progress(prompt_id)
    comfy.interrupt()
    result = comfy.wait(prompt_id)
    assert result.status == "interrupted"
    assert not result.images
    assert comfy.run(PICTURE).status == "success"


def test_page_runs_a_dropped_workflow(page: ComfyPage, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(workflow()))
    bad.write_text(json.dumps(workflow("NoSuchNode")))
    page.drop_workflow(good)
    assert page.node_types() == ["EmptyImage", "PreviewImage"]
    assert page.missing_nodes() == []
    page.run()
    (image,) = page.wait_for_images()
    page.screenshot(tmp_path / "page.png")
    assert image.size == (256, 192)
    assert image.getpixel((0, 0))[:3] == (0x20, 0x60, 0xFF)

    page.drop_workflow(bad)
    assert page.missing_nodes() == ["NoSuchNode"]
    page.wait_for_notice("NoSuchNode")
    page.screenshot(tmp_path / "missing.png")
