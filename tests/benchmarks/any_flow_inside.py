"""Sample a model as an ordinary flow model inside ComfyUI's process, for `stock.py`.

    cd COMFYUI && .venv/bin/python any_flow_inside.py JOB

JOB is a JSON file: `model` (a checkpoint), `inputs` (a safetensors file with `noise` and, for a
model of classes, `labels`), `out` (a folder) and `settings`, a list of dicts as `run` takes them.
Samples go to OUT/NUMBER.safetensors; the line after MARK tells the network calls and steps of each.
This file imports nothing of this repository's `tests`, as ComfyUI has a package of that name.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
MARK = "RESULT "
BATCH = 250


def main(job: str) -> None:
    """Run a job."""
    sys.path.insert(0, os.getcwd())
    sys.argv[1:] = ["--cpu", "--disable-api-nodes"]
    import comfy.options

    comfy.options.enable_args_parsing()
    load = extension("nodes.comfyui.gm_model").load_gm_model
    extension("nodes.comfyui.stock_lists").add_to_stock_lists()
    from safetensors.torch import load_file, save_file

    about = json.loads(Path(job).read_text())
    inputs, mixture = load_file(about["inputs"]), load(about["model"])
    plain, found = plain_model(load(about["model"])), []
    with torch.inference_mode():
        for number, setting in enumerate(about["settings"]):
            model = mixture if setting.pop("mixture", False) else plain
            samples, facts = run(model, inputs, **setting)
            save_file({"samples": samples}, Path(about["out"]) / f"{number}.safetensors")
            found.append(facts)
            print(setting, facts, file=sys.stderr, flush=True)
    print(MARK + json.dumps(found), flush=True)


def extension(module: str) -> Any:
    """Import a module of this repository as ComfyUI does: in a package that is off sys.path."""
    if "gmflow_any" not in sys.modules:
        place = importlib.util.spec_from_file_location(
            "gmflow_any", REPOSITORY / "__init__.py", submodule_search_locations=[str(REPOSITORY)]
        )
        package = sys.modules["gmflow_any"] = importlib.util.module_from_spec(place)
        place.loader.exec_module(package)
    return importlib.import_module(f"gmflow_any.{module}")


def plain_model(model: Any) -> Any:
    """Return a GM model of which nothing is known but its mean velocity."""
    import comfy.model_base

    ours = type(model.model)
    kept = {name: vars(ours)[name] for name in ("process_timestep", "extra_conds")}
    model.model.__class__ = type("PlainModel", (comfy.model_base.BaseModel,), kept)
    model.wrappers.clear()
    model.model.diffusion_model.network.spectrum_net = None  # it is a part of the mixture
    return model


def run(
    model: Any,
    inputs: dict[str, Tensor],
    *,
    sampler: str,
    scheduler: str = "gm",
    calls: int,
    count: int,
    cfg: float = 1.0,
    spread: float = 0.0,
    remedy: str = "",
) -> tuple[Tensor, dict[str, int]]:
    """Sample with a stock name.

    Args:
        calls: network calls; the most steps that take no more are chosen.
        count: samples, the first of those in the inputs; or points of the one latent.
        cfg: guidance scale, or weight of probabilistic guidance.
        spread: of GM Spread; the usual one if 0.
        remedy: key of REMEDIES, or "probabilistic".

    Returns:
        Samples, and `steps` and `calls`; NaN and 0 if the sampler cannot do so few.
    """
    if spread:
        model = extension("nodes.comfyui.plain_model").with_spread(model, spread)
    if remedy == "probabilistic":
        model = extension("nodes.comfyui.guiders").guided(model)
    elif remedy:
        model = remedied(model, remedy)
    if len(inputs["noise"]) > 1:
        parts = {name: tensor[:count] for name, tensor in inputs.items()}
        first = {name: tensor[:1] for name, tensor in parts.items()}
        steps, taken = fitting_steps(model, first, sampler, scheduler, calls, cfg)
        pieces = [
            {name: tensor[start : start + BATCH] for name, tensor in parts.items()}
            for start in range(0, count, BATCH)
        ]
    else:  # one latent of many points
        side = math.isqrt(count)
        parts = {"noise": inputs["noise"][..., :side, :side]}
        small = {"noise": parts["noise"][..., :2, :2]}
        steps, taken = fitting_steps(model, small, sampler, scheduler, calls, cfg)
        pieces = [parts]
    if not steps:
        return torch.full_like(parts["noise"], math.nan), {"steps": 0, "calls": 0}
    sampled = [sample(model, piece, sampler, scheduler, steps, cfg)[0] for piece in pieces]
    return torch.cat(sampled), {"steps": steps, "calls": taken}


def fitting_steps(
    model: Any, inputs: dict[str, Tensor], sampler: str, scheduler: str, calls: int, cfg: float
) -> tuple[int, int]:
    """Return the most steps that take at most `calls` network calls, and the calls they take.

    Numbers of steps that the sampler or the scheduler cannot do are left out, such as 1 step of
    kl_optimal, which divides by 0. If no other takes few enough calls, the first that can be done
    is returned; 0 steps and 0 calls if there is none.
    """
    best = (0, 0)
    for steps in range(1, calls + 1):
        try:
            samples, taken = sample(model, inputs, sampler, scheduler, steps, cfg)
        except (RuntimeError, IndexError, ZeroDivisionError):
            continue
        if samples.isfinite().all() and (taken <= calls or best == (0, 0)):
            best = steps, taken
    return best


def sample(
    model: Any, inputs: dict[str, Tensor], sampler: str, scheduler: str, steps: int, cfg: float
) -> tuple[Tensor, int]:
    """Sample as KSampler does; return the samples and the number of network calls."""
    import comfy.sample

    labelled = extension("nodes.comfyui.label_conditioning")
    counted, model = [0], model.clone()

    def counting(executor, *args, **kwargs):
        counted[0] += 1
        return executor(*args, **kwargs)

    from comfy.patcher_extension import WrappersMP

    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "count", counting)
    noise, positive = inputs["noise"], labelled.NO_TEXT
    if "labels" in inputs:
        positive = labelled.class_conditioning(inputs["labels"].tolist())
    samples = comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        sampler,
        scheduler,
        positive,
        labelled.unconditional() if "labels" in inputs else positive,
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=1,
    )
    return samples.float(), counted[0]


def remedied(model: Any, remedy: str) -> Any:
    """Return the model with one of ComfyUI's own remedies for classifier-free guidance."""
    from comfy_extras import nodes_apg, nodes_cfg, nodes_model_advanced

    if remedy == "APG":  # as the node stands
        return nodes_apg.APG.execute(model, 1.0, 5.0, 0.0)[0]
    if remedy == "APG, eta 0":  # without the part along the prediction, as its paper advises
        return nodes_apg.APG.execute(model, 0.0, 5.0, 0.0)[0]
    if remedy == "RescaleCFG":
        return nodes_model_advanced.RescaleCFG().patch(model, 0.7)[0]
    if remedy == "CFGNorm":
        return nodes_cfg.CFGNorm.execute(model, 1.0)[0]
    if remedy == "CFGZeroStar":
        return nodes_cfg.CFGZeroStar.execute(model)[0]
    raise ValueError(f"remedy {remedy!r} is unknown")


if __name__ == "__main__":
    main(sys.argv[1])
