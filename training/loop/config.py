"""Settings that all trainers share."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, Literal

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """What every training command can be told."""

    out: Path = Path("outputs/run")
    """Folder for the checkpoint, the TensorBoard logs and the results; a run found there is resumed."""
    batch_size: int = 4096
    """Samples an iteration, over all processes together."""
    iterations: int = 200_000
    """Iterations in all."""
    lr: float = 2e-4
    """Peak learning rate."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """What the learning rate does after the warm-up: stay, or fall to zero at the last iteration."""
    warmup: int = 1000
    """Iterations of linear learning-rate warm-up, from 0.001 of the peak."""
    ema: bool = True
    """Average the weights, and sample with the average."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Matrix products in float32 or bfloat16; weights, optimiser and mixture are float32 either way."""
    seed: int = 0
    """Seed of the weights and of the data."""
    device: str = "auto"
    """auto (what accelerate finds) or cpu."""
    shard: bool = False
    """With several processes: share out weights, gradients and optimiser state among them (FSDP 2) instead of copying them."""
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
        require(
            self.device in ("auto", "cpu"),
            "device",
            self.device,
            "auto or cpu (choose a GPU with CUDA_VISIBLE_DEVICES)",
        )


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """ValueError if a setting is not what it must be."""
    if not condition:
        raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be {expected}")


def parse_preset(
    presets: dict[str, TrainerConfig], module: str, description: str, arguments: list[str]
) -> Any:
    """The preset that the arguments name, or else the first, then whatever they change of it."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset")
    first = next(iter(presets.values()))
    preset = presets.get(finder.parse_known_args(arguments)[0].preset, first)
    return tyro.cli(
        type(first),
        default=preset,
        args=arguments,
        prog=f"python -m {module}",
        description=description,
    )
