"""Settings that all training commands share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from training.common.settings import require, require_device, require_ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Settings of a run. Subclasses add those of their model and data.

    Raises:
        ValueError: a setting is out of its range.
    """

    out: Path = Path("outputs/run")
    """Folder for checkpoint, TensorBoard logs and results; a run found there is resumed."""
    batch_size: int = 4096
    """Samples in an iteration, over all processes together."""
    iterations: int = 200_000
    """Iterations in all."""
    lr: float = 2e-4
    """Peak learning rate."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling to 0 at the last iteration."""
    warmup: int = 1000
    """Iterations of linear learning-rate warm-up, from 0.001 of the peak."""
    ema: bool = True
    """Average the weights, and sample with the average."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of matrix products; weights, optimizer and mixture are always float32."""
    seed: int = 0
    """Seed of the weights and of the data."""
    device: str = "auto"
    """auto (the device that accelerate finds) or cpu."""
    shard: bool = False
    """Divide weights, gradients and optimizer state among the processes (FSDP 2)."""
    checkpoint_every: int = 1000
    """Iterations between checkpoints."""
    log_every: int = 100
    """Iterations between points of the loss curve."""
    picture_every: int = 5000
    """Iterations between pictures of samples."""
    restart: bool = False
    """Throw away the run found in OUT and start anew."""

    def __post_init__(self):
        for name in ("batch_size", "iterations", "checkpoint_every", "log_every", "picture_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.warmup >= 0, "warmup", self.warmup, "0 or more")
        require(self.lr > 0, "lr", self.lr, "positive")
        require_device(self.device)
        require_ranges(self)
