"""Prepare a folder of images for training: cache VAE latents, or small pictures, in shards.

    python -m training.prepare --data imagenet/train --out data/imagenet_256   # a GPU, or the CPU
    python -m training.prepare --data imagenet/train --out data/imagenet_256 --vae FOLDER
    torchrun --nproc-per-node 8 -m training.prepare --data imagenet/train --out data/imagenet_256 \\
        --class-names imagenet1000_clsidx_to_labels.txt
    python -m training.prepare --data imagenet/train --out data/imagenet_rae \\
        --vae rae-dinov2-b --dtype float16                    # 0.5 TB; in float32 1.0 TB
    python -m training.prepare --data data/digits/train --out data/digits_train \\
        --size 8 --pixels --no-flip

DATA has one subfolder for each class; the classes are numbered in the sorted order of these names.
Images may lie deeper inside. Every image is centre-cropped to a square, scaled to --size, flipped
with probability 1/2, and encoded once in float32. Flips and posterior samples depend on the seed
and on the image alone, not on the batch size, the number of processes, or restarts.

If it is stopped in any way and started again with the same command, it keeps the whole shards and
goes on. Images that cannot be read are left out, and named at the end and in OUT/index.json.
Several machines need a shared OUT.
"""

from __future__ import annotations

import tyro

from training.common.processes import PATIENCE, command, owned
from training.data.preparation import PreparationConfig, check_places, prepare


def main(arguments: list[str] | None = None) -> None:
    """Run the command, with `sys.argv` if no arguments are given."""
    with command():
        prog = "python -m training.prepare"
        config = tyro.cli(PreparationConfig, args=arguments, prog=prog, description=__doc__)
        check_places(config)
        with owned(config.out, config.device, PATIENCE):
            prepare(config)


if __name__ == "__main__":
    main()
