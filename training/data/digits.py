"""Draw coloured digits: a small data set whose distribution of colours is known exactly."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from gmflow_core.files.atomic import atomic_folder
from training.common.settings import require, require_ranges

SATURATION = (0.1, 0.9)  # range of the saturations
TEST_SHARE = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """Drawing of coloured digits."""

    out: Path = Path("data/digits")
    """Folder for train and test; it must not exist yet."""
    copies: int = 8
    """Pictures of each source digit, each in a colour of its own."""
    size: int = 8
    """Width and height; above 8 the digit is enlarged."""
    seed: int = 0
    """Seed of the split and of the colours."""

    def __post_init__(self):
        require(self.copies >= 1, "copies", self.copies, "at least 1")
        require(self.size >= 8, "size", self.size, "8 or more, as the digits are 8x8")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        require_ranges(self)


def draw_saturation(rng: np.random.Generator) -> float:
    """Draw a saturation from Beta(2, 2), stretched to the range `SATURATION`."""
    return SATURATION[0] + (SATURATION[1] - SATURATION[0]) * float(rng.beta(2, 2))


def colour(hue: float, saturation: float) -> np.ndarray:
    """Return the brightest colour of this hue and saturation.

    Args:
        hue, saturation: in [0, 1].

    Returns:
        RGB (3,) in [0, 1].
    """
    # distances to red, green and blue on the colour wheel
    away = np.abs((hue * 6 - np.array([0, 2, 4]) + 3) % 6 - 3)
    return 1 - saturation * (1 - np.clip(2 - away, 0, 1))


def draw_digit(intensity: np.ndarray, rgb: np.ndarray, size: int = 8) -> Image.Image:
    """Draw a digit in one colour on black.

    Args:
        intensity: (8, 8) in 0 .. 16.
        rgb: (3,) in [0, 1].
        size: width and height of the picture; other sizes than 8 are scaled bicubically.
    """
    strength = np.asarray(intensity, dtype=np.float32) / 16
    if size != strength.shape[0]:
        enlarged = Image.fromarray(strength).resize((size, size), Image.Resampling.BICUBIC)
        strength = np.asarray(enlarged).clip(0, 1)
    return Image.fromarray(np.rint(255 * strength[:, :, None] * rgb).astype(np.uint8))


def source_digits() -> tuple[np.ndarray, np.ndarray]:
    """Load scikit-learn's digits.

    Returns:
        Intensities (1797, 8, 8) in 0 .. 16, and labels (1797,).

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
    """Choose the source digits for testing, the same share of every class.

    Returns:
        (n,) bool, true for testing.
    """
    test = np.zeros(len(labels), dtype=bool)
    rng = np.random.default_rng(seed)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        test[members[: round(TEST_SHARE * len(members))]] = True
    return test


def write_digits(config: DigitsConfig) -> dict[str, int]:
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
    with atomic_folder(out) as unfinished:
        _draw_all(config, images, labels, test, unfinished)
    return {"train": int((~test).sum()) * config.copies, "test": int(test.sum()) * config.copies}


def _draw_all(
    config: DigitsConfig, images: np.ndarray, labels: np.ndarray, test: np.ndarray, out: Path
) -> None:
    """Draw the digits into out/train and out/test."""
    for part in ("train", "test"):
        for label in np.unique(labels):
            (out / part / str(label)).mkdir(parents=True)
    for number, (intensity, label) in enumerate(zip(images, labels, strict=True)):
        rng = np.random.default_rng((config.seed, number))
        folder = out / ("test" if test[number] else "train") / str(label)
        for copy in range(config.copies):
            rgb = colour(rng.random(), draw_saturation(rng))
            draw_digit(intensity, rgb, config.size).save(folder / f"{number:04d}_{copy}.png")
