"""Put hostile names, links, pipes and folders into a folder of files."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

NAMES = (
    b"\xff\xfe",
    b"a\nb",
    b"x" * 240,
    b"\xe2\x80\xae",
    b"a\x1b[31m",
    b".hidden",
    b"-o",
    "é".encode(),
    b"' OR 1=1",
    b"CON",
)


def change_tree(folder: Path, rng: Random) -> str:
    """Add a file, a folder, a pipe or links under a name that files of this folder could have."""
    sound = sorted(path for path in folder.iterdir() if path.is_file())
    ending = sound[0].suffix if sound else ".png"
    if sound and rng.random() < 0.4:
        return _named(folder, sound[0], rng)
    name = rng.choice(list(TREES))
    TREES[name](folder, ending)
    return f"{folder.name}: {name}"


def _named(folder: Path, source: Path, rng: Random) -> str:
    """Copy a file to an unusual name, or into a folder of such a name beside this one."""
    name = rng.choice(NAMES)
    place = os.fsencode(folder) + b"/" + name + os.fsencode(source.suffix)
    if rng.random() < 0.3:
        place = os.fsencode(folder.parent) + b"/" + name
        os.mkdir(place)
        place += b"/0" + os.fsencode(source.suffix)
    with open(place, "wb") as file:
        file.write(source.read_bytes())
    return f"{folder.name}: a file or folder called {name!r}"


def _two_links(folder: Path, ending: str) -> None:
    (folder / "one").mkdir()
    (folder / "two").mkdir()
    for place in ("one", "two"):
        for target in ("one", "two", ""):
            (folder / place / f"to{target}").symlink_to(folder / target)


def _many(folder: Path, ending: str) -> None:
    for i in range(3000):
        (folder / f"{i:05d}{ending}").write_bytes(b"")


def _deep(folder: Path, ending: str) -> None:
    place = os.open(folder, os.O_RDONLY)
    for _ in range(900):
        os.mkdir("d", dir_fd=place)
        inner = os.open("d", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    os.close(place)


def _folders(folder: Path, ending: str) -> None:
    for i in range(300):
        (folder.parent / f"folder{i}").mkdir()


TREES = {
    "a link to itself": lambda folder, ending: (folder / "loop").symlink_to("."),
    "a link up": lambda folder, ending: (folder / "up").symlink_to(".."),
    "two links into each other": _two_links,
    "a dangling link": lambda folder, ending: (folder / f"new{ending}").symlink_to("nowhere"),
    "a file that links to itself": lambda folder, ending: (folder / f"new{ending}").symlink_to(
        f"new{ending}"
    ),
    "a pipe as a file": lambda folder, ending: os.mkfifo(folder / f"new{ending}"),
    "a pipe as a folder": lambda folder, ending: os.mkfifo(folder.parent / "pipe"),
    "an endless file": lambda folder, ending: (folder / f"new{ending}").symlink_to("/dev/zero"),
    "a folder as a file": lambda folder, ending: (folder / f"new{ending}").mkdir(),
    "an empty folder": lambda folder, ending: (folder.parent / "empty").mkdir(),
    "300 empty folders": _folders,
    "3000 empty files": _many,
    "900 levels": _deep,
    "a closed folder": lambda folder, ending: (folder / "closed").mkdir(mode=0),
    "text in the place of a file": lambda folder, ending: (folder / f"new{ending}").write_text(
        "<svg onload=1>"
    ),
    "links to the system": lambda folder, ending: (folder / "root").symlink_to("/proc/self"),
}
