"""Choose the optimizer."""

from __future__ import annotations

import torch
from torch import nn


def eight_bit_problem(device: torch.device) -> str | None:
    """Why bitsandbytes' 8-bit AdamW cannot be used on `device`; None if it can."""
    if device.type == "cpu":
        return "on a CPU it only costs time"
    try:
        from bitsandbytes.optim import AdamW8bit

        weight = nn.Parameter(torch.zeros(4096, 2, device=device))
        weight.grad = torch.ones_like(weight)
        AdamW8bit([weight]).step()
    except Exception as error:  # whatever it is, there is another optimiser
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None
