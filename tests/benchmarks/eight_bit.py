"""Measure the 8-bit loader against bf16 and fp8 weights in a real ComfyUI.

    python -m tests.benchmarks.eight_bit                     # everything, 10 to 15 minutes, 1 core
    python -m tests.benchmarks.eight_bit --only error need   # memory, error, speed, layers, need

ComfyUI is found as by the tests (COMFYUI_PATH, COMFYUI_PYTHON). It runs in child processes on the
CPU (`eight_bit_inside.py`), with random models in the layout of FLUX.1. The layers are measured on
an NVIDIA GPU too if this Python's torch finds one. `need` is computed (`eight_bit_need.py`).
Results go to docs/results/eight_bit.json and .csv, eight_bit_need.csv and eight_bit.png; parts that
are not run are taken from the json.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gmflow_core.quantization.int8 import int8_linear, linear, quantize_rows
from tests.comfyui.adapters import write_adapter
from tests.comfyui.bases import flux_shapes, random_weights, write, write_flux
from tests.comfyui.installation import COMFYUI, comfyui_python

from . import eight_bit_inside
from .eight_bit_inside import MARK, VARIANTS, relative
from .eight_bit_need import compute_need

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs" / "results"
PARTS = ("memory", "error", "speed", "layers", "need")
GB = 1e9


def run_child(part: str, **options: Any) -> Any:
    """Run one part in ComfyUI's Python and return its answer."""
    if not (COMFYUI / "main.py").is_file():
        raise SystemExit(f"no ComfyUI in {COMFYUI}; set COMFYUI_PATH")
    command = [
        comfyui_python(),
        str(Path(eight_bit_inside.__file__).resolve()),
        part,
        json.dumps(options),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, cwd=COMFYUI, env=environment, capture_output=True, text=True)
    answers = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not answers:
        raise SystemExit(f"{part} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(answers[-1].removeprefix(MARK))


def with_outliers(
    weights: dict[str, Tensor], kind: str, share: float = 0.01, seed: int = 1
) -> dict[str, Tensor]:
    """Return a model in which 1 % of the channels are outliers.

    Args:
        kind: "weights" (on these inputs the weights of all layers in blocks are 10 times as large),
            "activations" (in the residual stream they are 20 times as large), "both" or "none".
    """
    generator = torch.Generator().manual_seed(seed)
    changed = dict(weights)
    for name, weight in weights.items():
        if kind in ("activations", "both") and name.split(".")[0] in ("img_in", "txt_in"):
            same = torch.Generator().manual_seed(seed)  # the same channels in img_in and txt_in
            channels = torch.randperm(len(weight), generator=same)
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
    """Measure the host memory of loading a bf16 file of 2 GB."""
    path = write_flux(folder / "two_gb.safetensors", hidden=3072, depth=1, single=4)
    size = path.stat().st_size / GB
    found = {
        variant: run_child("memory", variant=variant, path=str(path)) for variant in VARIANTS[:4]
    }
    path.unlink()
    return {"file": size, "loads": found}


def measure_error(folder: Path) -> dict:
    """Measure the error of latents with and without outlier channels and a LoRA."""
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
    """Measure the seconds of a network call in every variant."""
    path = write_flux(folder / "speed.safetensors", hidden=3072, depth=1, single=1)
    return {
        "tokens": 16 * 16 + 64,
        "seconds": run_child("speed", path=str(path), repeats=3, side=16),
    }


def layer_products() -> dict[str, Callable]:
    """Return ways to multiply by a bf16 weight: weight -> (stored form, product(x, stored))."""
    return {
        "bf16": lambda w: (w, lambda x, kept: F.linear(x, kept)),
        "fp8": lambda w: (w.to(torch.float8_e4m3fn), lambda x, kept: F.linear(x, kept.to(x.dtype))),
        "8-bit": lambda w: (quantize_rows(w), linear),
        "8-bit, int8 products": lambda w: (quantize_rows(w), int8_linear),
    }


def measure_layers(device: str) -> dict:
    """Measure milliseconds and peak memory of a FLUX-size layer on bf16 activations.

    The ways of `layer_products` take turns.
    """
    inputs, outputs, tokens = 3072, 12288, 4096 if device == "cuda" else 512
    layers = 20 if device == "cuda" else 1  # on a GPU enough that weights count in the peak
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
    if device == "cuda":  # measure the peak memory of one way at a time
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


# --- reports


def rows_of(results: dict) -> list[dict]:
    """Return all measured figures, one a row."""
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
    """Write rows under the keys of the first one."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plot(results: dict, path: Path) -> None:
    """Plot the memory of a load, and the error with and without outlier channels."""
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
    main()
