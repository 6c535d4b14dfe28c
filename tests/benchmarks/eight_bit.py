"""Measures the 8-bit loader against bf16 and fp8 weights in a real ComfyUI, and computes what the big models need.

    python -m tests.benchmarks.eight_bit                       # everything, 10 to 15 minutes on one CPU core
    python -m tests.benchmarks.eight_bit --only error need     # some of: memory error speed layers need

ComfyUI is found as by the tests (COMFYUI_PATH, COMFYUI_PYTHON); it runs in child processes, on its CPU. Models are random ones
in the layout of FLUX.1. The layers are measured on an NVIDIA GPU too if this Python's torch has one. Results go to
docs/results/eight_bit.json and .csv, eight_bit_need.csv and eight_bit.png; parts that are not run are taken from the json.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs" / "results"
PARTS = ("memory", "error", "speed", "layers", "need")
VARIANTS = ("default", "bf16", "fp8", "8-bit", "8-bit, int8 products")
DETAILS = {
    "default": "Load Diffusion Model as it is: on a CPU ComfyUI turns bf16 weights into fp32",
    "bf16": "the same with --bf16-unet: bf16 weights, as on a GPU",
    "fp8": "Load Diffusion Model with weight_dtype fp8_e4m3fn",
    "8-bit": "Load Diffusion Model (8-bit)",
    "8-bit, int8 products": "the same with compute int8",
}
STRAIGHT = "straight"  # what the 8-bit loader is compared with: ComfyUI's loader, then the rounding as one writes it
MARK = "RESULT "  # before a child's answer
GB, GIB = 1e9, 2**30
CARDS = (8, 12, 16, 24)  # GiB, which is what is meant by an 8 GB card: 8.6 GB
CONTEXT = 600e6  # what CUDA and a display take of a card: a guess


# --- in a child process: ComfyUI's Python


def child(part: str, options: dict[str, Any]) -> None:
    """Run one part inside ComfyUI and print its result."""
    sys.path.insert(0, os.getcwd())
    sys.argv[1:] = ["--cpu", "--disable-api-nodes"]
    import comfy.options

    comfy.options.enable_args_parsing()
    quantized = extension("nodes.comfyui.int8_files")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with torch.inference_mode():  # as ComfyUI runs its nodes
        print(MARK + json.dumps(globals()[f"child_{part}"](quantized, **options)), flush=True)


def extension(module: str) -> Any:
    """A module of this repository as ComfyUI sees it: inside a package, the root of which is not on the path."""
    place = importlib.util.spec_from_file_location(
        "gmflow_8bit", REPOSITORY / "__init__.py", submodule_search_locations=[str(REPOSITORY)]
    )
    package = sys.modules["gmflow_8bit"] = importlib.util.module_from_spec(place)
    place.loader.exec_module(package)
    return importlib.import_module(f"gmflow_8bit.{module}")


def load(quantized: Any, variant: str, path: str) -> Any:
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
    """The model with every weight of its blocks rounded, one after the other, and the 16-bit ones given up then."""
    sys.path.append(str(REPOSITORY))  # ComfyUI has a package `tests` of its own
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
    """Bytes of this process's memory that no file backs."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def child_memory(quantized: Any, variant: str, path: str) -> dict[str, float]:
    """Peak of the anonymous memory while loading, and what is left of it afterwards, in GB."""
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
    """Relative error of the latent after `steps` Euler steps, for each seed; with the LoRA of a GM adapter merged into the
    weights of all, if there is one."""
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
    layers = sys.modules[quantized.read_layout.__module__]
    rounded = layers.quantize_rows
    layers.quantize_rows = lambda weight, group=None, **options: rounded(weight, 0, **options)
    for variant in VARIANTS[3:]:
        found[f"{variant}, no rotation"] = errors(loaded(variant))
    return found


def child_speed(quantized: Any, path: str, repeats: int, side: int) -> dict[str, list[float]]:
    """Seconds of one call of the network with side * side image tokens; the variants take turns."""
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


# --- in this process


