"""Sample class-conditional models and say how good the samples are, at one setting or over a sweep:

    python -m training.evaluate --checkpoint A.safetensors --data data/imagenet_256 --preset paper        # one GPU, or the CPU
    torchrun --nproc-per-node 8 -m training.evaluate --checkpoint A.safetensors --data data/imagenet_256  # eight GPUs
    python -m training.evaluate --checkpoint Lakonik/gmflow_imagenet_k8_ema --reference VIRTUAL_imagenet256_labeled.npz
    python -m training.evaluate --checkpoint k8.safetensors k1.safetensors --data data/digits_train \\
        --test-data data/digits_test --features outputs/digits_features.safetensors --saturation digits --count 2000 \\
        --solver euler dpmpp-2m gm-ode gm-sde --steps 2 4 8 32 --guidance 0 .1 .2 --cfg 1.5 2 3 --device cpu

Every checkpoint is sampled with every solver, number of steps, and guidance: weights of probabilistic guidance and scales of
classifier-free guidance. Image i gets a label and its noise from its own seed, so that neither the batch size nor the number
of processes matters, and all settings see the same labels and noise.

OUT/results.json and .csv hold, for each setting: Fréchet distance, inception score, precision, recall, class accuracy, colour
saturation, network calls, and seconds; beside them the same figures of real images (--test-data), which no model can be
expected to beat. Plots and a sheet of samples of each setting lie there too. Stopped in any way and started again, it keeps
the settings that are finished and the samples that it has.

Features are Inception's, through torch-fidelity; or those of a small classifier (--features FILE.safetensors), which is
trained on --data first if the file does not exist.
"""

from __future__ import annotations

import argparse
import sys

import tyro

from training.common.processes import command
from training.evaluation.config import PRESETS, Config
from training.evaluation.evaluation import Evaluation


def parse(arguments: list[str]) -> Config:
    """The preset, then whatever the command line changes of it."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset", default="default")
    preset = PRESETS.get(finder.parse_known_args(arguments)[0].preset, Config())
    return tyro.cli(
        Config,
        default=preset,
        args=arguments,
        prog="python -m training.evaluate",
        description=__doc__,
    )


def main(arguments: list[str] | None = None) -> None:
    with command():
        Evaluation(parse(sys.argv[1:] if arguments is None else arguments)).run()


if __name__ == "__main__":
    main()
