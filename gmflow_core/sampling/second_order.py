"""The second-order correction of GM-ODE and GM-SDE (GMFlow, ICML 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..fast.compiling import Parts, compiles, fusible
from ..flow.path import posterior_mean
from ..gaussians.mixture import GaussianMixture, Tilts
from .guidance import GuidedMixture, MovedMixture, image_mean


@dataclass(frozen=True)
class Step(Parts):
    """What the second-order correction needs of the step before: its first-order (guided, uncorrected) mixture of x_0, where
    that was predicted, and the step's size."""

    mixture: GaussianMixture
    x: Tensor
    sigma: float
    size: float


class CorrectedMixture(MovedMixture):
    """What `second_order` gives where it is compiled, with its arguments as attributes. It is computed when it is asked for, so
    that it is compiled as part of what asks."""

    def __init__(
        self,
        first_order: GaussianMixture,
        previous: Step,
        x: Tensor,
        sigma: float,
        size: float,
        ca: float,
        cb: float,
    ):
        self.__dict__.update(
            first_order=first_order, previous=previous, x=x, sigma=sigma, size=size, ca=ca, cb=cb
        )

    tilts = property(lambda self: self._moved.tilts)
    slope = property(lambda self: self._moved.slope)
    quadratic = property(lambda self: self._moved.quadratic)
    original_var = property(lambda self: self._moved.original_var)
    bias = property(lambda self: self._moved.bias)
    narrowing = property(lambda self: self._moved.narrowing)

    @property
    def _moved(self) -> MovedMixture:
        if (
            "_kept" not in self.__dict__
        ):  # a cached_property has a lock, which torch.compile refuses
            found = _corrected(
                self.first_order, self.previous, self.x, self.sigma, self.size, self.ca, self.cb
            )
            self.__dict__["_kept"] = found
        return self.__dict__["_kept"]

    def settled(self) -> MovedMixture:
        return self.__dict__.get("_kept", self)


def second_order(
    mixture: GaussianMixture,
    previous: Step,
    x: Tensor,
    sigma: float,
    size: float,
    ca: float = 0.005,
    cb: float = 1.0,
) -> MovedMixture:
    """The second-order correction of GM-ODE and GM-SDE (GMFlow, ICML 2025), fused with probabilistic guidance.

    The last step's mixture, carried to (x, sigma), predicts a mean; half the difference to the new mean, scaled by the
    ratio of the step sizes and damped where it is mostly network error, extrapolates to the middle of the coming step.
    Together with the guidance bias it is applied in one update of the unguided mixture.

    Args:
        mixture: first-order mixture of x_0 at (x, sigma); a `GuidedMixture` when guided.
        previous: the step before.
        size: sigma minus the next sigma.
        ca, cb: network error relative to V, without guidance and per guidance weight.
    """
    compute = CorrectedMixture if compiles(mixture, previous, x) else _corrected
    return compute(mixture, previous, x, sigma, size, ca, cb)


@fusible
def _corrected(
    mixture: GaussianMixture,
    previous: Step,
    x: Tensor,
    sigma: float,
    size: float,
    ca: float,
    cb: float,
) -> MovedMixture:
    """The formulas of `second_order`."""
    if isinstance(mixture, GuidedMixture):
        tilts, var, scale = mixture.tilts, mixture.original_var, mixture.scale
    else:
        tilts = Tilts(mixture)
        var, scale = image_mean(tilts.moment_match().var), 0.0
    predicted = posterior_mean(previous.mixture, previous.x, previous.sigma, x, sigma)
    error = var * ((scale * cb) ** 2 + ca) / previous.size**2
    gain = (1 - error).clamp(min=0).sqrt() * (0.5 * size / previous.size)
    if isinstance(mixture, GuidedMixture):
        bias = torch.addcmul(mixture.bias, mixture.mean() - predicted, gain)
    else:
        bias = (tilts.origin - predicted) * gain
    power = image_mean(bias.square())
    bias = bias * (var / power.clamp(min=1e-6)).clamp(max=1).sqrt()
    return MovedMixture(tilts, var, bias, (1 - power / var.clamp(min=1e-6)).clamp(min=1e-6))
