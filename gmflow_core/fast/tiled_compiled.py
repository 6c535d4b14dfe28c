"""The parts of a tile's rollout in `gmflow_core.rollout` ("In tiles") as torch.compile likes them: nothing in place, and, with
the Gram matrix, every number of a pixel by itself, so that several substeps become one loop over the pixels. Names and shapes
are explained there, but for `pairs`: the K (K + 1) / 2 different entries of the Gram matrix, (pairs, n)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TOGETHER = 4  # substeps of one call
MOST = 8  # components whose pairs are compiled in seconds


def prepare(
    means: Tensor, log_weights: Tensor, x: Tensor, signal: Tensor, gram: bool
) -> tuple[Tensor, ...]:
    """o and z_start; then (pairs, <D_k, z_start>), or what `gmflow_core.rollout._prepare` gives."""
    origin = (means * log_weights.exp().unsqueeze(1)).sum(0)
    z = x - signal * origin
    offsets = means - origin
    along = (offsets * z).sum(1)
    if not gram:
        return origin, z, offsets.transpose(0, 1), offsets.square().sum(1), along
    pairs = [(offsets[k] * offsets[j]).sum(0) for k, j in _pairs(len(means))]
    return origin, z, torch.stack(pairs), along


def advance(
    state: Tensor,
    products: tuple[Tensor, ...],
    log_weights: Tensor,
    coefficients: Tensor,
    gram: bool,
) -> Tensor:
    """See `gmflow_core.rollout._advance`; `products` are those of `prepare`."""
    if gram:
        return _advance_coordinates(state, *products, log_weights, coefficients)
    inner, norms, along = products
    for of_norm, of_source, of_state, decay, gain in (
        each.unbind(0) for each in coefficients.unbind(0)
    ):
        logits = (
            log_weights
            + norms * of_norm
            + along * of_source
            + (inner * (state * of_state).unsqueeze(1)).sum(0)
        )
        state = state * decay + (inner * logits.softmax(0)).sum(1) * gain
    return state


def _advance_coordinates(
    state: Tensor, pairs: Tensor, along: Tensor, log_weights: Tensor, coefficients: Tensor
) -> Tensor:
    number = {}  # of a pair
    for index, (k, j) in enumerate(_pairs(len(state))):
        number[k, j] = number[j, k] = index
    coordinates = state.unbind(0)
    every = range(len(coordinates))
    for of_norm, of_source, of_state, decay, gain in (
        each.unbind(0) for each in coefficients.unbind(0)
    ):
        scaled = [each * of_state for each in coordinates]
        logits = []
        for k in every:
            own = log_weights[k] + pairs[number[k, k]] * of_norm + along[k] * of_source
            logits.append(
                own + _in_halves(operator.add, [pairs[number[k, j]] * scaled[j] for j in every])
            )
        highest = _in_halves(torch.maximum, logits)
        shares = [(each - highest).exp() for each in logits]
        part = gain / _in_halves(operator.add, shares)
        coordinates = [
            each * decay + share * part for each, share in zip(coordinates, shares, strict=True)
        ]
    return torch.stack(coordinates)


def _pairs(components: int) -> list[tuple[int, int]]:
    return [(k, j) for k in range(components) for j in range(k, components)]


def _in_halves(combine: Callable[[Tensor, Tensor], Tensor], values: Sequence[Tensor]) -> Tensor:
    """All values combined, as a tree: a processor does its branches at the same time."""
    middle = len(values) // 2
    if not middle:
        return values[0]
    return combine(_in_halves(combine, values[:middle]), _in_halves(combine, values[middle:]))


def finish(
    state: Tensor,
    origin: Tensor,
    z: Tensor,
    means: Tensor,
    signal_end: Tensor,
    source: Tensor,
    gram: bool,
) -> Tensor:
    """See `gmflow_core.rollout._finish`."""
    if not gram:
        return source * z + signal_end * origin + state
    return source * z + (signal_end - state.sum(0)) * origin + (means * state.unsqueeze(1)).sum(0)


def few_enough(components: int, channels: int, substeps: int) -> bool:
    """Whether to follow the coordinates, in one loop."""
    return components <= MOST
