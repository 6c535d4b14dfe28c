"""Gaussian mixtures with one isotropic variance, and the algebra that flow matching needs of them.

Shapes: B samples, K components, C channels, and any number of space dimensions *S (none for points, two for images,
three for video-shaped latents). All densities are per pixel over the C channels; pixels are independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..fast.compiling import Parts, fusible
from .density import log_density
from .draws import Generator, draw_like, standard_normal
from .quantile import mixture_quantile, normal_score
from .tensors import at_least_float, sum_of_products
from .transport import _given, _given_point, _principal_axes, _root_weighted, _rotate


@dataclass(frozen=True, eq=False)
class IsotropicGaussian(Parts):
    """N(mean, var I) per pixel.

    Args:
        mean: (B, C, *S).
        var: broadcastable to (B, 1, *S), positive.

    Raises:
        ValueError: `mean` and `var` differ in their number of dimensions.
    """

    mean: Tensor
    var: Tensor

    def __post_init__(self):
        if self.mean.ndim != self.var.ndim:
            raise ValueError(
                f"IsotropicGaussian: mean {tuple(self.mean.shape)} and var {tuple(self.var.shape)} need the same number "
                "of dimensions; give var as (B, 1, *S), with 1 where it is shared"
            )
        object.__setattr__(self, "mean", at_least_float(self.mean))
        object.__setattr__(self, "var", at_least_float(self.var))


@dataclass(frozen=True, eq=False)
class GaussianMixture(Parts):
    """sum_k w_k N(means_k, std^2 I) per pixel, the standard deviation shared by all components and channels.

    Half-precision inputs are converted to float32, so that all mathematics below runs in float32 (or float64).

    Args:
        means: (B, K, C, *S).
        log_weights: (B, K, 1, *S), normalised over K.
        log_std: natural logarithm of the standard deviation, broadcastable to (B, 1, 1, *S).

    Raises:
        ValueError: the shapes do not belong together.
    """

    means: Tensor
    log_weights: Tensor
    log_std: Tensor

    def __post_init__(self):
        means, log_weights, log_std = self.means, self.log_weights, self.log_std
        if means.ndim < 3:
            raise ValueError(
                f"GaussianMixture: means {tuple(means.shape)} need at least the dimensions (B, K, C)"
            )
        if log_weights.shape != (*means.shape[:2], 1, *means.shape[3:]):
            raise ValueError(
                f"GaussianMixture: log_weights {tuple(log_weights.shape)} do not fit means {tuple(means.shape)}; "
                f"expected {(*means.shape[:2], 1, *means.shape[3:])}"
            )
        full = (means.shape[0], 1, 1, *means.shape[3:])
        if log_std.ndim != means.ndim or any(
            n not in (1, size) for n, size in zip(log_std.shape, full, strict=True)
        ):
            raise ValueError(
                f"GaussianMixture: log_std {tuple(log_std.shape)} does not broadcast to {full}; "
                "it is shared by all components and channels"
            )
        for name in ("means", "log_weights", "log_std"):
            object.__setattr__(self, name, at_least_float(getattr(self, name)))

    @property
    def num_components(self) -> int:
        """K."""
        return self.means.shape[1]

    @property
    def weights(self) -> Tensor:
        """Component probabilities, (B, K, 1, *S)."""
        return self.log_weights.exp()

    @property
    def var(self) -> Tensor:
        """The components' common variance, shaped as `log_std`."""
        return (2 * self.log_std).exp()

    @classmethod
    def point_mass(cls, mean: Tensor) -> GaussianMixture:
        """One component without a spread at (B, C, *S): ordinary flow matching."""
        mean = mean.unsqueeze(1)
        return cls(
            mean,
            torch.zeros_like(mean[:, :, :1]),
            mean.new_full((len(mean), *[1] * (mean.ndim - 1)), -30.0),
        )

    # Parts and moves

    def chunk(self, chunks: int) -> list[GaussianMixture]:
        """The batch in equal parts; `log_std` needs an entry for each sample."""
        fields = (self.means, self.log_weights, self.log_std)
        return [
            GaussianMixture(*parts)
            for parts in zip(*(field.chunk(chunks) for field in fields), strict=True)
        ]

    def fits(self, x: Tensor) -> bool:
        """Whether it is a mixture of tensors of the shape of x, (B, C, *S)."""
        return (self.means.shape[0], *self.means.shape[2:]) == tuple(x.shape)

    def to(self, device: torch.device) -> GaussianMixture:
        """The mixture on another device."""
        return GaussianMixture(
            self.means.to(device), self.log_weights.to(device), self.log_std.to(device)
        )

    def moved(self, by: Tensor) -> GaussianMixture:
        """The mixture moved as a whole, by (B, C, *S)."""
        return GaussianMixture(self.means + by.unsqueeze(1), self.log_weights, self.log_std)

    # Moments

    def mean(self) -> Tensor:
        """E[x], (B, C, *S)."""
        return sum_of_products(self.means, self.weights, 1).squeeze(1)

    def moment_match(self) -> IsotropicGaussian:
        """The isotropic Gaussian with the mixture's mean and, per pixel, its variance averaged over channels.

        Returns:
            mean (B, C, *S), var (B, 1, *S).
        """
        return Tilts(self).moment_match()

    def covariance(self, average: bool = False) -> Tensor:
        """Full covariance over the channels, per pixel, or averaged over space: (B, *S or *1, C, C)."""
        channels, *space = self.means.shape[2:]
        within = self.var[:, 0, 0, ..., None, None]  # (B, *S or *1, 1, 1)
        diff = _root_weighted(self.means, self.log_weights)
        if average and space:
            diff = diff.flatten(3)  # (B, K, C, n)
            between = (
                (diff @ diff.mT).sum(1).div(diff.shape[-1]).unflatten(0, (-1, *[1] * len(space)))
            )
            within = within.mean(tuple(range(1, 1 + len(space))), keepdim=True)
        else:
            diff = diff.movedim((2, 1), (-2, -1))  # (B, *S, C, K)
            between = diff @ diff.mT
        return between + within * torch.eye(channels, dtype=diff.dtype, device=diff.device)

    # Products

    def tilt(self, linear: Tensor, quadratic: Tensor | float) -> GaussianMixture:
        """The mixture times exp(linear . x - quadratic |x|^2 / 2), renormalised: multiplication by a Gaussian, a quotient
        of Gaussians, or a likelihood, in information form. `quadratic` 0 and `linear` 0 give the mixture back.

        Component k becomes N((mu_k + v linear) / d, v / d) with d = 1 + v quadratic, and its log-weight grows by
        mu_k . (linear - quadratic mu_k / 2) / d. Positions are taken relative to the mixture mean: the same in exact
        arithmetic, and in float32 it keeps the digits when the variance is small beside the means.

        Args:
            linear: (B, C, *S), or broadcastable.
            quadratic: a number, or broadcastable to (B, 1, *S). Where 1 + v quadratic is not positive no normalisable product
                exists; it is clamped at 1e-6.
        """
        tilts = Tilts(self)
        return TiltedMixture(tilts, tilts.slope(linear, quadratic), quadratic)

    def tilted_means(self) -> Callable[[Tensor, Tensor], Tensor]:
        """A function (linear, quadratic) -> the mean (B, C, *S) of `tilt(linear, quadratic)`, for many tilts of one mixture:
        what does not depend on them is computed once, and no component is moved."""
        tilts = Tilts(self)
        return lambda linear, quadratic: tilts.mean(tilts.slope(linear, quadratic), quadratic)

    def times(
        self, gaussian: IsotropicGaussian, over: IsotropicGaussian | None = None
    ) -> GaussianMixture:
        """The renormalised product with `gaussian`, or with the quotient `gaussian / over`.

        Args:
            gaussian: mean (B, C, *S), var broadcastable to (B, 1, *S).
            over: as `gaussian`; its variance is normally the larger of the two.
        """
        linear, quadratic = gaussian.mean / gaussian.var, gaussian.var.reciprocal()
        if over is not None:
            linear, quadratic = linear - over.mean / over.var, quadratic - over.var.reciprocal()
        return self.tilt(linear, quadratic)

    def with_temperature(self, temperature: float) -> GaussianMixture:
        """Sharpen (temperature < 1) or flatten (> 1): log-weights / T renormalised, variance times T (pi-Flow).

        Raises:
            ValueError: `temperature` is not positive.
        """
        if not temperature > 0:
            raise ValueError(
                f"temperature {temperature} must be positive; 1 leaves the mixture as it is"
            )
        return GaussianMixture(
            means=self.means,
            log_weights=(self.log_weights / temperature).log_softmax(1),
            log_std=self.log_std + 0.5 * math.log(temperature),
        )

    # Density and draws

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density per pixel in nats, with the 2 pi term: x (B, C, *S) -> (B, *S)."""
        return log_density(x, self.means, self.log_weights, self.log_std)

    def sample(
        self,
        generator: Generator | None = None,
        *,
        component: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """One draw per pixel, (B, C, *S): a component by its weight, then Gaussian noise around its mean.

        Args:
            generator: source of both draws, on any device, or one for each sample; the default generator if None.
            component: recorded component indices (B, *S) to use instead of a draw.
            noise: recorded standard normal noise (B, C, *S) to use instead of a draw.
        """
        if component is None:
            uniform = draw_like(
                torch.rand, (self.means.shape[0], *self.means.shape[3:]), generator, self.means
            )
            edges = self.weights.squeeze(2).cumsum(1)[:, :-1]  # (B, K - 1, *S)
            component = (uniform.unsqueeze(1) >= edges).sum(1)
        if noise is None:
            noise = standard_normal(
                (self.means.shape[0], *self.means.shape[2:]), generator, like=self.means
            )
        index = component[:, None, None].expand(-1, 1, *self.means.shape[2:])
        return self.means.gather(1, index).squeeze(1) + self.log_std.squeeze(1).exp() * noise

    # Knothe-Rosenblatt transport

    def principal_axes(self, per_pixel: bool = False) -> Tensor:
        """Orthonormal channel axes, as columns, in descending order of variance; no gradient. Signs are LAPACK's choice. Of a
        covariance that is not finite the axes are the channels.

        Args:
            per_pixel: axes of every pixel's own covariance, (B, *S, C, C), instead of those of the covariance averaged
                over space, (B, *1, C, C).
        """
        with torch.no_grad():
            return _principal_axes(
                GaussianMixture(self.means, self.log_weights, self.log_std), per_pixel
            )

    def to_normal(self, x: Tensor, axes: Tensor | None = None) -> Tensor:
        """Knothe-Rosenblatt map of samples of the mixture to standard normal ones, axis after axis: the first through its
        marginal CDF, each later one through its CDF given the earlier ones. Differentiable.

        Args:
            x: (B, C, *S).
            axes: (B, *S or *1, C, C), columns; `principal_axes()` if None.

        Returns:
            (B, C, *S), channel i along axis i.
        """
        axes = self.principal_axes() if axes is None else axes
        offsets = (_rotate(x.unsqueeze(1) - self.means, axes) / self.log_std.exp()).unbind(
            2
        )  # C of (B, K, *S)
        log_weights, normal = self.log_weights.squeeze(2), []
        for offset in offsets:
            normal.append(normal_score(log_weights.softmax(1), offset))
            log_weights = _given(log_weights, offset)
        return torch.stack(normal, 1)

    def from_normal(self, z: Tensor, axes: Tensor | None = None) -> Tensor:
        """Inverse of `to_normal`: standard normal samples (B, C, *S), channel i along axis i, to samples of the mixture.
        Differentiable in z and in the mixture (by the implicit function theorem)."""
        axes = self.principal_axes() if axes is None else axes
        batch, _, channels, *space = self.means.shape
        means = (
            _rotate(self.means, axes).movedim((2, 1), (0, 1)).flatten(2).unsqueeze(1)
        )  # (C, 1, K, n), n pixels in all
        log_weights = self.log_weights.movedim(1, 0).flatten(1).unsqueeze(0)  # (1, K, n)
        std = self.log_std.exp().expand(batch, 1, 1, *space).reshape(1, 1, -1)
        z = z.movedim(1, 0).reshape(channels, 1, -1)
        x = [mixture_quantile(means[0], std, log_weights, z[0])]
        for axis in range(1, channels):
            log_weights = _given_point(log_weights, x[-1], means[axis - 1], std)
            x.append(mixture_quantile(means[axis], std, log_weights, z[axis]))
        x = torch.stack(x, 1).unflatten(2, (batch, *space)).movedim(2, 0)  # (B, 1, C, *S)
        return _rotate(x, axes.mT).squeeze(1)


class Tilts(Parts):
    """The products of one mixture with exp(slope . (x - origin) - quadratic |x - origin|^2 / 2), where `origin` is its mean:
    the formulas of `GaussianMixture.tilt`, with what several tilts share computed once. Arguments are shaped as there."""

    def __init__(self, mixture: GaussianMixture):
        self.log_weights, self.log_std, self.weights = (
            mixture.log_weights,
            mixture.log_std,
            mixture.weights,
        )
        self.var = mixture.var.squeeze(1)
        self.origin = sum_of_products(mixture.means, self.weights, 1).squeeze(1)
        self.means = mixture.means - self.origin.unsqueeze(1)
        self._half_norms = self._compute_half_norms()

    @property
    def half_norms(self) -> Tensor:
        """Half of |means|^2, (B, K, 1, *S); what was compiled does not keep it."""
        return self._half_norms if "_half_norms" in self.__dict__ else self._compute_half_norms()

    def _compute_half_norms(self) -> Tensor:
        return 0.5 * sum_of_products(self.means, self.means, 2)

    def moment_match(self) -> IsotropicGaussian:
        """See `GaussianMixture.moment_match`."""
        spread = sum_of_products(self.weights, self.half_norms, 1).squeeze(1) * (
            2 / self.means.shape[2]
        )
        return IsotropicGaussian(self.origin, spread + self.var)

    def slope(self, linear: Tensor, quadratic: Tensor | float) -> Tensor:
        """At the origin, of exp(linear . x - quadratic |x|^2 / 2)."""
        return linear - quadratic * self.origin

    @fusible
    def mean(self, slope: Tensor, quadratic: Tensor | float) -> Tensor:
        """(B, C, *S)."""
        logits, scale = self._logits(slope, quadratic)
        moved = torch.addcmul(
            sum_of_products(self.means, logits.softmax(1), 1).squeeze(1), self.var, slope
        )
        return torch.addcmul(self.origin, moved, scale)

    @fusible
    def mixture(self, slope: Tensor, quadratic: Tensor | float) -> GaussianMixture:
        """Component k becomes N((mean_k + var slope) scale, var scale), relative to the origin."""
        logits, scale = self._logits(slope, quadratic)
        move, factor = self.var * scale * slope, scale.unsqueeze(1)
        return GaussianMixture(
            means=torch.addcmul(move.unsqueeze(1), self.means, factor).add_(
                self.origin.unsqueeze(1)
            ),
            log_weights=logits.log_softmax(1),
            log_std=self.log_std + 0.5 * factor.log(),
        )

    def _logits(self, slope: Tensor, quadratic: Tensor | float) -> tuple[Tensor, Tensor]:
        """The log-weights up to a constant, (B, K, 1, *S), and what the variance is multiplied by."""
        scale = (1 + self.var * quadratic).clamp(min=1e-6).reciprocal()
        if torch.compiler.is_compiling():  # in its loops half_norms are computed sooner than read
            factors = (scale * slope).unsqueeze(1) - (0.5 * scale * quadratic).unsqueeze(
                1
            ) * self.means
            return self.log_weights + sum_of_products(self.means, factors, 2), scale
        logits = torch.addcmul(
            self.log_weights, scale.unsqueeze(1), sum_of_products(self.means, slope.unsqueeze(1), 2)
        )
        return torch.addcmul(
            logits, (scale * quadratic).unsqueeze(1), self.half_norms, value=-1
        ), scale


class TiltedMixture(GaussianMixture):
    """A product of `Tilts` as a mixture. Its components are computed when they are asked for: its mean, and that of its own
    tilts, come without."""

    def __init__(self, tilts: Tilts, slope: Tensor, quadratic: Tensor | float):
        self.__dict__.update(
            tilts=tilts, slope=slope, quadratic=quadratic
        )  # frozen, as all mixtures

    means = property(lambda self: self._components.means)
    log_weights = property(lambda self: self._components.log_weights)
    log_std = property(lambda self: self._components.log_std)

    @cached_property
    def _components(self) -> GaussianMixture:
        with torch.enable_grad():  # whoever asks first
            return self.tilts.mixture(self.slope, self.quadratic)

    def mean(self) -> Tensor:
        return self.tilts.mean(self.slope, self.quadratic)

    def tilted_means(self) -> Callable[[Tensor, Tensor], Tensor]:
        tilts = self.tilts
        return lambda linear, quadratic: tilts.mean(
            self.slope + tilts.slope(linear, quadratic), self.quadratic + quadratic
        )
