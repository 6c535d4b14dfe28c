"""Choose the device of a command, and move tensors there."""

from __future__ import annotations

import contextlib
import ctypes

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SHORT_ATTENTION = 128  # tokens up to which plain products beat torch's bfloat16 kernel on a CPU


def on_cpu(device: str) -> bool:
    """Return whether --device (auto or cpu) means the CPU.

    Pass the result to accelerate: without `cpu=True`, it starts no process group on CPUs.
    """
    return device == "cpu" or not torch.accelerator.is_available()


def cuda_or_cpu(device: str) -> torch.device:
    """Return the device for operations that only CUDA and the CPU offer, such as float64 sums.

    Args:
        device: --device: auto (CUDA if there is any) or cpu.
    """
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device`; to a CUDA device without a sync."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep freed memory for later allocations.

    By default malloc may return the activations of an iteration to the system and fetch them again
    page by page, which takes a tenth of the time of a small network on a CPU. With another
    allocator than glibc's, the function does nothing.
    """
    # ctypes, as glibc reads its MALLOC_ variables only when the process starts
    with contextlib.suppress(OSError, AttributeError, TypeError):
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)


def training_attention(
    device: torch.device, precision: str, tokens: int
) -> contextlib.AbstractContextManager[None]:
    """Return the context of an iteration, in which attention runs as it trains fastest.

    PyTorch's fused attention pads a short bfloat16 sequence on a CPU, so that its backward pass
    takes several times as long as plain matrix products do. The context must hold the backward pass
    too, as gradient checkpoints run the network again there.

    Args:
        precision: "bf16" for matrix products in bfloat16, or "fp32".
        tokens: length of the sequences that the network attends over.
    """
    if precision == "bf16" and device.type == "cpu" and tokens <= SHORT_ATTENTION:
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()
