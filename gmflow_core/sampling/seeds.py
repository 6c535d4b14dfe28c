"""Seeds of samples: their range, and which of them give the same noise."""

from __future__ import annotations

from typing import Any

from ..flow.checks import listed, whole_number

LARGEST_SEED = 2**63 - 1
NOISES = 2**32  # different ones: PyTorch's generator on the CPU takes a seed modulo this number


def seed_list(seeds: Any) -> list[int]:
    """Return seeds as a list of ints; one number alone is one seed.

    Seeds that are equal modulo NOISES give the same noise.

    Raises:
        ValueError: one is no whole number from 0 to LARGEST_SEED.
    """
    return [checked_seed(seed) for seed in listed(seeds)]


def checked_seed(seed: Any) -> int:
    """Return a seed as an int.

    Raises:
        ValueError: it is no whole number from 0 to LARGEST_SEED.
    """
    return whole_number("a seed", seed, 0, LARGEST_SEED)


def same_noise(seeds: list[int]) -> tuple[int, int] | None:
    """Return the first two seeds that give the same noise; None if all differ."""
    found: dict[int, int] = {}
    for seed in seeds:
        if seed % NOISES in found:
            return found[seed % NOISES], seed
        found[seed % NOISES] = seed
    return None
