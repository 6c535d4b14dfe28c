"""Measure what GM Train Adapter costs beside the two networks that it runs, inside ComfyUI.

    python -m tests.benchmarks.train_adapter_cost       # 13 minutes on one thread

Every row runs an iteration of the node's own loop and a plain loop in turns, in a real ComfyUI
(found as by the tests), on one tiny random FLUX.1. The plain loop has the same calls of the same
network: the student's forward and backward pass with its LoRA, its head and its checkpoints, the
teacher's forward passes, AdamW and the average of the weights; but no guider, and no policy that is
followed. The ratio of the two is what the method and its way through ComfyUI cost. Writes
docs/results/train_adapter_cost.csv when all rows are measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.comfyui.bases import write_flux
from tests.comfyui.scripts import results_of

from .measure import quartiles, ratios
from .tables import RESULTS, write

CSV = RESULTS / "train_adapter_cost.csv"
INSIDE = Path(__file__).with_name("train_adapter_cost_inside.py")
NETWORK = {"hidden": 512, "depth": 2, "single": 4}
USUAL = {"side": 32, "batch": 1, "count": 8, "states": 2, "rank": 32, "checkpointing": True}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("usual", {}),
    ("K = 1", {"count": 1}),
    ("K = 32", {"count": 32}),
    ("1 state", {"states": 1}),
    ("4 states", {"states": 4}),
    ("64 x 64", {"side": 64}),
    ("without checkpoints", {"checkpointing": False}),
]


def main() -> None:
    """Measure every case in a fork of ComfyUI's process, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=CSV, help="the CSV file")
    arguments = parser.parse_args()
    rows = []
    for name, changes in CASES:
        about = {**USUAL, **changes}
        found = measured(about)
        low, ratio, high = ratios(found["ours"], found["plain"])
        seconds = quartiles(found["ours"])[1]
        memory = found["memory"]["ours"] / found["memory"]["plain"]
        rows.append({"case": name, **about, "seconds": seconds, "ratio": ratio})
        rows[-1] |= {"ratio_low": low, "ratio_high": high, "memory_ratio": memory}
        print(rows[-1], flush=True)
    write(rows, arguments.out)


def measured(about: dict[str, Any], **network: int) -> dict[str, Any]:
    """Return the seconds of both loops, repeat by repeat, and the bytes that each holds.

    Args:
        network: sizes that differ from NETWORK.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_flux(work / "flux.safetensors", dtype=torch.float32, **{**NETWORK, **network})
        (work / "job.json").write_text(json.dumps(about))
        return results_of(INSIDE, work)


if __name__ == "__main__":
    main()
