"""Trajectories: what a solver passed through on its way from noise to data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Every = Literal["step", "substep"]
SAME = 1e-6  # difference of two sigmas that are the same but for rounding


class Trajectory(NamedTuple):
    """The states of a run in order, from the initial x to the result.

    Args:
        sigmas: (T,).
        x: x at these sigmas, (T, B, C, *S).
        x0: means of x_0 that the network calls predicted, one per step, (T', B, C, *S).
    """

    sigmas: Tensor
    x: Tensor
    x0: Tensor


def with_trajectory(sample: Callable[..., Tensor]) -> Callable[..., Any]:
    """Give a solver the keyword `return_trajectory`, which changes its result to two.

    The values are False; True or "step" for x after every step (T = steps + 1); "substep" for x
    after every substep, too, and after fresh noise where a solver adds some, so that sigmas may
    rise. "step" changes no number of the result. "substep" has the rollout computed by its
    definition, as any constraint has, which may differ from faster forms by rounding errors.

    Returns:
        A solver that returns x, or (x, `Trajectory`).
    """

    @functools.wraps(sample)
    def run(
        denoiser: Callable[[Tensor, Tensor], Any],
        x: Tensor,
        sigmas: Tensor | Sequence[float],
        *,
        return_trajectory: bool | Every = False,
        **settings: Any,
    ) -> Tensor | tuple[Tensor, Trajectory]:
        if return_trajectory is False:
            return sample(denoiser, x, sigmas, **settings)
        if return_trajectory not in (True, "step", "substep"):
            raise ValueError(
                f"return_trajectory is {return_trajectory!r}; it can be False, True, which is "
                '"step", or "substep"'
            )
        hooks = (settings.get(name) for name in ("callback", "constrain", "blend"))
        recorder = _Recorder(*hooks)
        settings["callback"] = recorder.callback
        if return_trajectory == "substep":
            recorder.keep(x, sigmas[0])
            settings["constrain"] = recorder.constrain
            settings["blend"] = recorder.blend if settings.get("blend") else None
        result = sample(denoiser, x, sigmas, **settings)
        if return_trajectory == "substep":
            return result, recorder.trajectory()
        states = [*recorder.reported, result]
        times = torch.as_tensor(sigmas).to(result)
        return result, Trajectory(times, torch.stack(states), torch.stack(recorder.x0))

    return run


class _Recorder:
    """Hooks of a solver that keep what it passes through, and call the user's own."""

    def __init__(
        self, callback: Callable | None, constrain: Callable | None, blend: Callable | None
    ):
        self.callback_of_user, self.constrain_of_user = callback, constrain
        self.blend_of_user = blend
        self.reported, self.x0 = [], []  # x and the mean of x_0 at every network call
        self.x, self.sigmas = [], []  # after every substep

    def callback(self, step: int, x: Tensor, x0_mean: Tensor) -> None:
        """Keep x and the mean of a network call."""
        self.reported.append(x)
        self.x0.append(x0_mean)
        if self.callback_of_user is not None:
            self.callback_of_user(step, x, x0_mean)

    def constrain(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Keep x after a substep, as the user's constraint wants it."""
        if self.constrain_of_user is not None:
            x = self.constrain_of_user(x, sigma)
        self.keep(x, sigma)
        return x

    def blend(self, start: Tensor, sigma: float, x: Tensor, sigma_end: float) -> Tensor:
        """Return x as the user blends it, and keep it in the place of the last substep's."""
        x = self.blend_of_user(start, sigma, x, sigma_end)
        if abs(float(self.sigmas[-1]) - sigma_end) < SAME:  # not where a solver has made x_0
            self.x[-1] = x
        return x

    def keep(self, x: Tensor, sigma: float | Tensor) -> None:
        """Keep x at sigma."""
        self.x.append(x)
        self.sigmas.append(torch.as_tensor(sigma).to(x.device).flatten()[0])

    def trajectory(self) -> Trajectory:
        """Return what was kept after every substep."""
        states = torch.stack(self.x)
        return Trajectory(torch.stack(self.sigmas).to(states), states, torch.stack(self.x0))
