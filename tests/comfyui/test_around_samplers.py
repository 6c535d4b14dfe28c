"""What other nodes put around a sampler or on a model, in ComfyUI's process."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from .adapters import write_adapter
from .bases import write_flux
from .installation import COMFYUI, comfyui_python

SCRIPT = Path(__file__).with_name("around_samplers.py")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("around")
    write_flux(folder / "flux.safetensors", dtype=torch.float32)
    write_adapter(folder / "adapter.safetensors", dtype=torch.float32)
    return folder


def run(work: Path, case: str) -> dict[str, Any]:
    done = subprocess.run(
        [comfyui_python(), str(SCRIPT), str(COMFYUI), str(work), case],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_sampler_that_another_node_wraps(work: Path) -> None:
    """The wrapper's sigma takes effect as in stock Euler, with its model's attributes or without.

    Outside of a mask nothing changes.
    """
    for name, about in run(work, "wrapped").items():
        assert about["effect"] > 0.05, name
        assert about["euler 2"] < 1e-6, name
        assert about["euler 0"] < 1e-6, name
        for solver in ("gm-ode", "gm-sde", "gm-policy"):
            assert about[solver]["effect"] > 0.02, (name, solver)
            assert about[solver]["hidden"] < 1e-6, (name, solver)
            assert about[solver]["kept"] is None or about[solver]["kept"] < 1e-6, (name, solver)


def test_gm_and_stock_samplers_in_turn_on_a_compiled_model(work: Path) -> None:
    assert max(run(work, "compiled")["differences"]) < 1e-5


def test_a_sampling_that_is_no_flow_is_refused_at_every_door(work: Path) -> None:
    found = run(work, "not a flow")
    for door, text in found["refused"].items():
        assert "ModelSampling" in text, door
        assert "flow" in text, door
    assert found["fine"] == [True, True]


def test_what_is_valid_is_not_refused(work: Path) -> None:
    """Numbers of NumPy and torch, odd but valid conditionings and latents, rounded sigmas."""
    found = run(work, "valid")
    assert len(found) > 15
    assert {name: text for name, text in found.items() if text} == {}


def test_what_is_not_finite_is_said_once(work: Path) -> None:
    """Inputs are refused by name; a result is reported with the likely cause."""
    found = run(work, "not finite")
    refused = {"latent": "the latent that is sampled", "mask": "the noise mask"}
    refused["text"] = "positive conditioning (cross_attn)"
    reported = {"weight": "the model's weight", "scale": "the guidance scale", "lora": "a LoRA"}
    for sampler, cases in found.items():
        for case, about in cases.items():
            if case in refused:
                assert refused[case] in about["error"], (sampler, case)
                assert "not finite" in about["error"]
            elif case in reported:
                assert about["error"] == "", (sampler, case)
                (text,) = about["heard"]
                assert reported[case] in text, (sampler, case)
            else:
                assert about == {"error": "", "heard": []}, sampler


def test_stock_nodes_do_not_save_half_of_a_model(work: Path) -> None:
    found = run(work, "saved")
    assert "without its head" in found["adapted"]
    assert "gmflux_4step" in found["adapted"]
    assert "GM model cannot be saved" in found["board"]
    assert found["base"] == ""
    assert found["files"] == ["base_00001_.safetensors"]
    assert found["same"]


def test_what_links_bring_is_refused_by_the_name_of_its_input(work: Path) -> None:
    """Values that ComfyUI itself never checks, of which some would give black pictures."""
    found = run(work, "linked")
    assert found.pop("good") == ""
    says = {"mask": "noise_mask", "index": "batch_index", "text": "tensor"}
    says |= {"pooled": "pooled_output", "long": "longest has 1,000,000"}
    for name, error in found.items():
        first, _, rest = name.partition(" ")
        at = {"long": "more_labels"}.get(first, "positive" if rest == "nan" else "latent_image")
        at = "latent_image" if first == "mask" else at
        assert f"the input '{at}' is " in error, (name, error)
        assert says.get(first, "samples" if rest == "bit" else "") in error, (name, error)
        assert "not finite" in error or rest != "nan", (name, error)
