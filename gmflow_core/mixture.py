"""Gaussian mixtures with one isotropic variance, and the algebra that flow matching needs of them.

Shapes: B samples, K components, C channels, and any number of space dimensions *S (none for points, two for images,
three for video-shaped latents). All densities are per pixel over the C channels; pixels are independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Generator = torch.Generator | Sequence[torch.Generator]  # one for all samples, or one for each

LOG_2PI = math.log(2 * math.pi)
SHORT = 32  # terms of a sum that are added one after another


def _sum_of_products(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """(a * b).sum(dim, keepdim=True), without the product in memory where the sum is short: what is added up stays in the
    cache."""
    if a.shape[dim] > SHORT:
        return (a * b).sum(dim, keepdim=True)
    pairs = zip(a.split(1, dim), b.expand(*b.shape[:dim], a.shape[dim], *b.shape[dim + 1 :]).split(1, dim), strict=True)
    first, *others = pairs
    total = first[0] * first[1]
    for left, right in others:
        total = torch.addcmul(total, left, right)
    return total


def _float(tensor: Tensor) -> Tensor:
    """Half-precision values in float32; float32 and float64 as they are."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


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
                f"IsotropicGaussian: mean {tuple(self.mean.shape)} and var {tuple(self.var.shape)} need the same number "
                "of dimensions; give var as (B, 1, *S), with 1 where it is shared"
            )
        object.__setattr__(self, "mean", _float(self.mean))
        object.__setattr__(self, "var", _float(self.var))


