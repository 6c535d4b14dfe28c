"""Coloured digits: a small data set that needs no download and whose distribution of colours is known exactly.

    python -m training.digits --out data/digits                        # 8x8, 11,504 pictures to train on, 2,872 to test
    python -m training.digits --out data/digits16 --size 16 --copies 16

scikit-learn's handwritten digits (1,797 of them, 8x8, 17 grey levels), each drawn several times on black in a random
colour: hue uniform, value 1, saturation from a Beta(2, 2) stretched to 0.1 .. 0.9. OUT/train and OUT/test are folders of
class folders, and no source digit is in both. `image_saturation` measures the saturation that a picture was drawn with, and
`saturation_distance` how far a set of pictures is from the known distribution.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from training.evaluation.saturation import SATURATION

TEST_SHARE = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Drawing coloured digits."""

    out: Path = Path("data/digits")
    """Folder for train and test; it must not exist yet."""
    copies: int = 8
    """Pictures of each source digit, each in a colour of its own."""
    size: int = 8
    """Width and height; above 8 the digit is enlarged."""
    seed: int = 0
    """Seed of the split and of the colours."""

    def __post_init__(self):
        if self.copies < 1:
            raise ValueError(f"--copies is {self.copies}; it must be at least 1")
        if self.size < 8:
            raise ValueError(f"--size is {self.size}; the digits are 8x8, give 8 or more")
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}; it must be 0 or more")


def draw_saturation(rng: np.random.Generator) -> float:
    """One saturation of the known distribution."""
    return SATURATION[0] + (SATURATION[1] - SATURATION[0]) * float(rng.beta(2, 2))


def colour(hue: float, saturation: float) -> np.ndarray:
    """RGB (3,) in [0, 1] of the brightest colour with this hue and saturation, all in [0, 1]."""
    away = np.abs(
        (hue * 6 - np.array([0, 2, 4]) + 3) % 6 - 3
    )  # distance to red, green, blue on the colour wheel
    return 1 - saturation * (1 - np.clip(2 - away, 0, 1))


def draw_digit(intensity: np.ndarray, rgb: np.ndarray, size: int = 8) -> Image.Image:
    """A digit of intensity (8, 8) in 0 .. 16 as a picture of `size`, in the colour rgb (3,) on black."""
    strength = np.asarray(intensity, dtype=np.float32) / 16
    if size != strength.shape[0]:
        enlarged = Image.fromarray(strength).resize((size, size), Image.Resampling.BICUBIC)
        strength = np.asarray(enlarged).clip(0, 1)
    return Image.fromarray(np.rint(255 * strength[:, :, None] * rgb).astype(np.uint8))


def source_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: intensities (1797, 8, 8) in 0 .. 16, and labels (1797,).

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the digits come with scikit-learn: pip install -e ".[train]"'
        ) from error
    digits = load_digits()
    return digits.images, digits.target


def split(labels: np.ndarray, seed: int) -> np.ndarray:
    """Which of the source digits are for testing: (n,) bool, the same share of every class."""
    test = np.zeros(len(labels), dtype=bool)
    rng = np.random.default_rng(seed)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        test[members[: round(TEST_SHARE * len(members))]] = True
    return test


def write_digits(config: Config) -> dict[str, int]:
    """Draw all digits into config.out.

    Returns:
        The number of pictures in train and in test.

    Raises:
        ValueError: config.out exists.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    out = config.out
    if out.exists():
        raise ValueError(f"{out} exists already; delete it, or give another --out")
    images, labels = source_digits()
    test = split(labels, config.seed)
    unfinished = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    for part in ("train", "test"):
        for label in np.unique(labels):
            (unfinished / part / str(label)).mkdir(parents=True)
    for number, (intensity, label) in enumerate(zip(images, labels, strict=True)):
        rng = np.random.default_rng((config.seed, number))
        folder = unfinished / ("test" if test[number] else "train") / str(label)
        for copy in range(config.copies):
            rgb = colour(rng.random(), draw_saturation(rng))
            draw_digit(intensity, rgb, config.size).save(folder / f"{number:04d}_{copy}.png")
    unfinished.rename(out)
    return {"train": int((~test).sum()) * config.copies, "test": int(test.sum()) * config.copies}


def main(arguments: list[str] | None = None) -> None:
    try:
        config = tyro.cli(
            Config, args=arguments, prog="python -m training.digits", description=__doc__
        )
        counts = write_digits(config)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    print(
        f"{counts['train']} pictures in {config.out / 'train'}, {counts['test']} in {config.out / 'test'}"
    )


if __name__ == "__main__":
    main()
