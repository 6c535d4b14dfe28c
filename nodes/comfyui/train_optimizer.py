"""Optimizer, average and watch over the loss of the training of an adapter."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor, nn

ADAMW, ADAMW_8BIT = "adamw", "adamw8bit"
OPTIMIZERS = (ADAMW, ADAMW_8BIT)
BETAS = (0.9, 0.95)
MOST_NORM = 2.0  # of the gradient
EMA_POWER = 8  # Karras' gamma of 7, and 1
WATCHED = 20  # latest losses whose median counts
GROWTH = 10.0  # of that median over its lowest, from which on a run counts as diverging
RISEN = 1.33  # the same over that of the first losses, from which on it is said at the end
SETTLED = 2.0  # the same, below which its state is worth going back to


def make_optimizer(
    kind: str, parameters: Mapping[str, nn.Parameter], rate: float
) -> torch.optim.Optimizer:
    """Return an optimizer without weight decay.

    Raises:
        ValueError: the 8-bit one does not run here.
    """
    settings = {"lr": rate, "betas": BETAS, "weight_decay": 0.0}
    if kind == ADAMW:
        return torch.optim.AdamW(list(parameters.values()), **settings)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            "adamw8bit needs the package bitsandbytes, which is not installed in ComfyUI's Python "
            "environment; install it there, or choose adamw"
        ) from error
    return bitsandbytes.optim.AdamW8bit(list(parameters.values()), **settings)


def warmed_up(rate: float, iteration: int, warmup: int) -> float:
    """Return the learning rate of an iteration, counted from 0."""
    return rate * min(1.0, (iteration + 1) / max(warmup, 1))


class PowerAverage:
    """A moving average of parameters on the CPU, whose memory grows with the run.

    The decay is (1 - 1/t)^8 for update t (Karras et al. 2024, arXiv 2312.02696, gamma 7).
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        self.values = {name: on_cpu(value) for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], t: int) -> None:
        """Take the parameters in.

        Args:
            t: number of this update, from 1.
        """
        share = 1 - (1 - 1 / t) ** EMA_POWER
        for name, value in parameters.items():
            self.values[name].lerp_(value.detach().to("cpu", torch.float32), share)


def on_cpu(value: Tensor) -> Tensor:
    """Return a copy on the CPU."""
    return value.detach().to("cpu", copy=True)


class LossWatch:
    """Notice that a run diverges.

    A median is watched: near sigma 0 a DX policy's velocity is so large that a single loss may be
    many times the others.

    Args:
        losses: of its iterations so far; the list grows.
        lowest: median of a few of them.
    """

    def __init__(self, losses: list[float], lowest: float = math.inf):
        self.losses, self.lowest = losses, lowest

    def problem(self, loss: float, changing: bool = False) -> str:
        """Take the loss of one more iteration; return why the run has to stop, or "".

        Args:
            changing: its meaning still changes, so that growth says nothing.
        """
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        self.losses.append(loss)
        self.lowest = self.recent if changing else min(self.lowest, self.recent)
        if self.recent > GROWTH * self.lowest:
            return f"the loss has grown from {self.lowest:.3g} to {self.recent:.3g}"
        return ""

    @property
    def recent(self) -> float:
        """Median of the latest losses."""
        return statistics.median(self.losses[-WATCHED:])

    @property
    def rise(self) -> tuple[float, float] | None:
        """Medians of the first and of the latest losses, if it has grown by more than a third."""
        if len(self.losses) < 2 * WATCHED:
            return None
        first, recent = statistics.median(self.losses[:WATCHED]), self.recent
        return (first, recent) if recent > RISEN * first else None

    @property
    def is_settled(self) -> bool:
        """True if the losses, the last one too, are near the lowest: its state is one to keep."""
        near = SETTLED * self.lowest
        return self.recent < near and self.losses[-1] < 2 * near
