"""Log a training run to Weights & Biases (wandb), beside TensorBoard."""

from __future__ import annotations

import importlib
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from gmflow_core.files.atomic import atomic_write
from gmflow_core.files.errors import reason

RUN = "wandb_run.txt"  # in OUT: wandb's id of the run
PROJECT = "gmflow"


class WandbRun:
    """Run of wandb that gets the numbers and pictures of a training run.

    Its axis is the iteration. A resumed training goes on in the same run of wandb, whose id is kept
    in OUT/wandb_run.txt.

    Args:
        folder: OUT.
        settings: of the training run, as JSON holds them.
        step: first iteration of this start.

    Raises:
        ModuleNotFoundError: wandb is not installed.
        ValueError: it does not start; the message says why.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], step: int):
        self.wandb = import_wandb()
        path = folder / RUN
        if step == 1 or not path.exists():
            with atomic_write(path) as temporary:
                temporary.write_text(uuid.uuid4().hex[:16], encoding="utf-8")
        try:
            self.run = self.wandb.init(
                project=PROJECT,
                name=folder.name,
                id=path.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(folder),
                config=settings,
            )
            self.run.define_metric("iteration")
            self.run.define_metric("*", step_metric="iteration")
        except Exception as error:  # wandb's own kinds, and those of the network
            raise ValueError(
                f"wandb does not start ({reason(error)}); run `wandb login`, or set "
                "WANDB_MODE=offline, or leave --wandb out"
            ) from error

    def numbers(self, values: dict[str, float], step: int) -> None:
        """Add a point to each curve."""
        self.run.log({**values, "iteration": step})

    def picture(self, name: str, picture: Tensor, step: int) -> None:
        """Add a picture (H, W, 3) in [0, 1]."""
        pixels = (picture.float().clamp(0, 1) * 255).round().byte().cpu().numpy()
        self.run.log({name: self.wandb.Image(pixels), "iteration": step})

    def close(self) -> None:
        """End the run."""
        self.run.finish()


def import_wandb() -> ModuleType:
    """Import wandb.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ModuleNotFoundError(
            f"--wandb needs wandb, which does not import ({error}): pip install wandb"
        ) from error
