"""Write statistics of the features of any set of images, for --reference of training.evaluate:

    python -m training.reference --data data/imagenet_256 --out imagenet_256.npz
    python -m training.reference --data photos --size 256 --out photos.npz
    torchrun --nproc-per-node 8 -m training.reference --data images.npz --out images_statistics.npz
    python -m training.reference --data data/digits_train --out digits.npz \\
        --features outputs/digits_features.safetensors

--data is a folder written by training.prepare, a folder of images, or an .npz file of images. The
file has `mu` and `sigma`, which other tools read too, `mu_s` and `sigma_s` of the spatial features
(sFID), and the features of some images, for precision and recall.

After a stop, the same command goes on: it keeps what it measured in a folder beside the file.
"""

from __future__ import annotations

import sys

from training.common.processes import PATIENCE, command, owned
from training.common.settings import parse_preset
from training.evaluation.reference_statistics import PRESETS, Config, write_statistics


def parse(arguments: list[str]) -> Config:
    """Parse the command line."""
    return parse_preset(PRESETS, "training.reference", __doc__, arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure the images; errors that the user can act on end in one line."""
    with command():
        config = parse(sys.argv[1:] if arguments is None else arguments)
        with owned(config.out, config.device, PATIENCE, file=True) as state:
            write_statistics(config, state)


if __name__ == "__main__":
    main()
