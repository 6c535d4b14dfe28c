"""Which device a command computes on."""

from __future__ import annotations

import contextlib
import ctypes

import torch
from torch import Tensor


def on_cpu(device: str) -> bool:
    """Whether --device (auto or cpu) means the CPU; accelerate leaves processes on CPUs strangers to each other unless told."""
    return device == "cpu" or not torch.accelerator.is_available()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`; a GPU takes it when it gets there, without anyone waiting."""
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else tensor.to(device)
    )


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep what is freed for what comes next: by default it may give an iteration's activations back and
    fetch them anew, page by page, a tenth of the time of a small network on a CPU. Other allocators are left as they are."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
