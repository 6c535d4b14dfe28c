"""Measure an adapter of 4 calls on a teacher that has learned something: the coloured digits.

    python -m tests.benchmarks.train_adapter_digits --work outputs/train_adapter_digits

A small network of FLUX.1's layout is trained on the digits (flow matching, a class for each of ten
random texts) inside a real ComfyUI, once for a work folder. GM Train Adapter's own code then trains
two adapters of it, one with the published targets and one with the attention too, and goes on from
the first at a fifth of its learning rate, under another name. Adapters of a work folder go on if
there are more iterations. Fréchet distances of 1,000 samples, as in any_flow.py, go to
docs/results/train_adapter_digits.csv: of the teacher's 32 Euler calls, of 4 calls of it by stock
samplers on three sets of sigmas, and of the adapters' 4 calls, all from the same noise. With
--teacher-alone there are no adapters, and docs/results/train_adapter_digits_teacher.csv is written.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gmflow_core.gaussians.draws import standard_normal
from tests.comfyui.bases import write_flux
from tests.comfyui.installation import COMFYUI, comfyui_python
from tests.comfyui.train_bases import TEACHERS

from .picture_sets import Digits
from .tables import RESULTS, write

CSV = RESULTS / "train_adapter_digits.csv"
TEACHER_CSV = RESULTS / "train_adapter_digits_teacher.csv"
COLUMNS = ("model", "sampler", "sigmas", "calls")
SIZE = {"hidden": 128, "depth": 1, "single": 3}  # of the teacher


def main() -> None:
    """Train and measure; the teacher of an earlier start is kept."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("outputs/train_adapter_digits"))
    parser.add_argument("--teacher-iterations", type=int, default=3000)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--slower-iterations", type=int, default=600)
    about = "sample the teacher by stock samplers, and train no adapter"
    parser.add_argument("--teacher-alone", action="store_true", help=about)
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    data = Digits(work)
    write_inputs(work, data)
    job = {
        "teacher_iterations": arguments.teacher_iterations,
        "adapter_iterations": arguments.iterations,
        "slower_iterations": arguments.slower_iterations,
    }
    if arguments.teacher_alone:
        job = {"teacher_iterations": arguments.teacher_iterations}
    (work / "job.json").write_text(json.dumps(job))
    (work / "teachers.json").write_text(json.dumps({"flux": dataclasses.asdict(TEACHERS["flux"])}))
    inside = Path(__file__).with_name("train_adapter_digits_inside.py")
    subprocess.run(
        [comfyui_python(), str(inside), str(COMFYUI), str(work)],
        env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        check=True,
    )
    rows = [{"model": "held-out images", **data.floor()}]
    for name, samples in sorted(load_file(work / "samples.safetensors").items()):
        about = dict(zip(COLUMNS, name.split("|"), strict=True))
        rows.append({**about, **job, **data.score(samples)})
    path = TEACHER_CSV if arguments.teacher_alone else CSV
    write(rows, path)
    print(path.read_text())


def write_inputs(work: Path, data: Digits) -> None:
    """Write what the script inside ComfyUI reads: the base, images, noise and labels."""
    if not (work / "flux_random.safetensors").is_file():
        write_flux(work / "flux_random.safetensors", dtype=torch.float32, **SIZE)
    images, labels = data.train
    generators = [torch.Generator().manual_seed(seed) for seed in data.seeds]
    noise = standard_normal((data.count, *TEACHERS["flux"].latent), generators, like=torch.zeros(1))
    tensors = {"images": images, "labels": labels, "noise": noise, "wanted": data.labels}
    save_file(tensors, work / "inputs.safetensors")


if __name__ == "__main__":
    main()
