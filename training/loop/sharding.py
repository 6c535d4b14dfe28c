"""Tensors that accelerate distributes over processes."""

from __future__ import annotations

from accelerate import Accelerator, DistributedType
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def math_attention():
    """Plain attention: on a CPU, with few tokens, its backward pass is faster than the fused one's."""
    return sdpa_kernel(SDPBackend.MATH)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def distribute_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, divided among the processes as `like` is."""
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def check_accelerate(accelerator: Accelerator) -> None:
    """
    Raises:
        ValueError: accelerate was told, by its configuration, to do what the trainer does itself.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"accelerate is configured for {accelerator.distributed_type}; start with torchrun, and give --shard"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"accelerate is configured for {accelerator.gradient_accumulation_steps} gradient accumulation steps; set that to "
            "1, and give --accumulate instead"
        )
