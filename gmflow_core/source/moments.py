"""Fit the mixture of given modes in one pass over the data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..files.checkpoint import open_checkpoint, stored, write_tensors
from .processes import add_up
from .source import GaussianMixtureSource, listed, widest

MOMENTS = "gmflow-moments-1"
BLOCK = 2**22  # elements of a temporary tensor


# Modes that are given
class RunningMoments:
    """Mean and variance of samples of known modes, in one pass; with one mode, those of all samples.

    The mean and the squared deviations of each chunk are merged into those of its modes (Chan et
    al. 1979). Only differences are squared, so a mean that is large beside the spread loses no
    digits in float32. Memory: one copy of the means, two for diagonal modes. On a GPU the order of
    the additions varies, and so does the last bit.

    Args:
        num_modes: M.
        shape: of one sample.
        spherical: keep one variance for each mode instead of one for each of its dimensions.
        dtype: of the means, and of the squared deviations of diagonal modes.
        device: where the sums are kept; samples are moved there.

    Attributes:
        means: (M, *shape).
        squares: sums of the squared deviations from the means, (M, *shape), or (M, 1, ...) summed
            over the dimensions too for spherical modes.
        counts: samples of each mode, (M,) int64.
    """

    def __init__(
        self,
        num_modes: int,
        shape: tuple[int, ...],
        *,
        spherical: bool = True,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        self.spherical = spherical
        self.means = torch.zeros(num_modes, *shape, dtype=dtype, device=device)
        self.counts = torch.zeros(num_modes, dtype=torch.int64, device=device)
        spread = (num_modes, *[1] * len(shape)) if spherical else (num_modes, *shape)
        wide = widest(self.means.device) if spherical else dtype
        self.squares = torch.zeros(spread, dtype=wide, device=device)

    def save(self, path: str | Path, settings: dict[str, Any]) -> None:
        """Keep what came until now, to go on with after a stop; `settings` are to tell what it belongs to."""
        tensors = {
            name: stored(getattr(self, name), getattr(self, name).dtype)
            for name in ("means", "squares", "counts")
        }
        write_tensors(tensors, path, {"format": MOMENTS, "settings": json.dumps(settings)})

    def restore(self, path: str | Path, settings: dict[str, Any]) -> int:
        """Take over what `save` kept, if there is such a file; how many samples that were.

        Raises:
            ValueError: the file belongs to something else.
        """
        if not Path(path).exists():
            return 0
        with open_checkpoint(path) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != MOMENTS or json.loads(metadata["settings"]) != settings:
                raise ValueError(
                    f"{path} is of another fit, or of other processes; remove it to begin anew"
                )
            for name in ("means", "squares", "counts"):
                getattr(self, name).copy_(file.get_tensor(name))
        return int(self.counts.sum())

    def add(self, x: Tensor, modes: Tensor) -> None:
        """Take up samples (n, *shape) of the modes (n,).

        Raises:
            ValueError: they are of another shape, out of range, or not finite.
        """
        if x.shape[1:] != self.means.shape[1:] or modes.shape != x.shape[:1]:
            raise ValueError(
                f"samples {tuple(x.shape)} of modes {tuple(modes.shape)} came to a mixture of samples "
                f"{tuple(self.means.shape[1:])}; give (n, *shape) and (n,)"
            )
        if len(modes) and not 0 <= int(modes.min()) <= int(modes.max()) < len(self.means):
            raise ValueError(
                f"modes between {int(modes.min())} and {int(modes.max())} do not fit a mixture of {len(self.means)} modes; "
                f"give 0 to {len(self.means) - 1}"
            )
        x, modes = x.to(self.means), modes.to(self.means.device)
        if not x.sum(dtype=self.squares.dtype).isfinite():
            bad = [row for row, sample in enumerate(x) if not sample.isfinite().all()]
            raise ValueError(
                f"rows {listed(bad)} of {len(x)} samples are not finite; mend or leave out what made them"
            )
        present, groups = modes.unique(return_inverse=True)
        number = groups.bincount(minlength=len(present))
        share = number.view(-1, *[1] * (x.ndim - 1))
        mean = self.means.new_zeros(len(present), *x.shape[1:]).index_add_(0, groups, x).div_(share)
        squares = self._fold((x - mean[groups]).square_())
        squares = squares.new_zeros(len(present), *squares.shape[1:]).index_add_(0, groups, squares)
        self._merge(present, number, mean, squares)

    def _merge(self, modes: Tensor, number: Tensor, mean: Tensor, squares: Tensor) -> None:
        before = self.counts[modes]
        total = before + number
        ratio = (number.to(mean.dtype) / total).view(-1, *[1] * (mean.ndim - 1))
        difference = mean - self.means[modes]
        weight = before.view_as(ratio) * ratio
        self.squares[modes] += squares + self._fold(difference.square()) * weight
        self.means[modes] += difference.mul_(ratio)
        self.counts[modes] = total

    def _fold(self, squares: Tensor) -> Tensor:
        """Added up over all dimensions for spherical modes."""
        if not self.spherical:
            return squares
        return (
            squares.flatten(1).sum(1, dtype=self.squares.dtype).view(-1, *[1] * (squares.ndim - 1))
        )

    def add_up_processes(self) -> None:
        """Merge what all processes saw, so that each of them has it all."""
        if not dist.is_initialized():
            return
        counts = self.counts.clone()
        add_up(counts)
        total = counts.clamp(min=1).view(-1, *[1] * (self.means.ndim - 1))
        for part in torch.arange(len(counts), device=counts.device).split(
            max(1, BLOCK // self.means[0].numel())
        ):
            mine = self.counts[part].view_as(total[part])
            mean = self.means[part] * mine
            add_up(mean)
            mean.div_(total[part])
            self.squares[part] += self._fold((self.means[part] - mean).square_()) * mine
            self.means[part] = mean
        add_up(self.squares)
        self.counts = counts

    def add_flipped(self) -> None:
        """Count the width-flipped twin of each sample too."""
        for part in torch.arange(len(self.means), device=self.means.device).split(
            max(1, BLOCK // self.means[0].numel())
        ):
            mean, number = (
                self.means[part],
                self.counts[part].view(-1, *[1] * (self.means.ndim - 1)),
            )
            both = 0.5 * (mean + mean.flip(-1))
            squares = self.squares[part] + self.squares[part].flip(-1)
            self.squares[part] = squares + 2 * number * self._fold((mean - both).square_())
            self.means[part] = both
        self.counts *= 2

    def source(
        self, assigner: GaussianMixtureSource | None = None, min_var: float = 1e-6
    ) -> GaussianMixtureSource:
        """The mixture: weights of the assigner, or else by the counts; one variance for each mode, averaged over its
        dimensions, or one for each dimension; at least `min_var`. A mode without samples gets the average of the others. Takes
        over the running means, so nothing can be added afterwards.

        Raises:
            ValueError: there were no samples.
        """
        full = self.counts > 0
        if not full.any():
            raise ValueError("no samples came, so there is nothing to fit; give the latents")
        number = self.counts.clamp(min=1).view(-1, *[1] * (self.means.ndim - 1))
        var = self.squares.div_(number).div_(self.means[0].numel() if self.spherical else 1)
        weights = full / full.sum()
        for values in (self.means, var):
            average = torch.mv(values.flatten(1).T, weights.to(values)).view_as(values[0])
            values[~full] = average
        assigner = assigner and assigner.to(self.means.device)
        log_weights = (
            (self.counts / self.counts.sum()).log() if assigner is None else assigner.log_weights
        )
        return GaussianMixtureSource(
            self.means, var.clamp_(min=min_var).sqrt_().float(), log_weights, assigner
        )


def fit_given_modes(
    samples: Iterable[tuple[Tensor, Tensor]],
    num_modes: int,
    shape: tuple[int, ...],
    *,
    spherical: bool = True,
    flip: bool = False,
    assigner: GaussianMixtureSource | None = None,
    device: str | torch.device = "cpu",
    moments: RunningMoments | None = None,
) -> GaussianMixtureSource:
    """The mixture of samples whose modes are known, in one pass; over all processes, each with its own samples.

    Args:
        samples: chunks of (x (n, *shape), modes (n,)).
        spherical: one variance for each mode, that of its dimensions on average.
        flip: count the width-flipped twin of each sample too.
        assigner: who knew the modes; its weights are taken, and it becomes the source's.
        moments: where they are added up, for a caller that keeps them from time to time; it may hold some samples already.

    Raises:
        ValueError: as `RunningMoments`.
    """
    if moments is None:
        moments = RunningMoments(num_modes, shape, spherical=spherical, device=device)
    for x, modes in samples:
        moments.add(x, modes)
    moments.add_up_processes()
    if flip:
        moments.add_flipped()
    return moments.source(assigner)
