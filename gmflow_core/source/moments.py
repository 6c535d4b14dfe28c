"""Mean and variance of given modes in one pass over the data, and the mixture fitted by them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..files.checkpoint import open_checkpoint, stored
from ..files.errors import FileError, reading
from ..files.safetensors_files import write_safetensors
from .processes import add_up
from .source import GaussianMixtureSource, listed, span, widest
from .stored_tensors import ANEW, check_values, read_state, same_json, settings_of

MOMENTS = "gmflow-moments-1"
BLOCK = 2**22  # elements of a temporary tensor


class RunningMoments:
    """Mean and variance of samples of known modes in one pass; with one mode, of all samples.

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
        """Write the sums so far to a file, to resume from; `settings` tell what they belong to."""
        sums = {name: getattr(self, name) for name in ("means", "squares", "counts")}
        tensors = {name: stored(tensor, tensor.dtype) for name, tensor in sums.items()}
        write_safetensors(tensors, path, {"format": MOMENTS, "settings": json.dumps(settings)})

    def restore(self, path: str | Path, settings: dict[str, Any], most: int | None = None) -> int:
        """Load the sums that `save` wrote, if there is such a file.

        Args:
            path: the file.
            settings: as given to `save`.
            most: the number of samples that there are.

        Returns:
            The number of samples in the sums; 0 if there is no file.

        Raises:
            FileError: the file is damaged or has other settings; the sums stay as they were.
        """
        if not os.path.exists(path):
            return 0
        file = open_checkpoint(path)
        with reading(path, ANEW):
            metadata = file.metadata() or {}
            if metadata.get("format") != MOMENTS or settings_of(metadata, path) != same_json(
                settings
            ):
                raise FileError(path, "is of another fit, or of other processes", ANEW)
            names = ("means", "squares", "counts")
            tensors = read_state(file, {name: getattr(self, name).shape for name in names}, path)
            counts = tensors["counts"].tolist()
            total = sum(counts)
            check_values(min(counts) >= 0, "counts fewer than no samples", path)
            check_values(
                total <= (2**53 if most is None else most),
                f"counts {total:,} samples, more than there are",
                path,
            )
            check_values((tensors["squares"] >= 0).all(), "has squares that are negative", path)
        for name in names:
            getattr(self, name).copy_(tensors[name])
        return total

    def add(self, x: Tensor, modes: Tensor) -> None:
        """Add samples (n, *shape) of the modes (n,).

        Raises:
            ValueError: they have another shape, are out of range, or are not finite.
        """
        if x.shape[1:] != self.means.shape[1:] or modes.shape != x.shape[:1]:
            raise ValueError(
                f"samples {tuple(x.shape)} of modes {tuple(modes.shape)} came to a mixture of "
                f"samples {tuple(self.means.shape[1:])}; give (n, *shape) and (n,)"
            )
        if len(modes) and not 0 <= int(modes.min()) <= int(modes.max()) < len(self.means):
            found = span(int(modes.min()), int(modes.max()))
            raise ValueError(
                f"{found} not fit a mixture of {len(self.means)} modes; "
                f"give 0 to {len(self.means) - 1}"
            )
        x, modes = x.to(self.means), modes.to(self.means.device)
        if not x.sum(dtype=self.squares.dtype).isfinite():
            bad = [row for row, sample in enumerate(x) if not sample.isfinite().all()]
            raise ValueError(
                f"rows {listed(bad)} of {len(x)} samples are not finite; mend or leave out what "
                "made them"
            )
        present, groups = modes.unique(return_inverse=True)
        number = groups.bincount(minlength=len(present))
        mean = self.means.new_zeros(len(present), *x.shape[1:]).index_add_(0, groups, x)
        mean /= _like_samples(number, x)
        squares = self._fold((x - mean[groups]).square_())
        squares = squares.new_zeros(len(present), *squares.shape[1:]).index_add_(0, groups, squares)
        self._merge(present, number, mean, squares)

    def _merge(self, modes: Tensor, number: Tensor, mean: Tensor, squares: Tensor) -> None:
        """Merge a chunk's moments of the modes (m,) into the sums (Chan et al. 1979)."""
        before = self.counts[modes]
        total = before + number
        ratio = _like_samples(number.to(mean.dtype) / total, mean)
        difference = mean - self.means[modes]
        weight = before.view_as(ratio) * ratio
        self.squares[modes] += squares + self._fold(difference.square()) * weight
        self.means[modes] += difference.mul_(ratio)
        self.counts[modes] = total

    def _fold(self, squares: Tensor) -> Tensor:
        """Sum squares (n, *shape) over all dimensions if the modes are spherical."""
        if not self.spherical:
            return squares
        return _like_samples(squares.flatten(1).sum(1, dtype=self.squares.dtype), squares)

    def _parts(self) -> Iterator[Tensor]:
        """Split the numbers of the modes, so that a temporary tensor of each part is small."""
        modes = torch.arange(len(self.means), device=self.means.device)
        yield from modes.split(max(1, BLOCK // self.means[0].numel()))

    def add_up_processes(self) -> None:
        """Merge the sums of all processes; afterwards each process has the same."""
        if not dist.is_initialized():
            return
        counts = self.counts.clone()
        add_up(counts)
        for part in self._parts():
            mine = _like_samples(self.counts[part], self.means)
            mean = self.means[part] * mine
            add_up(mean)
            mean /= _like_samples(counts[part].clamp(min=1), self.means)
            self.squares[part] += self._fold((self.means[part] - mean).square_()) * mine
            self.means[part] = mean
        add_up(self.squares)
        self.counts = counts

    def add_flipped(self) -> None:
        """Add the width-flipped twin of every sample so far."""
        for part in self._parts():
            mean, number = self.means[part], _like_samples(self.counts[part], self.means)
            both = 0.5 * (mean + mean.flip(-1))
            squares = self.squares[part] + self.squares[part].flip(-1)
            self.squares[part] = squares + 2 * number * self._fold((mean - both).square_())
            self.means[part] = both
        self.counts *= 2

    def source(
        self, assigner: GaussianMixtureSource | None = None, min_var: float = 1e-6
    ) -> GaussianMixtureSource:
        """Return the mixture of these moments.

        A mode without samples gets the average mean and variance of the others. The mixture takes
        over the running means, so nothing can be added afterwards.

        Args:
            assigner: gives the weights, and becomes the source's; None: weights by the counts.
            min_var: least variance.

        Raises:
            ValueError: there were no samples.
        """
        full = self.counts > 0
        if not full.any():
            raise ValueError("no samples came, so there is nothing to fit; give the latents")
        number = _like_samples(self.counts.clamp(min=1), self.means)
        var = self.squares.div_(number).div_(self.means[0].numel() if self.spherical else 1)
        weights = full / full.sum()
        for values in (self.means, var):
            average = torch.mv(values.flatten(1).T, weights.to(values)).view_as(values[0])
            values[~full] = average
        assigner = assigner and assigner.to(self.means.device)
        log_weights = (self.counts / self.counts.sum()).log()
        if assigner is not None:
            log_weights = assigner.log_weights
        std = var.clamp_(min=min_var).sqrt_().float()
        return GaussianMixtureSource(self.means, std, log_weights, assigner)


def _like_samples(values: Tensor, like: Tensor) -> Tensor:
    """Reshape one value per sample or mode, (n,), so that it broadcasts to `like`, (n, *shape)."""
    return values.view(-1, *[1] * (like.ndim - 1))


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
    """Fit the mixture of samples whose modes are known, in one pass over all processes.

    Args:
        samples: this process's chunks of (x (n, *shape), modes (n,)).
        num_modes: M.
        shape: of one sample.
        spherical: one variance for each mode, the average of its dimensions.
        flip: add the width-flipped twin of every sample.
        assigner: the source that told the modes; its weights are taken, and it becomes the
            fitted source's assigner.
        device: where the sums are kept.
        moments: the sums to add to, which may hold samples already, for a caller that saves them
            from time to time.

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
