"""Record the mixture that a model predicts at one step of a sampling."""

from __future__ import annotations

import weakref
from contextlib import suppress
from dataclasses import dataclass, replace

import comfy.latent_formats
import torch
from torch import Tensor

from ...gmflow_core import GaussianMixture, Mixture
from ...gmflow_core.flow.blended import Followed, kind_of
from .adapter_info import final_step_size_for
from .cells import Progress, Subject
from .gm_sampler import gm_sampler
from .latent_shapes import PointShape, SolverShape, solver_shape
from .plain_model import sampling_of
from .sample_latent import fitting_samples
from .sizes import check_size
from .solver_choice import solver_for, steps_for
from .solver_model import WATCH
from .time_shift import own_sigmas


@dataclass(frozen=True, eq=False)
class Recorded:
    """The mixture of x_0 that a model predicted at one step, on the CPU.

    Args:
        mixture: in the solver's shape, (B, K, C, *S); of points (N, K, 2).
        x: what the network was given, (B, C, *S) or (N, 2).
        sigma: of that step.
        step, steps: the step, from 1, and how many there are.
        latent_shape: (B, C', *S') of the latents.
        shape: converts between the solver's shape and that of latents.
        latent_format: ComfyUI's, of the model.
    """

    mixture: GaussianMixture
    x: Tensor
    sigma: float
    solver: str
    step: int
    steps: int
    latent_shape: torch.Size
    shape: SolverShape
    latent_format: comfy.latent_formats.LatentFormat

    @property
    def of_points(self) -> bool:
        """True if every pixel of the latent is a sample of its own."""
        return isinstance(self.shape, PointShape)

    def to_latent(self, x0: Tensor) -> Tensor:
        """Convert x_0 in the solver's shape, of any batch, to samples in the scale of a LATENT."""
        return self.latent_format.process_out(self.shape.from_solver(x0, self.latent_shape))

    @property
    def places(self) -> tuple[int, ...]:
        """Shape (h, w) of the pixels that have a mixture each; (N,) for points."""
        return tuple(self.x.shape[-2:]) if not self.of_points else (len(self.x),)


class _SeenError(Exception):
    """Ends a sampling at the step that is looked at: nothing after it is shown."""


class _Watch:
    """Keeps what a solver model predicts in its call number `step`, from 1, and ends the run."""

    def __init__(self, step: int):
        self.step, self.calls = step, 0
        self.seen: tuple[Followed, Tensor, Tensor] | None = None

    def __call__(self, policy: Followed, x: Tensor, sigma: Tensor) -> None:
        self.calls += 1
        if self.calls != self.step:
            return
        if not isinstance(policy, Mixture):
            raise ValueError(
                f"nothing to inspect: the prediction is {kind_of(policy)}, which is no single "
                "mixture; use one prompt, and a GM adapter (gmflux, gmqwen)"
            )
        shape = tuple(policy.components().means.shape)
        check_size("mixtures", 1, shape, "choose a smaller latent or batch")
        cpu = torch.device("cpu")
        self.seen = policy.to(cpu), x.float().cpu(), sigma.float().cpu()
        raise _SeenError


# Module state, as node classes have no instances: the last recording, so that another place in the
# picture needs no sampling. The model is kept by a weak reference only.
_last: tuple[weakref.ref, tuple, Recorded] | None = None


def record_mixture(subject: Subject, seed: int, steps: int, step: int) -> Recorded:
    """Sample with the solver that suits the model up to a step, and return its mixture there.

    The same inputs as in the last call give the same result, without sampling.

    Args:
        steps: network calls; as many as suit the model if 0.
        step: from 1.

    Raises:
        ValueError: there is no such step, or the model predicts no mixture.
    """
    global _last
    steps = steps or steps_for(subject.model)
    if step > steps:
        raise ValueError(f"there is no step {step} in {steps} steps; choose one from 1 to {steps}")
    wires = (subject.latent, subject.positive, subject.negative)
    settings = (seed, steps, step, subject.guidance)
    if _last is not None and _last[0]() is subject.model:
        wires_then, settings_then = _last[1]
        same = all(now is then for now, then in zip(wires, wires_then, strict=True))
        if same and settings == settings_then:
            return _last[2]
    _last = None
    recorded = _record(subject, seed, steps, step)
    _last = weakref.ref(subject.model), (wires, settings), recorded
    return recorded


def _record(subject: Subject, seed: int, steps: int, step: int) -> Recorded:
    watch, model, solver = _Watch(step), subject.model.clone(), solver_for(subject.model)
    # a function, as older versions of ComfyUI copy any other object with a MODEL's options
    model.model_options[WATCH] = lambda policy, x, sigma: watch(policy, x, sigma)
    subject = replace(subject, model=model)
    size_of_last = final_step_size_for(subject.model, solver)
    sigmas = own_sigmas(sampling_of(model), steps, final_step_size=size_of_last)
    progress = Progress(step)
    with suppress(_SeenError):
        subject.sample(gm_sampler(solver), sigmas, seed, progress)
    progress()
    if watch.seen is None:
        raise ValueError(f"the sampler ended after {watch.calls} network calls, before step {step}")
    mixture, x, sigma = watch.seen
    return Recorded(
        mixture=mixture,
        x=x,
        sigma=float(sigma.flatten()[0]),
        solver=solver,
        step=step,
        steps=steps,
        latent_shape=fitting_samples(model, subject.latent).shape,
        shape=solver_shape(model.model, model.model_options),
        latent_format=model.get_model_object("latent_format"),
    )
