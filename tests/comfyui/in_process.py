"""Runs the extension in the process of a ComfyUI, on the cases that ComfyUI-piFlow was run on; started by `test_piflow.py`.

    COMFYUI/.venv/bin/python in_process.py COMFYUI WORK CASES OUT

COMFYUI is its folder; WORK holds the models; CASES is a JSON file, OUT a safetensors file with a latent for each case.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def main(comfyui: Path, work: Path, cases: Path, out: Path) -> None:
    os.chdir(comfyui)
    sys.path[:] = [str(comfyui), *(p for p in sys.path if p != str(Path(__file__).parent))]
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sample
    import folder_paths
    import torch
    from safetensors.torch import save_file

    import nodes

    stand_in = importlib.util.spec_from_file_location(
        "text_stand_in", Path(__file__).parent / "text_stand_in" / "__init__.py"
    )
    stand_in.loader.exec_module(
        importlib.util.module_from_spec(stand_in)
    )  # for the sizes of tiny models
    folder_paths.add_model_folder_path("diffusion_models", str(work))
    folder_paths.add_model_folder_path("loras", str(work))
    if not asyncio.run(nodes.load_custom_node(str(REPOSITORY))):
        raise RuntimeError("the extension did not load")
    adapter, sampler = (
        nodes.NODE_CLASS_MAPPINGS[name] for name in ("GMFlowAdapter", "GMFlowSampler")
    )
    # the noise of stochastic steps as ComfyUI-piFlow draws it: for the whole batch from one generator
    gm_sampler = sys.modules[sampler.__module__.replace(".samplers", ".comfyui.gm_sampler")]
    gm_sampler.image_generators = lambda seed, noise: torch.Generator().manual_seed(seed)

    results, models = {}, {}
    for name, case in json.loads(cases.read_text()).items():
        base = case["base"]
        if base not in models:
            (models[base],) = nodes.UNETLoader().load_unet(f"{base}.safetensors", "default")
        adapted = adapter.execute(
            models[base], f"{base}_{case['adapter']}.safetensors", case["adapter_strength"]
        )[0]
        cond, pooled = inputs_of(base, torch)
        about = (
            {"pooled_output": pooled, "guidance": 3.5}
            if base == "flux"
            else {"pooled_output": None}
        )
        latent, mask = latent_of(case, torch)
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


def inputs_of(base: str, torch) -> tuple:
    """Conditioning (1, n, width), and the pooled one (1, 768), as they were drawn for ComfyUI-piFlow: FLUX.1's first."""
    generator = torch.Generator().manual_seed(0)
    for name, count, width in (("flux", 10, 4096), ("qwen", 9, 3584)):
        drawn = (
            torch.randn(1, count, width, generator=generator),
            torch.randn(1, 768, generator=generator),
        )
        if name == base:
            return drawn
    raise ValueError(base)


def latent_of(case: dict, torch) -> tuple:
    """The latent that goes in, and its noise mask, if it has one."""
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
