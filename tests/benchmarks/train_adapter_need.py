"""Compute what GM Train Adapter needs on a card, from the layers' shapes; nothing is measured.

    python -m tests.benchmarks.train_adapter_need     # writes docs/results/train_adapter_need.csv

Counted are the base's weights; the LoRA and the head, in 32 bit, with their gradients and the
optimizer's state; the inputs of all blocks, which gradient checkpointing keeps, for one picture;
what the largest block computes, once more in the backward pass; and the largest block's weights in
16 bit, where they are quantised. Not counted: the mixture's own arithmetic and fragmentation, for
which OTHER is a guess, as is what CUDA and a display take.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from math import prod
from pathlib import Path

from tests.comfyui.adapters import adapter_shapes
from tests.comfyui.bases import Shapes, flux_shapes, qwen_image_shapes

from .tables import RESULTS, write

CSV = RESULTS / "train_adapter_need.csv"
OTHER, CONTEXT = 1e9, 0.6e9  # bytes
TEXT_TOKENS = 512
BYTES = {"bf16": 2.0, "fp8 or int8": 1.0, "Q4_K": 144 / 256}  # of a weight
STATE = {"adamw": 8, "adamw8bit": 2}  # bytes of the optimizer's state for a number
RUNS = {  # rank, pixels a side, optimizer
    "rank 16, 512 x 512": (16, 512, "adamw"),
    "rank 32, 512 x 512": (32, 512, "adamw"),
    "rank 32, 1024 x 1024": (32, 1024, "adamw"),
    "rank 256, 512 x 512, 8-bit AdamW": (256, 512, "adamw8bit"),
}
CARDS = (12, 16, 24)  # GiB
BASES = {
    "FLUX.1": (flux_shapes(3072, 19, 38), "flux", 19, 38),
    "Qwen-Image": (qwen_image_shapes(3072, 60), "qwen", 60, 0),
}
GB, GIB = 1e9, 2**30


def need(base: str, weights: str, run: str) -> dict[str, str]:
    """Return a row of the table: what one run needs, in GB, and how much of it a card holds."""
    shapes, kind, depth, single = BASES[base]
    rank, side, optimizer = RUNS[run]
    tokens = (side // 16) ** 2 + TEXT_TOKENS
    trained = sum(map(prod, adapter_shapes(kind, 3072, depth, single, rank).values()))
    blocks = sizes_of_blocks(shapes)
    kept = 2 * tokens * 3072 * len(blocks)
    inside = 2 * tokens * max(blocks.values())
    base_bytes = BYTES[weights] * sum(map(prod, shapes.values()))
    # the backward pass through a block keeps the 16-bit forms of its weights
    expanded = 0 if weights == "bf16" else 2 * max(weights_of_blocks(shapes).values())
    training = trained * (4 + 4 + STATE[optimizer])
    total = base_bytes + expanded + training + kept + inside + OTHER + CONTEXT
    row = {"base": base, "weights": weights, "run": run, "base_gb": f"{base_bytes / GB:.1f}"}
    row |= {"trained_millions": f"{trained / 1e6:.0f}", "training_gb": f"{training / GB:.2f}"}
    row |= {"activations_gb": f"{(kept + inside) / GB:.2f}", "need_gb": f"{total / GB:.1f}"}
    for card in CARDS:
        short = total - card * GIB
        fits = "fits" if short <= 0 else f"{short / GB:.1f} GB too much"
        row[f"{card}_gb_card"] = fits
    return {**row, "ema_in_host_gb": f"{4 * trained / GB:.2f}", "how": "computed"}


def weights_of_blocks(shapes: Shapes) -> dict[str, int]:
    """Return the number of weights of each block."""
    blocks: dict[str, int] = defaultdict(int)
    for name, shape in shapes.items():
        if block := re.match(r"(\w*blocks\.\d+)\.", name):
            blocks[block[1]] += prod(shape)
    return blocks


def sizes_of_blocks(shapes: Shapes) -> dict[str, int]:
    """Return, for each block, the inputs and outputs of its linear layers for a token, summed."""
    blocks: dict[str, int] = defaultdict(int)
    for name, shape in shapes.items():
        block = re.match(r"(\w*blocks\.\d+)\.", name)
        if block and len(shape) == 2 and "_mod" not in name and "modulation" not in name:
            blocks[block[1]] += sum(shape)
    return blocks


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=CSV, help="the CSV file")
    arguments = parser.parse_args()
    rows = [need(base, weights, run) for base in BASES for weights in BYTES for run in RUNS]
    write(rows, arguments.out)


if __name__ == "__main__":
    main()
