"""Compare the log-likelihood of a checkerboard model with the exact density, or of image models:

    python -m training.likelihood                  # the shipped model, one CPU thread, 4 minutes
    python -m training.likelihood --preset quick   # seconds; the figures mean little
    python -m training.likelihood --checkpoint outputs/checkerboard/weights.safetensors
    python -m training.likelihood --data data/digits_train --checkpoint K1.safetensors ...

`log_likelihood` scores points of the data, whose density is 1 / 32, with the exact posterior mean
and with the model's, at several numbers of integration steps. At the largest it also scores them
with a divergence that one random direction estimates, and points of the empty squares with the
model. OUT/likelihood.csv holds the figures in nats.

With --data the models are image models, and OUT/time_averaged.csv holds their time-averaged
negative log-likelihood, in bits per dimension: the mean of -log2 q(x_0 | x_t) / D over 50,000
images, each at a random time (GMFlow's equation 21), with its standard error, with and without the
model's spectrum. All models get the same images, times and noises, so that the difference to the
first one has a smaller error than either. Where images are used again, the error is one over
images, not over draws.

The tables are written after every line. With --data the same command goes on after a stop: what was
measured is kept in OUT/draws. Without, it begins anew.
"""

from __future__ import annotations

import sys

import torch

from gmflow_core.files.locks import locked
from training.common.devices import keep_freed_memory
from training.common.processes import command
from training.common.settings import parse_preset
from training.experiments.image_likelihood import write_images
from training.experiments.likelihood import MODULE, PRESETS, write


def main(arguments: list[str] | None = None) -> None:
    """Score the points; errors that the user can act on end in one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    keep_freed_memory()
    with command():
        config = parse_preset(PRESETS, MODULE, __doc__, arguments)
        config.check_effects()
        if config.data is None:  # small networks
            torch.set_num_threads(1)
        with locked(config.out):
            (write if config.data is None else write_images)(config)


if __name__ == "__main__":
    main()
