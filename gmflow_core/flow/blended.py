"""Several policies in one latent, each on a part of it, blended at every substep.

For prompts of regions: each conditioning predicts a policy, and weights (masks, strengths) say how
much of each counts where. Between two network calls every policy answers for the x that is reached,
and the answers are averaged, so that a region follows its own mixture and not only its mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..gaussians.draws import Generator, draw_like, standard_normal
from ..gaussians.mixture import Mixture
from .policy import Policy

MIN_WEIGHT = 1e-37  # in divisions by the sum of weights: where nothing counts, x_0 is 0

Window = tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class Part:
    """A policy on a part of a latent.

    Args:
        policy: of x_0, (B, C, *s).
        weight: 0 or more, broadcastable to (B, C, *s).
        window: where the part lies: a slice of length s for each dimension after the channels.
        prompt: what tells its prompt from others, the same at every step.
    """

    policy: Policy
    weight: Tensor
    window: Window
    prompt: object = None

    def of(self, x: Tensor) -> Tensor:
        """Return the part of x, (B, C, *S), that lies in the window; of a number per sample, all.

        A dimension of size 1 is kept whole.
        """
        slices = (
            every if size > 1 else slice(None)
            for every, size in zip(self.window, x.shape[2:], strict=True)
        )
        return x[(slice(None), slice(None), *slices)]


@dataclass(frozen=True, eq=False)
class BlendedPolicy:
    """Policies whose x_0 are averaged by weight: sum_i w_i x0_i / sum_i w_i at every pixel.

    Args:
        parts: at least one.
        shape: (B, C, *S) of the whole.
    """

    parts: tuple[Part, ...]
    shape: torch.Size

    def average(self, values: list[Tensor]) -> Tensor:
        """Average (B, C, *s) of each part by weight; return (B, C, *S)."""
        total = values[0].new_zeros(self.shape)
        weights = total.new_zeros(self.shape)
        for part, value in zip(self.parts, values, strict=True):
            weight = part.weight.to(value)
            part.of(total).add_(weight * value)
            part.of(weights).add_(weight)
        return total / weights.clamp(min=MIN_WEIGHT)

    def mean(self) -> Tensor:
        """Return x_0 at the time of the call, (B, C, *S)."""
        return self.average([part.policy.mean() for part in self.parts])

    def map(self, change: Callable[..., Policy], *tensors: Tensor) -> BlendedPolicy:
        """Change each policy to change(policy, *parts of the tensors), given (B, C, *S) each."""
        changed = (
            replace(part, policy=change(part.policy, *map(part.of, tensors))) for part in self.parts
        )
        return replace(self, parts=tuple(changed))

    def moved(self, by: Tensor) -> BlendedPolicy:
        """Shift x_0 by (B, C, *S)."""
        return self.map(lambda policy, part: policy.moved(part), by)

    def with_temperature(self, temperature: float) -> BlendedPolicy:
        """Sharpen every mixture, see `Mixture.with_temperature`."""
        return self.map(lambda policy: policy.with_temperature(temperature))

    def sample(self, generator: Generator | None = None) -> Tensor:
        """Draw x_0, (B, C, *S), from mixtures: from each with the same random numbers.

        So where the mixtures agree, the draw is that of one of them.

        Args:
            generator: as of `Mixture.sample`, which draws the same numbers.
        """
        batch, _, *space = self.shape
        like = self.parts[0].policy.mean()
        uniform = draw_like(torch.rand, (batch, *space), generator, like).unsqueeze(1)
        noise = standard_normal(self.shape, generator, like=like)
        return self.average([_draw(part, uniform, noise) for part in self.parts])

    def is_alike(self, other: object) -> bool:
        """Return whether another one has the parts of the same prompts in the same places."""
        return isinstance(other, BlendedPolicy) and self._places() == other._places()

    def _places(self) -> list[tuple[object, Window]]:
        return [(part.prompt, part.window) for part in self.parts]


def _draw(part: Part, uniform: Tensor, noise: Tensor) -> Tensor:
    """Draw from a part's mixture with its share of random numbers."""
    component = part.policy.component_at(part.of(uniform).squeeze(1))
    return part.policy.sample(component=component, noise=part.of(noise))


Followed = Policy | BlendedPolicy  # what a rollout follows


def is_mixture(policy: Followed) -> bool:
    """Return whether a policy is a Gaussian mixture, or a blend of such."""
    if isinstance(policy, BlendedPolicy):
        return all(is_mixture(part.policy) for part in policy.parts)
    return isinstance(policy, Mixture)


def kind_of(policy: Followed) -> str:
    """Return what a policy is, with its article, for a message: "a DX policy"."""
    if isinstance(policy, BlendedPolicy):
        return "a blend of several prompts"
    return getattr(policy, "kind", "a mixture")
