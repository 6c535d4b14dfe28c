"""Choose the precision in which a network is sampled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

PRECISIONS = ("auto", "bf16", "fp32")


def chosen_precision(precision: str, device: torch.device) -> str:
    """Return "bf16" or "fp32"; "auto" is bf16 on NVIDIA's and AMD's GPUs that have it, else fp32.

    Args:
        precision: one of PRECISIONS.
        device: where the network is.

    Raises:
        ValueError: `precision` is another one.
    """
    check_precision(precision, PRECISIONS)
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "fp32"


def check_precision(precision: Any, known: Sequence[str]) -> None:
    """Check the name of a precision.

    Raises:
        ValueError: it is none of those known.
    """
    if not isinstance(precision, str) or precision not in known:
        raise ValueError(f"precision is {ascii(precision)[:60]}; choose one of {', '.join(known)}")


def set_precision(network: nn.Module, precision: str) -> nn.Module:
    """Let a network compute in a precision from now on, in place; return the network.

    In bf16 its forward pass runs under autocast, and on a GPU with TF32 for the products that stay
    in float32. Weights, the predicted mixture, and all that solvers compute with it are float32.
    fp32 leaves the network as it is.

    Args:
        precision: "bf16" or "fp32".

    Raises:
        ValueError: it is another one.
    """
    check_precision(precision, PRECISIONS[1:])
    if precision == "fp32":
        return network
    device, forward = next(network.parameters()).device, network.forward

    def reduced(*args: Any, **settings: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16), _tf32(device):
            return forward(*args, **settings)

    network.forward = reduced
    return network


@contextmanager
def _tf32(device: torch.device) -> Iterator[None]:
    """Let float32 products of the block round their factors to TF32, on NVIDIA's GPUs."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.set_float32_matmul_precision(before)
