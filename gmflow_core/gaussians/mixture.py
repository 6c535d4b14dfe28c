"""Gaussian mixtures with one isotropic variance, and the algebra that flow matching needs.

Shapes: B samples, K components, C channels, and any number of space dimensions *S (none for
points, two for images, three for video-shaped latents). Densities are per pixel over the C
channels; pixels are independent of each other.

Two types: `GaussianMixture` stores its components; `TiltedMixture` is a mixture times a Gaussian
factor, whose components are computed at every request. `Mixture` is what both can do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import transport
from .density import log_density
from .draws import Generator, draw_like, standard_normal
from .tensors import at_least_float, sum_of_products


@dataclass(frozen=True, eq=False)
class IsotropicGaussian:
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
                f"IsotropicGaussian: mean {tuple(self.mean.shape)} and var {tuple(self.var.shape)} "
                "need the same number of dimensions; give var as (B, 1, *S), with 1 where shared"
            )
        object.__setattr__(self, "mean", at_least_float(self.mean))
        object.__setattr__(self, "var", at_least_float(self.var))


class Mixture:
    """A mixture sum_k w_k N(mean_k, std^2 I) per pixel: operations on its components.

    Subclasses provide `means` (B, K, C, *S), `log_weights` (B, K, 1, *S), normalised over K, and
    `log_std`, broadcastable to (B, 1, 1, *S), shared by all components and channels.
    """

    means: Tensor
    log_weights: Tensor
    log_std: Tensor

    def components(self) -> GaussianMixture:
        """Return the mixture with its components computed."""
        raise NotImplementedError

    @property
    def num_components(self) -> int:
        """Number of components K."""
        return self.means.shape[1]

    @property
    def weights(self) -> Tensor:
        """Component probabilities, (B, K, 1, *S)."""
        return self.log_weights.exp()

    @property
    def var(self) -> Tensor:
        """Variance of the components, shaped as `log_std`."""
        return (2 * self.log_std).exp()

    # Parts and moves

    def chunk(self, chunks: int) -> list[GaussianMixture]:
        """Split the batch into equal parts; `log_std` needs an entry per sample."""
        own = self.components()
        fields = (own.means, own.log_weights, own.log_std)
        parts = zip(*(field.chunk(chunks) for field in fields), strict=True)
        return [GaussianMixture(*part) for part in parts]

    def fits(self, x: Tensor) -> bool:
        """Return whether samples of the mixture have the shape of x, (B, C, *S)."""
        return (self.means.shape[0], *self.means.shape[2:]) == tuple(x.shape)

    def to(self, device: torch.device) -> GaussianMixture:
        """Move the mixture to a device."""
        own = self.components()
        fields = (own.means, own.log_weights, own.log_std)
        return GaussianMixture(*(field.to(device) for field in fields))

    def moved(self, by: Tensor) -> GaussianMixture:
        """Shift the whole mixture by (B, C, *S)."""
        own = self.components()
        return GaussianMixture(own.means + by.unsqueeze(1), own.log_weights, own.log_std)

    # Moments

    def mean(self) -> Tensor:
        """Return E[x], (B, C, *S)."""
        return sum_of_products(self.means, self.weights, 1).squeeze(1)

    def moment_match(self) -> IsotropicGaussian:
        """Return the isotropic Gaussian with the mixture's mean and its variance.

        The variance is per pixel, averaged over channels.

        Returns:
            mean (B, C, *S), var (B, 1, *S).
        """
        return TiltedMixture.of(self.components()).untilted_gaussian()

    def covariance(self, average: bool = False) -> Tensor:
        """Return the full covariance over channels, per pixel or averaged over space.

        Returns:
            (B, *S or *1, C, C).
        """
        own = self.components()
        return transport.covariance(own.means, own.log_weights, own.log_std, average)

    # How sure it is

    def weight_entropy(self) -> Tensor:
        """Return the entropy of the weights in nats, (B, 1, *S), from 0 to log K."""
        return torch.special.entr(self.components().weights).sum(1)

    def effective_components(self) -> Tensor:
        """Return exp(entropy of the weights), (B, 1, *S): 1 if one counts, K if all are equal."""
        return self.weight_entropy().exp()

    def spread(self) -> Tensor:
        """Return the standard deviation of the whole mixture, (B, 1, *S).

        Its square is the variance within and between components, averaged over channels.
        """
        return self.moment_match().var.expand_as(self.components().log_weights[:, 0]).sqrt()

    # Products

    def as_tilted(self) -> TiltedMixture:
        """Convert to a TiltedMixture, which computes means of tilts without their components."""
        return TiltedMixture.of(self.components())

    def tilt(self, linear: Tensor, quadratic: Tensor | float) -> GaussianMixture:
        """Multiply by exp(linear . x - quadratic |x|^2 / 2) and renormalise.

        This is the product with a Gaussian, a quotient of Gaussians or a likelihood in information
        form. Component k becomes N((mu_k + v linear) / d, v / d) with d = 1 + v quadratic, and its
        log-weight grows by mu_k . (linear - quadratic mu_k / 2) / d.

        Args:
            linear: (B, C, *S), or broadcastable.
            quadratic: number, or broadcastable to (B, 1, *S). Where d is not positive there is no
                normalisable product; d is clamped at 1e-6.
        """
        return self.as_tilted().tilted(linear, quadratic).components()

    def times(
        self, gaussian: IsotropicGaussian, over: IsotropicGaussian | None = None
    ) -> GaussianMixture:
        """Multiply by `gaussian`, or by the quotient `gaussian / over`, and renormalise.

        Args:
            gaussian: mean (B, C, *S), var broadcastable to (B, 1, *S).
            over: as `gaussian`, normally with the larger variance.
        """
        linear, quadratic = gaussian.mean / gaussian.var, gaussian.var.reciprocal()
        if over is not None:
            linear = linear - over.mean / over.var
            quadratic = quadratic - over.var.reciprocal()
        return self.tilt(linear, quadratic)

    def with_temperature(self, temperature: float) -> GaussianMixture:
        """Sharpen (temperature < 1) or flatten (> 1) the mixture, as pi-Flow does.

        Log-weights become log_softmax(log_weights / T), the variance becomes T times itself.

        Raises:
            ValueError: `temperature` is not positive.
        """
        if not temperature > 0:
            raise ValueError(
                f"temperature {temperature} must be positive; 1 leaves the mixture as it is"
            )
        own = self.components()
        return GaussianMixture(
            means=own.means,
            log_weights=(own.log_weights / temperature).log_softmax(1),
            log_std=own.log_std + 0.5 * math.log(temperature),
        )

    # Density and draws

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density per pixel in nats, with the 2 pi term: (B, C, *S) -> (B, *S)."""
        own = self.components()
        return log_density(x, own.means, own.log_weights, own.log_std)

    def sample(
        self,
        generator: Generator | None = None,
        *,
        component: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Draw once per pixel: a component by its weight, then Gaussian noise around its mean.

        Args:
            generator: source of both draws, on any device, or one per sample; torch's if None.
            component: recorded component indices (B, *S) to use instead of a draw.
            noise: recorded standard normal noise (B, C, *S) to use instead of a draw.

        Returns:
            (B, C, *S).
        """
        own = self.components()
        batch, _, channels, *space = own.means.shape
        if component is None:
            component = own.component_at(
                draw_like(torch.rand, (batch, *space), generator, own.means)
            )
        if noise is None:
            noise = standard_normal((batch, channels, *space), generator, like=own.means)
        index = component[:, None, None].expand(-1, 1, channels, *space)
        return own.means.gather(1, index).squeeze(1) + own.log_std.squeeze(1).exp() * noise

    def component_at(self, uniform: Tensor) -> Tensor:
        """Return the index (B, *S) of the component at a number (B, *S) in [0, 1), by weight."""
        edges = self.components().weights.squeeze(2).cumsum(1)[:, :-1]  # (B, K - 1, *S)
        return (uniform.unsqueeze(1) >= edges).sum(1)

    # Knothe-Rosenblatt transport

    def principal_axes(self, per_pixel: bool = False) -> Tensor:
        """Return orthonormal channel axes, as columns, in descending order of variance.

        There is no gradient. Signs are LAPACK's choice. Falls back to the channel axes if the
        covariance is not finite. The eigenvalue solver forces a GPU sync.

        Args:
            per_pixel: axes of every pixel's own covariance, (B, *S, C, C), instead of those of
                the covariance averaged over space, (B, *1, C, C).
        """
        own = self.components()
        return transport.principal_axes(own.means, own.log_weights, own.log_std, per_pixel)

    def to_normal(self, x: Tensor, axes: Tensor | None = None) -> Tensor:
        """Map samples of the mixture to standard normal ones (Knothe-Rosenblatt); differentiable.

        Args:
            x: (B, C, *S).
            axes: (B, *S or *1, C, C), as columns; `principal_axes()` if None.

        Returns:
            (B, C, *S), channel i along axis i.
        """
        own = self.components()
        axes = own.principal_axes() if axes is None else axes
        return transport.to_normal(x, own.means, own.log_weights, own.log_std, axes)

    def from_normal(
        self,
        z: Tensor,
        axes: Tensor | None = None,
        axis_map: transport.AxisMap | None = None,
    ) -> Tensor:
        """Map standard normal samples to samples of the mixture: inverse of `to_normal`.

        It is differentiable in z and in the mixture (implicit function theorem).

        Args:
            z: (B, C, *S), channel i along axis i.
            axes: as in `to_normal`.
            axis_map: other forms of the two steps along an axis; the plain ones if None.
        """
        own = self.components()
        axes = own.principal_axes() if axes is None else axes
        parts = (own.means, own.log_weights, own.log_std, axes)
        return transport.from_normal(z, *parts, axis_map)


@dataclass(frozen=True, eq=False)
class GaussianMixture(Mixture):
    """sum_k w_k N(means_k, std^2 I) per pixel, with one std for all components and channels.

    Half-precision inputs become float32, so all mathematics runs in float32 or float64.

    Args:
        means: (B, K, C, *S).
        log_weights: (B, K, 1, *S), normalised over K.
        log_std: natural logarithm of the standard deviation, broadcastable to (B, 1, 1, *S).

    Raises:
        ValueError: the shapes do not fit together.
    """

    means: Tensor
    log_weights: Tensor
    log_std: Tensor

    def __post_init__(self):
        means, log_weights, log_std = self.means, self.log_weights, self.log_std
        if means.ndim < 3:
            raise ValueError(
                f"GaussianMixture: means {tuple(means.shape)} need at least the dimensions "
                "(B, K, C)"
            )
        expected = (*means.shape[:2], 1, *means.shape[3:])
        if log_weights.shape != expected:
            raise ValueError(
                f"GaussianMixture: log_weights {tuple(log_weights.shape)} do not fit means "
                f"{tuple(means.shape)}; expected {expected}"
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

    def components(self) -> GaussianMixture:
        """Return the mixture itself."""
        return self

    @classmethod
    def point_mass(cls, mean: Tensor) -> GaussianMixture:
        """Return one component without spread at (B, C, *S): ordinary flow matching."""
        mean = mean.unsqueeze(1)
        log_std = mean.new_full((len(mean), *[1] * (mean.ndim - 1)), -30.0)
        return cls(mean, torch.zeros_like(mean[:, :, :1]), log_std)


@dataclass(frozen=True, eq=False)
class TiltedMixture(Mixture):
    """A mixture times exp(slope . (x - origin) - quadratic |x - origin|^2 / 2), renormalised.

    With offsets d_k = mean_k - origin and scale = 1 / (1 + var quadratic), component k is
    N(origin + scale (d_k + var slope), scale var), and its log-weight grows by
    scale (d_k . slope - quadratic |d_k|^2 / 2). Positions are relative to the mixture's mean, which
    keeps digits in float32 where the variance is small beside the means.

    Args:
        origin: mean of the mixture before the tilt, (B, C, *S).
        centred: that mixture, shifted by -origin.
        half_norms: |d_k|^2 / 2, (B, K, 1, *S).
        slope: broadcastable to (B, C, *S).
        quadratic: number, or broadcastable to (B, 1, *S).
    """

    origin: Tensor
    centred: GaussianMixture
    half_norms: Tensor
    slope: Tensor
    quadratic: Tensor | float

    @classmethod
    def of(cls, mixture: GaussianMixture) -> TiltedMixture:
        """Return `mixture` with no tilt yet."""
        origin = sum_of_products(mixture.means, mixture.weights, 1).squeeze(1)
        offsets = mixture.means - origin.unsqueeze(1)
        centred = GaussianMixture(offsets, mixture.log_weights, mixture.log_std)
        half_norms = 0.5 * sum_of_products(offsets, offsets, 2)
        return cls(origin, centred, half_norms, origin.new_zeros([1] * origin.ndim), 0.0)

    def as_tilted(self) -> TiltedMixture:
        """Return the mixture itself."""
        return self

    def tilted(self, linear: Tensor, quadratic: Tensor | float) -> TiltedMixture:
        """Multiply by exp(linear . x - quadratic |x|^2 / 2); arguments as in `tilt`."""
        slope = self.slope + (linear - quadratic * self.origin)
        return replace(self, slope=slope, quadratic=self.quadratic + quadratic)

    def with_tilt(self, slope: Tensor, quadratic: Tensor | float) -> TiltedMixture:
        """Replace the tilt."""
        return replace(self, slope=slope, quadratic=quadratic)

    def untilted_gaussian(self) -> IsotropicGaussian:
        """Return `moment_match()` of the mixture before the tilt."""
        channels = self.centred.means.shape[2]
        spread = sum_of_products(self.centred.weights, self.half_norms, 1).squeeze(1)
        return IsotropicGaussian(self.origin, spread * (2 / channels) + self.centred.var.squeeze(1))

    def mean(self) -> Tensor:
        """Return E[x], (B, C, *S), without computing the components."""
        logits, scale = self._logits()
        mean = sum_of_products(self.centred.means, logits.softmax(1), 1).squeeze(1)
        mean = torch.addcmul(mean, self.centred.var.squeeze(1), self.slope)
        return torch.addcmul(self.origin, mean, scale)

    def components(self) -> GaussianMixture:
        """Compute the product as a mixture with components of its own."""
        logits, scale = self._logits()
        move = self.centred.var.squeeze(1) * scale * self.slope
        scale = scale.unsqueeze(1)
        means = torch.addcmul(move.unsqueeze(1), self.centred.means, scale)
        return GaussianMixture(
            means=means.add_(self.origin.unsqueeze(1)),
            log_weights=logits.log_softmax(1),
            log_std=self.centred.log_std + 0.5 * scale.log(),
        )

    def _logits(self) -> tuple[Tensor, Tensor]:
        """Return log-weights up to a constant, (B, K, 1, *S), and `scale`, (B, 1, *S)."""
        scale = (1 + self.centred.var.squeeze(1) * self.quadratic).clamp(min=1e-6).reciprocal()
        inner = sum_of_products(self.centred.means, self.slope.unsqueeze(1), 2)
        logits = torch.addcmul(self.centred.log_weights, scale.unsqueeze(1), inner)
        weight = (scale * self.quadratic).unsqueeze(1)
        return torch.addcmul(logits, weight, self.half_norms, value=-1), scale

    @property
    def means(self) -> Tensor:
        """Means of the product's components, (B, K, C, *S)."""
        return self.components().means

    @property
    def log_weights(self) -> Tensor:
        """Log-weights of the product's components, (B, K, 1, *S)."""
        return self.components().log_weights

    @property
    def log_std(self) -> Tensor:
        """Log-std of the product's components, broadcastable to (B, 1, 1, *S)."""
        return self.components().log_std
