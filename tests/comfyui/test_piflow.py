"""From the base model's file to the latent, compared with ComfyUI-piFlow.

tests/golden/piflow.safetensors holds the latents of ComfyUI-piFlow (of 11 November 2025) on ComfyUI
0.3.64, the last version it works on: tiny FLUX.1 and Qwen-Image models in float32, with GM and DX
adapters. Its metadata holds the settings of each case.

Relative to a latent's largest value most cases agree to 1e-5, and all with more than one step to
2e-5. In a single step all 128 substeps read one mixture: ComfyUI-piFlow's plain float32 substeps
are 4e-5 from float64 there (ours, in tiles, 3e-6), and with two threads instead of one its latents
move by up to 2.4e-4.

Stochastic cases get ComfyUI-piFlow's noise, which it draws for the whole batch at once; ours is
drawn for each image. Masks with fresh noise in every step are not among the cases: ComfyUI-piFlow
adds that noise outside of the mask too, where we keep the first noise, as stock samplers do.

tests/golden/piflow_trained.safetensors holds a file that GM Train Adapter wrote, and the latents of
ComfyUI-piFlow 1.0.5 with it (`piflow_trained_inside.py`).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .adapters import write_adapter
from .bases import write_flux, write_qwen_image
from .scripts import run_inside

GOLDEN = Path(__file__).parents[1] / "golden" / "piflow.safetensors"
with safe_open(GOLDEN, "pt") as file:
    CASES = json.loads(file.metadata()["cases"])
TRAINED = GOLDEN.with_name("piflow_trained.safetensors")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Run all cases in the extension, and return their latents."""
    work = tmp_path_factory.mktemp("piflow")
    write_flux(work / "flux.safetensors", dtype=torch.float32)
    write_qwen_image(work / "qwen.safetensors", dtype=torch.float32)
    for base in ("flux", "qwen"):
        for name, policy in (("gm", "GM"), ("dx", "DX")):
            write_adapter(
                work / f"{base}_{name}.safetensors", base, policy=policy, dtype=torch.float32
            )
    cases = {**CASES, "trained": write_trained(work)}
    (work / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).parent / "in_process.py"
    run_inside(script, work, work / "cases.json", work / "out.safetensors")
    return load_file(work / "out.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_same_latent_as_comfyui_piflow(ours: dict[str, Tensor], name: str) -> None:
    expected = load_file(GOLDEN)[name]
    assert ours[name].shape == expected.shape
    error = (ours[name] - expected).abs().max() / expected.abs().max()
    # one step of 128 substeps adds up rounding, which differs between versions: 1.0e-4 in 0.3.64
    assert error <= (2e-4 if CASES[name]["steps"] == 1 else 2e-5)


def test_comfyui_piflow_loads_a_trained_file(ours: dict[str, Tensor]) -> None:
    expected = load_file(TRAINED)["latent"]
    assert ours["trained"].shape == expected.shape
    assert (ours["trained"] - expected).abs().max() <= 2e-5 * expected.abs().max()


def write_trained(work: Path) -> dict:
    """Write a trained file and its base as they were; return the case that was recorded."""
    with safe_open(TRAINED, "pt") as file:
        about = {name: json.loads(text) for name, text in file.metadata().items()}
    case = about["case"]
    write_flux(work / f"{case['model']}.safetensors", dtype=torch.float32, **about["size"])
    tensors = {
        name.removeprefix("adapter/"): tensor
        for name, tensor in load_file(TRAINED).items()
        if name != "latent"
    }
    save_file(tensors, work / f"{case['model']}_trained.safetensors", about["adapter"])
    return case
