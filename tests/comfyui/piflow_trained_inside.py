"""Record what ComfyUI-piFlow samples with a file that GM Train Adapter wrote.

    COMFYUI/.venv/bin/python piflow_trained_inside.py COMFYUI PIFLOW OUT

COMFYUI is the folder of a ComfyUI 0.3.64, the last one that ComfyUI-piFlow (PIFLOW, its folder)
works on. OUT is tests/golden/piflow_trained.safetensors, which `test_piflow.py` reads: the file
that was trained on the spot on a tiny FLUX.1, in bfloat16, its metadata, and the latents.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path

import torch

HIDDEN, RANK, STEPS = 128, 2, 4
SETTINGS = {"rank": RANK, "iterations": 24, "learning_rate": 2e-3}
FLUX = {"latent": (16, 8, 8), "text": 4096, "pooled": 768, "guidance": 3.5}
CASE = {  # as those of piflow.safetensors
    "base": "flux",
    "model": "small",
    "adapter": "trained",
    "adapter_strength": 1.0,
    "batch": 2,
    "size": [8, 6],
    "start": "empty",
    "mask": None,
    "seed": 7,
    "steps": STEPS,
    "substeps": 128,
    "shift": 3.2,
    "denoise": 1.0,
    "final_step_size_scale": 0.5,
    "gm_temperature": "manual",
    "manual_gm_temperature": 1.0,
    "diffusion_coefficient": 0.0,
}


def main(comfyui: str, piflow: str, out: str) -> None:
    """Train, sample with ComfyUI-piFlow, write."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import in_process
    import inside
    import train_parts

    from tests.comfyui.bases import write_flux

    out = Path(out).absolute()
    inside.start(comfyui)
    import folder_paths
    from safetensors.torch import save_file

    import nodes

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        size = {"hidden": HIDDEN, "depth": 1, "single": 1}
        write_flux(work / "flux.safetensors", dtype=torch.float32, **size)
        train_parts.WORK.append(work)
        train_parts.TEACHERS["flux"] = FLUX
        with torch.inference_mode():
            _, tensors, about = train_parts.train("flux", "trained", **SETTINGS)
        tensors = {name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}
        folder_paths.add_model_folder_path("diffusion_models", folder)
        folder_paths.add_model_folder_path("loras", folder)
        save_file(tensors, work / "small_trained.safetensors", about)
        assert asyncio.run(nodes.load_custom_node(piflow))
        load, shift, sampler = (
            nodes.NODE_CLASS_MAPPINGS[name]()
            for name in ("Load pi-Flow Model", "ModelSamplingPiFlow", "pi-Flow Sampler")
        )
        (model,) = load.load_piflow("flux.safetensors", "default", "small_trained.safetensors")
        (model,) = shift.patch(model, CASE["shift"])
        cond, pooled = in_process.inputs_of("flux")
        text = [[cond, {"pooled_output": pooled, "guidance": 3.5}]]
        latent = {"samples": in_process.latent_of(CASE)[0]}
        names = ("final_step_size_scale", "diffusion_coefficient", "gm_temperature")
        values = [CASE[name] for name in (*names, "manual_gm_temperature")]
        with torch.inference_mode():
            (found,) = sampler.sample(
                model, CASE["seed"], STEPS, CASE["substeps"], *values, text, latent
            )
    kept = {f"adapter/{name}": tensor for name, tensor in tensors.items()}
    kept["latent"] = found["samples"].float().contiguous()
    metadata = {"adapter": json.dumps(about), "case": json.dumps(CASE), "size": json.dumps(size)}
    save_file(kept, out, metadata)


if __name__ == "__main__":
    main(*sys.argv[1:])
