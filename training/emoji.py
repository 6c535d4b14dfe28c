"""Write Noto's emoji as folders of pictures: a real set of small colour pictures, 64 x 64.

    python -m training.emoji --out data/emoji
    python -m training.prepare --data data/emoji/train --out data/emoji_train --size 32 --pixels
    python -m training.prepare --data data/emoji/test --out data/emoji_test --size 32 --pixels

Nine classes (faces, people, animals, food, flags, ...), 3,781 pictures of 1,906 emoji in up to 26
skin tones each. OUT/train and OUT/test are folders of class folders. No emoji is in both, and none
that looks the same, or mirrored the same, such as a person who faces right.

The pictures are Google's Noto emoji, under the Apache License 2.0; its flags are in the public
domain or exempt from copyright. npm downloads the package emoji-datasource-google 16.0.0 (74 MB,
MIT), which lists and holds them; its checksum is checked.
"""

from __future__ import annotations

import tyro

from gmflow_core.files.locks import locked_file
from training.common.processes import command
from training.data.emoji import EmojiConfig, write_emoji


def main(arguments: list[str] | None = None) -> None:
    """Run the command, with `sys.argv` if no arguments are given."""
    with command():
        prog = "python -m training.emoji"
        config = tyro.cli(EmojiConfig, args=arguments, prog=prog, description=__doc__)
        with locked_file(config.out):
            counts = write_emoji(config)
        print(
            f"{counts['train']:,} pictures in {config.out / 'train'}, "
            f"{counts['test']:,} in {config.out / 'test'}"
        )


if __name__ == "__main__":
    main()
