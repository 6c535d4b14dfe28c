"""Compare noise from N(0, I) and from Gaussian-mixture sources for flow matching in 2-D:

    python -m training.source_toys                 # 22 small networks, one CPU thread, 30 minutes
    python -m training.source_toys --preset quick  # seconds; the figures mean nothing
    python -m training.source_toys --seeds 4 --out outputs/source_toys

There are two experiments, on data of unit variance; only the named thing differs between runs:

- source: the checkerboard and 8 Gaussians, from N(0, I) and from mixtures of M modes fitted to the
  data. The noise is of a mode independent of the point, or of the point's own mode (drawn from its
  posterior). The network predicts the mean velocity and does not see the mode; the solver is Euler.
- corners, on the checkerboard: {N(0, I), mixture source} x {mean, mixture output}. With the mixture
  source the network sees the mode, and everything happens in the mode's frame (`ModeFrame`).

The distance is `sliced_wasserstein` to new data. "0 calls" is the source itself: a flow that does
not beat it has learnt nothing. Each mixture is the likeliest of several starts of EM. Networks and
sources are kept in OUT: after a stop, the same command goes on.
OUT/source_toys.csv, .json and .md hold the figures, OUT/source_toys.png and
OUT/source_toys_corners.png the samples.
"""

from __future__ import annotations

import sys

import torch

from gmflow_core.files.locks import locked
from training.common.devices import keep_freed_memory
from training.common.processes import command
from training.common.settings import parse_preset
from training.experiments.source_toys import MODULE, PRESETS
from training.experiments.source_toys_report import write


def main(arguments: list[str] | None = None) -> None:
    """Run the experiments; errors that the user can act on end in one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    torch.set_num_threads(1)
    keep_freed_memory()
    with command():
        config = parse_preset(PRESETS, MODULE, __doc__, arguments)
        with locked(config.out):
            write(config)


if __name__ == "__main__":
    main()
