"""Choose how a model is sampled where the user leaves it open: as it was distilled, if it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..flow.checks import whole_number
from ..flow.path import flow_sigmas

STEPS = 8  # network calls of a model that was made for no number of them


@dataclass(frozen=True)
class Choice:
    """Solver and time grid of a model's samples.

    Args:
        solver: a name in `SOLVERS`.
        steps: network calls.
        shift: of the times.
        final_step_size: size of the last step relative to the others; None for a model that was
            not distilled, whose steps are equal.
        temperature: of a distilled model's policy; None for other models.
    """

    solver: str
    steps: int
    shift: float
    final_step_size: float | None = None
    temperature: float | None = None

    def sigmas(self, end: float = 0.0) -> Tensor:
        """Return the time grid, see `flow_sigmas`; there must be steps."""
        last = 1.0 if self.final_step_size is None else self.final_step_size
        return flow_sigmas(self.steps, self.shift, final_step_size=last, end=end)


def choose_sampling(
    data: dict[str, Any],
    *,
    solver: str | None = None,
    steps: int | None = None,
    shift: float | None = None,
) -> Choice:
    """Return the settings of a model's samples, with its own where the user gives none.

    Args:
        data: the record of the checkpoint's samples; `few_steps` says what it was distilled for.
        solver, steps, shift: as the user gave them. A distilled model has its own; others take
            GM-ODE, 8 steps and no shift. 0 steps leave the noise as it is.

    Raises:
        ValueError: `steps` is no whole number or out of range.
    """
    few = data.get("few_steps") or {}
    return Choice(
        solver or ("gm-policy" if few else "gm-ode"),
        few.get("steps", STEPS) if steps is None else whole_number("steps", steps, least=0),
        few.get("shift", 1.0) if shift is None else shift,
        few.get("final_step_size"),
        few.get("temperature"),
    )
