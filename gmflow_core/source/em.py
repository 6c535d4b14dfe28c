"""Fit Gaussian-mixture sources to streamed data: EM with a k-means++ start.

Tokens come in chunks, from anything that can be iterated again for every pass. Of all that grows
with the data, only the rows for k-means++ are kept in memory. If torch.distributed is initialised,
each process streams its own part, in the order of the ranks, and the sums are added up over all.

Peak memory of EM in float32, in bytes, with M modes, D dimensions and B = `rows_of` samples at a
time: at most max(76 MD, 60 MD + 8 BM + 12 BD); of the start from S samples: 4 S (D + 40). That is
0.5 GB and 0.9 GB for 8192 modes of 768 dimensions, whatever the number of samples (measured in
tests/benchmarks/source_fit.py).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..files.checkpoint import open_checkpoint, stored
from ..files.errors import FileError, quoted, reading
from ..files.safetensors_files import write_safetensors
from .processes import add_up, gather, rank
from .source import GaussianMixtureSource, LogJoint, listed, widest
from .stored_tensors import ANEW, check_values, read_state, settings_of

FORMAT = "gmflow-source-fit-1"
BLOCK = 2**22  # elements of (rows, modes) and (rows, dimensions) at a time
START_ROWS = (32, 2**16)  # rows that k-means++ looks at: per mode, and at least in all
LOG_NOTHING = -60.0  # floor of log-responsibilities: no denormal numbers, which are slow
Chunks = Iterable[Tensor]  # (n, D) each


class Fit(NamedTuple):
    """Result of EM."""

    source: GaussianMixtureSource
    log_likelihoods: list[float]  # mean over the samples in nats, before each iteration's update
    converged: bool


class Survey(NamedTuple):
    """Summary of the data of all processes."""

    count: int
    first: int  # number of this process's first sample among all
    mean: Tensor  # (D,) float64


def fit_mixture(
    tokens: Chunks | Tensor,
    num_modes: int,
    *,
    spherical: bool = False,
    start: GaussianMixtureSource | None = None,
    seed: int = 0,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
    reg_covar: float = 1e-6,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    state: str | Path | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Fit:
    """Fit a diagonal or spherical Gaussian mixture by EM, as scikit-learn's GaussianMixture does.

    k-means++ chooses the means. All modes begin with the variance `reg_covar`, so the first
    iteration assigns each sample to its nearest mean. A mode that loses all its samples keeps its
    mean, with the variance `reg_covar` and a weight of about 0.

    Args:
        tokens: (N, D), or chunks (n, D) that can be iterated again and again; this process's part
            of them. Results do not depend on the size of the chunks.
        num_modes: M.
        spherical: one variance for each mode instead of one for each dimension.
        start: the mixture that EM begins with, instead of k-means++.
        seed: of k-means++, which looks at 32 random samples for each mode (at least 65,536).
        max_iterations: EM stops after as many, converged or not.
        tolerance: EM has converged when the mean log-likelihood changes by less, in nats.
        reg_covar: added to the variances.
        dtype: of the products over samples and modes; sums over blocks of samples are float64. In
            float32 a log-density is off by about 1e-3 nats where modes are as wide as their
            distance, by a few nats where they are 100 times narrower; the likeliest mode stays.
        device: where EM runs.
        state: a file that EM's state is written to after every iteration, and resumed from if it
            exists. On one process, a resumed fit gives exactly the same result.
        progress: called as progress(iterations done, log-likelihood) after every iteration.

    Raises:
        ValueError: the tokens are not (n, D), not finite (the message lists the rows), fewer than
            the modes, or too large; or the state is of another fit or damaged (a `FileError`).
    """
    device = torch.device(device)
    tokens = _chunks(tokens)
    survey = look_at(tokens, num_modes, device)
    origin = survey.mean.to(dtype)
    rows = rows_of(num_modes, len(origin))
    settings = {
        "num_modes": num_modes,
        "spherical": spherical,
        "seed": seed,
        "reg_covar": reg_covar,
        "dtype": str(dtype),
        "count": survey.count,
        "dimensions": len(origin),
    }
    em = _load_state(state, settings, survey.mean) if state is not None else None
    if em is None:
        em = _start(start, tokens, survey, settings, origin)
    while not (converged := em.converged(tolerance)) and len(em.log_likelihoods) < max_iterations:
        blocks = _blocks(tokens, rows, device, dtype, origin)
        em = em.update(blocks, survey.count, reg_covar, dtype)
        if state is not None and rank() == 0:
            _save_state(state, em, settings, survey.mean)
        if progress is not None:
            progress(len(em.log_likelihoods), em.log_likelihoods[-1])
    means = (em.means + origin).to(dtype)
    source = GaussianMixtureSource(means, em.var.sqrt().to(dtype), em.log_weights.to(dtype))
    return Fit(source, em.log_likelihoods, converged)


def _start(
    start: GaussianMixtureSource | None,
    tokens: Chunks,
    survey: Survey,
    settings: dict[str, Any],
    origin: Tensor,
) -> EM:
    """Return the mixture that EM begins with: the given one, or centres of k-means++."""
    num_modes, spherical, wide = settings["num_modes"], settings["spherical"], survey.mean.dtype
    if start is None:
        rows = _subset(tokens, survey, num_modes, settings["seed"], origin)
        means = kmeans_plus_plus(rows, num_modes, settings["seed"])
        if dist.is_initialized():
            dist.broadcast(means, 0)  # GPUs of several kinds may round differently
        means = means.to(wide)
        var = means.new_full((num_modes, 1 if spherical else len(origin)), settings["reg_covar"])
        return EM(means, var, means.new_full((num_modes,), -math.log(num_modes)), [])
    start.require_shape(origin.shape)
    if start.num_modes != num_modes:
        raise ValueError(
            f"a start of {start.num_modes} modes does not fit a fit of {num_modes}; "
            "give one of as many"
        )
    start = start.to(origin.device, wide)
    var = start.std.square().expand(num_modes, -1)
    var = var.mean(1, keepdim=True) if spherical else var.expand_as(start.means).clone()
    return EM(start.means - origin, var, start.log_weights, [])


def rows_of(num_modes: int, dims: int) -> int:
    """Return how many samples EM takes at a time."""
    return max(1, BLOCK // max(num_modes, dims))


@dataclass(frozen=True)
class EM:
    """State of EM: a mixture in float64 around the data's mean, and the log-likelihoods so far."""

    means: Tensor  # (M, D)
    var: Tensor  # (M, D) or (M, 1)
    log_weights: Tensor  # (M,)
    log_likelihoods: list[float]

    def converged(self, tolerance: float) -> bool:
        """Return whether the last iteration changed the mean log-likelihood by less."""
        last = self.log_likelihoods[-2:]
        return len(last) == 2 and abs(last[1] - last[0]) < tolerance

    def update(
        self, blocks: Iterator[Tensor], count: int, reg_covar: float, dtype: torch.dtype
    ) -> EM:
        """Run one iteration over all processes and return the new state.

        Args:
            blocks: this process's samples minus the origin, (n, D) each.
            count: number of samples of all processes.
            reg_covar, dtype: as in `fit_mixture`.

        Raises:
            ValueError: the samples are too large to be squared.
        """
        log_joint = LogJoint(self.means, self.var, self.log_weights, dtype)
        like, spherical = self.means, self.var.shape[1] == 1
        number, total = torch.zeros_like(self.log_weights), torch.zeros_like(self.log_weights[:1])
        sums, squares = torch.zeros_like(self.means), torch.zeros_like(self.var)
        for x in blocks:  # E step: sums of responsibilities, of samples and of their squares
            responsibility = log_joint(x)
            most = responsibility.amax(1, keepdim=True)
            responsibility.sub_(most).clamp_(min=LOG_NOTHING).exp_()
            share = responsibility.sum(1, keepdim=True)
            responsibility.div_(share)
            total += (most + share.log()).sum(dtype=like.dtype)
            number += responsibility.sum(0)
            sums += responsibility.T @ x
            x2 = x.square()
            squares += responsibility.T @ (x2.mean(1, keepdim=True) if spherical else x2)
        add_up(number, sums, squares, total)
        # M step
        floor = 10 * torch.finfo(like.dtype).eps
        alive = (number > floor).unsqueeze(1)
        number = number + floor  # as in scikit-learn, to avoid division by 0
        means = torch.where(alive, sums.div_(number.unsqueeze(1)), self.means)
        norms = means.square().mean(1, keepdim=True) if spherical else means.square()
        var = squares.div_(number.unsqueeze(1)).sub_(norms).clamp_(min=0)
        var = torch.where(alive, var, 0) + reg_covar
        log_weights, log_likelihood = (number / number.sum()).log(), (total / count).item()
        if not math.isfinite(log_likelihood):
            raise ValueError(
                f"the log-likelihood is {log_likelihood} at iteration "
                f"{len(self.log_likelihoods) + 1}: the data's values are too large to be squared, "
                f"or too far apart, or reg_covar ({reg_covar:g}) is too small; scale the values, "
                "or compute with float64"
            )
        return EM(means, var, log_weights, [*self.log_likelihoods, log_likelihood])


