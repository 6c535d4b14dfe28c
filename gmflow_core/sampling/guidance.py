"""Guidance on distributions: steer the conditional mixture away from the unconditional mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..flow.path import Sigma, velocity_to_x0
from ..gaussians.mixture import GaussianMixture, IsotropicGaussian, Mixture, TiltedMixture

SLACK = 1e-6  # of sigmas at an interval's ends


def probabilistic_guidance(
    cond: Mixture, uncond_mean: Tensor, scale: float | Tensor, orthogonal: float = 1.0
) -> TiltedMixture:
    """Multiply `cond` by N(mean + bias, (1 - w^2) V) / N(mean, V) (GMFlow, ICML 2025).

    V is the variance of `cond` averaged over channels and space. The bias points from the
    unconditional to the conditional mean, without its part along the conditional mean, and has the
    mean square w^2 V: it shifts the mixture by w standard deviations, whatever the distance of the
    two means, and narrows it in exchange. Only differences with a root mean square below 0.001,
    which are rounding errors, shift it by less.

    Args:
        cond: conditional mixture of x_0.
        uncond_mean: unconditional mean of x_0, (B, C, *S).
        scale: guidance weight w in [0, 1), a number or one per sample (B,); 0 leaves `cond` as is.
        orthogonal: how much of the parallel part is removed, in [0, 1].

    Raises:
        ValueError: `scale` (if a number) or `orthogonal` is out of range.
    """
    _check_scale(scale, orthogonal)
    cond = TiltedMixture.of(cond.components())
    gaussian = cond.untilted_gaussian()
    mean, var = gaussian.mean, image_mean(gaussian.var)
    scale = _per_sample(scale, mean)
    bias = mean - uncond_mean
    parallel = image_mean(bias * mean) / image_mean(mean.square()).clamp(min=1e-6)
    bias = torch.addcmul(bias, parallel * -orthogonal, mean)
    bias = bias * (scale * (var / image_mean(bias.square()).clamp(min=1e-6)).sqrt())
    return with_shift(cond, GaussianShift(var, bias, scale.square()))


def classifier_free_guidance(
    cond: Mixture, uncond_mean: Tensor, scale: float | Tensor
) -> GaussianMixture:
    """Shift `cond` so that its mean is uncond + scale (cond - uncond) (Ho & Salimans 2022).

    Args:
        cond: conditional mixture of x_0.
        uncond_mean: unconditional mean of x_0, (B, C, *S).
        scale: a number or one per sample (B,); 1 leaves `cond` as it is.
    """
    mean = cond.mean()
    return cond.moved((_per_sample(scale, mean) - 1) * (mean - uncond_mean))


MIN_NARROWING = 1e-6
GUIDANCE_KINDS = ("probabilistic", "cfg")


@dataclass(frozen=True)
class Guidance:
    """Guidance with a user's settings.

    Args:
        scale: weight w in [0, 1) of probabilistic guidance, 0 for none; or scale of
            classifier-free guidance, 1 for none.
        kind: "probabilistic" or "cfg".
        orthogonal: see `probabilistic_guidance`.
        interval: (low, high), the sigmas between which guidance acts, both included; elsewhere
            the conditional mixture stays as it is (Kynkäänniemi et al. 2024).

    Raises:
        ValueError: a value is out of range.
    """

    scale: float
    kind: str = "probabilistic"
    orthogonal: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if self.kind not in GUIDANCE_KINDS:
            known = ", ".join(GUIDANCE_KINDS)
            raise ValueError(f"guidance kind {self.kind!r} is unknown; choose one of {known}")
        if self.kind == "probabilistic":
            _check_scale(self.scale, self.orthogonal)
        elif not self.scale >= 0:
            raise ValueError(f"guidance scale {self.scale} must be 0 or more")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"the guidance interval ({low}, {high}) must be two sigmas in [0, 1], "
                "the lower one first"
            )

    @property
    def idle(self) -> bool:
        """True if guidance never acts, so that no unconditional prediction is needed."""
        return self.scale == (0 if self.kind == "probabilistic" else 1)

    def acts_at(self, sigma: float | Tensor) -> bool:
        """Return whether guidance acts at `sigma`, a number or equal values (B,)."""
        return not self.idle and within(self.interval, sigma)

    def __call__(self, cond: Mixture, uncond_mean: Tensor) -> Mixture:
        """Return the guided mixture of x_0."""
        if self.kind == "cfg":
            return classifier_free_guidance(cond, uncond_mean, self.scale)
        return probabilistic_guidance(cond, uncond_mean, self.scale, self.orthogonal)

    def of_velocities(self, cond: Mixture, uncond: Mixture, x: Tensor, sigma: Sigma) -> Mixture:
        """Return the guided mixture of x_0 from two mixtures of velocities at (x, sigma)."""
        return self(velocity_to_x0(cond, x, sigma), velocity_to_x0(uncond.mean(), x, sigma))


def within(interval: tuple[float, float], sigma: float | Tensor) -> bool:
    """Return whether `sigma` lies in an interval, both ends included.

    Ends count as reached up to SLACK, as sigmas are rounded: float32 has no 0.3.

    Args:
        sigma: a number or equal values (B,). Reading a tensor forces a GPU sync; the interval
            (0, 1) contains every sigma and reads none.
    """
    low, high = interval
    if (low, high) == (0.0, 1.0):
        return True
    sigma = sigma.flatten()[0].item() if isinstance(sigma, Tensor) else sigma
    return low - SLACK <= sigma <= high + SLACK


class GaussianShift(NamedTuple):
    """A shift of a mixture's moment-matched Gaussian, from N(mean, V) to N(mean + bias, n V).

    Guidance and the second-order correction multiply a mixture by the quotient of the two.

    Args:
        var: V, averaged over channels and space, (B, 1, *1).
        bias: broadcastable to (B, C, *S).
        weight: 1 - n in [0, 1], broadcastable to (B, 1, *1); w^2 of probabilistic guidance.
    """

    var: Tensor
    bias: Tensor
    weight: Tensor

    @property
    def narrowing(self) -> Tensor:
        """Factor n of the variance, at least MIN_NARROWING."""
        return (1 - self.weight).clamp(min=MIN_NARROWING)


def with_shift(mixture: TiltedMixture, shift: GaussianShift) -> TiltedMixture:
    """Multiply the untilted mixture by N(mean + bias, n V) / N(mean, V)."""
    narrow = shift.narrowing * shift.var
    weight = shift.weight.clamp(max=1 - MIN_NARROWING)
    return mixture.with_tilt(shift.bias / narrow, weight / narrow)


def shift_of(mixture: TiltedMixture) -> GaussianShift:
    """Return the shift that the mixture's tilt stands for: inverse of `with_shift`."""
    var = image_mean(mixture.untilted_gaussian().var)
    growth = 1 + mixture.quadratic * var  # 1 / n
    return GaussianShift(var, mixture.slope * (var / growth), mixture.quadratic * var / growth)