@dataclass(frozen=True, eq=False)
class GaussianMixture:
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
            raise ValueError(f"GaussianMixture: means {tuple(means.shape)} need at least the dimensions (B, K, C)")
        if log_weights.shape != (*means.shape[:2], 1, *means.shape[3:]):
            raise ValueError(
                f"GaussianMixture: log_weights {tuple(log_weights.shape)} do not fit means {tuple(means.shape)}; "
                f"expected {(*means.shape[:2], 1, *means.shape[3:])}"
            )
        full = (means.shape[0], 1, 1, *means.shape[3:])
        if log_std.ndim != means.ndim or any(n not in (1, size) for n, size in zip(log_std.shape, full, strict=True)):
            raise ValueError(
                f"GaussianMixture: log_std {tuple(log_std.shape)} does not broadcast to {full}; "
                "it is shared by all components and channels"
            )
        for name in ("means", "log_weights", "log_std"):
            object.__setattr__(self, name, _float(getattr(self, name)))

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
        return cls(mean, torch.zeros_like(mean[:, :, :1]), mean.new_full((len(mean), *[1] * (mean.ndim - 1)), -30.0))

    # Parts and moves

    def chunk(self, chunks: int) -> list[GaussianMixture]:
        """The batch in equal parts; `log_std` needs an entry for each sample."""
        fields = (self.means, self.log_weights, self.log_std)
        return [GaussianMixture(*parts) for parts in zip(*(field.chunk(chunks) for field in fields), strict=True)]

    def fits(self, x: Tensor) -> bool:
        """Whether it is a mixture of tensors of the shape of x, (B, C, *S)."""
        return (self.means.shape[0], *self.means.shape[2:]) == tuple(x.shape)

    def to(self, device: torch.device) -> GaussianMixture:
        """The mixture on another device."""
        return GaussianMixture(self.means.to(device), self.log_weights.to(device), self.log_std.to(device))

    def moved(self, by: Tensor) -> GaussianMixture:
        """The mixture moved as a whole, by (B, C, *S)."""
        return GaussianMixture(self.means + by.unsqueeze(1), self.log_weights, self.log_std)

    # Moments

    def mean(self) -> Tensor:
        """E[x], (B, C, *S)."""
        return (self.weights * self.means).sum(1)

    def moment_match(self) -> IsotropicGaussian:
        """The isotropic Gaussian with the mixture's mean and, per pixel, its variance averaged over channels.

        Returns:
            mean (B, C, *S), var (B, 1, *S).
        """
        mean = self.mean()
        spread = (self.weights * (self.means - mean.unsqueeze(1)).square()).sum(1).mean(1, keepdim=True)
        return IsotropicGaussian(mean, spread + self.var.squeeze(1))

    def covariance(self) -> Tensor:
        """Full covariance over the channels, per pixel: (B, *S, C, C)."""
        diff = (self.means - self.mean().unsqueeze(1)).movedim(2, -1)  # (B, K, *S, C)
        weighted = diff * self.weights.movedim(2, -1)
        between = torch.einsum("bk...c,bk...d->b...cd", weighted, diff)
        within = self.var[:, 0, 0, ..., None, None]  # (B, *S, 1, 1)
        return between + within * torch.eye(self.means.shape[2], dtype=between.dtype, device=between.device)

    # Products

    def tilt(self, linear: Tensor, quadratic: Tensor) -> GaussianMixture:
        """The mixture times exp(linear . x - quadratic |x|^2 / 2), renormalised: multiplication by a Gaussian, a quotient
        of Gaussians, or a likelihood, in information form. `quadratic` 0 and `linear` 0 give the mixture back.

        Component k becomes N((mu_k + v linear) / d, v / d) with d = 1 + v quadratic, and its log-weight grows by
        mu_k . (linear - quadratic mu_k / 2) / d. Positions are taken relative to the mixture mean: the same in exact
        arithmetic, and in float32 it keeps the digits when the variance is small beside the means.

        Args:
            linear: (B, C, *S), or broadcastable.
            quadratic: broadcastable to (B, 1, *S). Where 1 + v quadratic is not positive no normalisable product
                exists; it is clamped at 1e-6.
        """
        var = self.var
        quadratic = quadratic.unsqueeze(1)
        origin = self.mean().unsqueeze(1)  # (B, 1, C, *S)
        means = self.means - origin
        linear = linear.unsqueeze(1) - quadratic * origin
        scale = (1 + var * quadratic).clamp(min=1e-6).reciprocal()
        gain = (means * (linear - 0.5 * quadratic * means)).sum(2, keepdim=True) * scale  # (B, K, 1, *S)
        return GaussianMixture(
            means=origin + (means + var * linear) * scale,
            log_weights=(self.log_weights + gain).log_softmax(1),
            log_std=self.log_std + 0.5 * scale.log(),
        )

    def tilted_means(self) -> Callable[[Tensor, Tensor], Tensor]:
        """A function (linear, quadratic) -> the mean (B, C, *S) of `tilt(linear, quadratic)`, for many tilts of one mixture:
        what does not depend on them is computed once, and no component is moved."""
        origin, var = self.mean(), self.var.squeeze(1)
        means = self.means - origin.unsqueeze(1)
        half_norms = 0.5 * means.square().sum(2, keepdim=True)  # (B, K, 1, *S)

        def mean(linear: Tensor, quadratic: Tensor) -> Tensor:
            linear = linear - quadratic * origin
            scale = (1 + var * quadratic).clamp(min=1e-6).reciprocal()
            gain = _sum_of_products(means, linear.unsqueeze(1), 2) - quadratic.unsqueeze(1) * half_norms
            weights = (self.log_weights + gain * scale.unsqueeze(1)).softmax(1)
            return origin + (_sum_of_products(means, weights, 1).squeeze(1) + var * linear) * scale

        return mean

    def times(self, gaussian: IsotropicGaussian, over: IsotropicGaussian | None = None) -> GaussianMixture:
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
            raise ValueError(f"temperature {temperature} must be positive; 1 leaves the mixture as it is")
        return GaussianMixture(
            means=self.means,
            log_weights=(self.log_weights / temperature).log_softmax(1),
            log_std=self.log_std + 0.5 * math.log(temperature),
        )

    # Density and draws

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density per pixel in nats, with the 2 pi term: x (B, C, *S) -> (B, *S)."""
        channels = self.means.shape[2]
        distance = ((x.unsqueeze(1) - self.means) * (-self.log_std).exp()).square().sum(2, keepdim=True)
        log_density = self.log_weights - 0.5 * distance - channels * (self.log_std + 0.5 * LOG_2PI)
        return log_density.logsumexp(1).squeeze(1)

    def sample(
        self, generator: Generator | None = None, *, component: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """One draw per pixel, (B, C, *S): a component by its weight, then Gaussian noise around its mean.

        Args:
            generator: source of both draws, on any device, or one for each sample; the default generator if None.
            component: recorded component indices (B, *S) to use instead of a draw.
            noise: recorded standard normal noise (B, C, *S) to use instead of a draw.
        """
        if component is None:
            uniform = _draw(torch.rand, (self.means.shape[0], *self.means.shape[3:]), generator, self.means)
            edges = self.weights.squeeze(2).cumsum(1)[:, :-1]  # (B, K - 1, *S)
            component = (uniform.unsqueeze(1) >= edges).sum(1)
        if noise is None:
            noise = standard_normal((self.means.shape[0], *self.means.shape[2:]), generator, like=self.means)
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
            covariance = self.covariance()
            space = tuple(range(1, covariance.ndim - 2))
            if space and not per_pixel:
                covariance = covariance.mean(space, keepdim=True)
            finite = covariance.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
            covariance = torch.where(finite, covariance, torch.eye(covariance.shape[-1]).to(covariance))  # or LAPACK gives up
            return torch.linalg.eigh(covariance).eigenvectors.flip(-1)

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
        means, std = (
            _rotate(self.means, axes.unsqueeze(1), channel=2),
            self.log_std.squeeze(2).exp(),
        )  # (B, K, C, *S), (B, 1, *S)
        x = _rotate(x, axes)
        log_weights = self.log_weights.squeeze(2)
        normal = []
        for axis in range(x.shape[1]):
            offset = (x[:, axis : axis + 1] - means[:, :, axis]) / std  # (B, K, *S)
            normal.append(_normal_score(log_weights, offset))
            log_weights = (log_weights - 0.5 * offset.square()).log_softmax(1)
        return torch.stack(normal, 1)

    def from_normal(self, z: Tensor, axes: Tensor | None = None) -> Tensor:
        """Inverse of `to_normal`: standard normal samples (B, C, *S), channel i along axis i, to samples of the mixture.
        Differentiable in z and in the mixture (by the implicit function theorem)."""
        axes = self.principal_axes() if axes is None else axes
        means, std = _rotate(self.means, axes.unsqueeze(1), channel=2), self.log_std.squeeze(2).exp()
        log_weights = self.log_weights.squeeze(2)
        x = []
        for axis in range(z.shape[1]):
            x.append(mixture_quantile(means[:, :, axis], std, log_weights, z[:, axis]))
            offset = (x[-1].unsqueeze(1) - means[:, :, axis]) / std
            log_weights = (log_weights - 0.5 * offset.square()).log_softmax(1)
        return _rotate(torch.stack(x, 1), axes.transpose(-1, -2))


def standard_normal(shape: tuple[int, ...], generator: Generator | None, *, like: Tensor) -> Tensor:
    """N(0, 1) draws with the device and dtype of `like`, drawn where the generator lives (so that a CPU generator gives
    the same numbers whatever the device of the maths). With one generator for each sample, a sample's numbers do not
    depend on what else is in its batch."""
    return _draw(torch.randn, shape, generator, like)


def _draw(distribution: Callable[..., Tensor], shape: tuple[int, ...], generator: Generator | None, like: Tensor) -> Tensor:
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators do not fit a batch of {shape[0]}; give one for each sample")
        return torch.stack([_draw(distribution, shape[1:], each, like) for each in generator])
    device = like.device if generator is None else generator.device
    return distribution(shape, generator=generator, device=device).to(like)


def mixture_quantile(means: Tensor, std: Tensor, log_weights: Tensor, z: Tensor, steps: int = 32) -> Tensor:
    """The quantile of a 1-D mixture at level Phi(z), by Newton's method inside a shrinking bracket.

    With one common std the quantile lies between the smallest and the largest component quantile mean_k + std z; a
    Newton step that would leave the bracket is replaced by bisection, so that gaps without density do no harm.
    Gradients in all arguments come from one last, exact Newton step (implicit function theorem).

    Args:
        means, log_weights: (B, K, *S); std: broadcastable to (B, 1, *S); z: (B, *S).
        steps: iterations; Newton doubles the digits each time once it is near.

    Returns:
        (B, *S).
    """
    with torch.no_grad():
        quantiles = means + std * z.unsqueeze(1)
        low, high = quantiles.amin(1), quantiles.amax(1)
        x = (log_weights.exp() * quantiles).sum(1).clamp(low, high)
        for _ in range(steps):
            excess, density = _cdf_excess(means, std, log_weights, x, z)
            low, high = torch.where(excess > 0, low, x), torch.where(excess > 0, x, high)
            newton = x - excess / density
            x = torch.where((newton >= low) & (newton <= high), newton, 0.5 * (low + high))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (means, std, log_weights, z)):
        excess, density = _cdf_excess(means, std, log_weights, x, z)
        x = x - (excess - excess.detach()) / density.detach().clamp(min=1e-30)
    return x


def _cdf_excess(means: Tensor, std: Tensor, log_weights: Tensor, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """(F(x) - Phi(z) to first order, F'(x)) of a 1-D mixture. The difference is that of the logarithms, times F, in whichever
    tail z lies: it has the sign and, at the root, the derivatives of the plain one, and Newton's steps on it go far where the
    tail is thin."""
    offset = (x.unsqueeze(1) - means) / std
    weights = log_weights.exp()
    side = torch.where(z < 0, 1.0, -1.0)
    tail = (weights * normal_cdf(side.unsqueeze(1) * offset)).sum(1).clamp(min=torch.finfo(x.dtype).tiny)
    density = (weights * (-0.5 * (offset.square() + LOG_2PI)).exp() / std).sum(1)
    return side * tail * (tail.log() - torch.special.log_ndtr(side * z)), density


def normal_cdf(x: Tensor) -> Tensor:
    """Phi(x), exact in the lower tail too (torch's own ndtr is 0 below -5.5 in float32)."""
    return 0.5 * torch.erfc(x * -math.sqrt(0.5))


def _normal_score(log_weights: Tensor, offset: Tensor) -> Tensor:
    """Phi^-1(sum_k w_k Phi(offset_k)), through the nearer tail: (B, K, *S) -> (B, *S)."""
    weights = log_weights.exp()
    below = (weights * normal_cdf(offset)).sum(1)
    above = (weights * normal_cdf(-offset)).sum(1)
    tiny = torch.finfo(below.dtype).tiny
    score = torch.special.ndtri(torch.minimum(below, above).clamp(min=tiny))
    return torch.where(below < above, score, -score)


def _rotate(x: Tensor, axes: Tensor, channel: int = 1) -> Tensor:
    """Coordinates of x, whose dimension `channel` holds C, along the columns of axes (..., C, C)."""
    return torch.einsum("...c,...cd->...d", x.movedim(channel, -1), axes).movedim(-1, channel)
