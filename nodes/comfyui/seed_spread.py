"""Sample several seeds, and measure how much their pictures differ."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.samplers
import torch
from torch import Tensor

from ...gmflow_core.pictures import contact_sheet, mean_pairwise_distance, to_picture
from .cells import Progress, Subject
from .sample_pictures import Decode, enlarged
from .sizes import check_size

MOST_SEEDS = 64
COLUMNS, MOST_ROWS = 8, 10  # of pictures on a sheet
SEEDS = 2**64


@dataclass(frozen=True, eq=False)
class Spread:
    """Pictures of several seeds.

    Args:
        seeds: N of them.
        pictures: (N, B, H, W, 3) in [0, 1], for each seed those of a batch.
    """

    seeds: list[int]
    pictures: Tensor

    def varieties(self) -> list[float]:
        """Return the mean pairwise distance of the seeds' pictures, for each item of the batch."""
        return [mean_pairwise_distance(own) for own in self.pictures.unbind(1)]

    def variety(self) -> float:
        """Return the mean pairwise distance of the seeds' pictures, averaged over the batch."""
        return sum(self.varieties()) / self.pictures.shape[1]

    def together(self) -> Tensor:
        """Return all pictures (N B, H, W, 3), seed after seed."""
        return self.pictures.flatten(0, 1)


def sample_seeds(
    subject: Subject,
    sampler: comfy.samplers.Sampler,
    sigmas: Tensor,
    first: int,
    count: int,
    decode: Decode,
) -> Spread:
    """Sample a LATENT with `count` seeds from `first` on.

    Raises:
        ValueError: the pictures would be too large together.
    """
    seeds, pictures = [(first + i) % SEEDS for i in range(count)], []
    progress = Progress(count * (len(sigmas) - 1))
    for seed in seeds:
        pictures.append(decode(subject.sample(sampler, sigmas, seed, progress)))
        check_size("pictures", count, tuple(pictures[0].shape), "choose fewer seeds")
    return Spread(seeds, torch.stack(pictures))


def reference_of(images: Tensor, batch: int) -> Spread:
    """Return pictures of another sampler, (N B, H, W, 3) seed after seed, as a Spread.

    Raises:
        ValueError: they do not fit a batch of that size, or are of a single seed.
    """
    count = len(images) // batch
    if len(images) % batch or not 2 <= count <= MOST_SEEDS:
        raise ValueError(
            f"the reference does not fit: it has {len(images)} pictures, and for a batch of "
            f"{batch} it must have {2 * batch}, {3 * batch} or another multiple, up to "
            f"{MOST_SEEDS} seeds, seed after seed; connect the images of another GM Seed Spread"
        )
    pictures = images[..., :3].float().cpu().unflatten(0, (count, batch))
    return Spread(list(range(count)), pictures)


def spread_sheet(spread: Spread, reference: Spread | None, what: str, size: int) -> Tensor:
    """Draw the pictures of all seeds with the figure of their variety: (H, W, 3) in [0, 1].

    Each row has the seeds of one item of the batch, and more than COLUMNS seeds go over several
    rows. Of a large batch only some items are drawn, evenly spaced, and the title says so.

    Args:
        what: how the pictures came about, for the title.
        size: pixels from side to side of each picture.
    """
    count, batch = spread.pictures.shape[:2]
    drawn = min(batch, max(1, MOST_ROWS // -(-count // COLUMNS)))
    check_size("pictures", count * drawn, (2 * size, size, 3), "choose a smaller size")
    title, rows = figure_of(spread, reference, what), []
    if drawn < batch:
        title += f"\ndrawn: {drawn} of the {batch} items of the batch; the figure is of all"
    varieties = spread.varieties()
    for item in (place * batch // drawn for place in range(drawn)):
        pictures = enlarged(spread.pictures[:, item], size)
        cells = [(f"seed {seed}", p) for seed, p in zip(spread.seeds, pictures, strict=True)]
        name = f"item {item}\n{varieties[item]:.3f}" if batch > 1 else ""
        for start in range(0, count, COLUMNS):
            rows.append((name if start == 0 else "", cells[start : start + COLUMNS]))
    return to_picture(contact_sheet(rows, None, title, size))


def figure_of(spread: Spread, reference: Spread | None, what: str) -> str:
    """Return the figure of variety in words, and what it is relative to the reference."""
    variety = spread.variety()
    lines = [
        f"variety {variety:.3f}   {what}, {len(spread.seeds)} seeds",
        "mean pairwise distance: root mean square difference of the pixels, in [0, 1]",
    ]
    if reference is not None:
        other = reference.variety()
        share = f"{variety / other:.0%} of it" if other else "which has none"
        lines.append(f"reference {other:.3f}   {len(reference.seeds)} seeds; this is {share}")
    return "\n".join(lines)
