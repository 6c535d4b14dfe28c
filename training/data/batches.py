"""Choose the samples of an iteration and their noise, the same for any number of processes."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.common.processes import ignore_interrupt

NOISE_BLOCK = 16  # rows whose noise shares a seed, so that it does not depend on the processes


def seed_of(*parts: int) -> int:
    """Return a generator's seed, different for different numbers."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Order:
    """An endless sampler of the indices that this process sees, piece by piece.

    Each epoch is a permutation of the data, and the batch of an iteration is the same for any
    number of processes and pieces.

    Args:
        count: samples in the data.
        batch_size: samples in an iteration, over all processes.
        rows: this process's part of the batch's rows, 0 to `batch_size` - 1.
        pieces: number of pieces that this part is divided into; each one is yielded as a list.
        seed: of the permutations.
        first: iteration to begin with.
        epochs: yield numbers epoch * count + index instead of indices.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        rows: range,
        pieces: int,
        seed: int,
        first: int,
        epochs: bool = False,
    ):
        self.count, self.batch_size, self.rows = count, batch_size, rows
        self.pieces, self.seed, self.first, self.epochs = pieces, seed, first, epochs

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
                        order += at * self.count if self.epochs else 0
                    indices += order[position : position + len(rows) - len(indices)].tolist()
                yield indices


def rows_of(process: int, processes: int, batch_size: int, accumulate: int) -> range:
    """Return a process's part of the batch's rows.

    Args:
        accumulate: pieces that each process's part is divided into.

    Raises:
        ValueError: the batch cannot be divided so.
    """
    pieces = processes * accumulate
    if batch_size % pieces:
        each = f" with {accumulate} pieces each" if accumulate > 1 else ""
        raise ValueError(
            f"--batch-size {batch_size} cannot be divided among {processes} processes{each}; make "
            f"it a multiple of {pieces}"
        )
    share = batch_size // processes
    return range(process * share, (process + 1) * share)


def pieces_of(rows: range, pieces: int) -> list[range]:
    """Divide `rows` into equal parts; a remainder is left out."""
    size = len(rows) // pieces
    return [rows[i * size : (i + 1) * size] for i in range(pieces)]


def draw_noise(
    seed: int, step: int, rows: range, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Draw standard normal noise for some rows of a batch.

    A row's noise depends on the seed, the iteration `step` and the row, not on the other rows.

    Returns:
        (len(rows), *shape).
    """
    blocks = range(rows.start // NOISE_BLOCK, (rows.stop - 1) // NOISE_BLOCK + 1)
    noise = []
    for block in blocks:
        generator = torch.Generator(device).manual_seed(seed_of(seed, step, block))
        noise.append(torch.randn(NOISE_BLOCK, *shape, generator=generator, device=device))
    offset = rows.start - blocks.start * NOISE_BLOCK
    return torch.cat(noise)[offset : offset + len(rows)]


def batch_loader(
    samples: Dataset, batches: Iterable[list[int]], workers: int, pin_memory: bool
) -> DataLoader:
    """Load batches from a data set that fetches whole batches at once.

    Args:
        batches: indices of each batch, such as `Order`.
        workers: processes that read; 0 reads in this one.
        pin_memory: for copies to a CUDA device.
    """
    return DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=ignore_interrupt,
        pin_memory=pin_memory,
    )


def _unchanged(batch: Any) -> Any:
    """Return a batch that is collated already."""
    return batch
