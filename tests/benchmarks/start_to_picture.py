"""Time whole prompts of ComfyUI: our nodes, ComfyUI-piFlow and a stock KSampler on one model.

    python -m tests.benchmarks.start_to_picture                   # a quarter of an hour on one core
    PIFLOW_PATH=... python -m tests.benchmarks.start_to_picture   # with ComfyUI-piFlow
    python -m tests.benchmarks.start_to_picture --width 256 --blocks 1 2 --side 16    # a minute

A random model in FLUX.1's layout, with one LoRA, makes pictures in 4 network calls. Each way has a
ComfyUI server of its own (found as by the tests) on one CPU thread; the servers run side by side,
and get their prompts in turns: a first one, further ones with other seeds, one after the adapter
(or the LoRA) was switched to another file, one at twice the height and width. A probe in every
server (`start_to_picture_inside.py`) notes when nodes and the network begin and end. What our parts
take at FLUX.1's real size is computed (`start_to_picture_parts.py`). The figures go to
docs/results/start_to_picture.csv, row by row; rows of other versions of ComfyUI, and of stages and
ways that are not asked for, stay there.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import re
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from tests.comfyui.adapters import write_adapter
from tests.comfyui.bases import write, write_flux
from tests.comfyui.client import Comfy, PromptError
from tests.comfyui.graphs import node
from tests.comfyui.installation import COMFYUI, HOW_TO, comfyui_version, is_installed
from tests.comfyui.server import running
from tests.comfyui.stand_in_files import write_text_encoder
from tests.comfyui.vaes import write_vae

from .peers import PLACES
from .start_to_picture_parts import TEXT_TOKENS, parts_row

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs" / "results" / "start_to_picture.csv"
PROBE = Path(__file__).with_name("start_to_picture_inside.py")
STOCK, PIFLOW = "stock", "ComfyUI-piFlow"
ADAPTER = "gmflux_k8_piid_4step"  # whose name says the number of steps
STAND_IN_TOKENS = 8  # that the stand-in for text encoders adds to the words
TIMEOUT = 3600
RATIOS = {
    "seconds": "to_stock",
    "processor_seconds": "processor_to_stock",
    "peak_gb": "peak_to_stock",
}
COMPUTED = "computed"  # for FLUX.1 itself, from measured parts
STAGES = ("first", "second", "switched", "doubled", COMPUTED)
KEYS = ("comfyui", "way", "prompt")  # of a row
COLUMNS = (
    *("comfyui", "way", "prompt", "width", "blocks", "latent", "repeats"),
    *("seconds", "to_stock", "processor_seconds", "processor_to_stock"),
    *("load_seconds", "sampling_seconds", "outside_ms", "outside_percent"),
    *("last_layer_ms", "last_and_outside_percent", "peak_gb", "peak_to_stock"),
    *("head_seconds", "solver_seconds", "network_tflop", "gflop_per_second", "network_seconds"),
    *("load_average", "command", "note"),
)
Prompt = dict[str, Any]
Row = dict[str, Any]


class Case(NamedTuple):
    """What a prompt asks for: the seed, the file of the adapter or LoRA, and the latents' side."""

    seed: int
    file: str
    side: int


@dataclass(frozen=True)
class Way:
    """A way to sample: the extensions that its server needs, and the nodes that it samples with."""

    extensions: dict[str, Path]
    nodes: Callable[[Case], Prompt]


# --- prompts


