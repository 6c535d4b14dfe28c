"""Measure how near few-step adapters come to their teachers, on tiny random bases of every kind.

    python -m tests.benchmarks.train_adapter                      # half an hour on one core
    python -m tests.benchmarks.train_adapter --only flux sd3

GM Train Adapter's own code trains an adapter of 4 calls for each base in a real ComfyUI (found as
by the tests): two prompts, batch 4, rank 16, learning rate 1e-3. What is measured is the relative
distance to the latents of the teacher's 32 Euler calls, from noise that was not trained on: of 4
Euler calls of the teacher on the student's sigmas, and of the student's 4 calls. The figures go to
docs/results/train_adapter.csv. Random weights prove the way, not the quality.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import tempfile
from pathlib import Path

from tests.comfyui.scripts import of, results_of
from tests.comfyui.train_bases import TEACHERS, write_teacher

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "train_adapter.csv"
ITERATIONS = {"flux2": 30}  # which has 512 tokens of text, and is slow here
USUAL = 150
NAMES = {
    "flux": "FLUX.1",
    "qwen": "Qwen-Image",
    "flux2": "FLUX.2",
    "lumina": "Z-Image / Lumina 2",
    "krea2": "Krea 2",
    "sd3": "Stable Diffusion 3",
}
COLUMNS = ("base", "calls", "iterations", "euler", "student", "factor")


def main() -> None:
    """Train, and write the table; rows of bases that are not asked for stay."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    kinds = parser.parse_args().only
    rows = {}
    if RESULTS.is_file():
        with open(RESULTS, newline="") as file:
            rows = {row["base"]: row for row in csv.DictReader(file)}
    for kind in kinds:
        about = measured(kind)
        factor = about["euler"] / about["student"]
        rounded = {name: f"{about[name]:.4f}" for name in ("euler", "student")}
        rows[NAMES[kind]] = {
            "base": NAMES[kind],
            "calls": 4,
            "iterations": about["iterations"],
            **rounded,
            "factor": f"{factor:.2f}",
        }
        print(rows[NAMES[kind]], flush=True)
        with open(RESULTS, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[name] for name in NAMES.values() if name in rows)


def measured(kind: str) -> dict[str, float]:
    """Train for one kind of base in a fork of ComfyUI's process."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_teacher(work, kind)
        about = {kind: dataclasses.asdict(TEACHERS[kind])}
        (work / "teachers.json").write_text(json.dumps(about))
        (work / "job.json").write_text(json.dumps({kind: ITERATIONS.get(kind, USUAL)}))
        inside = Path(__file__).with_name("train_adapter_inside.py")
        return of(results_of(inside, work), kind)


if __name__ == "__main__":
    main()
