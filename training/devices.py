"""Which device a command computes on."""

from __future__ import annotations

import torch


def on_cpu(device: str) -> bool:
    """Whether --device (auto or cpu) means the CPU; accelerate leaves processes on CPUs strangers to each other unless told."""
    return device == "cpu" or not torch.accelerator.is_available()