def stock_nodes(case: Case) -> Prompt:
    """Return Load Diffusion Model -> Load LoRA -> KSampler."""
    wires = {name: ["positive", 0] for name in ("positive", "negative")}
    settings = {"steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    lora = {"lora_name": f"lora_{case.file}.safetensors", "strength_model": 1.0}
    return {
        "base": node("UNETLoader", unet_name="flux1.safetensors", weight_dtype="default"),
        "model": node("LoraLoaderModelOnly", model=["base", 0], **lora),
        "sample": node(
            "KSampler",
            model=["model", 0],
            latent_image=["latent", 0],
            seed=case.seed,
            denoise=1.0,
            **wires,
            **settings,
        ),
    }


def our_nodes(case: Case) -> Prompt:
    """Return Load Diffusion Model -> GM Adapter -> GM Sampler."""
    wires = {"model": ["model", 0], "latent_image": ["latent", 0], "positive": ["positive", 0]}
    settings = {"steps": 4, "solver": "gm-policy", "order": 2, "substeps": 128, "shift": 0.0}
    adapter = {"adapter_name": f"{ADAPTER}_{case.file}.safetensors", "strength": 1.0}
    return {
        "base": node("UNETLoader", unet_name="flux1.safetensors", weight_dtype="default"),
        "model": node("GMFlowAdapter", model=["base", 0], **adapter),
        "sample": node("GMFlowSampler", seed=case.seed, denoise=1.0, **wires, **settings),
    }


def our_stock_nodes(case: Case) -> Prompt:
    """Return Load Diffusion Model -> GM Adapter -> KSampler with the sampler gm_policy."""
    prompt = our_nodes(case)
    sample = stock_nodes(case)["sample"]
    sample["inputs"] |= {"sampler_name": "gm_policy", "scheduler": "gm"}
    return {**prompt, "sample": sample}


def piflow_nodes(case: Case) -> Prompt:
    """Return the nodes of ComfyUI-piFlow."""
    adapter = f"{ADAPTER}_{case.file}.safetensors"
    files = {"model_name": "flux1.safetensors", "adapter_name": adapter}
    settings = {"steps": 4, "substeps": 128, "final_step_size_scale": 0.5, "denoise": 1.0}
    settings |= {"diffusion_coefficient": 0.0, "gm_temperature": "auto"}
    wires = {"conditioning": ["positive", 0], "latent_image": ["latent", 0]}
    return {
        "base": node("Load pi-Flow Model", weight_dtype="default", adapter_strength=1.0, **files),
        "model": node("ModelSamplingPiFlow", model=["base", 0], shift=3.2),
        "sample": node(
            "pi-Flow Sampler",
            model=["model", 0],
            seed=case.seed,
            manual_gm_temperature=1.0,
            **wires,
            **settings,
        ),
    }


def whole(way: Way, case: Case) -> Prompt:
    """Return a prompt from the files to a saved picture."""
    text = " ".join(f"word{i}" for i in range(TEXT_TOKENS - STAND_IN_TOKENS))
    names = {f"clip_name{i}": "text.safetensors" for i in (1, 2)}
    size = {"width": 8 * case.side, "height": 8 * case.side, "batch_size": 1}
    return {
        **way.nodes(case),
        "clip": node("DualCLIPLoader", type="flux", **names),
        "positive": node("CLIPTextEncode", clip=["clip", 0], text=text),
        "latent": node("EmptySD3LatentImage", **size),
        "vae": node("VAELoader", vae_name="vae.safetensors"),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["vae", 0]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="picture"),
    }


def ways() -> dict[str, Way]:
    """Return the ways that are compared; ComfyUI-piFlow if there is a checkout of it."""
    ours = {"gmflow": REPOSITORY}
    found = {
        STOCK: Way({}, stock_nodes),
        "GM Adapter, GM Sampler": Way(ours, our_nodes),
        "GM Adapter, KSampler": Way(ours, our_stock_nodes),
    }
    variable, usual = PLACES[PIFLOW]
    place = Path(os.environ.get(variable) or usual).expanduser().absolute()
    if place.is_dir():
        release = re.search(r'^version = "(.+)"', (place / "pyproject.toml").read_text(), re.M)
        found[f"{PIFLOW} {release[1]}"] = Way({"piflow": place}, piflow_nodes)
    return found


# --- measuring


