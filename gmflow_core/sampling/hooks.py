"""Functions of the caller that a solver calls while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..flow.policy import Policy
from .rollout import Check, Constrain, rollout

Callback = Callable[[int, Tensor, Tensor], None]
Blend = Callable[[Tensor, float, Tensor, float], Tensor]


@dataclass(frozen=True)
class Hooks:
    """Functions that a solver calls while it runs.

    Args:
        callback: called as callback(step, x, x0_mean) after each network call.
        constrain: called as constrain(x, sigma) after every substep; returns the x to go on with.
            For the part of an inpainting mask where nothing is to change.
        blend: called as blend(start, sigma, x, sigma_end) once for each network call, with the x at
            sigma that it was for and the x that its prediction alone leads to, before fresh noise
            (the x_0 itself, at 0, of GM-SDE and multistep solvers); returns the x to go on with.
            For soft inpainting masks.
        check: called at least once per step; an exception from it ends the sampling. For the
            user's interruption.
    """

    callback: Callback | None = None
    constrain: Constrain | None = None
    blend: Blend | None = None
    check: Check | None = None

    def report(self, step: int, x: Tensor, mean: Callable[[], Tensor]) -> None:
        """Call the callback after a network call."""
        if self.callback is not None:
            self.callback(step, x, mean())

    def settle(self, x: Tensor, sigma: float) -> Tensor:
        """Return x at sigma as the constraint wants it."""
        return x if self.constrain is None else self.constrain(x, x.new_full((), sigma))

    def blended(self, start: Tensor, sigma: float, x: Tensor, sigma_end: float) -> Tensor:
        """Return x at sigma_end, where a prediction for `start` at sigma leads, as blended."""
        return x if self.blend is None else self.blend(start, sigma, x, sigma_end)

    def rollout(
        self, policy: Policy, x: Tensor, sigma: float, sigma_end: float, *rest: Any, **settings: Any
    ) -> Tensor:
        """Return `rollout` under constraint and check, as blended."""
        hooks = {"constrain": self.constrain, "check": self.check}
        end = rollout(policy, x, sigma, sigma_end, *rest, **settings, **hooks)
        return self.blended(x, sigma, end, sigma_end)
