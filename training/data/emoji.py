"""Write Noto's emoji as folders of pictures: a real set of small colour pictures."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gmflow_core.files.atomic import atomic_folder
from gmflow_core.files.errors import FileError, check_regular_file, quoted, reading
from training.common.settings import require, require_ranges

from .pictures import centre_crop, read_rgb

PACKAGE, VERSION = "emoji-datasource-google", "16.0.0"
SHA512 = (  # of the package
    "6517b17f3b3b315a0b9e6cd998db0ee132a19c0269e43fbe566e8fa54a47fe31"
    "104257a6a7797cf028d9f83a19d9f68cf51e10c5990e3c90a84fc0e53e17d0dc"
)
LIST, PICTURES = "package/emoji.json", "package/img/google/64/"
MOST_BYTES = 1 << 20  # of one picture; the largest has some 10 KB
MOST_LISTED = 1 << 26  # of the list of emoji
LEFT_OUT = "component"  # swatches of skin tones, which are parts and no emoji
LOOKED_AT = 32  # pixels a side of the pictures that are compared
ALIKE = 0.03  # of [0, 1], root mean square; most are exact: persons facing left and right, flags


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmojiConfig:
    """Writing of Noto's emoji."""

    out: Path = Path("data/emoji")
    """Folder for train and test; it must not exist yet."""
    package: Path | None = None
    """The package's .tgz, if npm is not here or cannot download it."""
    test_share: float = 0.1
    """Share of the emoji of each class that are kept for testing, with all that looks like them."""
    seed: int = 0
    """Seed of the split."""

    def __post_init__(self):
        require(0 < self.test_share < 1, "test_share", self.test_share, "between 0 and 1")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        require_ranges(self)


@dataclasses.dataclass(frozen=True)
class Emoji:
    """An emoji: its class, and the file names of its pictures, one for each skin tone."""

    category: str
    pictures: tuple[str, ...]


def write_emoji(config: EmojiConfig) -> dict[str, int]:
    """Write the pictures into config.out/train and config.out/test, a folder for each class.

    Returns:
        The number of pictures in train and in test.

    Raises:
        ValueError: config.out exists.
        FileError: the package is another one, or damaged.
        FileNotFoundError: npm is needed and is not here.
        OSError: npm could not download the package.
    """
    if config.out.exists():
        raise ValueError(f"{config.out} exists already; delete it, or give another --out")
    with tempfile.TemporaryDirectory(prefix="gmflow-emoji-") as folder:
        package = config.package or download(Path(folder))
        check_package(package)
        emoji = list_emoji(package)
        found = dict(pictures(package))
        listed = [name for each in emoji for name in each.pictures]
        if missing := sum(name not in found for name in listed):
            has = f"has {len(listed) - missing:,} of the {len(listed):,} pictures that it lists"
            raise FileError(package, has, "download it again")
        test = split(emoji, alike(emoji, found), config.test_share, config.seed)
        places = {
            name: Path("test" if held_out else "train") / each.category / name
            for each, held_out in zip(emoji, test, strict=True)
            for name in each.pictures
        }
        with atomic_folder(config.out) as unfinished:
            for name, place in places.items():
                path = unfinished / place
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(found[name])
    of_train = sum(place.parts[0] == "train" for place in places.values())
    return {"train": of_train, "test": len(places) - of_train}


def download(folder: Path) -> Path:
    """Download the package with npm into a folder; return its file.

    Raises:
        FileNotFoundError: npm is not here.
        OSError: npm could not download it.
    """
    npm = shutil.which("npm")
    where = f"download {PACKAGE} {VERSION} elsewhere and give the file as --package"
    if npm is None:
        raise FileNotFoundError(
            f"npm is not here, which downloads the pictures; install it, or {where}"
        )
    command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent"]
    done = subprocess.run(  # noqa: S603 npm, with a fixed name
        command, cwd=folder, capture_output=True, text=True, check=False
    )
    files = list(folder.glob("*.tgz"))
    if done.returncode or len(files) != 1:
        said = " ".join((done.stderr or done.stdout).split())
        raise OSError(f"npm could not download {PACKAGE} ({quoted(said, 300)}); {where}")
    return files[0]


def check_package(path: Path) -> None:
    """Check that a file is the version of the package that the results were measured with.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: it is not.
    """
    try:
        check_regular_file(path)
    except FileNotFoundError as error:
        text = f"{error}; give --package the .tgz of {PACKAGE} {VERSION}, or leave it out for npm"
        raise FileNotFoundError(text) from None
    digest = hashlib.sha512()
    with reading(path, "give another copy", "cannot be read"), path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != SHA512:
        raise FileError(
            path,
            f"is not {PACKAGE} {VERSION}",
            "give its .tgz as it is; the SHA-512 of this file differs",
        )


