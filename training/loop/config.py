"""Settings that all training commands share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from training.common.settings import require, require_device, require_ranges, require_unused
from training.evaluation.config import check_features
from training.loop.wandb_run import import_wandb


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Settings of a run. Subclasses add those of their model and data.

    Raises:
        ModuleNotFoundError: wandb is asked for, and not installed.
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
    wandb: bool = False
    """Log to Weights & Biases too (pip install wandb): all curves and pictures of TensorBoard."""
    restart: bool = False
    """Throw away the run found in OUT and start anew."""

    def __post_init__(self):
        for name in ("batch_size", "iterations", "checkpoint_every", "log_every", "picture_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.warmup >= 0, "warmup", self.warmup, "0 or more")
        require(self.lr > 0, "lr", self.lr, "positive")
        require_device(self.device)
        require_ranges(self)
        if self.wandb:  # now, not when the reference of validation has been measured
            import_wandb()


OF_VALIDATION = ("validate_count", "reference", "reference_count", "inception_weights")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidatedConfig(TrainerConfig):
    """Settings of a run whose samples are pictures, which can be compared with real ones.

    Raises:
        ModuleNotFoundError: wandb is asked for, and not installed.
        ValueError: a setting is out of its range, or two of them do not go together.
    """

    validate_every: int | None = None
    """Iterations between measurements of the Fréchet distance (FID) of samples; 0 measures none.
    By default none, or with --features one with each picture. The last one is measured too."""
    validate_count: int = 1000
    """Samples of each measurement; the distance of few is larger. Published FIDs have 50,000."""
    features: str | None = None
    """Features of the distance: inception (the default), or a file written by training.evaluate."""
    inception_weights: Path | None = None
    """torch-fidelity's weight file; downloaded if not given."""
    reference: Path | None = None
    """What samples are compared with: as --reference of training.evaluate; by default --data."""
    reference_count: int = 50_000
    """Images of the reference at most, chosen at random."""

    def __post_init__(self):
        super().__post_init__()
        every = self.validate_every
        require(every is None or every >= 0, "validate_every", every, "0 or more")
        for name in ("validate_count", "reference_count"):
            require(getattr(self, name) >= 2, name, getattr(self, name), "at least 2")
        if self.features is not None:
            check_features(self.features)
        reference, data = self.reference, getattr(self, "data", None)
        name = "features" if every is None else "validate_every"
        value = self.features if every is None else every
        there = reference is not None or data is not None or not self.validation_interval
        require(there, name, value, "given together with --reference, or with --data")
        if every is None and self.features is None:  # 0 turns validation off, whatever is given
            when = "without --features or --validate-every"
            require_unused(self, ValidatedConfig, OF_VALIDATION, when)
        elif self.features not in (None, "inception"):
            when = f"with --features {self.features}"
            require_unused(self, ValidatedConfig, ("inception_weights",), when)

    @property
    def validation_interval(self) -> int:
        """Iterations between measurements; 0 for none."""
        if self.validate_every is not None:
            return self.validate_every
        return 0 if self.features is None else self.picture_every


def memory_advice(config: TrainerConfig) -> str:
    """Return what to give a run that needs too much memory, of the options that it has."""
    options = ["--batch-size a smaller number"]
    if hasattr(config, "accumulate"):
        options = ["--accumulate a larger number (the batch stays the same)"]
    if not getattr(config, "gradient_checkpointing", True):
        options.append("--gradient-checkpointing")
    if not config.shard:
        options.append("--shard with several processes")
    return f"give {', or '.join(options)}"


VALIDATION = frozenset(field.name for field in dataclasses.fields(ValidatedConfig)) - frozenset(
    field.name for field in dataclasses.fields(TrainerConfig)
)
