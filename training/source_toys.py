"""What a Gaussian-mixture source does for flow matching in 2-D: the source, the coupling, and both mixtures at once.

    python -m training.source_toys                    # 22 small networks on one CPU thread, some 30 minutes
    python -m training.source_toys --preset quick     # seconds; the figures mean nothing
    python -m training.source_toys --seeds 4 --out outputs/source_toys

Two experiments, on data of unit variance and with everything but the named thing alike:

- source: the checkerboard and 8 Gaussians, from N(0, I) and from mixtures of M modes fitted to the data, whose noise is of an
  independent mode or of the point's own (drawn from its posterior). The network predicts the mean velocity and is not told the
  mode; Euler.
- corners, on the checkerboard: {N(0, I), mixture source} x {mean, mixture output}. With the mixture source the network is told
  the mode, so that everything happens in the mode's frame (`ModeFrame`).

The distance is `sliced_wasserstein` to fresh data. "0 calls" is the source itself: a flow that does not beat it has learnt
nothing. A mixture is the likeliest of several starts of EM. Networks and sources are kept in OUT, so that the command, started
again, goes on where it was stopped.
OUT/source_toys.csv, .json and .md hold the figures, OUT/source_toys.png and OUT/source_toys_corners.png the samples.
"""

from __future__ import annotations

import sys

import torch

from training.common.devices import keep_freed_memory
from training.common.settings import parse_preset
from training.experiments.source_toys import MODULE, PRESETS, write


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        write(
            parse_preset(PRESETS, MODULE, __doc__, sys.argv[1:] if arguments is None else arguments)
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print("\nstopped; the networks that are done are kept, run the same command again to go on")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
