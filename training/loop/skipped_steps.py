"""Count the steps whose gradient is not finite, without a GPU sync in each iteration."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

MAX_IN_A_ROW = 10  # this many steps in a row without a finite gradient end a run


class SkippedSteps:
    """Numbers of steps without a finite gradient.

    Attributes:
        total: steps that were skipped, in all.
        in_a_row: steps that were skipped since the last good one.
    """

    def __init__(self):
        self.total = self.in_a_row = 0
        self._flags: list[Tensor] = []  # of the steps that are not counted yet

    def add(self, finite: Tensor) -> None:
        """Note whether a step's gradient is finite: a bool on the device, which is not read yet."""
        self._flags.append(finite)

    def count(self) -> bool:
        """Bring the numbers up to date; this forces a GPU sync.

        Returns:
            True if `MAX_IN_A_ROW` steps or more in a row were skipped.
        """
        most = 0
        for finite in torch.stack(self._flags).tolist() if self._flags else []:
            self.total += not finite
            self.in_a_row = 0 if finite else self.in_a_row + 1
            most = max(most, self.in_a_row)
        self._flags.clear()
        return most >= MAX_IN_A_ROW


def not_finite(step: int, path: Path) -> FloatingPointError:
    """Return the error about too many steps in a row, before iteration `step`.

    Args:
        path: the run's checkpoint.
    """
    kept = f"{path} still holds the last good checkpoint"
    count = min(MAX_IN_A_ROW, step)
    return FloatingPointError(
        f"the gradient was not finite for {count} steps in a row before iteration {step}; "
        f"{kept if path.exists() else 'nothing is saved yet'}: lower --lr (in another --out), use "
        "--precision fp32, or look for broken values in the data"
    )
