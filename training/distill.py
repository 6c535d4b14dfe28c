"""Distil a model into a student of few network calls (pi-ID), from the repository's root:

    python -m training.distill --teacher gmflow_core/shipped/digits_k8.safetensors      # one call
    python -m training.distill --teacher outputs/digits/weights.safetensors --steps 2 --policy dx
    python -m training.distill --teacher TEACHER --guidance 0.2          # learn the guided flow
    python -m training.distill --teacher TEACHER --data data/digits_train   # start from real images
    python -m training.distill --teacher gmflow_core/shipped/digits_modes_k8.safetensors \\
        --source gmflow_core/shipped/digits_source.safetensors
    torchrun --nproc-per-node 8 -m training.distill --preset imagenet --shard

The teacher is any model that this repository trains or reads: GM-DiT, DiTDH or the network of
points, with mixtures or as ordinary flow matching. No data are needed: the student follows its own
policy from noise, and wherever it gets, the teacher is asked for its velocity.

If it is started again with the same --out, a run resumes from its last checkpoint.
OUT/model.safetensors loads in ComfyUI at any time, with its number of steps; OUT/samples holds
pictures of samples, and TensorBoard's logs the distance to the teacher's samples; with --features
and --reference, or --validate-every, the Fréchet distance to real ones too. At the end
OUT/weights.safetensors is the model to share: weights alone, in bfloat16.
"""

from __future__ import annotations

import sys

from training.common.processes import command, owned
from training.common.settings import parse_preset
from training.loop.distill_presets import PRESETS, DistillConfig
from training.loop.distill_trainer import DistillTrainer
from training.loop.trainer import train


def parse(arguments: list[str]) -> DistillConfig:
    """Parse the command line over the preset that it names."""
    return parse_preset(PRESETS, DistillTrainer.module, __doc__, arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the command, with `sys.argv` if no arguments are given."""
    with command():
        config = parse(sys.argv[1:] if arguments is None else arguments)
        with owned(config.out, config.device):
            train(DistillTrainer, config).export()


if __name__ == "__main__":
    main()
