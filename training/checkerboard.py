"""Train a Gaussian-mixture flow model on the 2-D checkerboard, from the repository's root:

    python -m training.checkerboard                          # GMFlow's: transition loss, AdamW, EMA
    python -m training.checkerboard --preset minimal         # Adam, plain velocity NLL, no EMA
    python -m training.checkerboard --preset flow-matching   # baseline: K = 1, unit variance
    python -m training.checkerboard --out outputs/k16 -k 16 --batch-size 1024 --iterations 20000
    python -m training.checkerboard --evaluate outputs/checkerboard/model.safetensors
    torchrun --nproc-per-node 2 -m training.checkerboard     # DDP on two GPUs; or --device cpu

If it is started again with the same --out, a run resumes from its last checkpoint, to the very
losses of a run that was never stopped. OUT/model.safetensors is the checkpoint to resume from, and
loads in ComfyUI at any time. At the end OUT/report.png and OUT/report.json show how good the
samples are, and OUT/weights.safetensors is the model to share: weights alone, in float16, with
these figures in its metadata.
"""

from __future__ import annotations

import sys

from training.common.processes import command, owned
from training.common.settings import parse_preset
from training.evaluation.checkerboard_report import write_report
from training.loop.checkerboard_presets import PRESETS, CheckerboardConfig
from training.loop.checkerboard_trainer import CheckerboardTrainer
from training.loop.trainer import train


def parse(arguments: list[str]) -> CheckerboardConfig:
    """Parse the command line over the preset that it names."""
    return parse_preset(PRESETS, CheckerboardTrainer.module, __doc__, arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the command, with `sys.argv` if no arguments are given."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with command():
        config = parse(arguments)
        chosen = config.evaluate is None or any(a.split("=")[0] == "--out" for a in arguments)
        out = config.out if chosen else config.evaluate.parent
        with owned(out, config.device):
            if config.evaluate is None:
                train(CheckerboardTrainer, config).export()
            else:
                write_report(config.evaluate, out, config.eval_samples, device=config.device)


if __name__ == "__main__":
    main()
