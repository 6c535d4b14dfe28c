"""Sums over the processes of torch.distributed; with one process they change nothing."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Return the number of this process; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def add_up(*tensors: Tensor) -> None:
    """Replace each tensor with its sum over the processes."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def gather(tensor: Tensor) -> Tensor:
    """Stack the tensors of all processes, (processes, ...)."""
    if not dist.is_initialized():
        return tensor.unsqueeze(0)
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)