def contents(path: Path, start: str, most: int) -> Iterator[tuple[str, bytes]]:
    """Return name and content of a package's files whose names start so, of at most `most` bytes.

    Raises:
        FileError: it is no tar file, or cut off.
    """
    try:
        with tarfile.open(path, "r:gz") as package:
            for member in package:
                if member.isfile() and member.name.startswith(start) and member.size <= most:
                    yield member.name, package.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise FileError(path, "is damaged", "download it again") from error


def list_emoji(path: Path) -> list[Emoji]:
    """Return the emoji that a package lists and has pictures of, in its own order.

    Raises:
        FileError: there is no list, or it is not as expected.
    """
    for _, content in contents(path, LIST, MOST_LISTED):
        try:
            found = [_emoji(entry) for entry in json.loads(content)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(
                path, f"has another kind of {LIST}", f"give {PACKAGE} {VERSION}"
            ) from error
        return [each for each in found if each.pictures and each.category != LEFT_OUT]
    raise FileError(path, f"has no {LIST}", f"give the .tgz of {PACKAGE} {VERSION}")


def _emoji(entry: dict[str, Any]) -> Emoji:
    """Return the emoji of an entry of the list."""
    category = re.sub(r"[^a-z]+", "_", entry["category"].replace("&", "and").lower())
    looks = [entry, *entry.get("skin_variations", {}).values()]
    return Emoji(category, tuple(look["image"] for look in looks if look["has_img_google"]))


def pictures(path: Path) -> Iterator[tuple[str, bytes]]:
    """Return file name and content of every picture of a package."""
    for name, content in contents(path, PICTURES, MOST_BYTES):
        yield name.removeprefix(PICTURES), content


def alike(emoji: list[Emoji], found: dict[str, bytes]) -> np.ndarray:
    """Return which emoji of a class look alike, in any skin tone or mirrored.

    Two pictures are alike if they differ by less than `ALIKE` at `LOOKED_AT` pixels a side, on
    white. What looks like the same third emoji is alike, too.

    Args:
        emoji: n emoji.
        found: The content of their pictures, by file name.

    Returns:
        (n,) int, the same number for emoji that look alike.
    """
    own = np.array([i for i, each in enumerate(emoji) for _ in each.pictures])
    pixels = np.stack([_pixels(found[name]) for each in emoji for name in each.pictures])
    categories = np.array([emoji[i].category for i in own])
    labels = np.arange(len(emoji))
    for category in np.unique(categories):
        chosen = categories == category
        first, second = np.nonzero(_near(pixels[chosen]))
        first, second = own[chosen][first], own[chosen][second]
        before = None
        while not np.array_equal(before, labels):
            before = labels.copy()
            np.minimum.at(labels, first, before[second])
    return labels


def _pixels(content: bytes) -> np.ndarray:
    """Return a picture as it is compared, (h, w, 3) in [0, 1]."""
    return np.asarray(centre_crop(read_rgb(content), LOOKED_AT), dtype=np.float32) / 255


def _near(pixels: np.ndarray) -> np.ndarray:
    """Return which of n pictures (n, h, w, 3), or their mirror images, are alike, (n, n) bool."""
    plain, mirrored = (each.reshape(len(pixels), -1) for each in (pixels, pixels[:, :, ::-1]))
    squares = np.square(plain).sum(1)
    product = np.maximum(plain @ plain.T, plain @ mirrored.T)
    return squares[:, None] + squares - 2 * product < ALIKE**2 * plain.shape[1]


def split(emoji: list[Emoji], labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Choose the emoji for testing, the same share of every class, and all that look alike.

    Args:
        emoji: n emoji.
        labels: (n,) int, the same for those that stay together.
        share: Of a class's emoji, for testing, between 0 and 1; rounded down to whole groups.
        seed: Of the choice.

    Returns:
        (n,) bool, true for testing.
    """
    test, rng = np.zeros(len(emoji), dtype=bool), np.random.default_rng(seed)
    categories = np.array([each.category for each in emoji])
    for category in np.unique(categories):
        own = categories == category
        groups, sizes = np.unique(labels[own], return_counts=True)
        order = rng.permutation(len(groups))
        fits = np.cumsum(sizes[order]) <= round(share * own.sum())
        test |= own & np.isin(labels, groups[order][fits])
    return test
