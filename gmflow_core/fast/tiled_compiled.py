"""The steps of a tile's rollout, written for torch.compile.

They equal `prepare`, `advance` and `finish` of `tiled.py`, where names and shapes are explained.
For few components every number of a pixel is a tensor of its own, so that several substeps become
one loop over the pixels. `pairs` are the K (K + 1) / 2 different entries of the Gram matrix,
(pairs, n). More components would compile too long, and follow r with `tiled_few_kernels.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import tiled_few_kernels
from .tiled import TileForm
from .tiled_few_kernels import finish

GROUP = 4  # substeps of one call
MOST_COMPONENTS = 8  # K up to which the pairs compile in seconds


def prepare(
    means: Tensor, log_weights: Tensor, x: Tensor, signal: Tensor, gram: bool
) -> tuple[Tensor, ...]:
    """Return o and z_start, then (pairs, <D_k, z_start>), or D_k and its products without Gram."""
    if not gram:
        return tiled_few_kernels.prepare(means, log_weights, x, signal, gram)
    origin = (means * log_weights.exp().unsqueeze(1)).sum(0)
    z = x - signal * origin
    offsets = means - origin
    pairs = [(offsets[k] * offsets[j]).sum(0) for k, j in _pairs(len(means))]
    return origin, z, torch.stack(pairs), (offsets * z).sum(1)


def advance(
    state: Tensor, products: list[Tensor], log_weights: Tensor, coefficients: Tensor, gram: bool
) -> Tensor:
    """Take a group of Euler steps; `products` as `prepare` returns them."""
    if not gram:
        return tiled_few_kernels.advance(state, products, log_weights, coefficients, gram)
    pairs, along = products
    pair = {}
    for row, (k, j) in zip(pairs.unbind(0), _pairs(len(state)), strict=True):
        pair[k, j] = pair[j, k] = row
    coordinates, every = state.unbind(0), range(len(state))
    for of_norm, of_source, of_state, decay, gain in (e.unbind(0) for e in coefficients.unbind(0)):
        scaled = [each * of_state for each in coordinates]
        logits = []
        for k in every:
            own = log_weights[k] + pair[k, k] * of_norm + along[k] * of_source
            logits.append(own + _reduce(operator.add, [pair[k, j] * scaled[j] for j in every]))
        highest = _reduce(torch.maximum, logits)
        shares = [(each - highest).exp() for each in logits]
        part = gain / _reduce(operator.add, shares)
        coordinates = [
            each * decay + share * part for each, share in zip(coordinates, shares, strict=True)
        ]
    return torch.stack(coordinates)


def _pairs(components: int) -> list[tuple[int, int]]:
    return [(k, j) for k in range(components) for j in range(k, components)]


def _reduce(combine: Callable[[Tensor, Tensor], Tensor], values: Sequence[Tensor]) -> Tensor:
    """Combine all values as a balanced tree, whose branches a processor computes in parallel."""
    middle = len(values) // 2
    if not middle:
        return values[0]
    return combine(_reduce(combine, values[:middle]), _reduce(combine, values[middle:]))


FORM = TileForm(
    prepare, advance, finish, lambda k, c, substeps: k <= MOST_COMPONENTS, GROUP, pad=True
)
