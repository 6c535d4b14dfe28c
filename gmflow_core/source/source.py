"""Gaussian-mixture source: noise drawn from a mixture fitted to the data (MM-FM, CVPR 2026).

The source has M modes; the mixtures at a network's output have K components. A sample belongs to
one mode as a whole, whereas the output has a mixture for every pixel. `em.py` and `moments.py` fit
sources, `pickles.py` converts published ones, `files.py` writes and reads them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ..files.errors import quoted
from ..gaussians.density import LOG_2PI
from ..gaussians.draws import Generator, draw_like, standard_normal
from ..gaussians.tensors import at_least_float, widest
from .mode_frame import ModeFrame

BLOCK = 2**24  # elements of the largest temporary tensor
FIT = "fit one with python -m training.fit_source"


@dataclass(frozen=True, eq=False)
class GaussianMixtureSource:
    """Mixture sum_m w_m N(means_m, diag(std_m^2)) over whole samples.

    Half-precision inputs are converted to float32.

    Args:
        means: (M, *shape); the shape of one sample is (C, *S), or (D,) for points and tokens.
        std: positive, broadcastable to (M, *shape): (M, 1, ...) for spherical modes, (M, *shape)
            for diagonal ones.
        log_weights: (M,), normalised; -inf for a mode that is never drawn.
        assigner: a source over tokens (M, D) with the same M modes, which tells the mode of an
            image; without it the source itself does.

    Raises:
        ValueError: the shapes do not belong together, a std is not positive, or the weights do not
            add up to 1.
    """

    means: Tensor
    std: Tensor
    log_weights: Tensor
    assigner: GaussianMixtureSource | None = None

    def __post_init__(self):
        self._check_shapes()
        for name in ("means", "std", "log_weights"):
            object.__setattr__(self, name, at_least_float(getattr(self, name)))
        self._check_values()

    def _check_shapes(self) -> None:
        """Check that means, std, log_weights and assigner have shapes that belong together."""
        means, std, log_weights = self.means, self.std, self.log_weights
        if means.ndim < 2 or not means.numel():
            raise ValueError(
                f"GaussianMixtureSource: means {tuple(means.shape)} need the dimensions "
                "(M, C, *S) or (M, D)"
            )
        if std.ndim != means.ndim or any(
            n not in (1, size) for n, size in zip(std.shape, means.shape, strict=True)
        ):
            raise ValueError(
                f"GaussianMixtureSource: std {tuple(std.shape)} does not broadcast to means "
                f"{tuple(means.shape)}; give {(len(means), *[1] * (means.ndim - 1))} for "
                "spherical modes, or the shape of the means for diagonal ones"
            )
        if log_weights.shape != (len(means),):
            raise ValueError(
                f"GaussianMixtureSource: log_weights {tuple(log_weights.shape)} are not one for "
                f"each of {len(means)} modes"
            )
        judge = self.assigner
        if judge is not None and (judge.num_modes != len(means) or len(judge.shape) != 1):
            raise ValueError(
                f"GaussianMixtureSource: an assigner of {judge.num_modes} modes over samples "
                f"{judge.shape} does not fit a source of {len(means)} modes; it needs as many, "
                "over tokens (D,)"
            )

    def _check_values(self) -> None:
        """Check that the means are finite, the std positive, and the weights normalised."""
        if not self.means.isfinite().all():
            bad = (~self.means.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
            raise ValueError(
                f"GaussianMixtureSource: the means of the modes {listed(bad)} are not finite; "
                "fit the source again"
            )
        if not (self.std.isfinite() & (self.std > 0)).all():
            raise ValueError(
                "GaussianMixtureSource: a standard deviation is not finite or not positive; "
                "fit the source again"
            )
        total = self.log_weights.logsumexp(0).exp().item()
        if not abs(total - 1) < 1e-3:
            raise ValueError(
                f"GaussianMixtureSource: the weights add up to {total:.6g} instead of 1; "
                "give log_weights.log_softmax(0)"
            )

    @property
    def num_modes(self) -> int:
        """Number of modes M."""
        return len(self.means)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.means.shape[1:])

    @property
    def is_spherical(self) -> bool:
        """Return whether each mode has one variance for all its dimensions."""
        return self.std[0].numel() == 1

    @property
    def weights(self) -> Tensor:
        """Probabilities of the modes, (M,)."""
        return self.log_weights.exp()

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Means, standard deviations and log-weights."""
        return self.means, self.std, self.log_weights

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> GaussianMixtureSource:
        """Return a copy of the source and its assigner on another device or in another type."""
        moved = (tensor.to(device=device, dtype=dtype) for tensor in self._tensors)
        return GaussianMixtureSource(*moved, self.assigner and self.assigner.to(device, dtype))

    def flipped(self) -> GaussianMixtureSource:
        """Return the source of the width-flipped samples; modes keep numbers and assigner.

        Raises:
            ValueError: the samples are points or tokens, which have no width.
        """
        if len(self.shape) == 1:
            raise ValueError(
                f"samples of {self.shape} have no width to flip; flip sources of images or "
                "latents (C, *S)"
            )
        return replace(self, means=self.means.flip(-1), std=self.std.flip(-1))

    def require_shape(self, shape: Sequence[int]) -> None:
        """Check that samples of `shape` (without the batch) are what the source was fitted on.

        Raises:
            ValueError: they are not.
        """
        if tuple(shape) != self.shape:
            raise ValueError(
                f"the source's samples are {self.shape}, but the latents are {tuple(shape)}; take "
                f"latents of {self.shape}, or a source fitted on data of {tuple(shape)}: {FIT}"
            )

    @cached_property
    def digest(self) -> str:
        """Fingerprint of the mixture, to tell sources of the same shape apart."""
        arrays = (t.detach().cpu().contiguous().numpy() for t in self._tensors)
        parts = b"".join(hashlib.sha256(array.tobytes()).digest() for array in arrays)
        return hashlib.sha256(parts).hexdigest()[:16]

    def record(self, coupling: str, known: bool) -> dict[str, Any]:
        """Return the record of this source in a model's checkpoint, see `save_checkpoint`.

        Args:
            coupling: how modes were assigned in training: "soft", "hard" or "independent".
            known: the network was told the mode.
        """
        about = {"num_modes": self.num_modes, "shape": self.shape, "digest": self.digest}
        return {**about, "coupling": coupling, "conditioning": "mode" if known else "hidden"}

    def require_record(self, record: dict[str, Any] | None, model: str) -> None:
        """Check that the model with that `record` was trained with this source.

        Raises:
            ValueError: it was trained without a source, or with another.
        """
        if record is None:
            raise ValueError(f"{model} was trained without a mixture source; leave the source out")
        if not isinstance(record, dict) or not isinstance(record.get("shape"), (list, tuple)):
            raise ValueError(
                f"{model} has the record {quoted(record)} of its mixture source, which was edited "
                "or damaged; download or train the model again"
            )
        made = record.get("num_modes"), tuple(record["shape"]), record.get("digest", self.digest)
        mine = self.num_modes, self.shape, self.digest
        if made != mine:
            modes, shape, digest = map(quoted, made)
            raise ValueError(
                f"{model} was trained with a source of {modes} modes of {shape} (fingerprint "
                f"{digest}), and this one has {mine[0]} modes of {mine[1]} ({mine[2]}); "
                "give that one"
            )

    # Draws

    def draw_modes(
        self, count: int, generator: Generator | None = None, *, uniform: Tensor | None = None
    ) -> Tensor:
        """Draw modes (count,) int64 by their weights.

        Args:
            count: number of draws.
            generator: as in `GaussianMixture.sample`.
            uniform: recorded numbers (count,) in [0, 1) to use instead.
        """
        return _choose(self.weights, count, generator, uniform)

    def draw(
        self,
        modes: Tensor | Sequence[int],
        generator: Generator | None = None,
        *,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Draw one sample of each given mode, (B, *shape): mean + std * noise.

        Args:
            modes: (B,) integers.
            generator: of the noise, on any device, or one for each sample; the default generator
                if None.
            noise: recorded standard normal noise (B, *shape) to use instead.

        Raises:
            ValueError: a mode is out of range, or the noise has another shape.
        """
        mean, std = self.moments(modes)
        if noise is None:
            noise = standard_normal(tuple(mean.shape), generator, like=mean)
        else:
            self.require_shape(noise.shape[1:])
        return mean + std * noise.to(mean)

    def sample(self, count: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw samples (count, *shape) and return them with their modes (count,)."""
        modes = self.draw_modes(count, generator)
        return self.draw(modes, generator), modes

    def moments(self, modes: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return mean (B, *shape) and standard deviation of the given modes.

        The standard deviation is (B, *shape), or (B, 1, ...) for spherical modes.

        Raises:
            ValueError: a mode is out of range. Modes on a GPU are not checked, as that would force
                a sync; CUDA itself then raises.
        """
        on_cpu = isinstance(modes, Tensor) and modes.device.type == "cpu"
        numbers = modes.flatten().tolist() if on_cpu else modes
        if not isinstance(numbers, Tensor) and len(numbers):
            low, high = min(numbers), max(numbers)
            if low < 0 or high >= self.num_modes:
                raise ValueError(
                    f"{span(low, high)} not fit a source of {self.num_modes} modes; "
                    f"give 0 to {self.num_modes - 1}"
                )
        modes = torch.as_tensor(modes, dtype=torch.int64, device=self.means.device)
        return self.means[modes], self.std.expand(self.num_modes, *self.std.shape[1:])[modes]

    def frame(self, modes: Tensor | Sequence[int]) -> ModeFrame:
        """Return the coordinates in which the noise of these modes is N(0, I).

        Raises:
            ValueError: a mode is out of range, or the modes are diagonal.
        """
        return ModeFrame(*self.moments(modes))

    # Assignment

    @cached_property
    def _log_joints(self) -> tuple[Tensor, list[LogJoint]]:
        """Origin (D,) of the coordinates, and the log-joints of a part of the modes each.

        They are kept as long as the source is, and take as much memory as its means, or twice
        that for diagonal modes.
        """
        means = self.means.flatten(1)
        std = self.std.expand(self.num_modes, *self.std.shape[1:])
        std = std.flatten(1) if self.is_spherical else std.expand_as(self.means).flatten(1)
        origin = self.weights @ means
        modes = max(1, BLOCK // means.shape[1])
        split = (means.split(modes), std.split(modes), self.log_weights.split(modes))
        parts = zip(*split, strict=True)
        return origin, [LogJoint(mean - origin, s.square(), weight) for mean, s, weight in parts]

    def log_joint(self, x: Tensor) -> Tensor:
        """Return log w_m + log N(x; mode m) of the source itself, (B, M), for x (B, *shape).

        The normalising constant of the Gaussian is included.

        Raises:
            ValueError: x does not have the samples' shape.
        """
        self.require_shape(x.shape[1:])
        origin, parts = self._log_joints
        x = x.to(self.means).flatten(1) - origin
        return torch.cat([part(x) for part in parts], 1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """Return p(m | x), (B, M), by the assigner if there is one.

        Args:
            x: samples (B, *shape), or tokens (B, D) for the assigner.

        Raises:
            ValueError: x has another shape; or, on a CPU, is not finite (the message lists the
                rows). On other devices such rows become NaN, as a check would force a sync: check
                the data where they are loaded.
        """
        judge = self.assigner or self
        if self.assigner is not None and tuple(x.shape[1:]) != judge.shape:
            raise ValueError(
                f"the source's modes are told apart by tokens of {judge.shape}, but "
                f"{tuple(x.shape[1:])} came; give the tokens of the encoder that it was fitted "
                "with, or choose the modes by weight or by number"
            )
        posterior = judge.log_joint(x).softmax(1)
        if posterior.device.type == "cpu" and (bad := posterior.isnan().any(1)).any():
            rows = bad.nonzero().flatten().tolist()
            raise ValueError(
                f"rows {listed(rows)} of {len(x)} are not finite, so they belong to no mode; look "
                "for broken values in what made them"
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
        """Return a mode of each x, (B,) int64.

        Args:
            x: as in `responsibilities`.
            coupling: "soft" draws from p(m | x), "hard" takes the most probable mode.
            generator, uniform: as in `draw_modes`.

        Raises:
            ValueError: as `responsibilities`; or the coupling is unknown.
        """
        if coupling not in ("soft", "hard"):
            hint = "; modes that are independent of x are no posterior: draw_modes draws them"
            hint = hint if coupling == "independent" else ""
            raise ValueError(f'coupling {coupling!r} is neither "soft" nor "hard"{hint}')
        posterior = self.responsibilities(x)
        if coupling == "hard":
            return posterior.argmax(1)
        return _choose(posterior, len(x), generator, uniform)


class LogJoint:
    """Function (n, D) -> (n, M): log w_m + log N(x; means_m, diag(var_m)).

    It takes two matrix products, or one for spherical modes. The quadratic form is expanded, so x
    and the means should be centred: the error is about the type's rounding times |x|^2 / var. The
    constants are computed in float64 on devices that have it.

    Args:
        means: (M, D).
        var: (M, D) or (M, 1).
        log_weights: (M,).
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
        """Return the log-joint of x (n, D) with every mode, (n, M)."""
        result = torch.addmm(self.constant, x, self.linear)
        if len(self.precision) == 1:
            return result.addcmul_(x.square().sum(1, keepdim=True), self.precision, value=-0.5)
        return result.addmm_(x.square(), self.precision, alpha=-0.5)


def _choose(
    weights: Tensor, count: int, generator: Generator | None, uniform: Tensor | None
) -> Tensor:
    """Draw `count` indices into weights (M,), or one into each row of weights (count, M).

    Inverts the cumulative sum at uniform numbers, which are drawn if None.
    """
    edges = weights.cumsum(-1, dtype=widest(weights.device))
    if uniform is None:
        uniform = draw_like(torch.rand, (count,), generator, edges)
    below_1 = 1 - torch.finfo(edges.dtype).eps  # 1 would lie behind the last edge
    uniform = uniform.to(edges).clamp(max=below_1) * edges[..., -1]
    if weights.ndim == 1:
        return torch.searchsorted(edges, uniform, right=True)
    chosen = torch.searchsorted(edges, uniform.unsqueeze(1), right=True).squeeze(1)
    return chosen.clamp_(max=weights.shape[1] - 1)  # a row of NaN gives M


def listed(numbers: Sequence[int], most: int = 8) -> str:
    """List the first few numbers for a message."""
    more = f", ... ({len(numbers)} in all)" if len(numbers) > most else ""
    return ", ".join(map(str, numbers[:most])) + more


def span(low: int, high: int) -> str:
    """Return the subject of a message about modes from `low` to `high`, up to "not"."""
    return f"mode {low} does" if low == high else f"modes between {low} and {high} do"
