"""Handle tensors that FSDP divides among processes, and accelerate's own settings."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """Gather the parts of a tensor from all processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def distribute_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Divide a whole tensor among the processes in the same way as `like`."""
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def check_accelerate(accelerator: Accelerator) -> None:
    """Check that accelerate's configuration leaves to the trainer what the trainer does itself.

    Raises:
        ValueError: it asks for FSDP, DeepSpeed or gradient accumulation.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"accelerate is configured for {accelerator.distributed_type}; start with torchrun, "
            "and give --shard"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"accelerate is configured for {accelerator.gradient_accumulation_steps} gradient "
            "accumulation steps; set that to 1, and give --accumulate instead"
        )


def check_same_step(accelerator: Accelerator, step: int, out: Path) -> None:
    """Check that all processes are at the same iteration.

    Raises:
        ValueError: they found different runs in OUT.
    """
    mine = torch.tensor([step], device=accelerator.device)
    steps = accelerator.gather(mine).tolist()
    if len(set(steps)) > 1:
        raise ValueError(
            f"the processes found runs at different iterations in --out {out}: {steps}; it must be "
            "one folder that all machines share"
        )
