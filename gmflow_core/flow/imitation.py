"""Imitation distillation (pi-ID): a network of few calls learns to follow a teacher's flow.

One call of the student predicts a policy for a whole segment of time. From the segment's start the
policy itself is followed; wherever it gets, the teacher is asked for its velocity, and the policy's
mean velocity over the next moments has to be the same. So the student learns from its own
mistakes, and needs no data: noise is enough.

Source: pi-Flow (Chen et al. 2025, arXiv 2510.14974), algorithm 1, with the scheduled trajectory
mixing of its section 4. Time t in [0, 1] is the unshifted one, 1 for noise; sigma is
`shift_time(t, shift)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..gaussians.mixture import GaussianMixture
from .following import follow_means, means_along
from .path import expand_sigma, positive, shift_time
from .policy import DXPolicy, Policy, PolicyVelocity, predict_x0

MIN_STEP = 1e-4  # of sigma, in divisions by the length of a step
MIN_TIME = 1e-4  # smallest start of a segment that is drawn
KEPT_SUBSTEPS = 8  # a longer way with gradients is computed again in the backward pass
DROPPED = -1e30  # log-weight of a component that is dropped
ROUNDING = 1e-3  # of a substep: what float32 times are off by at most

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x, sigma (B,)) -> mean velocity (B, C, *S)
Student = Callable[[Tensor, Tensor], PolicyVelocity]
Uniform = Callable[[int], Tensor]  # n -> (B, n) numbers, uniform in [0, 1)


@dataclass(frozen=True)
class ImitationSettings:
    """Settings of imitation distillation.

    Args:
        states: places on each segment at which the teacher is asked, at least 1.
        window: substeps over which the policy's mean velocity is compared with the teacher's; 0
            and 1 compare the velocity at the place itself.
        substeps: Euler steps of a policy for the whole of time; a segment takes its share.
        dropout: probability with which a component of a mixture is left out where the policy is
            followed, in [0, 1), for each sample; a sample that would lose all keeps all.
        shift: the network's time shift, see `shift_time`.

    Raises:
        ValueError: a setting is out of range.
    """

    states: int = 2
    window: int = 3
    substeps: int = 128
    dropout: float = 0.0
    shift: float = 1.0

    def __post_init__(self):
        for name, least in (("states", 1), ("window", 0), ("substeps", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value}; it must be a whole number, at least {least}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift is {self.shift}; it must be a positive number")


def segments(steps: int, final_step_size: float = 1.0) -> list[tuple[float, float]]:
    """Return the start and the length of each segment, from noise to data.

    Args:
        steps: network calls, at least 1; one segment each, all of one length but the last.
        final_step_size: length of the last one relative to the others, in (0, 1].

    Raises:
        ValueError: an argument is out of range.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is {steps}; it must be a whole number, at least 1")
    if not 0 < final_step_size <= 1:
        raise ValueError(f"final_step_size is {final_step_size}; it must be in (0, 1]")
    size = 1 / (steps - 1 + final_step_size)
    regular = [(1 - step * size, size) for step in range(steps - 1)]
    return [*regular, (final_step_size * size, final_step_size * size)]