def write_files(models: Path, width: int, double: int, single: int) -> None:
    """Write a model, two adapters, their LoRAs alone, a VAE, and text encoders."""
    sizes = {"hidden": width, "depth": double, "single": single}
    write_flux(models / "diffusion_models" / "flux1.safetensors", **sizes)
    for seed, name in enumerate("ab"):
        path = models / "loras" / f"{ADAPTER}_{name}.safetensors"
        write_adapter(path, **sizes, rank=max(4, width // 12), strength=0.1, seed=seed)
        lora = {f"transformer.{k}": w for k, w in load_file(path).items() if ".lora_" in k}
        write(models / "loras" / f"lora_{name}.safetensors", lora)
    write_vae(models / "vae" / "vae.safetensors")
    write_text_encoder(models / "text_encoders" / "text.safetensors")


def measured(server: Comfy, prompt: Prompt) -> Row:
    """Run a prompt, and return what it took.

    Raises:
        PromptError: it failed.
    """
    server.get("/start_to_picture")
    status = Path(f"/proc/{server.process.pid}")
    (status / "clear_refs").write_text("5")  # the peak begins at what is resident now
    server.run(prompt, timeout=TIMEOUT)
    peak = re.search(r"VmHWM:\s+(\d+) kB", (status / "status").read_text())
    row = times_of(server.get("/start_to_picture"))
    return {**row, "peak_gb": int(peak[1]) * 1024 / 1e9}


def times_of(notes: list[tuple[str, str, float, float]]) -> Row:
    """Return the times of a prompt, from the notes of the probe.

    Outside the network is the sampler's node without the network's forward pass. The last layer is
    the part of that pass behind the blocks: where our head, or that of ComfyUI-piFlow, is computed.
    Shares are of the seconds that the process has computed, which other load on the machine
    changes little.
    """
    nodes = [each for each in notes if each[0] == "node"]
    pairs = itertools.pairwise(nodes)
    processor = {begin[1]: end[3] - begin[3] for begin, end in pairs}
    begins, last, ends = (
        [each[3] for each in notes if each[0] == what]
        for what in ("network begins", "last layer begins", "network ends")
    )
    sampling, last_layer = processor["sample"], sum(ends) - sum(last)
    outside = sampling - (sum(ends) - sum(begins))
    return {
        "seconds": nodes[-1][2] - nodes[0][2],
        "processor_seconds": nodes[-1][3] - nodes[0][3],
        "load_seconds": sum(processor.get(name, 0.0) for name in ("base", "model")),
        "sampling_seconds": sampling,
        "outside_ms": 1e3 * outside,
        "outside_percent": 100 * outside / sampling,
        "last_layer_ms": 1e3 * last_layer,
        "last_and_outside_percent": 100 * (outside + last_layer) / sampling,
    }


def stages(side: int, repeats: int) -> dict[str, list[Case]]:
    """Return the cases of each stage by its name; those of one stage are repeats."""
    return {
        "first": [Case(0, "a", side)],
        "second": [Case(1 + i, "a", side) for i in range(repeats)],
        "switched": [Case(1, "b", side)],
        "doubled": [Case(1, "b", 2 * side)],
    }


def compare(
    known: dict[str, Way], servers: dict[str, Comfy], wanted: dict[str, list[Case]]
) -> Iterator[tuple[str, str, list[Row] | str]]:
    """Yield stage, way and what was measured in each repeat; a way that fails, its error, once."""
    failed: dict[str, str] = {}
    for stage, cases in wanted.items():
        found: dict[str, list[Row]] = {name: [] for name in servers}
        for turn, case in enumerate(cases):
            for name in list(servers)[:: 1 if turn % 2 == 0 else -1]:
                if name in failed:
                    continue
                try:
                    found[name].append(measured(servers[name], whole(known[name], case)))
                except PromptError as error:
                    failed[name] = why(servers[name], error)
        for name in servers:
            if name not in failed:
                yield stage, name, found[name]
            elif failed[name]:
                yield stage, name, failed[name]
                failed[name] = ""  # said once; no further prompts


def why(server: Comfy, error: PromptError) -> str:
    """Return one line on why a prompt failed: what an extension that did not load raised, or it."""
    log = server.log()
    broken = re.search(r"Cannot import \S*(\w+) module for custom nodes: (.+)", log)
    if broken:
        return f"its extension does not load: {broken[2]}"
    return re.sub(r"\s+", " ", str(error).splitlines()[1])[:300]


def summary(found: list[Row], stock: list[Row]) -> Row:
    """Return the medians of repeats, and the ratios to the stock sampler's, if it has run."""
    row = {name: statistics.median(each[name] for each in found) for name in found[0]}
    pairs = list(zip(found, stock, strict=True)) if stock else []
    for name, ratio in RATIOS.items() if pairs else ():
        row[ratio] = statistics.median(ours[name] / other[name] for ours, other in pairs)
    return {**row, "repeats": len(found)}


# --- the command


def write_row(path: Path, row: Row) -> None:
    """Write a row to a CSV file, in the place of the one for the same version, way and prompt."""
    rows = []
    if path.is_file():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    rows = [old for old in rows if any(old[key] != str(row[key]) for key in KEYS)]
    rows.append({name: rounded(value) for name, value in row.items()})
    rows.sort(key=lambda each: STAGES.index(each["prompt"]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda each: each["comfyui"], reverse=True))


def rounded(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def main() -> None:
    """Measure; print and write each row."""
    arguments = parsed()
    torch.set_num_threads(1)
    command = " ".join(["python -m tests.benchmarks.start_to_picture", *given_options()])
    for row in rows_of(arguments):
        row |= {"load_average": os.getloadavg()[0], "command": command}
        print(*(f"{name} {rounded(value)}" for name, value in row.items()), sep=", ", flush=True)
        write_row(arguments.out, row)


def rows_of(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows that the options ask for."""
    width, blocks, version = arguments.width, arguments.blocks, comfyui_version()
    about = {"comfyui": version, "width": width, "blocks": f"{blocks[0]} + {blocks[1]}"}
    cases = stages(arguments.side, arguments.repeats)
    wanted = {stage: cases[stage] for stage in STAGES[:-1] if stage in arguments.stages}
    with tempfile.TemporaryDirectory() as name, ExitStack() as opened:
        work, servers, stock = Path(name), {}, []
        if COMPUTED in arguments.stages:
            yield {"comfyui": "", "way": "GM Adapter", "prompt": COMPUTED, **parts_row(work)}
        if wanted:
            write_files(work / "models", width, *blocks)
        known = {way: about for way, about in ways().items() if way not in arguments.without}
        for number, way in enumerate(known if wanted else ()):
            base = work / str(number)
            base.mkdir()
            (base / "models").symlink_to(work / "models", target_is_directory=True)
            extensions = {PROBE.name: PROBE, **known[way].extensions}
            servers[way] = opened.enter_context(running(base, extensions=extensions))
        for stage, way, found in compare(known, servers, wanted):
            side = cases[stage][0].side
            row = {**about, "way": way, "prompt": stage, "latent": f"{side} x {side}"}
            if way == STOCK and not isinstance(found, str):
                stock = found
            yield row | ({"note": found} if isinstance(found, str) else summary(found, stock))


def given_options() -> list[str]:
    """Return the options of the command as they were given, without the place of the results."""
    given = [shlex.quote(each) for each in sys.argv[1:]]
    if "--out" in given:
        at = given.index("--out")
        del given[at : at + 2]
    return given


def parsed() -> argparse.Namespace:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=1024, help="of the model, a multiple of 128")
    parser.add_argument("--blocks", type=int, nargs=2, default=[3, 6], help="double, single")
    parser.add_argument("--side", type=int, default=64, help="of the latents, in latent pixels")
    parser.add_argument("--repeats", type=int, default=3, help="of the second prompt")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="to measure")
    parser.add_argument("--without", nargs="+", choices=list(ways()), default=(), help="ways")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV file")
    arguments = parser.parse_args()
    if not is_installed():
        parser.error(f"no ComfyUI in {COMFYUI}: {HOW_TO}")
    return arguments


if __name__ == "__main__":
    main()