def _chunks(tokens: Chunks | Tensor) -> Chunks:
    """Return the tokens as chunks that can be iterated again and again."""
    if isinstance(tokens, Iterator):
        raise ValueError(
            "tokens that can be iterated only once do not do for a fit, which takes many passes; "
            "give a list of chunks, a tensor, or an object with __iter__"
        )
    return [tokens] if isinstance(tokens, Tensor) else tokens


def look_at(tokens: Chunks, num_modes: int, device: torch.device) -> Survey:
    """Count and average the samples of all processes, and check them.

    Raises:
        ValueError: as `fit_mixture`, on all processes alike.
    """
    count, dims, bad, total = 0, None, [], torch.zeros(0, dtype=widest(device), device=device)
    wrong = ""  # what a chunk's shape is; as long as the others do not know, they wait
    for chunk in tokens:
        if chunk.ndim != 2 or dims not in (None, chunk.shape[1]):
            before = f" after ones of {dims} numbers" if dims else ""
            wrong = f"a chunk of tokens is {tuple(chunk.shape)}{before}"
            break
        if dims is None:
            dims, total = chunk.shape[1], total.new_zeros(chunk.shape[1])
        chunk = chunk.to(device)
        finite = chunk.sum(1, dtype=total.dtype).isfinite()
        if not finite.all():
            bad += [count + row for row in finite.logical_not().nonzero().flatten().tolist()]
        total += chunk.sum(0, dtype=total.dtype)
        count += len(chunk)
    misshapen = gather(torch.tensor(int(bool(wrong)), device=device)).any()
    if misshapen:
        wrong = wrong or "a chunk of another process's tokens has another shape"
        raise ValueError(f"{wrong}; give (n, D), the same D throughout")
    counts = gather(torch.tensor([count, len(bad), dims or 0], device=device)).tolist()
    first = sum(n for n, _, _ in counts[: rank()])
    _check_counts(counts, [first + row for row in bad], num_modes)
    if not count:
        total = total.new_zeros(max(d for _, _, d in counts))
    add_up(total)
    everywhere = sum(n for n, _, _ in counts)
    return Survey(everywhere, first, total / everywhere)