def segment_at(time: Tensor, steps: int, final_step_size: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the start and the length, (B,) each, of the segments that hold these times.

    With uniform times a segment is drawn in proportion to its length. Arguments as in `segments`;
    `time` is (B,), in [0, 1].
    """
    last = segments(steps, final_step_size)[-1][1]
    size = last / final_step_size
    number = ((time.clamp(min=MIN_TIME) - last) / size).ceil().clamp(0, steps - 1)
    return last + number * size, torch.where(number == 0, last, size)


def detached(policy: Policy) -> Policy:
    """Return the policy without its graph.

    Raises:
        TypeError: it is neither a Gaussian mixture nor a DX policy.
    """
    if isinstance(policy, GaussianMixture):
        parts = policy.means, policy.log_weights, policy.log_std
        return GaussianMixture(*(part.detach() for part in parts))
    if isinstance(policy, DXPolicy):
        return replace(policy, x0=policy.x0.detach())
    raise TypeError(f"students predict a Gaussian mixture or a DX policy, not {policy.kind}")


def drop_components(policy: Policy, probability: float, uniform: Uniform) -> Policy:
    """Leave out components of a mixture at random, for each sample; other policies stay.

    Args:
        probability: of each component, in [0, 1); a sample that would lose all keeps all.
        uniform: called once, with K, if components may be dropped.
    """
    if not probability or not isinstance(policy, GaussianMixture):
        return policy
    dropped = uniform(policy.num_components) < probability  # (B, K)
    dropped = dropped & ~dropped.all(1, keepdim=True)
    dropped = dropped.reshape(*dropped.shape, *[1] * (policy.means.ndim - 2))
    log_weights = policy.log_weights.masked_fill(dropped, DROPPED).log_softmax(1)
    return GaussianMixture(policy.means, log_weights, policy.log_std)


class PolicyFlow:
    """The flow of a policy that was predicted at (x, sigma): its velocity, and the way it takes.

    Args:
        policy: of x_0, predicted there.
        x: (B, C, *S).
        sigma: (B,).
        settings: substeps and shift.
    """

    def __init__(self, policy: Policy, x: Tensor, sigma: Tensor, settings: ImitationSettings):
        self.settings = settings
        self.mean_at = means_along(policy, x, sigma)

    def velocity(self, x: Tensor, time: Tensor) -> Tensor:
        """Return the velocity (B, C, *S) at x (B, C, *S) and time (B,)."""
        sigma = expand_sigma(shift_time(time, self.settings.shift), x)
        return (x - self.mean_at(x, sigma)) / positive(sigma)

    def follow(self, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """Return x at `end` after Euler steps from `start`, both (B,); see `visit`."""
        return self.visit(x, torch.stack([start, end], 1))[0]

    def visit(self, x: Tensor, times: Tensor) -> list[Tensor]:
        """Follow the policy from x at the first of `times`; return x at each of the others.

        Each sample takes as many steps as its own ways need, at least one from each time to the
        next, and then waits for the others. Of many steps with gradients each one is computed
        again in the backward pass.

        Args:
            x: (B, C, *S).
            times: (B, n + 1), falling or equal.
        """
        ways, shift = -times.diff(dim=1), self.settings.shift
        counts = (ways * self.settings.substeps - ROUNDING).ceil().clamp(min=1)
        ends = counts.cumsum(1)  # (B, n): number of the step that reaches each time
        most = int(ends[:, -1].max())
        again = most > KEPT_SUBSTEPS and torch.is_grad_enabled()
        sigma, found = expand_sigma(shift_time(times[:, 0], shift), x), [x] * ways.shape[1]
        for step in range(1, most + 1):
            way = (ends < step).sum(1, keepdim=True).clamp(max=ways.shape[1] - 1)  # (B, 1)
            left = (ends.gather(1, way) - step).clamp(min=0) / counts.gather(1, way)
            time = (times.gather(1, way + 1) + ways.gather(1, way) * left)[:, 0]
            following = expand_sigma(shift_time(time, shift), x)
            arguments = self.mean_at, x, (sigma, following)
            if again:
                moved = checkpoint(follow_means, *arguments, use_reentrant=False)
            else:
                moved = follow_means(*arguments)
            x, sigma = torch.where(expand_sigma(ends[:, -1], x) >= step, moved, x), following
            reached = zip(ends.unbind(1), found, strict=True)
            found = [torch.where(expand_sigma(end, x) == step, x, each) for end, each in reached]
        return found

    def mean_velocity(self, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """Return the mean velocity (B, C, *S) on the way from x at `start` to `end`, both (B,).

        Where the way is shorter than one and a half substeps it is the velocity at its start.
        """
        long = ((start - end) * self.settings.substeps).round() >= 2
        if not long.any():
            return self.velocity(x, start)
        sigmas = (expand_sigma(shift_time(time, self.settings.shift), x) for time in (start, end))
        length = next(sigmas) - next(sigmas)
        average = (x - self.follow(x, start, end)) / length.clamp(min=MIN_STEP)
        if long.all():
            return average
        return torch.where(expand_sigma(long, x) > 0, average, self.velocity(x, start))


def imitate_segment(
    velocity: PolicyVelocity,
    x: Tensor,
    start: Tensor,
    size: Tensor,
    teacher: Velocity,
    settings: ImitationSettings,
    uniform: Uniform,
    teacher_ratio: float = 0.0,
    reach_end: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the loss of one segment, and where its policy ends.

    From each state to the next, x first goes by the policy and then by one Euler step of the
    teacher; `teacher_ratio` divides the segment between the two. With 1 all states lie on the
    teacher's own path of few steps.

    Args:
        velocity: the student's prediction at the segment's start, with its graph.
        x: (B, C, *S), there.
        start: time of the start, (B,), in (0, 1].
        size: length of the segment, (B,), at most `start`.
        teacher: returns mean velocities; it is called without gradients, `settings.states` times.
        uniform: called for the places on the policy's way (`settings.states` numbers), for those of
            the teacher's steps (one less), and for the dropout (K, if there is any).
        teacher_ratio: in [0, 1].
        reach_end: follow the policy to the segment's end; False stops at the last state.

    Returns:
        loss (B,): half the squared difference of the velocities, averaged over states, channels
        and space. x_end (B, C, *S): the policy's end, without gradients.

    Raises:
        ValueError: `teacher_ratio` is out of range.
        TypeError: as `detached`.
    """
    if not 0 <= teacher_ratio <= 1:
        raise ValueError(f"teacher_ratio is {teacher_ratio}; it must be in [0, 1]")
    shift, states = settings.shift, settings.states
    sigma = shift_time(start, shift)
    policy = predict_x0(velocity, x, sigma)
    learning = PolicyFlow(policy, x, sigma, settings)
    own, taught, window = _gaps(size, settings, uniform, teacher_ratio)
    with torch.no_grad():
        dropped = drop_components(detached(policy), settings.dropout, uniform)
        followed = PolicyFlow(dropped, x, sigma, settings)
    places = None
    if not teacher_ratio:  # all places lie on one way of the policy
        times = [start.unsqueeze(1), (start.unsqueeze(1) - own.cumsum(1)).clamp(min=0)]
        with torch.no_grad():
            last = [(start - size).unsqueeze(1)] if reach_end else []
            places = followed.visit(x, torch.cat([*times, *last], 1))
    time, losses = start, []
    for state in range(states):
        place = (time - own[:, state]).clamp(min=0)
        following = (place - taught[:, state]).clamp(min=0)
        with torch.no_grad():
            x = followed.follow(x, time, place) if places is None else places[state]
            sigma = shift_time(place, shift)
            target = teacher(x, sigma)
        average = learning.mean_velocity(x, place, following - window)
        losses.append(0.5 * (average - target).square().flatten(1).mean(1))
        if teacher_ratio:
            x = x + target * expand_sigma(shift_time(following, shift) - sigma, x)
        time = following
    if reach_end:
        with torch.no_grad():
            x = followed.follow(x, time, start - size) if places is None else places[-1]
    return torch.stack(losses).mean(0), x


def _gaps(
    size: Tensor, settings: ImitationSettings, uniform: Uniform, teacher_ratio: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the lengths of the ways to each state, by the policy and by the teacher, (B, n) each.

    The third result is the window's length, (B,). See `imitate_segment`.
    """
    states = settings.states
    window = size / (size * settings.substeps).round().clamp(min=1) * settings.window
    window = torch.minimum(window, size)
    free = (size - window).unsqueeze(1)  # (B, 1): what the states are spread over
    own = (uniform(states) * (1 - teacher_ratio) * free).sort(1).values
    own = own.diff(dim=1, prepend=torch.zeros_like(free))
    cuts = uniform(states - 1).sort(1).values
    ends = torch.zeros_like(free), torch.ones_like(free)
    taught = cuts.diff(dim=1, prepend=ends[0], append=ends[1]) * teacher_ratio * free
    return own, taught, window


def imitate(
    student: Student,
    teacher: Velocity,
    noise: Tensor,
    steps: int,
    settings: ImitationSettings,
    uniform: Uniform,
    *,
    final_step_size: float = 1.0,
    teacher_ratio: float = 0.0,
) -> Iterator[Tensor]:
    """Follow the student from noise to data, and yield the loss of each segment on the way.

    Call `backward` on each loss before asking for the next: then one graph is alive at a time. No
    data are needed.

    Args:
        student: called once for a segment, as student(x, sigma) with sigma (B,).
        noise: (B, C, *S), standard normal.
        steps, final_step_size: see `segments`.
        others: see `imitate_segment`.

    Yields:
        The mean loss of a segment times its length: the sum is the mean over time.
    """
    x = noise
    for start, size in segments(steps, final_step_size):
        time, length = (x.new_full((len(x),), each) for each in (start, size))
        velocity = student(x, shift_time(time, settings.shift))
        loss, x = imitate_segment(
            velocity, x, time, length, teacher, settings, uniform, teacher_ratio
        )
        yield loss.mean() * size
