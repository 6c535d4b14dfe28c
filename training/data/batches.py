"""Which samples an iteration sees, and with what noise: the same whatever the number of processes."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

NOISE_BLOCK = 16  # samples whose noise comes from one seed, so that it does not depend on the number of processes


def seed_of(*parts: int) -> int:
    """A seed for a generator, different for different numbers."""
    return (
        int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1
    )


class Order:
    """Which samples this process sees, piece by piece, from iteration `first` on, for ever: each epoch is a permutation of the
    data, and the batch of an iteration is the same whatever the number of processes.

    Args:
        count: samples in the data.
        rows: this process's part of the batch's rows, 0 to `batch_size` - 1.
        pieces: how many pieces that part comes in.
    """

    def __init__(
        self, count: int, batch_size: int, rows: range, pieces: int, seed: int, first: int
    ):
        self.count, self.batch_size, self.rows, self.pieces, self.seed, self.first = (
            count, batch_size, rows, pieces, seed, first,
        )  # fmt: skip

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, None
        for step in itertools.count(self.first):
            for rows in pieces_of(self.rows, self.pieces):
                indices: list[int] = []
                while len(indices) < len(rows):
                    at, position = divmod(
                        step * self.batch_size + rows.start + len(indices), self.count
                    )
                    if at != epoch:
                        generator = torch.Generator().manual_seed(seed_of(self.seed, at))
                        epoch, order = at, torch.randperm(self.count, generator=generator)
                    indices += order[position : position + len(rows) - len(indices)].tolist()
                yield indices


def pieces_of(rows: range, pieces: int) -> list[range]:
    """`rows` in `pieces` equal parts."""
    size = len(rows) // pieces
    return [rows[i * size : (i + 1) * size] for i in range(pieces)]


def draw_noise(
    seed: int, step: int, rows: range, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Standard normal (len(rows), *shape) for these rows of iteration `step`'s batch, whatever other rows are drawn."""
    blocks = range(rows.start // NOISE_BLOCK, (rows.stop - 1) // NOISE_BLOCK + 1)
    noise = []
    for block in blocks:
        generator = torch.Generator(device).manual_seed(seed_of(seed, step, block))
        noise.append(torch.randn(NOISE_BLOCK, *shape, generator=generator, device=device))
    offset = rows.start - blocks.start * NOISE_BLOCK
    return torch.cat(noise)[offset : offset + len(rows)]
