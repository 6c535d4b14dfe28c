"""8-bit layers on the device, at the sizes of FLUX.1's layers, beside bf16 and fp8."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from gmflow_core.quantization.int8 import (
    Int8Weight,
    bitsandbytes_product,
    int8_product,
    pack,
    unpack,
)
from tests.benchmarks.eight_bit import layer_products
from tests.benchmarks.eight_bit_inside import MARK, relative
from tests.benchmarks.measure import extra_memory, quartiles, ratios, take_turns
from tests.benchmarks.rows import size_of
from tests.comfyui.installation import COMFYUI, comfyui_python

from .run import GB, Run, check

SCRIPT = Path(__file__).with_name("nodes_inside.py")
INPUTS, OUTPUTS, TOKENS = 3072, (9216, 12288, 21504), 4608  # 64 x 64 tokens of image, 512 of text
ALLOWED = {"bf16": 0.006, "8-bit": 0.02, "8-bit, int8 products": 0.03}  # errors, as norms
IN_NODES = {"bf16": "bf16", "16 bit": "8-bit", "int8": "8-bit, int8 products"}  # names there, here


def int8(run: Run) -> Iterator[tuple[str, dict]]:
    """Compare 8-bit layers with bf16 ones: error, time and memory."""
    yield products(run)
    inputs, tokens = run.size((INPUTS, TOKENS), (256, 64))
    sizes = [(inputs, outputs, tokens) for outputs in run.size(OUTPUTS, (96,))]
    for size in sizes:
        yield layers(run, *size)
    yield from nodes(run, sizes)


def products(run: Run) -> tuple[str, dict]:
    """Check int8 products of few and of odd rows against int64, and the packed form."""
    generator = torch.Generator().manual_seed(0)
    for rows, outputs, inputs in ((1, 24, 64), (16, 64, 256), (40, 30, 48), (4608, 64, 256)):
        a, b = (
            torch.randint(-127, 128, (n, inputs), generator=generator, dtype=torch.int8)
            for n in (rows, outputs)
        )
        found = int8_product(a.to(run.device), b.to(run.device)).cpu()
        right = torch.equal(found.long(), a.long() @ b.long().T)
        what = f"int8 product ({rows}, {inputs}) x ({inputs}, {outputs})"
        check(right, what, "the integers of int64", "others")
        weight = Int8Weight(b.to(run.device), torch.rand(outputs, 1, device=run.device), 0)
        back = unpack(pack(weight), outputs, 0)
        same = torch.equal(back.values, weight.values) and torch.equal(back.scale, weight.scale)
        check(same, f"packed weight ({outputs}, {inputs})", "the same numbers back", "others")
    by = "bitsandbytes" if run.device == "cuda" and bitsandbytes_product() else "torch"
    return f"int8 products by {by}", {"exact": True}


@torch.inference_mode()
def layers(run: Run, inputs: int, outputs: int, tokens: int) -> tuple[str, dict]:
    """Compare the ways of `layer_products` on one layer, in turns."""
    case = f"{inputs} -> {outputs}, {tokens} tokens"
    torch.manual_seed(0)
    x = torch.randn(tokens, inputs, device=run.device).bfloat16()
    weight = (torch.randn(outputs, inputs, device=run.device) * inputs**-0.5).bfloat16()
    exact = x.float() @ weight.float().T
    forms, figures = {}, {}
    for name, make in layer_products().items():
        kept, product = make(weight)
        forms[name] = functools.partial(product, x, kept)
        tensors = (kept.values, kept.scale) if isinstance(kept, Int8Weight) else (kept,)
        error = relative(forms[name]().float(), exact)
        figures[name] = {"error": error, "weight GB": size_of(*tensors) / GB}
    for name, bound in ALLOWED.items():
        error = figures[name]["error"]
        check(error <= bound, f"error of {name}, {case}", f"at most {bound}", f"{error:.3g}")
    del exact
    times = take_turns(forms, run.device, **run.budget(3.0))
    for name, form in forms.items():
        figures[name] |= {
            "ms": 1e3 * quartiles(times[name])[1],
            "time / bf16's": ratios(times[name], times["bf16"]),
            "extra GB": extra_memory(form, run.device) / GB,
        }
    return case, figures


def nodes(run: Run, sizes: list[tuple[int, int, int]]) -> Iterator[tuple[str, dict | str]]:
    """Compare the layers that the nodes put into a model, in ComfyUI's own process."""
    case = "the nodes' layers in ComfyUI"
    if not (COMFYUI / "main.py").is_file():
        yield case, "not run: there is no ComfyUI; set COMFYUI_PATH"
        return
    command = [comfyui_python(), str(SCRIPT), run.device, json.dumps(sizes)]
    usual = {} if run.device == "cuda" else {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment = {**os.environ, **usual}
    done = subprocess.run(command, cwd=COMFYUI, env=environment, capture_output=True, text=True)
    answers = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    check(bool(answers), case, "an answer", f"status {done.returncode}: {done.stderr[-2000:]}")
    found = json.loads(answers[-1].removeprefix(MARK))
    layout = "its own layout" if found["native"] else "our layout"
    for size, figures in found["cases"].items():
        name = f"{case}, {layout}, {size}"
        for compute, here in IN_NODES.items():
            error = figures[compute]["error"]
            what = f"error of {compute}, {name}"
            check(error <= ALLOWED[here], what, f"at most {ALLOWED[here]}", f"{error:.3g}")
        yield name, figures
