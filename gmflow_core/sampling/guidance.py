"""Guidance on distributions: steer the conditional mixture away from the unconditional mean without leaving the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..fast.compiling import fusible
from ..flow.path import Sigma, velocity_to_x0
from ..gaussians.mixture import GaussianMixture, IsotropicGaussian, TiltedMixture, Tilts


class MovedMixture(TiltedMixture):
    """A mixture times the quotient of two Gaussians, N(mean + bias, narrowing var) / N(mean, var): the second is the
    moment-matched one, with its variance averaged over the image, and becomes the first.

    Args:
        tilts: of the mixture.
        var: (B, 1, *1).
        bias: (B, C, *S).
        narrowing: in (0, 1], broadcastable to (B, 1, *1).
    """

    def __init__(self, tilts: Tilts, var: Tensor, bias: Tensor, narrowing: Tensor):
        super().__init__(tilts, bias / (narrowing * var), (1 / narrowing - 1) / var)
        self.__dict__.update(original_var=var, bias=bias, narrowing=narrowing)

    @property
    def gaussian(self) -> IsotropicGaussian:
        """What the moment-matched Gaussian was moved to: mean (B, C, *S), var (B, 1, *1)."""
        return IsotropicGaussian(self.tilts.origin + self.bias, self.original_var * self.narrowing)


class GuidedMixture(MovedMixture):
    """A mixture moved by guidance. It remembers the weight, so that a second-order solver can fuse its own correction with the
    guidance into one move of the conditional mixture (see `gmflow_core.solvers.second_order`).

    Args:
        scale: the guidance weight w, broadcastable to (B, 1, *1); the narrowing is 1 - w^2.
        Others: of `MovedMixture`.
    """

    def __init__(self, tilts: Tilts, var: Tensor, bias: Tensor, scale: Tensor):
        super().__init__(tilts, var, bias, 1 - scale.square())
        self.__dict__.update(scale=scale)


def probabilistic_guidance(
    cond: GaussianMixture, uncond_mean: Tensor, scale: float | Tensor, orthogonal: float = 1.0
) -> GuidedMixture:
    """Probabilistic guidance (GMFlow, ICML 2025): cond times N(mean + bias, (1 - w^2) V) / N(mean, V).

    The bias points from the unconditional to the conditional mean, without its part along the conditional mean, and has
    the mean square w^2 V, V the variance of `cond` averaged over channels and space: it shifts the mixture by w
    standard deviations, whatever the distance of the two means, and narrows it in exchange. Only a difference below a root
    mean square of 0.001 shifts it by less, as rounding errors have no direction.

    Args:
        cond: conditional mixture of x_0.
        uncond_mean: unconditional mean of x_0, (B, C, *S).
        scale: w in [0, 1), a number or one per sample (B,); 0 leaves `cond` as it is.
        orthogonal: how much of the parallel part is removed, in [0, 1].

    Raises:
        ValueError: `scale` (when a number) or `orthogonal` is out of range.
    """
    _check_scale(scale, orthogonal)
    return _guided(cond, uncond_mean, scale, orthogonal)


@fusible
def _guided(
    cond: GaussianMixture, uncond_mean: Tensor, scale: float | Tensor, orthogonal: float
) -> GuidedMixture:
    """See `probabilistic_guidance`."""
    tilts = Tilts(cond)
    mean, var = tilts.origin, image_mean(tilts.moment_match().var)
    scale = _per_sample(scale, mean)
    bias = mean - uncond_mean
    parallel = image_mean(bias * mean) / image_mean(mean.square()).clamp(min=1e-6)
    bias = torch.addcmul(bias, parallel * -orthogonal, mean)
    bias = bias * (scale * (var / image_mean(bias.square()).clamp(min=1e-6)).sqrt())
    return GuidedMixture(tilts, var, bias, scale)


@fusible
def _guided_velocities(
    cond: GaussianMixture,
    uncond: GaussianMixture,
    x: Tensor,
    sigma: Sigma,
    scale: float,
    orthogonal: float,
) -> GuidedMixture:
    """See `Guidance.of_velocities`."""
    return _guided(
        velocity_to_x0(cond, x, sigma), velocity_to_x0(uncond.mean(), x, sigma), scale, orthogonal
    )


def classifier_free_guidance(
    cond: GaussianMixture, uncond_mean: Tensor, scale: float | Tensor
) -> GaussianMixture:
    """Classifier-free guidance (Ho & Salimans 2022) on the mean, for comparison: `cond` moved as a whole so that its mean is
    uncond + scale (cond - uncond).

    Args:
        cond: conditional mixture of x_0.
        uncond_mean: unconditional mean of x_0, (B, C, *S).
        scale: a number or one per sample (B,); 1 leaves `cond` as it is.
    """
    mean = cond.mean()
    return cond.moved((_per_sample(scale, mean) - 1) * (mean - uncond_mean))


GUIDANCE_KINDS = ("probabilistic", "cfg")


@dataclass(frozen=True)
class Guidance:
    """Guidance as a user sets it.

    Args:
        scale: the weight w in [0, 1) of probabilistic guidance, 0 for none; the scale of classifier-free guidance, 1 for none.
        kind: "probabilistic" or "cfg".
        orthogonal: see `probabilistic_guidance`.
        interval: (low, high), the sigmas between which it acts, both included; elsewhere the conditional mixture is taken as it
            is (Kynkaanniemi et al. 2024).

    Raises:
        ValueError: a value is out of range.
    """

    scale: float
    kind: str = "probabilistic"
    orthogonal: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if self.kind not in GUIDANCE_KINDS:
            raise ValueError(
                f"guidance kind {self.kind!r} is unknown; choose one of {', '.join(GUIDANCE_KINDS)}"
            )
        if self.kind == "probabilistic":
            _check_scale(self.scale, self.orthogonal)
        elif not self.scale >= 0:
            raise ValueError(f"guidance scale {self.scale} must be 0 or more")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"the guidance interval ({low}, {high}) must be two sigmas in [0, 1], the lower one first"
            )

    @property
    def idle(self) -> bool:
        """Whether it never does anything, so that the unconditional prediction is not needed."""
        return self.scale == (0 if self.kind == "probabilistic" else 1)

    def acts_at(self, sigma: float | Tensor) -> bool:
        """Whether the unconditional prediction is needed at `sigma`, a number or equal values (B,)."""
        return not self.idle and within(self.interval, sigma)

    def __call__(self, cond: GaussianMixture, uncond_mean: Tensor) -> GaussianMixture:
        """The guided mixture of x_0."""
        if self.kind == "cfg":
            return classifier_free_guidance(cond, uncond_mean, self.scale)
        return probabilistic_guidance(cond, uncond_mean, self.scale, self.orthogonal)

    def of_velocities(
        self, cond: GaussianMixture, uncond: GaussianMixture, x: Tensor, sigma: Sigma
    ) -> GaussianMixture:
        """The guided mixture of x_0, from the two mixtures of velocities that were predicted at (x, sigma)."""
        if self.kind == "cfg":
            return self(velocity_to_x0(cond, x, sigma), velocity_to_x0(uncond.mean(), x, sigma))
        return _guided_velocities(cond, uncond, x, sigma, self.scale, self.orthogonal)


def within(interval: tuple[float, float], sigma: float | Tensor) -> bool:
    """Whether `sigma`, a number or equal values (B,), lies in an interval of sigmas, its ends included. The whole of [0, 1]
    holds every sigma, and a tensor is not read for that."""
    low, high = interval
    return (low, high) == (0.0, 1.0) or low <= (
        sigma.flatten()[0].item() if isinstance(sigma, Tensor) else sigma
    ) <= high


def _check_scale(scale: float | Tensor, orthogonal: float) -> None:
    if not isinstance(scale, Tensor) and not 0 <= scale < 1:
        raise ValueError(
            f"guidance scale {scale} is outside [0, 1); probabilistic guidance is not classifier-free guidance"
        )
    if not 0 <= orthogonal <= 1:
        raise ValueError(f"orthogonal is {orthogonal}; it must be in [0, 1]")


def _per_sample(scale: float | Tensor, like: Tensor) -> Tensor:
    """A number or one per sample (B,), broadcastable to `like`; a number without waiting for a GPU."""
    shape = [-1] + [1] * (like.ndim - 1)
    return (
        scale.to(like).reshape(shape)
        if isinstance(scale, Tensor)
        else like.new_full([1] * like.ndim, scale)
    )


def image_mean(x: Tensor) -> Tensor:
    """The average over everything but the batch, with its dimensions kept: (B, C, *S) -> (B, 1, *1)."""
    return x.mean(tuple(range(1, x.ndim)), keepdim=True)


def image_gaussian(mixture: GaussianMixture) -> IsotropicGaussian:
    """The moment-matched Gaussian with one variance for each image: mean (B, C, *S), var (B, 1, *1)."""
    gaussian = mixture.moment_match()
    return IsotropicGaussian(gaussian.mean, image_mean(gaussian.var))
