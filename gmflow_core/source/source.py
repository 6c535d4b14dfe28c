"""Gaussian-mixture source: noise that is drawn from a mixture fitted to the data (MM-FM, CVPR 2026).

M modes, to tell them from the K components at a network's output. A sample belongs to one mode as a whole, where the output's
mixture is one per pixel. `source_fit.py` makes sources; `source_convert.py` reads published ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ..gaussians.density import LOG_2PI
from ..gaussians.draws import Generator, draw_like, standard_normal
from ..gaussians.tensors import at_least_float
from .mode_frame import ModeFrame

BLOCK = 2**24  # elements of the largest temporary tensor
FIT = "fit one with python -m training.fit_source"


@dataclass(frozen=True, eq=False)
class GaussianMixtureSource:
    """sum_m w_m N(means_m, diag(std_m^2)) over whole samples.

    Half-precision inputs are converted to float32, as everywhere.

    Args:
        means: (M, *shape); the shape of one sample is (C, *S), or (D,) for points and tokens.
        std: broadcastable to (M, *shape), positive: (M, 1, ...) is spherical, (M, *shape) diagonal.
        log_weights: (M,), normalised; -inf for a mode that is never drawn.
        assigner: a source over tokens (M, D) with the same M modes, which says what mode an image belongs to; without it the
            source itself does.

    Raises:
        ValueError: the shapes do not belong together, a std is not positive, or the weights do not add up to 1.
    """

    means: Tensor
    std: Tensor
    log_weights: Tensor
    assigner: GaussianMixtureSource | None = None

    def __post_init__(self):
        means, std, log_weights = self.means, self.std, self.log_weights
        if means.ndim < 2 or not means.numel():
            raise ValueError(
                f"GaussianMixtureSource: means {tuple(means.shape)} need the dimensions (M, C, *S) or (M, D)"
            )
        if std.ndim != means.ndim or any(
            n not in (1, size) for n, size in zip(std.shape, means.shape, strict=True)
        ):
            raise ValueError(
                f"GaussianMixtureSource: std {tuple(std.shape)} does not broadcast to means {tuple(means.shape)}; give "
                f"{(len(means), *[1] * (means.ndim - 1))} for spherical modes, or the shape of the means for diagonal ones"
            )
        if log_weights.shape != (len(means),):
            raise ValueError(
                f"GaussianMixtureSource: log_weights {tuple(log_weights.shape)} are not one for each of {len(means)} modes"
            )
        for name in ("means", "std", "log_weights"):
            object.__setattr__(self, name, at_least_float(getattr(self, name)))
        if not self.means.isfinite().all():
            bad = (~self.means.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
            raise ValueError(
                f"GaussianMixtureSource: the means of the modes {listed(bad)} are not finite; fit the source again"
            )
        if not (self.std.isfinite() & (self.std > 0)).all():
            raise ValueError(
                "GaussianMixtureSource: a standard deviation is not finite or not positive; fit the source again"
            )
        total = self.log_weights.logsumexp(0).exp().item()
        if not abs(total - 1) < 1e-3:
            raise ValueError(
                f"GaussianMixtureSource: the weights add up to {total:.6g} instead of 1; give log_weights.log_softmax(0)"
            )
        if self.assigner is not None and (
            self.assigner.num_modes != len(means) or len(self.assigner.shape) != 1
        ):
            raise ValueError(
                f"GaussianMixtureSource: an assigner of {self.assigner.num_modes} modes over samples {self.assigner.shape} "
                f"does not fit a source of {len(means)} modes; it needs as many, over tokens (D,)"
            )

    @property
    def num_modes(self) -> int:
        """M."""
        return len(self.means)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return tuple(self.means.shape[1:])

    @property
    def is_spherical(self) -> bool:
        """Whether each mode has one variance for all of its dimensions."""
        return self.std[0].numel() == 1

    @property
    def weights(self) -> Tensor:
        """Probabilities of the modes, (M,)."""
        return self.log_weights.exp()

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> GaussianMixtureSource:
        """The same source elsewhere, its assigner too."""
        tensors = (
            t.to(device=device, dtype=dtype) for t in (self.means, self.std, self.log_weights)
        )
        return GaussianMixtureSource(*tensors, self.assigner and self.assigner.to(device, dtype))

    def flipped(self) -> GaussianMixtureSource:
        """The source of the width-flipped samples; the modes keep their numbers and the assigner.

        Raises:
            ValueError: the samples are points or tokens, which have no width.
        """
        if len(self.shape) == 1:
            raise ValueError(
                f"samples of {self.shape} have no width to flip; flip sources of images or latents (C, *S)"
            )
        return replace(self, means=self.means.flip(-1), std=self.std.flip(-1))

    def require_shape(self, shape: Sequence[int]) -> None:
        """
        Raises:
            ValueError: samples of `shape` (without the batch) are not what the source was fitted on.
        """
        if tuple(shape) != self.shape:
            raise ValueError(
                f"the source's samples are {self.shape}, but the latents are {tuple(shape)}; take latents of {self.shape}, or "
                f"a source fitted on data of {tuple(shape)}: {FIT}"
            )

    @cached_property
    def digest(self) -> str:
        """A fingerprint of what it draws, to tell sources of one shape apart."""
        tensors = (self.means, self.std, self.log_weights)
        parts = [
            hashlib.sha256(t.detach().cpu().contiguous().numpy().tobytes()).digest()
            for t in tensors
        ]
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

    def record(self, coupling: str, known: bool) -> dict[str, Any]:
        """What a model's checkpoint says of the source it was trained with, see `save_checkpoint`."""
        about = {"num_modes": self.num_modes, "shape": self.shape, "digest": self.digest}
        return {**about, "coupling": coupling, "conditioning": "mode" if known else "hidden"}

    def require_record(self, record: dict[str, Any] | None, model: str) -> None:
        """
        Raises:
            ValueError: the model with that `record` was trained without a source, or with another.
        """
        if record is None:
            raise ValueError(f"{model} was trained without a mixture source; leave the source out")
        made = record["num_modes"], tuple(record["shape"]), record.get("digest", self.digest)
        mine = self.num_modes, self.shape, self.digest
        if made != mine:
            raise ValueError(
                f"{model} was trained with a source of {made[0]} modes of {made[1]} (fingerprint {made[2]}), and this one has "
                f"{mine[0]} modes of {mine[1]} ({mine[2]}); give that one"
            )

    # Draws

    def draw_modes(
        self, count: int, generator: Generator | None = None, *, uniform: Tensor | None = None
    ) -> Tensor:
        """Modes (count,) int64, each by its weight; `generator` as in `GaussianMixture.sample`. `uniform`: recorded numbers
        (count,) in [0, 1) to use instead."""
        return _choose(self.weights, count, generator, uniform)

    def draw(
        self,
        modes: Tensor | Sequence[int],
        generator: Generator | None = None,
        *,
        noise: Tensor | None = None,
    ) -> Tensor:
        """One sample of each given mode, (B, *shape): mean + std * noise.

        Args:
            modes: (B,) integers.
            generator: source of the noise, on any device, or one for each sample; the default generator if None.
            noise: recorded standard normal noise (B, *shape) to use instead.

        Raises:
            ValueError: a mode is out of range, or the noise is of another shape.
        """
        mean, std = self.moments(modes)
        if noise is None:
            noise = standard_normal(tuple(mean.shape), generator, like=mean)
        else:
            self.require_shape(noise.shape[1:])
        return mean + std * noise.to(mean)

    def sample(self, count: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """(samples (count, *shape), their modes (count,)): a mode by its weight, then a draw of it."""
        modes = self.draw_modes(count, generator)
        return self.draw(modes, generator), modes

    def moments(self, modes: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mean (B, *shape) and standard deviation (B, ...), as far as it is expanded, of the given modes.

        Raises:
            ValueError: a mode is out of range; of modes on a GPU CUDA says so itself, as looking would wait for it.
        """
        numbers = (
            modes.flatten().tolist()
            if isinstance(modes, Tensor) and modes.device.type == "cpu"
            else modes
        )
        if (
            not isinstance(numbers, Tensor)
            and len(numbers)
            and not 0 <= min(numbers) <= max(numbers) < self.num_modes
        ):
            raise ValueError(
                f"modes between {min(numbers)} and {max(numbers)} do not fit a source of {self.num_modes} modes; give 0 to "
                f"{self.num_modes - 1}"
            )
        modes = torch.as_tensor(modes, dtype=torch.int64, device=self.means.device)
        return self.means[modes], self.std.expand(self.num_modes, *self.std.shape[1:])[modes]

    def frame(self, modes: Tensor | Sequence[int]) -> ModeFrame:
        """The coordinates in which the noise of these modes is N(0, I).

        Raises:
            ValueError: a mode is out of range, or the modes are diagonal.
        """
        return ModeFrame(*self.moments(modes))

    # Assignment

    @cached_property
    def _log_joints(self) -> tuple[Tensor, list[LogJoint]]:
        """The point (D,) that they are centred at, and those of a part of the modes each. They stay for as long as the source
        does, and hold as much as its means, or twice that for diagonal modes."""
        means = self.means.flatten(1)
        std = self.std.expand(self.num_modes, *self.std.shape[1:])
        std = std.flatten(1) if self.is_spherical else std.expand_as(self.means).flatten(1)
        origin = self.weights @ means
        modes = max(1, BLOCK // means.shape[1])
        parts = zip(
            means.split(modes), std.split(modes), self.log_weights.split(modes), strict=True
        )
        return origin, [
            LogJoint(mean - origin, std.square(), weight) for mean, std, weight in parts
        ]

    def log_joint(self, x: Tensor) -> Tensor:
        """log w_m + log N(x; mode m) of the source itself, (B, M), with the 2 pi term: x (B, *shape).

        Raises:
            ValueError: x does not have the samples' shape.
        """
        self.require_shape(x.shape[1:])
        origin, parts = self._log_joints
        x = x.to(self.means).flatten(1) - origin
        return torch.cat([part(x) for part in parts], 1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """p(m | x), (B, M), by the assigner if there is one.

        Args:
            x: samples (B, *shape), or tokens (B, D) for the assigner.

        Raises:
            ValueError: x is of another shape; or, on a CPU, not finite (the message says which rows). Elsewhere such rows are
                NaN, as looking would wait for the device: look for them where the data come in.
        """
        judge = self.assigner or self
        if self.assigner is not None and tuple(x.shape[1:]) != judge.shape:
            raise ValueError(
                f"the source's modes are told apart by tokens of {judge.shape}, but {tuple(x.shape[1:])} came; give the tokens "
                "of the encoder that it was fitted with, or choose the modes by weight or by number"
            )
        posterior = judge.log_joint(x).softmax(1)
        if posterior.device.type == "cpu" and (bad := posterior.isnan().any(1)).any():
            rows = bad.nonzero().flatten().tolist()
            raise ValueError(
                f"rows {listed(rows)} of {len(x)} are not finite, so they belong to no mode; look for broken values in what "
                "made them"
            )
        return posterior

    def posterior_modes(
        self,
        x: Tensor,
        coupling: Literal["soft", "hard"] = "soft",
        generator: Generator | None = None,
        *,
        uniform: Tensor | None = None,
    ) -> Tensor:
        """The mode of each x, (B,) int64: drawn from p(m | x) ("soft"), or the most probable one ("hard").

        Args:
            x, generator, uniform: as of `responsibilities` and `draw_modes`.

        Raises:
            ValueError: as `responsibilities`; another coupling.
        """
        if coupling not in ("soft", "hard"):
            hint = "; modes that are independent of x are no posterior: draw_modes draws them" * (
                coupling == "independent"
            )
            raise ValueError(f'coupling {coupling!r} is neither "soft" nor "hard"{hint}')
        posterior = self.responsibilities(x)
        return (
            posterior.argmax(1)
            if coupling == "hard"
            else _choose(posterior, len(x), generator, uniform)
        )


class LogJoint:
    """(n, D) -> (n, M): log w_m + log N(x; means_m, diag(var_m)), by two matrix products, or one for spherical modes.

    The quadratic form is expanded, so x and the means should be centred: its error is about the type's rounding times
    |x|^2 / var. The constants are computed in float64 where there is one.

    Args:
        means: (M, D); var: (M, D) or (M, 1); log_weights: (M,).
        dtype: of the products; that of the means if None.
    """

    def __init__(
        self, means: Tensor, var: Tensor, log_weights: Tensor, dtype: torch.dtype | None = None
    ):
        dtype = dtype or means.dtype
        dims, wide = means.shape[1], widest(means.device)
        means, precision = means.to(wide), var.to(wide).reciprocal()
        self.precision = precision.to(dtype).T
        log_det = -precision.log().sum(1) * (dims / precision.shape[1])
        self.linear = (means * precision).to(dtype).T
        norms = (means.square() * precision).sum(1)
        self.constant = (log_weights.to(wide) - 0.5 * (norms + log_det + dims * LOG_2PI)).to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        result = torch.addmm(self.constant, x, self.linear)
        if len(self.precision) == 1:
            return result.addcmul_(x.square().sum(1, keepdim=True), self.precision, value=-0.5)
        return result.addmm_(x.square(), self.precision, alpha=-0.5)


def _choose(
    weights: Tensor, count: int, generator: Generator | None, uniform: Tensor | None
) -> Tensor:
    """`count` indices into weights (M,), or one into each row of weights (count, M): the inverse of the cumulative sum at
    uniform numbers."""
    edges = weights.cumsum(-1, dtype=widest(weights.device))
    uniform = (
        draw_like(torch.rand, (count,), generator, edges) if uniform is None else uniform.to(edges)
    )
    uniform = (
        uniform.clamp(max=1 - torch.finfo(edges.dtype).eps) * edges[..., -1]
    )  # 1 would be behind the last
    if weights.ndim == 1:
        return torch.searchsorted(edges, uniform, right=True)
    chosen = torch.searchsorted(edges, uniform.unsqueeze(1), right=True).squeeze(1)
    return chosen.clamp_(max=weights.shape[1] - 1)  # where a row is NaN too


def widest(device: torch.device) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def listed(numbers: Sequence[int], most: int = 8) -> str:
    """The first few numbers, for a message."""
    return ", ".join(map(str, numbers[:most])) + (
        f", ... ({len(numbers)} in all)" if len(numbers) > most else ""
    )
