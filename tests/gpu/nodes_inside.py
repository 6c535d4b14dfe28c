"""Run the nodes' 8-bit layers in ComfyUI's own process, beside bf16, for `layers.py`.

    cd COMFYUI && .venv/bin/python nodes_inside.py DEVICE SIZES

SIZES is a JSON list of [inputs, outputs, tokens]. The answer is a line of JSON after MARK of
`eight_bit_inside.py`. As there, nothing of this repository's package `tests` is imported, since
ComfyUI has one of that name; files of it are read by their paths.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


class Progress:
    """Takes what the layers report of a load."""

    def __init__(self):
        self.missing: list[str] = []
        self.without_weight: list[str] = []
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def file_of(name: str) -> ModuleType:
    """Import a file of tests/benchmarks by its path."""
    place = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    found = importlib.util.module_from_spec(place)
    sys.modules[name] = found  # dataclasses and annotations look there
    place.loader.exec_module(found)
    return found


def layer_of(own: Any, compute: str, weight: Tensor, device: str) -> nn.Module:
    """Return the nodes' Linear layer that holds a weight in 8 bits.

    Raises:
        RuntimeError: the layer did not round it.
    """
    progress = Progress()
    operations = own.int8_operations(compute, torch.bfloat16, progress)
    outputs, inputs = weight.shape
    layer = operations.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)
    network = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"layer": layer})])})
    network.load_state_dict({"blocks.0.layer.weight": weight.cpu()}, strict=False)
    if progress.count != 1:
        raise RuntimeError(f"{type(layer).__name__} rounded {progress.count} weights instead of 1")
    return layer.to(device)


def compare(own: Any, inside: Any, measure: Any, device: str, size: list[int]) -> dict:
    """Return error and time of the layer in both computations, and in bf16, at one size."""
    inputs, outputs, tokens = size
    torch.manual_seed(0)
    x = torch.randn(tokens, inputs, device=device).bfloat16()
    weight = (torch.randn(outputs, inputs, device=device) * inputs**-0.5).bfloat16()
    exact = x.float() @ weight.float().T
    forms = {"bf16": functools.partial(F.linear, x, weight)}
    for compute in own.COMPUTE:
        forms[compute] = functools.partial(layer_of(own, compute, weight, device), x)
    errors = {name: inside.relative(form().float(), exact) for name, form in forms.items()}
    del exact
    limits = {"budget": 0.05, "least": 2} if device == "cpu" else {"budget": 3.0}
    times = measure.take_turns(forms, device, **limits)
    return {
        name: {
            "error": errors[name],
            "ms": 1e3 * measure.quartiles(times[name])[1],
            "time / bf16's": measure.ratios(times[name], times["bf16"]),
        }
        for name in forms
    }


def main(device: str, sizes: str) -> None:
    sys.path[0] = os.getcwd()
    sys.argv[1:] = ["--disable-api-nodes", *(["--cpu"] if device == "cpu" else [])]
    import comfy.options

    comfy.options.enable_args_parsing()
    inside, measure = map(file_of, ("eight_bit_inside", "measure"))
    own = inside.extension("nodes.comfyui.int8_layers")
    with torch.inference_mode():  # as ComfyUI runs its nodes
        found = {
            f"{size[0]} -> {size[1]}, {size[2]} tokens": compare(own, inside, measure, device, size)
            for size in json.loads(sizes)
        }
    native = own.has_native_layout()
    print(inside.MARK + json.dumps({"native": native, "cases": found}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
