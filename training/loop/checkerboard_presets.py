"""Settings of checkerboard training, and their presets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from training.common.settings import require
from training.loop.config import TrainerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckerboardConfig(TrainerConfig):
    """Checkerboard training. The defaults shown are those of the chosen preset.

    Raises:
        ValueError: a setting is out of its range.
    """

    preset: Literal["full", "minimal", "flow-matching"] = "full"
    """Preset that sets the other defaults."""
    out: Path = Path("outputs/checkerboard")
    """Folder for checkpoint, TensorBoard logs and report; a run found there is resumed."""
    num_components: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 64
    """K, the number of Gaussians."""
    constant_log_std: float | None = None
    """Fix the mixture's log-std instead of learning it; 0 with K = 1 is ordinary flow matching."""
    transition_ratio: float | None = 0.9
    """Step of the transition loss, (sigma_high - sigma_low) / sigma_high in (0, 1].
    None: plain velocity NLL."""
    optimizer: Literal["adamw", "adam"] = "adamw"
    """AdamW (without weight decay) or Adam."""
    ema: bool = True
    """Keep the power-function average of the weights, decay (1 - 1/t)^8, and sample with it."""
    evaluate: Path | None = None
    """Only write the report of this checkpoint: into --out, or without it beside the checkpoint."""
    eval_samples: int = 200_000
    """Samples for each solver and step count in the report."""

    def __post_init__(self):
        super().__post_init__()
        require(self.eval_samples >= 1, "eval_samples", self.eval_samples, "at least 1")
        ratio = self.transition_ratio
        require(ratio is None or 0 < ratio <= 1, "transition_ratio", ratio, "in (0, 1], or None")


PRESETS = {
    "full": CheckerboardConfig(),
    "minimal": CheckerboardConfig(
        preset="minimal",
        num_components=32,
        transition_ratio=None,
        optimizer="adam",
        ema=False,
        warmup=0,
        iterations=50_000,
    ),
    "flow-matching": CheckerboardConfig(
        preset="flow-matching", num_components=1, constant_log_std=0.0, transition_ratio=None
    ),
}
