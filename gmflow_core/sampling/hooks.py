"""Functions of the caller that a solver calls while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..flow.policy import Policy
from .rollout import Check, Constrain, rollout

Callback = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class Hooks:
    """Functions that a solver calls while it runs.

    Args:
        callback: called as callback(step, x, x0_mean) after each network call.
        constrain: called as constrain(x, sigma) after every substep; returns the x to go on with.
            For inpainting masks.
        check: called at least once per step; an exception from it ends the sampling. For the
            user's interruption.
    """

    callback: Callback | None = None
    constrain: Constrain | None = None
    check: Check | None = None

    def report(self, step: int, x: Tensor, mean: Callable[[], Tensor]) -> None:
        """Call the callback after a network call."""
        if self.callback is not None:
            self.callback(step, x, mean())

    def settle(self, x: Tensor, sigma: float) -> Tensor:
        """Return x at sigma as the constraint wants it."""
        return x if self.constrain is None else self.constrain(x, x.new_full((), sigma))

    def rollout(self, policy: Policy, x: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        """Return `rollout` under constraint and check."""
        hooks = {"constrain": self.constrain, "check": self.check}
        return rollout(policy, x, *arguments, **settings, **hooks)
