"""Run the extension inside ComfyUI's process, on the cases that ComfyUI-piFlow was run on.

    COMFYUI/.venv/bin/python in_process.py COMFYUI WORK CASES OUT

COMFYUI is its folder; WORK holds the models; CASES is a JSON file; OUT is a safetensors file that
gets a latent for each case. `test_piflow.py` starts it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from inside import ours, start


def main(comfyui: Path, work: Path, cases: Path, out: Path) -> None:
    start(str(comfyui))
    import folder_paths
    from safetensors.torch import save_file

    import nodes

    folder_paths.add_model_folder_path("diffusion_models", str(work))
    folder_paths.add_model_folder_path("loras", str(work))
    adapter, sampler = (
        nodes.NODE_CLASS_MAPPINGS[name] for name in ("GMFlowAdapter", "GMFlowSampler")
    )
    # ComfyUI-piFlow draws the noise of stochastic steps for the whole batch from one generator
    ours("gm_sampler").image_generators = lambda seed, noise: torch.Generator().manual_seed(seed)

    results, models = {}, {}
    for name, case in json.loads(cases.read_text()).items():
        base, file = case["base"], case.get("model", case["base"])
        if file not in models:
            (models[file],) = nodes.UNETLoader().load_unet(f"{file}.safetensors", "default")
        adapted = adapter.execute(
            models[file], f"{file}_{case['adapter']}.safetensors", case["adapter_strength"]
        )[0]
        cond, pooled = inputs_of(base)
        about = (
            {"pooled_output": pooled, "guidance": 3.5}
            if base == "flux"
            else {"pooled_output": None}
        )
        latent, mask = latent_of(case)
        given = {"samples": latent} if mask is None else {"samples": latent, "noise_mask": mask}
        with torch.inference_mode():
            result = sampler.execute(
                adapted,
                given,
                case["seed"],
                case["steps"],
                "gm-policy",
                2,
                case["substeps"],
                case["shift"],
                case["denoise"],
                positive=[[cond, about]],
                final_step_size=case["final_step_size_scale"],
                temperature=case["manual_gm_temperature"]
                if case["gm_temperature"] == "manual"
                else 0.0,
                stochasticity=case["diffusion_coefficient"],
            )[0]
        results[name] = result["samples"].float().contiguous()
    save_file(results, out)


def inputs_of(base: str) -> tuple:
    """Draw conditioning (1, n, width) and pooled output (1, 768), as for ComfyUI-piFlow's runs.

    FLUX.1's come first from the generator, then Qwen-Image's.
    """
    generator = torch.Generator().manual_seed(0)
    for name, count, width in (("flux", 10, 4096), ("qwen", 9, 3584)):
        drawn = (
            torch.randn(1, count, width, generator=generator),
            torch.randn(1, 768, generator=generator),
        )
        if name == base:
            return drawn
    raise ValueError(base)


def latent_of(case: dict) -> tuple:
    """Return a case's input latent, and its noise mask or None."""
    height, width = case["size"]
    shape = (
        (case["batch"], 16, height, width)
        if case["base"] == "flux"
        else (case["batch"], 16, 1, height, width)
    )
    latent = torch.zeros(shape)
    if case["start"] == "image":
        latent = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    if case["mask"] is None:
        return latent, None
    mask = torch.linspace(0, 1, 8 * width).repeat(case["batch"], 1, 8 * height, 1)
    return latent, mask if case["mask"] == "soft" else (
        torch.arange(8 * width) < 4 * width
    ).float().expand_as(mask).clone()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
