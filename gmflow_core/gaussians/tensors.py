"""Small tensor operations that the files of this folder share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SHORT_SUM = 32  # terms up to which a sum is accumulated one by one


def sum_of_products(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Return (a * b).sum(dim, keepdim=True), without the product in memory for short sums."""
    if a.shape[dim] > SHORT_SUM:
        return (a * b).sum(dim, keepdim=True)
    b = b.expand(*b.shape[:dim], a.shape[dim], *b.shape[dim + 1 :])
    first, *others = zip(a.split(1, dim), b.split(1, dim), strict=True)
    total = first[0] * first[1]
    for left, right in others:
        total.addcmul_(left, right)
    return total


def widest(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on devices that may lack it, such as Apple's and Intel's GPUs."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


def where_it_is_known(operation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return operation(x), on the CPU for devices that may lack it, such as Apple's GPUs."""
    if x.device.type in ("cpu", "cuda"):
        return operation(x)
    return operation(x.cpu()).to(x.device)


def at_least_float(tensor: Tensor) -> Tensor:
    """Convert half precision to float32; return float32 and float64 as they are."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
