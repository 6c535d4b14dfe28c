"""Choose the optimizer, schedule its learning rate, and average the weights."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from training.loop.config import TrainerConfig

BETAS = (0.9, 0.95)


def lr_factor(config: TrainerConfig, step: int) -> float:
    """Return the learning rate of iteration `step`, counted from 0, relative to the peak."""
    if step < config.warmup:
        return 0.001 + 0.999 * step / config.warmup
    if config.lr_schedule == "constant":
        return 1.0
    done = (step - config.warmup) / max(1, config.iterations - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def power_decay(step: int) -> float:
    """Return the decay of the power-function average with gamma = 7 (Karras et al. 2024).

    Args:
        step: iteration, counted from 1.
    """
    return (1 - 1 / step) ** 8


def new_schedule(optimizer: torch.optim.Optimizer, config: TrainerConfig, step: int) -> LambdaLR:
    """Create the learning rate's schedule, beginning at iteration `step`."""
    for group in optimizer.param_groups:  # LambdaLR asks for it when it does not begin at 0
        group["initial_lr"] = config.lr
    return LambdaLR(optimizer, lambda done: lr_factor(config, done), last_epoch=step - 1)


def new_adamw(
    model: nn.Module, *, lr: float, weight_decay: float, eight_bit: bool
) -> torch.optim.Optimizer:
    """Create AdamW for a network; biases and scales do not decay.

    Args:
        eight_bit: hold its state in 8 bits (bitsandbytes) instead of 32.

    Raises:
        ImportError: bitsandbytes is needed and not installed.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if not eight_bit:
        return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError(
            f"--optimizer adamw8bit needs bitsandbytes ({error}): pip install -e '.[8bit]'"
        ) from error
    return AdamW8bit(groups, lr=lr, betas=BETAS)


def eight_bit_problem(device: torch.device) -> str | None:
    """Return why bitsandbytes' 8-bit AdamW cannot be used on `device`; None if it can."""
    if device.type == "cpu":
        return "on a CPU it only costs time"
    try:
        from bitsandbytes.optim import AdamW8bit

        weight = nn.Parameter(torch.zeros(4096, 2, device=device))
        weight.grad = torch.ones_like(weight)
        AdamW8bit([weight]).step()
    except Exception as error:  # whatever fails, AdamW with 32-bit state works
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None
