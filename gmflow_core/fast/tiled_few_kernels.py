"""The steps of a tile's rollout in few large operations, for a GPU.

They equal `prepare`, `advance` and `finish` of `tiled.py`, where names and shapes are explained. On
a GPU launching a kernel costs more than its work, so products stay whole tensors, and the parts of
the logits that are known beforehand are computed for a group of substeps at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tiled import TileForm, gram_is_cheaper

GROUP = 16  # substeps of one call


def prepare(
    means: Tensor, log_weights: Tensor, x: Tensor, signal: Tensor, gram: bool
) -> tuple[Tensor, ...]:
    """Compute the inner products of a tile."""
    origin = (means * log_weights.exp().unsqueeze(1)).sum(0)
    z = x - signal * origin
    offsets = means - origin
    along = (offsets * z).sum(1)
    if gram:
        inner = torch.stack([(offsets * row).sum(1) for row in offsets])
        return origin, z, inner, inner.diagonal().T, along
    return origin, z, offsets.transpose(0, 1), offsets.square().sum(1), along


def advance(
    state: Tensor, products: list[Tensor], log_weights: Tensor, coefficients: Tensor, gram: bool
) -> Tensor:
    """Take a group of T Euler steps."""
    inner, norms, along = products
    of_norm, of_source, of_state, decay, gain = coefficients.unbind(1)
    known = torch.addcmul(log_weights, norms, of_norm.unsqueeze(1))  # (T, K, n)
    known = torch.addcmul(known, along, of_source.unsqueeze(1))
    for each, factor, kept, move in zip(known, of_state, decay, gain, strict=True):
        weights = torch.addcmul(each, (inner * state.unsqueeze(1)).sum(0), factor).softmax(0)
        drift = weights if gram else (inner * weights).sum(1)
        state = torch.addcmul(state * kept, drift, move)
    return state


def finish(
    state: Tensor,
    origin: Tensor,
    z: Tensor,
    means: Tensor,
    signal_end: Tensor,
    source: Tensor,
    gram: bool,
) -> Tensor:
    """Return x at the end, (C, n)."""
    end = torch.addcmul(source * z, signal_end - state.sum(0) if gram else signal_end, origin)
    return end + ((means * state.unsqueeze(1)).sum(0) if gram else state)


FEW_KERNELS = TileForm(prepare, advance, finish, gram_is_cheaper, GROUP)
