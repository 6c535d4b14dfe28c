"""Load, sample and time 8-bit models inside ComfyUI's own process, for `eight_bit.py`.

    cd COMFYUI && .venv/bin/python eight_bit_inside.py PART OPTIONS

PART is memory, error or speed; OPTIONS are its keyword arguments as JSON. The answer is a line of
JSON after MARK. This file imports nothing of this repository's `tests`, as ComfyUI has a package
of that name.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
VARIANTS = (
    "default",  # Load Diffusion Model as it is: on a CPU ComfyUI turns bf16 weights into fp32
    "bf16",  # the same with --bf16-unet: bf16 weights, as on a GPU
    "fp8",  # Load Diffusion Model with weight_dtype fp8_e4m3fn
    "8-bit",  # GM Load Diffusion Model (8-bit)
    "8-bit, int8 products",  # the same with compute int8
)
# ComfyUI's loader followed by rounding weight after weight: the 8-bit loader's naive form
STRAIGHT = "straight"
MARK = "RESULT "  # before the answer
GB = 1e9


def child(part: str, options: dict[str, Any]) -> None:
    """Run one part inside ComfyUI and print its result."""
    sys.path.insert(0, os.getcwd())
    sys.argv[1:] = ["--cpu", "--disable-api-nodes"]
    import comfy.options

    comfy.options.enable_args_parsing()
    quantized = extension("nodes.comfyui.int8_files")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with torch.inference_mode():  # as ComfyUI runs its nodes
        print(MARK + json.dumps(CHILDREN[part](quantized, **options)), flush=True)


def extension(module: str) -> Any:
    """Import a module of this repository as ComfyUI does: in a package that is off sys.path."""
    place = importlib.util.spec_from_file_location(
        "gmflow_8bit", REPOSITORY / "__init__.py", submodule_search_locations=[str(REPOSITORY)]
    )
    package = sys.modules["gmflow_8bit"] = importlib.util.module_from_spec(place)
    place.loader.exec_module(package)
    return importlib.import_module(f"gmflow_8bit.{module}")


def load(quantized: Any, variant: str, path: str) -> Any:
    """Load a base model in one of VARIANTS, or in the naive form STRAIGHT."""
    import comfy.sd

    if variant == STRAIGHT:
        return straight(
            comfy.sd.load_diffusion_model(path, model_options={"dtype": torch.bfloat16})
        )
    if variant.startswith("8-bit"):
        return quantized.load_8bit(path, "int8" if "products" in variant else "16 bit")
    dtype = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}.get(variant)
    return comfy.sd.load_diffusion_model(
        path, model_options={} if dtype is None else {"dtype": dtype}
    )


def straight(model: Any) -> Any:
    """Round every weight of the model's blocks, one after the other, and drop the 16-bit ones."""
    sys.path.append(str(REPOSITORY))  # last, as ComfyUI has a package `tests` of its own
    place = importlib.util.spec_from_file_location("naive", Path(__file__).with_name("naive.py"))
    naive = importlib.util.module_from_spec(place)
    place.loader.exec_module(naive)
    modules = model.model.diffusion_model.named_modules()
    blocks = [
        module
        for name, module in modules
        if "blocks." in name and isinstance(module, torch.nn.Linear)
    ]
    for module in blocks:
        values, scale = naive.round_rows(module.weight.detach())
        module.register_buffer("scale", scale)
        module.weight = torch.nn.Parameter(values, requires_grad=False)
    return model


def anonymous() -> int:
    """Return the bytes of this process's memory that no file backs."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def child_memory(quantized: Any, variant: str, path: str) -> dict[str, float]:
    """Return the peak of anonymous memory while loading, and what stays of it, in GB."""
    gc.collect()
    before, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        model = load(quantized, variant, path)
        seconds = time.perf_counter() - start
    finally:
        done.set()
        watcher.join()
    gc.collect()
    after = anonymous()
    return {
        "peak": (max(peak, after) - before) / GB,
        "resident": (after - before) / GB,
        "model_size": model.model_size() / GB,
        "seconds": seconds,
    }


def conditioning(seed: int, tokens: int = 64) -> list:
    """Draw a random conditioning in ComfyUI's form, for FLUX.1."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, 768, generator=generator)
    return [
        [
            torch.randn(1, tokens, 4096, generator=generator),
            {"pooled_output": pooled, "guidance": 3.5},
        ]
    ]


def child_error(
    quantized: Any, path: str, seeds: int, steps: int, adapter: str | None = None
) -> dict[str, list[float]]:
    """Return the relative error of the latent after `steps` Euler steps, for each seed.

    With `adapter`, the LoRA of that GM adapter is merged into the weights of all variants.
    """
    import comfy.sample
    import comfy.sd
    import comfy.utils

    def loaded(variant: str) -> Any:
        model = load(quantized, variant, path)
        if adapter is None:
            return model
        lora = {
            f"transformer.{key}": w
            for key, w in comfy.utils.load_torch_file(adapter).items()
            if ".lora_" in key
        }
        return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]

    def sample(model: Any, seed: int) -> Tensor:
        noise = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(seed))
        words = conditioning(seed)
        return comfy.sample.sample(
            model,
            noise,
            steps,
            1.0,
            "euler",
            "simple",
            words,
            words,
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=seed,
        )

    exact = [sample(loaded("bf16"), seed) for seed in range(seeds)]

    def errors(model: Any) -> list[float]:
        return [relative(sample(model, seed), exact[seed]) for seed in range(seeds)]

    found = {variant: errors(loaded(variant)) for variant in VARIANTS[2:]}
    if adapter is not None:
        return found
    layers = sys.modules[quantized.int8_operations.__module__]
    rounded = layers.quantize_rows
    layers.quantize_rows = lambda weight, group=None, **options: rounded(weight, 0, **options)
    for variant in VARIANTS[3:]:
        found[f"{variant}, no rotation"] = errors(loaded(variant))
    return found


def child_speed(quantized: Any, path: str, repeats: int, side: int) -> dict[str, list[float]]:
    """Return the seconds of one network call with side * side image tokens; variants take turns."""
    import comfy.model_management

    models = {variant: load(quantized, variant, path) for variant in VARIANTS}
    comfy.model_management.load_models_gpu(list(models.values()))
    words = conditioning(0)
    context, pooled = words[0][0], words[0][1]["pooled_output"]
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(repeats + 1):
        for variant, model in models.items():
            start = time.perf_counter()
            model.model.diffusion_model(
                torch.zeros(1, 16, 2 * side, 2 * side),
                torch.tensor([0.5]),
                context,
                pooled,
                torch.tensor([3.5]),
            )
            times[variant].append(time.perf_counter() - start)
    return {variant: seconds[1:] for variant, seconds in times.items()}


CHILDREN = {"memory": child_memory, "error": child_error, "speed": child_speed}


def relative(x: Tensor, exact: Tensor) -> float:
    """Return the norm of the error relative to the norm of `exact`."""
    return ((x - exact).norm() / exact.norm()).item()


if __name__ == "__main__":
    child(sys.argv[1], json.loads(sys.argv[2]))
