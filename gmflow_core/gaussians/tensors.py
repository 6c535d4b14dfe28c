"""Small operations on tensors that the files of this folder share."""

from __future__ import annotations

import torch
from torch import Tensor

SHORT = 32  # terms of a sum that are added one after another
SHORT_COMPILED = 7  # torch.compile writes as short a sum out, from products in memory


def sum_of_products(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """(a * b).sum(dim, keepdim=True), without the product in memory where the sum is short: what is added up stays in the
    cache. torch.compile keeps the product of a longer one out of memory by itself."""
    if a.shape[dim] > (SHORT_COMPILED if torch.compiler.is_compiling() else SHORT):
        return (a * b).sum(dim, keepdim=True)
    pairs = zip(
        a.split(1, dim),
        b.expand(*b.shape[:dim], a.shape[dim], *b.shape[dim + 1 :]).split(1, dim),
        strict=True,
    )
    first, *others = pairs
    total = first[0] * first[1]
    for left, right in others:
        total.addcmul_(left, right)
    return total


def at_least_float(tensor: Tensor) -> Tensor:
    """Half-precision values in float32; float32 and float64 as they are."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
