"""Models that were distilled into few steps, in a running ComfyUI: they know their steps."""

from __future__ import annotations

import pytest
import torch

from gmflow_core import save_checkpoint
from gmflow_core.models import GMFlowMLP
from gmflow_core.models.mlp import GMFlowMLPConfig
from gmflow_core.models.student import new_student
from tests.diffusers_folder import random_model

from .client import Comfy, PromptError
from .graphs import latent_of
from .test_images import graph, ksampler
from .test_nodes import graph as points_graph

FEW = {
    "steps": 2,
    "shift": 1.5,
    "final_step_size": 0.5,
    "temperature": 1.0,
    "policy": "GMFlow",
    "guidance": "probabilistic 0.2",
    "teacher": "0",
}
DX = (1 / 1.5, 1.5)


@pytest.fixture(scope="module")
def students(comfy: Comfy) -> dict[str, torch.nn.Module]:
    """Students with a mixture and with a DX policy, of pictures and of points."""
    teacher = random_model(torch.float32, channels=3, num_classes=3, spectrum_layers=None)
    found = {"gm": teacher, "dx": new_student(teacher, 4, DX)}
    points = GMFlowMLP(GMFlowMLPConfig(num_components=3, embed_dim=8, hidden_dim=8, num_layers=1))
    found["points"] = new_student(points, 4, DX)
    for name, model in found.items():
        policy = {"policy": "GMFlow" if name == "gm" else "DX"}
        record = {"space": "pixels", "labels": ["a", "b", "c"], "few_steps": {**FEW, **policy}}
        path = comfy.base / "models" / "gmflow" / f"student_{name}.safetensors"
        save_checkpoint(model.eval(), path, data=record)
    comfy.object_info()
    return found


def prompt(kind: str, **settings) -> dict:
    automatic = {"solver": "auto", "steps": 0, "substeps": 0, "shift": 0.0}
    return graph((1, 2), f"student_{kind}.safetensors", **{**automatic, **settings})


@pytest.mark.parametrize("kind", ["gm", "dx"])
def test_auto_is_what_a_student_was_made_for(comfy: Comfy, students, kind: str) -> None:
    said = comfy.run(prompt(kind)).texts["sample"]
    temperature = "temperature 1, " if kind == "gm" else ""
    assert said == f"gm-policy: 2 steps, shift 1.5, {temperature}128 substeps"
    settings = {"solver": "gm-policy", "steps": 2, "temperature": 1.0, "shift": 1.5}
    assert latent_of(comfy, prompt(kind)).equal(latent_of(comfy, prompt(kind, **settings)))


@pytest.mark.parametrize("kind", ["gm", "dx"])
def test_the_stock_sampler_and_schedule_give_the_same(comfy: Comfy, students, kind: str) -> None:
    ours = prompt(kind)
    stock = ksampler(ours, cfg=1.0, model="model", steps=2)
    name = next(key for key, each in stock.items() if each["class_type"] == "KSampler")
    stock[name]["inputs"] |= {"sampler_name": "gm_policy", "scheduler": "gm"}
    assert latent_of(comfy, stock).equal(latent_of(comfy, ours))


def test_guidance_on_top_and_too_few_steps_are_said(comfy: Comfy, students) -> None:
    said = comfy.run(prompt("gm", guidance=0.3, negative=["labels", 1])).texts["sample"]
    assert "guidance 0.3 does not fit" in said
    assert "(probabilistic 0.2)" in said
    assert "too few steps (1)" in comfy.run(prompt("gm", steps=1)).texts["sample"]
    with pytest.raises(PromptError, match="this model has a DX policy"):
        comfy.run(prompt("dx", solver="gm-sde"))


def test_points_follow_a_dx_policy_too(comfy: Comfy, students) -> None:
    sample = points_graph(side=16, solver="auto", steps=0, substeps=0, shift=0.0)
    sample["model"]["inputs"]["model_name"] = "student_points.safetensors"
    assert comfy.run(sample).texts["sample"].startswith("gm-policy: 2 steps, shift 1.5")
