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
