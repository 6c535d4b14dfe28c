"""Sample class-conditional models and measure the samples, at one setting or over a sweep:

    python -m training.evaluate --checkpoint A.safetensors --data data/imagenet_256 --preset paper
    torchrun --nproc-per-node 8 -m training.evaluate --checkpoint A.safetensors --data ...
    python -m training.evaluate --checkpoint Lakonik/gmflow_imagenet_k8_ema \\
        --reference VIRTUAL_imagenet256_labeled.npz
    python -m training.evaluate --checkpoint k8.safetensors k1.safetensors --count 2000 \\
        --data data/digits_train --test-data data/digits_test --saturation digits \\
        --features outputs/digits_features.safetensors --solver euler dpmpp-2m uni-pc gm-ode \\
        --steps 2 4 8 32 --guidance 0 .1 .2 --cfg 1.5 2 3 --device cpu
    python -m training.evaluate --samples samples.npz folder_of_png --reference REFERENCE.npz

Every checkpoint is sampled with every solver, number of steps and guidance: weights of
probabilistic guidance and scales of classifier-free guidance. Image i draws its label and noise
from its own seed, so the results do not depend on the batch size or the number of processes, and
all settings share labels and noise.

With --samples, .npz files in ADM's form and folders of images are scored without a model; --export
writes the samples of models so.

OUT/results.json and .csv hold, for each setting: Fréchet distance and spatial Fréchet distance,
inception score, precision, recall, class accuracy, colour saturation, network calls and seconds;
and the same figures of real images (--test-data), which no model can be expected to beat. Plots
and a sheet of samples of each setting are there too. After a stop, the same command goes on: it
keeps the finished settings and the samples.

Features are Inception's, through torch-fidelity, or those of a small classifier (--features
FILE.safetensors), which is trained on --data first if the file does not exist.
"""

from __future__ import annotations

import sys

from training.common.processes import PATIENCE, command, owned
from training.common.settings import parse_preset
from training.evaluation.config import PRESETS, Config
from training.evaluation.evaluation import Evaluation


def parse(arguments: list[str]) -> Config:
    """Parse the command line; options replace values of the preset."""
    return parse_preset(PRESETS, "training.evaluate", __doc__, arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the evaluation; errors that the user can act on end in one line."""
    with command():
        config = parse(sys.argv[1:] if arguments is None else arguments)
        with owned(config.out, config.device, PATIENCE):
            Evaluation(config).run()


if __name__ == "__main__":
    main()