def run_child(part: str, **options: Any) -> Any:
    """The answer of a child process."""
    from tests.comfyui.installation import COMFYUI, comfyui_python

    if not (COMFYUI / "main.py").is_file():
        raise SystemExit(f"no ComfyUI in {COMFYUI}; set COMFYUI_PATH")
    command = [
        comfyui_python(),
        str(Path(__file__).resolve()),
        "--child",
        part,
        json.dumps(options),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, cwd=COMFYUI, env=environment, capture_output=True, text=True)
    answers = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not answers:
        raise SystemExit(f"{part} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(answers[-1].removeprefix(MARK))


def relative(x: Tensor, exact: Tensor) -> float:
    return ((x - exact).norm() / exact.norm()).item()


def with_outliers(
    weights: dict[str, Tensor], kind: str, share: float = 0.01, seed: int = 1
) -> dict[str, Tensor]:
    """A model of which 1 % of the channels stand out: 10 times as large weights on these inputs of all layers in blocks
    ("weights"), 20 times as large activations in the residual stream ("activations"), or "both"."""
    generator = torch.Generator().manual_seed(seed)
    changed = dict(weights)
    for name, weight in weights.items():
        if kind in ("activations", "both") and name.split(".")[0] in ("img_in", "txt_in"):
            channels = torch.randperm(
                len(weight), generator=torch.Generator().manual_seed(seed)
            )  # the same for both
            changed[name] = weight.clone()
            changed[name][channels[: max(1, int(share * len(weight)))]] *= 20
        if kind in ("weights", "both") and weight.ndim == 2 and "_blocks." in name:
            channels = torch.randperm(weight.shape[1], generator=generator)[
                : max(1, int(share * weight.shape[1]))
            ]
            changed[name] = weight.clone()
            changed[name][:, channels] *= 10
    return changed


def measure_memory(folder: Path) -> dict:
    from tests.comfyui.bases import write_flux

    path = write_flux(folder / "two_gb.safetensors", hidden=3072, depth=1, single=4)
    size = path.stat().st_size / GB
    found = {
        variant: run_child("memory", variant=variant, path=str(path)) for variant in VARIANTS[:4]
    }
    path.unlink()
    return {"file": size, "loads": found}


def measure_error(folder: Path) -> dict:
    from tests.comfyui.adapters import write_adapter
    from tests.comfyui.bases import flux_shapes, random_weights, write

    adapter = write_adapter(
        folder / "adapter.safetensors", hidden=512, depth=2, single=4, rank=32, strength=0.1
    )
    weights = random_weights(flux_shapes(512, 2, 4), 0, torch.bfloat16)
    found = {}
    for kind in ("none", "weights", "activations", "both"):
        path = write(folder / f"outliers_{kind}.safetensors", with_outliers(weights, kind))
        found[kind] = run_child("error", path=str(path), seeds=4, steps=4)
        found[f"{kind}, with a LoRA"] = run_child(
            "error", path=str(path), seeds=4, steps=4, adapter=str(adapter)
        )
    return found


def measure_speed(folder: Path) -> dict:
    from tests.comfyui.bases import write_flux

    path = write_flux(folder / "speed.safetensors", hidden=3072, depth=1, single=1)
    return {
        "tokens": 16 * 16 + 64,
        "seconds": run_child("speed", path=str(path), repeats=3, side=16),
    }


def layer_products() -> dict[str, Callable]:
    """Ways to multiply by a bf16 weight: weight -> (what is kept, function of the input)."""
    from gmflow_core.quantization.int8 import int8_linear, linear, quantize_rows

    return {
        "bf16": lambda w: (w, lambda x, kept: F.linear(x, kept)),
        "fp8": lambda w: (w.to(torch.float8_e4m3fn), lambda x, kept: F.linear(x, kept.to(x.dtype))),
        "8-bit": lambda w: (quantize_rows(w), linear),
        "8-bit, int8 products": lambda w: (quantize_rows(w), int8_linear),
    }


def measure_layers(device: str) -> dict:
    """Milliseconds and peak memory of a FLUX-size layer on bf16 activations; the ways take turns."""
    inputs, outputs, tokens = 3072, 12288, 4096 if device == "cuda" else 512
    layers = (
        20 if device == "cuda" else 1
    )  # on a GPU a stack of them, so that weights count in the peak
    repeats = 20 if device == "cuda" else 5
    torch.manual_seed(0)
    x = torch.randn(tokens, inputs, device=device).bfloat16()
    weights = [
        (torch.randn(outputs, inputs, device=device) * inputs**-0.5).bfloat16()
        for _ in range(layers)
    ]

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    found = {}
    ways = layer_products()
    if device == "cuda":  # peak memory of one way at a time
        host = [weight.cpu() for weight in weights]
        del weights
        for name, make in ways.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            kept = [make(weight.cuda()) for weight in host]
            gc.collect()
            torch.cuda.empty_cache()
            resident = torch.cuda.memory_allocated() / GB
            torch.cuda.reset_peak_memory_stats()
            for weight, product in kept:
                product(x, weight)
            found[name] = {
                "resident_gb": resident,
                "peak_gb": torch.cuda.max_memory_allocated() / GB,
            }
            del kept, weight
        weights = [weight.cuda() for weight in host]
    with torch.inference_mode():
        exact = x.float() @ weights[0].float().T
        kept = {name: make(weights[0]) for name, make in ways.items()}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats + 2):
            for name, (weight, product) in kept.items():
                wait()
                start = time.perf_counter()
                product(x, weight)
                wait()
                times[name].append(1e3 * (time.perf_counter() - start))
        for name, (weight, product) in kept.items():
            best = {
                "ms": min(times[name][2:]),
                "error": relative(product(x, weight).float(), exact),
            }
            found[name] = {**found.get(name, {}), **best}
    about = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, one core"
    )
    return {
        "device": about,
        "tokens": tokens,
        "inputs": inputs,
        "outputs": outputs,
        "layers": layers,
        "ways": found,
    }


