"""Compute the loss of imitation distillation, and the velocity of its teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gmflow_core.flow.imitation import ImitationSettings, imitate_segment
from gmflow_core.flow.path import expand_sigma, shift_time, x0_to_velocity
from gmflow_core.flow.policy import PolicyVelocity
from gmflow_core.models.mlp import GMFlowMLP
from gmflow_core.sampling.guidance import Guidance
from gmflow_core.source.mode_frame import ModeFrame

Velocity = Callable[[Tensor, Tensor], Tensor]


def prediction(
    network: Callable[..., PolicyVelocity],
    x: Tensor,
    sigma: Tensor,
    labels: Tensor | None,
    frame: ModeFrame | None,
) -> PolicyVelocity:
    """Return what a network predicts, in the coordinates of its source's modes if it has one.

    Args:
        network: called as network(x, sigma) or network(x, sigma, labels).
        x: (B, C, *S), in the frame.
        sigma: (B,).
        labels: (B,); None for a network without labels.
        frame: of the modes; None if the noise is N(0, I).
    """
    place = x if frame is None else frame.leave(x, sigma)
    velocity = network(place, sigma, *([] if labels is None else [labels]))
    return velocity if frame is None else frame.velocity(velocity)


def takes_labels(network: nn.Module) -> bool:
    """Return whether a network is conditioned on classes or modes."""
    return network.config.num_classes > 0 or not isinstance(network, GMFlowMLP)


def teacher_velocity(
    teacher: nn.Module,
    labels: Tensor | None,
    frame: ModeFrame | None,
    guidance: Guidance | None,
    autocast: Callable,
) -> Velocity:
    """Return the function (x, sigma) -> mean velocity (B, C, *S) that the student imitates.

    Args:
        teacher: a network of `gmflow_core.models`, in evaluation mode.
        labels, frame: as in `prediction`.
        guidance: one that acts, or None; it acts on those samples whose sigma lies in its interval.
        autocast: creates the context that the network runs in.
    """

    def plain(x: Tensor, sigma: Tensor) -> Tensor:
        with autocast():
            return prediction(teacher, x, sigma, labels, frame).mean()

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        both = torch.cat([labels, torch.full_like(labels, teacher.config.num_classes)])
        with autocast():
            output = prediction(teacher, torch.cat([x, x]), torch.cat([sigma, sigma]), both, None)
        cond, uncond = output.chunk(2)
        steered = guidance.of_velocities(cond, uncond, x, sigma).mean()
        low, high = guidance.interval
        acts = expand_sigma((low <= sigma) & (sigma <= high), x) > 0
        return torch.where(acts, x0_to_velocity(steered, x, sigma), cond.mean())

    return plain if guidance is None else guided


class Imitation(nn.Module):
    """The loss of one segment of a student, see `gmflow_core.flow.imitation`.

    Args:
        network: the student.
        settings: of the imitation.
        autocast: creates the context that the network runs in.
    """

    def __init__(self, network: nn.Module, settings: ImitationSettings, autocast: Callable):
        super().__init__()
        self.network, self.settings, self.autocast = network, settings, autocast

    def forward(
        self,
        x: Tensor,
        start: Tensor,
        size: Tensor,
        labels: Tensor | None,
        frame: ModeFrame | None,
        teacher: Velocity,
        uniform: Tensor,
        teacher_ratio: float = 0.0,
        reach_end: bool = True,
    ) -> dict[str, Tensor]:
        """Return the mean "loss" of the segments, and where they end: "x" (B, C, *S).

        Args:
            x: (B, C, *S) at the start, in the frame.
            start, size: (B,), see `imitate_segment`.
            labels, frame: see `prediction`.
            uniform: (B, n) numbers in [0, 1), as many as `numbers_of` says.
            others: see `imitate_segment`.
        """
        sigma = shift_time(start, self.settings.shift)
        with self.autocast():
            velocity = prediction(self.network, x, sigma, labels, frame)
        used = 0

        def drawn(count: int) -> Tensor:
            nonlocal used
            used += count
            return uniform[:, used - count : used]

        loss, x = imitate_segment(
            velocity, x, start, size, teacher, self.settings, drawn, teacher_ratio, reach_end
        )
        return {"loss": loss.mean(), "x": x}


def numbers_of(settings: ImitationSettings, num_components: int) -> int:
    """Return how many uniform numbers a segment needs for each sample."""
    return 2 * settings.states - 1 + (num_components if settings.dropout else 0)
