"""Exercise models with 8-bit weights inside ComfyUI's process.

    COMFYUI/.venv/bin/python int8_inside.py COMFYUI MODEL LORA LAYERS

COMFYUI is its folder; MODEL and LORA are files; LAYERS is a JSON list of layers' names. Prints what
it found as JSON. `test_int8_layers.py` starts it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from inside import ours, says, start


def main(comfyui: str, path: str, lora_path: str, names: str) -> None:
    start(comfyui)
    quantized = ours("int8_files")
    with torch.inference_mode():
        print(json.dumps(everything(quantized, path, lora_path, json.loads(names))))


def everything(quantized: Any, path: str, lora_path: str, names: list[str]) -> dict[str, Any]:
    """Run all of the above, in ComfyUI's own int8 layout and in ours."""
    layers = sys.modules[quantized.int8_operations.__module__]
    native = layers.has_native_layout
    about: dict[str, Any] = {"interrupt": interrupt(quantized, path)}
    about["refused save"] = refused_save(quantized, path)
    about["blocks"] = [layers.is_block_layer(f"{name}.weight") for name in names]
    for own in (False, True):
        quantized.has_native_layout = layers.has_native_layout = (lambda: False) if own else native
        for compute in layers.COMPUTE:
            about[f"{own} {compute}"] = exercise(quantized, path, lora_path, compute)
    return about


def interrupt(quantized: Any, path: str) -> dict[str, bool]:
    """Interrupt a load, and load again."""
    import comfy.model_management

    comfy.model_management.interrupt_current_processing(True)
    try:
        quantized.load_8bit(path)
        interrupted = False
    except comfy.model_management.InterruptProcessingException:
        interrupted = True
    model = quantized.load_8bit(path)
    return {"interrupted": interrupted, "finite": bool(call_network(model).isfinite().all())}


def refused_save(quantized: Any, path: str) -> dict[str, Any]:
    """Save a model whose second patch fails: what is said, and whether the base is what it was."""
    model = quantized.load_8bit(path)
    before, seen, patched = call_network(model), [], model.clone()

    def failing(change: Any) -> Any:
        seen.append(change)
        if len(seen) == 2:
            raise ValueError("no such patch")
        return change

    for name in ("double_blocks.0.img_attn.proj.weight", "single_blocks.0.linear2.weight"):
        key = f"diffusion_model.{name}"
        change = torch.ones(model.model.state_dict()[key].shape)
        patched.add_patches({(key, None, failing): ("diff", (change,))})
    return {
        "said": says(lambda: quantized.saved_state(patched)),
        "same": torch.equal(call_network(model), before),
    }


def exercise(quantized: Any, path: str, lora_path: str, compute: str) -> dict[str, Any]:
    """Patch, partially load and unload an 8-bit model, and compare it with the 16-bit one."""
    import comfy.sd
    import comfy.utils

    def far(x: Any, exact: Any) -> float:
        return ((x - exact).norm() / exact.norm()).item()

    def loaded(model: Any, memory: int = 0) -> Any:
        """Call the network with all weights loaded, or with those that fit into `memory` bytes."""
        model.patch_model(device_to=torch.device("cpu"), lowvram_model_memory=memory)
        out = call_network(model)
        about["functions"] = sum(
            len(getattr(layer, "weight_function", ())) for layer in model.model.modules()
        )
        model.unpatch_model(model.offload_device)
        return out

    about: dict[str, Any] = {}
    lora = comfy.utils.load_torch_file(lora_path)
    exact = comfy.sd.load_diffusion_model(path, model_options={"dtype": torch.bfloat16})
    exact_lora, _ = comfy.sd.load_lora_for_models(exact, None, lora, 1.0, 0)
    model = quantized.load_8bit(path, compute)
    styled, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)
    weights = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    about["layer"] = type(model.model.diffusion_model.img_in).__mro__[1].__name__
    about["native"] = quantized.has_native_layout()
    about["size"] = model.model_size() / sum(2 * p.numel() for p in exact.model.parameters())
    base, moved = loaded(exact), loaded(exact_lora)
    about["error"], about["error with lora"] = far(loaded(model), base), far(loaded(styled), moved)
    about["move"] = far(moved, base)
    about["error offloaded"] = far(loaded(styled, 1), moved)
    about["functions offloaded"] = about["functions"]
    about["error half offloaded"] = far(loaded(styled, model.model_size() // 2), moved)
    styled.patch_model(device_to=torch.device("cpu"))
    about["freed"] = styled.partially_unload(styled.offload_device, model.model_size() // 2)
    about["error unloaded"] = far(call_network(styled), moved)
    styled.unpatch_model(styled.offload_device)
    now = model.model.state_dict()
    about["restored"] = all(torch.equal(now[name], weight) for name, weight in weights.items())
    return about


def call_network(model: Any, seed: int = 0) -> Any:
    """Call a FLUX as it is loaded now."""
    generator = torch.Generator().manual_seed(seed)
    x, context, pooled = (
        torch.randn(1, *shape, generator=generator) for shape in ((16, 8, 8), (8, 4096), (768,))
    )
    return model.model.diffusion_model(x, torch.tensor([0.7]), context, pooled, torch.tensor([3.5]))


if __name__ == "__main__":
    main(*sys.argv[1:])