def image_gaussian(mixture: Mixture) -> IsotropicGaussian:
    """Return the Gaussian of a mixture, with one variance per image.

    It is the moment-matched one, shifted as guidance and correction have shifted the mixture.

    Returns:
        mean (B, C, *S), var (B, 1, *1).
    """
    mixture = mixture.as_tilted()
    var = image_mean(mixture.untilted_gaussian().var)
    narrowed = var / (1 + mixture.quadratic * var)
    return IsotropicGaussian(mixture.origin + mixture.slope * narrowed, narrowed)


def image_mean(x: Tensor) -> Tensor:
    """Average over all dimensions but the batch, and keep them: (B, C, *S) -> (B, 1, *1)."""
    return x.mean(tuple(range(1, x.ndim)), keepdim=True)


def _check_scale(scale: float | Tensor, orthogonal: float) -> None:
    if not isinstance(scale, Tensor) and not 0 <= scale < 1:
        raise ValueError(
            f"the guidance weight {scale} is outside [0, 1); "
            "probabilistic guidance is not classifier-free guidance"
        )
    if not 0 <= orthogonal <= 1:
        raise ValueError(f"orthogonal is {orthogonal}; it must be in [0, 1]")


def _per_sample(scale: float | Tensor, like: Tensor) -> Tensor:
    """Return a number, or one per sample (B,), as a tensor that broadcasts to `like`."""
    if isinstance(scale, Tensor):
        return scale.to(like).reshape([-1] + [1] * (like.ndim - 1))
    return like.new_full([1] * like.ndim, scale)  # a fill needs no GPU sync
