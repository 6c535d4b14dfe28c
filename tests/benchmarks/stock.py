"""Sample checkpoints inside ComfyUI, with its stock samplers, and find the best of these.

ComfyUI is found as by the tests. `any_flow_inside.py` runs in its process.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from tests.comfyui.installation import COMFYUI, comfyui_python, is_installed

from . import any_flow_inside
from .any_flow_inside import MARK
from .tables import Row

STOCK_SCHEDULERS = ("simple", "normal", "beta", "sgm_uniform")
LEFT_OUT = (
    "gm_",  # ours
    "_gpu",  # the same as without, but for where they draw noise
    "_cfg_pp",  # the same as without where there is no guidance
    "ddim",  # ComfyUI's is Euler
    "dpm_adaptive",  # chooses the number of calls itself
    "ar_video",  # needs a model of videos
)
BEST = 6  # stock settings that are measured on all samples, by number of calls


def sampled(
    work: Path, checkpoint: Path, inputs: Path, settings: list[Row]
) -> list[tuple[Tensor, Row]]:
    """Sample settings inside ComfyUI; return the samples of each, and its steps and calls.

    Args:
        work: folder for temporary files.
        checkpoint: of the model, any that GM Model Loader takes.
        inputs: safetensors file with `noise` and, for a model of classes, `labels`.
        settings: as `any_flow_inside.run` takes them; with `mixture`, the model's own is known.
    """
    if not is_installed():
        raise SystemExit(f"no ComfyUI in {COMFYUI}; set COMFYUI_PATH")
    with tempfile.TemporaryDirectory(dir=work) as out:
        job = Path(out) / "job.json"
        places = {"model": checkpoint, "inputs": inputs, "out": Path(out)}
        about = {name: str(place.resolve()) for name, place in places.items()}
        job.write_text(json.dumps({**about, "settings": settings}))
        inside = str(Path(any_flow_inside.__file__).resolve())
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        done = subprocess.run(
            [comfyui_python(), inside, str(job.resolve())],
            cwd=COMFYUI,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        answers = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        if not answers:
            raise SystemExit("ComfyUI gave no answer; its messages are above")
        facts = json.loads(answers[-1].removeprefix(MARK))
        files = [Path(out) / f"{number}.safetensors" for number in range(len(settings))]
        return [(load_file(f)["samples"], fact) for f, fact in zip(files, facts, strict=True)]


def stock_names() -> list[str]:
    """Return the names of ComfyUI's samplers that are compared."""
    code = (
        "import sys; sys.argv = ['', '--cpu']; import comfy.options;"
        "comfy.options.enable_args_parsing(); import comfy.samplers;"
        "print(*comfy.samplers.KSampler.SAMPLERS)"
    )
    done = subprocess.run(
        [comfyui_python(), "-c", code], cwd=COMFYUI, capture_output=True, text=True, check=True
    )
    names = done.stdout.splitlines()[-1].split()
    return [name for name in names if not any(part in name for part in LEFT_OUT)]


def screened(
    compare: Callable[[list[Row]], list[Row]],
    count: int,
    figure: str,
    *,
    calls: Sequence[int] = (2, 3, 4),
) -> list[Row]:
    """Return the best settings of stock samplers for each number of calls, by a few samples.

    Args:
        compare: samples settings and returns them with their figures, without those that fail.
        count: samples of each setting.
        figure: the smaller, the better.
    """
    best = []
    samplers = stock_names()
    for number in calls:
        settings = [
            {"sampler": sampler, "scheduler": scheduler, "calls": number, "count": count}
            for sampler in samplers
            for scheduler in STOCK_SCHEDULERS
        ]
        fitting = [row for row in compare(settings) if row["calls"] <= number]
        found = sorted(fitting, key=lambda row: row[figure])
        best += [
            {key: row[key] for key in ("sampler", "scheduler")} | {"calls": number}
            for row in found[:BEST]
        ]
    return best