def _check_counts(counts: list[list[int]], bad: list[int], num_modes: int) -> None:
    """Check what the processes counted.

    Args:
        counts: of each process: its samples, how many of them are not finite, their dimensions.
        bad: numbers of this process's samples that are not finite.

    Raises:
        ValueError: dimensions differ, samples are not finite, or there are too few for the modes.
    """
    if len({d for n, _, d in counts if n}) > 1:
        raise ValueError(
            f"the processes have tokens of different lengths: {sorted({d for _, _, d in counts})}"
        )
    everywhere = sum(n for n, _, _ in counts)
    if broken := sum(n for _, n, _ in counts):
        named = f"rows {listed(bad)}" if bad else f"{broken} rows of other processes' parts"
        raise ValueError(
            f"{named} of {everywhere} tokens are not finite (NaN or infinite); "
            "mend or leave out what made them"
        )
    if everywhere < num_modes or num_modes < 1:
        raise ValueError(
            f"{everywhere} samples cannot be fitted with {num_modes} modes; "
            f"give 1 to {everywhere}, best far fewer"
        )


def _blocks(
    tokens: Chunks, rows: int, device: torch.device, dtype: torch.dtype, origin: Tensor
) -> Iterator[Tensor]:
    """Yield this process's tokens minus `origin`, in blocks of `rows` whatever the chunks are."""
    rest: list[Tensor] = []
    held = 0
    for chunk in tokens:
        while len(chunk):
            part, chunk = chunk[: rows - held], chunk[rows - held :]
            rest.append(part.to(device, dtype))
            held += len(part)
            if held == rows:
                yield torch.cat(rest).sub_(origin)
                rest, held = [], 0
    if held:
        yield torch.cat(rest).sub_(origin)


def _subset(tokens: Chunks, survey: Survey, num_modes: int, seed: int, origin: Tensor) -> Tensor:
    """Return the samples that k-means++ looks at, minus the origin, (S, D) on every process.

    These are all samples, or a uniform draw.
    """
    size = min(survey.count, max(START_ROWS[0] * num_modes, START_ROWS[1]))
    order = torch.randperm(survey.count, generator=torch.Generator().manual_seed(seed))
    chosen = order[:size].sort().values
    rows = origin.new_zeros(size, len(origin))
    start = survey.first
    for chunk in tokens:
        low, high = torch.searchsorted(chosen, torch.tensor([start, start + len(chunk)])).tolist()
        rows[low:high] = chunk[(chosen[low:high] - start).to(chunk.device)].to(rows) - origin
        start += len(chunk)
    add_up(rows)
    return rows


