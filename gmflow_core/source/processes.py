"""Sums over the processes of torch.distributed."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


# Processes
def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def add_up(*tensors: Tensor) -> None:
    """Replace each tensor with its sum over the processes."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def gather(tensor: Tensor) -> Tensor:
    """(processes, ...): the tensors of all of them."""
    if not dist.is_initialized():
        return tensor.unsqueeze(0)
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)