def compute_need() -> list[dict]:
    """What the models need on a card, computed from their shapes; nothing here is measured.

    Activations are ComfyUI's own estimate for 1024 x 1024 without a negative prompt (`memory_usage_factor`, 0.33), or the least
    that it leaves for them; the reserve is what it leaves free besides on Linux; one layer is expanded at a time.
    """
    from tests.comfyui.adapters import adapter_shapes
    from tests.comfyui.bases import flux_shapes, qwen_image_shapes

    models = {
        "FLUX.1": (flux_shapes(3072, 19, 38), adapter_shapes("flux", 3072, 19, 38), 3.1),
        "Qwen-Image": (qwen_image_shapes(3072, 60), adapter_shapes("qwen", 3072, 60), 1.8),
    }
    rows = []
    for model, (shapes, adapter, factor) in models.items():
        blocks = {
            name: shape for name, shape in shapes.items() if len(shape) == 2 and "blocks." in name
        }
        total, inside = (sum(map(count, some.values())) for some in (shapes, blocks))
        head = sum(count(shape) for name, shape in adapter.items() if "lora_" not in name)
        lora = sum(map(count, adapter.values())) - head
        weights = {
            "bf16": 2 * total,
            "fp8": total,
            "8-bit": inside + 4 * sum(shape[0] for shape in blocks.values()) + 2 * (total - inside),
        }
        activations = max(
            128 * 128 * 2 * 0.01 * factor * 2**20, 0.8 * GIB
        )  # latent pixels x bytes x ComfyUI's factor
        largest = 2 * max(map(count, shapes.values()))
        for variant, size in weights.items():
            rest = (
                2 * head
                + activations
                + (0 if variant == "bf16" else largest)
                + 400 * 2**20
                + CONTEXT
            )
            need = size + rest
            rows.append(
                {
                    "model": model,
                    "weights": variant,
                    "parameters": total,
                    "weights_gb": round(size / GB, 2),
                    "gm_head_gb": round(2 * head / GB, 3),
                    "lora_in_host_gb": round(2 * lora / GB, 2),
                    "activations_gb": round(activations / GB, 2),
                    "need_gb": round(need / GB, 2),
                    **{f"{card}_gb_card": fit(need, size, card) for card in CARDS},
                    "how": "computed",
                }
            )
    return rows


def count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def fit(need: float, weights: float, card: int) -> str:
    """Whether it fits on a card of that many GiB, else which share of the weights ComfyUI has to keep in host memory."""
    over = need - card * GIB
    return "fits" if over <= 0 else f"{100 * over / weights:.0f} % offloaded"


