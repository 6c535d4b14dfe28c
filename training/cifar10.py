"""Write CIFAR-10's pictures as folders, from the data set's own files.

    python -m training.cifar10 --data cifar-10-python.tar.gz --out data/cifar10
    python -m training.prepare --data data/cifar10/train --out data/cifar10_train --size 32 --pixels
    python -m training.prepare --data data/cifar10/test --out data/cifar10_test --size 32 --pixels
    python -m training.imagenet --preset cifar10 --data data/cifar10_train

OUT/train and OUT/test are folders of class folders: 50,000 and 10,000 pictures of 32 x 32.
cifar-10-binary.tar.gz, and the folder in either archive, give the same ones. Python's pickles are
never unpickled: a reader of our own takes the arrays out of them.
"""

from __future__ import annotations

import tyro

from gmflow_core.files.locks import locked_file
from training.common.processes import command
from training.data.cifar10 import Cifar10Config, write_cifar10


def main(arguments: list[str] | None = None) -> None:
    """Run the command, with `sys.argv` if no arguments are given."""
    with command():
        prog = "python -m training.cifar10"
        config = tyro.cli(Cifar10Config, args=arguments, prog=prog, description=__doc__)
        with locked_file(config.out):
            counts = write_cifar10(config)
        print(
            f"{counts['train']:,} pictures in {config.out / 'train'}, "
            f"{counts['test']:,} in {config.out / 'test'}"
        )


if __name__ == "__main__":
    main()