def kmeans_plus_plus(x: Tensor, num_centres: int, seed: int = 0) -> Tensor:
    """Choose centres (num_centres, D) among the rows of x (S, D) by greedy k-means++.

    Arthur and Vassilvitskii 2007, with scikit-learn's candidates: each centre is the best of 2 +
    log(num_centres) candidates, drawn by their squared distance to the nearest centre so far.

    It reads x once for each centre: num_centres S D (2 + log(num_centres)) multiplications. The
    random numbers are drawn on the CPU, and nothing forces a GPU sync.
    """
    trials = 2 + int(math.log(num_centres))
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(num_centres, trials, generator=generator, dtype=torch.float64).to(x.device)
    norms = torch.cat([part.square().sum(1) for part in x.split(max(1, BLOCK // x.shape[1]))])

    def distances(candidates: Tensor) -> Tensor:
        """Return the squared distances (S, candidates)."""
        products = torch.addmm(norms.unsqueeze(1), x, x[candidates].T, alpha=-2)
        return products.add_(norms[candidates]).clamp_(min=0)

    chosen = [(uniform[0, :1] * len(x)).long()]
    nearest = distances(chosen[0]).squeeze(1)
    for centre in range(1, num_centres):
        edges = nearest.cumsum(0, dtype=widest(x.device))
        drawn = uniform[centre].to(edges) * edges[-1]
        candidates = torch.searchsorted(edges, drawn, right=True).clamp_(max=len(x) - 1)
        closer = torch.minimum(nearest.unsqueeze(1), distances(candidates))  # (S, trials)
        best = closer.sum(0).argmin().unsqueeze(0)
        chosen.append(candidates[best])
        nearest = closer.index_select(1, best).squeeze(1)
    return x[torch.cat(chosen)]


def _save_state(path: str | Path, em: EM, settings: dict[str, Any], mean: Tensor) -> None:
    """Write EM's state, with the fit's settings and the data's mean to recognise it by."""
    tensors = {"means": em.means, "var": em.var, "log_weights": em.log_weights, "mean": mean}
    tensors["log_likelihoods"] = torch.tensor(em.log_likelihoods, dtype=torch.float64)
    metadata = {"format": FORMAT, "settings": json.dumps(settings)}
    write_safetensors({name: stored(t, t.dtype) for name, t in tensors.items()}, path, metadata)


def _load_state(path: str | Path, settings: dict[str, Any], mean: Tensor) -> EM | None:
    """Read EM's state from the file `path`; None if there is no such file.

    Raises:
        FileError: it is damaged, or of another fit.
        ValueError: it is not the same for all processes.
    """
    em = _read_state(path, settings, mean) if os.path.exists(path) else None
    mine = torch.tensor([len(em.log_likelihoods) if em else 0], device=mean.device)
    done = gather(mine).flatten().tolist()
    if len(set(done)) > 1:
        raise ValueError(
            f"the processes found {path} after different numbers of iterations: {done}; "
            "it must be one shared file"
        )
    return em


def _read_state(path: str | Path, settings: dict[str, Any], mean: Tensor) -> EM:
    """Read EM's state from a file.

    Raises:
        FileError: it is damaged, or of another fit.
    """
    file = open_checkpoint(path)
    with reading(path, ANEW):
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise FileError(path, "is not the state of a fit", "give another file, or remove it")
        found = settings_of(metadata, path)
        differ = [
            f"{name}: {quoted(found.get(name))} there, {value} here"
            for name, value in settings.items()
            if found.get(name) != value
        ]
        if not differ:
            modes, dims = settings["num_modes"], settings["dimensions"]
            spread = 1 if settings["spherical"] else dims
            shapes = {"means": (modes, dims), "var": (modes, spread), "log_weights": (modes,)}
            tensors = read_state(
                file, {**shapes, "log_likelihoods": (None,), "mean": (dims,)}, path
            )
            there = tensors["mean"].to(mean)
            if not torch.allclose(there, mean, rtol=1e-6, atol=1e-6 * float(mean.abs().max())):
                differ = ["the data have another mean"]
        if differ:
            raise FileError(path, f"is the state of another fit ({'; '.join(differ)})", ANEW)
        least = (1 - 1e-6) * settings["reg_covar"]
        check_values((tensors["var"] >= least).all(), f"has variances below {least:.3g}", path)
        total = tensors["log_weights"].logsumexp(0).exp().item()
        check_values(abs(total - 1) < 1e-3, f"has weights that add up to {total:.6g}", path)
    mixture = (tensors[name].to(mean) for name in ("means", "var", "log_weights"))
    return EM(*mixture, tensors["log_likelihoods"].tolist())