# --- reports


def rows_of(results: dict) -> list[dict]:
    """All measured figures, one a row."""
    rows = []

    def add(part: str, case: str, variant: str, value: float, unit: str) -> None:
        rows.append(
            {"part": part, "case": case, "variant": variant, "value": f"{value:.4g}", "unit": unit}
        )

    for variant, found in results.get("memory", {}).get("loads", {}).items():
        for name, value in found.items():
            add("memory", name, variant, value, "s" if name == "seconds" else "GB")
    for kind, found in results.get("error", {}).items():
        for variant, errors in found.items():
            add(
                "error",
                f"outliers: {kind}",
                variant,
                sum(errors) / len(errors),
                "relative error after 4 steps",
            )
    for variant, seconds in results.get("speed", {}).get("seconds", {}).items():
        add("speed", "one network call", variant, min(seconds), "s")
    for found in results.get("layers", []):
        case = (
            f"{found['inputs']} -> {found['outputs']}, {found['tokens']} tokens, {found['device']}"
        )
        if not found["ways"]:
            rows.append(
                {"part": "layers", "case": case, "variant": "all", "value": "not run", "unit": ""}
            )
        for variant, about in found["ways"].items():
            for name, value in about.items():
                add("layers", case, variant, value, name)
    return rows


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plot(results: dict, path: Path) -> None:
    """Memory of a load, and the error with and without outlier channels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    loads = results["memory"]["loads"]
    for offset, name, label in (
        (-0.2, "peak", "peak while loading"),
        (0.2, "resident", "after it"),
    ):
        left.bar(
            [i + offset for i in range(len(loads))],
            [about[name] for about in loads.values()],
            0.4,
            label=label,
        )
    left.set_xticks(range(len(loads)), list(loads))
    left.set_ylabel("anonymous host memory, GB")
    left.set_title(f"Loading a bf16 file of {results['memory']['file']:.2f} GB on a CPU")
    left.legend()
    kinds = {
        "none": "none",
        "weights": "in weights",
        "activations": "in activations",
        "both": "in both",
    }
    variants = list(results["error"]["none"])
    for i, variant in enumerate(variants):
        means = [
            100 * sum(results["error"][kind][variant]) / len(results["error"][kind][variant])
            for kind in kinds
        ]
        right.bar([k + (i - 2) * 0.16 for k in range(len(kinds))], means, 0.16, label=variant)
    right.set_xticks(range(len(kinds)), list(kinds.values()))
    right.set_xlabel("outlier channels")
    right.set_ylabel("relative error of the latent, %")
    right.set_title("Four Euler steps against bf16 weights")
    right.margins(y=0.4)  # room for the legend
    right.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="the parts to run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    store = arguments.out / "eight_bit.json"
    results = json.loads(store.read_text()) if store.is_file() else {}
    with tempfile.TemporaryDirectory() as name:
        for part, measure in (
            ("memory", measure_memory),
            ("error", measure_error),
            ("speed", measure_speed),
        ):
            if part in arguments.only:
                results[part] = measure(Path(name))
                print(part, json.dumps(results[part], indent=1), flush=True)
    if "layers" in arguments.only:
        results["layers"] = [measure_layers("cpu")]
        shape = {key: results["layers"][0][key] for key in ("inputs", "outputs")}
        none = {"device": "NVIDIA GPU", "tokens": 4096, **shape, "layers": 20, "ways": {}}
        results["layers"].append(measure_layers("cuda") if torch.cuda.is_available() else none)
    if "need" in arguments.only:
        results["need"] = compute_need()
    arguments.out.mkdir(parents=True, exist_ok=True)
    store.write_text(json.dumps(results, indent=1) + "\n")
    rows = rows_of(results)
    if rows:
        write_csv(store.with_suffix(".csv"), rows)
    if "need" in results:
        write_csv(arguments.out / "eight_bit_need.csv", results["need"])
    if "memory" in results and "error" in results:
        plot(results, store.with_suffix(".png"))
    for row in [*rows, *results.get("need", [])]:
        print(*row.values(), sep=" | ")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
