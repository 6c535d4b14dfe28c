"""Draw coloured digits: a small data set without a download, whose colours are known exactly.

    python -m training.digits --out data/digits       # 8x8; 11,504 pictures to train, 2,872 to test
    python -m training.digits --out data/digits16 --size 16 --copies 16

scikit-learn's handwritten digits (1,797 of them, 8x8, 17 grey levels) are each drawn several times
on black in a random colour: hue uniform, value 1, saturation from a Beta(2, 2) stretched to
0.1 .. 0.9. OUT/train and OUT/test are folders of class folders, and no source digit is in both.
`training.evaluation.saturation` measures the saturation that a picture was drawn with, and the
distance of a set of pictures from the known distribution.
"""

from __future__ import annotations

import tyro

from gmflow_core.files.locks import locked_file
from training.common.processes import command
from training.data.digits import DigitsConfig, write_digits


def main(arguments: list[str] | None = None) -> None:
    """Run the command, with `sys.argv` if no arguments are given."""
    with command():
        prog = "python -m training.digits"
        config = tyro.cli(DigitsConfig, args=arguments, prog=prog, description=__doc__)
        with locked_file(config.out):
            counts = write_digits(config)
        print(
            f"{counts['train']} pictures in {config.out / 'train'}, "
            f"{counts['test']} in {config.out / 'test'}"
        )


if __name__ == "__main__":
    main()
