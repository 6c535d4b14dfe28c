"""The loop that trains an adapter, as a sampler of ComfyUI's.

As a sampler it is handed a model that is loaded, and conditionings that are converted, by
ComfyUI's own guider, which is also the way to call the network.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...gmflow_core.files.errors import WriteError
from ...gmflow_core.flow.imitation import imitate
from ...gmflow_core.flow.path import expand_sigma
from ...gmflow_core.flow.policy import PolicyVelocity
from .notices import notice
from .probabilistic_cfg import ProbabilisticCFG
from .recording import recording
from .train_network import Differentiable, learning
from .train_optimizer import MOST_NORM, LossWatch, PowerAverage, make_optimizer, on_cpu, warmed_up
from .train_settings import CFG, FINAL_STEP_SIZE, PROBABILISTIC, TrainSettings
from .train_student import HeadKind, Student

LEAST_SIGMA = 1e-4  # of a call of the teacher
NEGATIVE = "negative"
REMEMBERED = 10  # iterations between states to go back to
MOST_SKIPPED = 10  # steps in a row without finite gradients, at which a run ends
SCALE = 2.0**12  # of the loss in the backward pass: small gradients would be 0 in fp16
GUIDING = (  # keys in model_options of functions that change the prediction of a guider
    "sampler_cfg_function",
    "sampler_calc_cond_batch_function",
    "sampler_pre_cfg_function",
    "sampler_post_cfg_function",
)


def prompt_key(index: int) -> str:
    """Return the name of a prompt among a guider's conditionings."""
    return f"prompt {index}"


class Calls:
    """Calls of the student and of the teacher through a guider, for one prompt.

    Args:
        options: model options that the guider is called with.
        conds: all prompts of the guider, converted, by their keys.
    """

    def __init__(self, student: Student, guider, options: dict, conds: dict, run: TrainSettings):
        self.student_model, self.guider, self.run = student, guider, run
        self.layout, self.conds, self.negative = student.base.layout, conds, conds.get(NEGATIVE)
        self.student_options = {k: v for k, v in options.items() if k not in GUIDING}
        self.teacher_options, self.prompt = options, prompt_key(0)
        if run.guidance == PROBABILISTIC:
            guided = {"sampler_cfg_function": ProbabilisticCFG(1.0, (0.0, 1.0))}
            self.teacher_options = {**options, **guided, "disable_cfg1_optimization": True}

    def student(self, x: Tensor, sigma: Tensor) -> PolicyVelocity:
        """Return the student's prediction at x (B, C, *S) and sigma (B,), with its graph."""
        self.student_model.switch.student = True
        options, recorder = recording(self.student_options)
        cond = self.conds[self.prompt]
        with Differentiable():
            self._call(x, sigma, options, cond, None, 1.0)
        return recorder.predictions[cond[0]["uuid"]]

    def teacher(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the teacher's velocity (B, C, *S), guided, at x and sigma (B,)."""
        self.student_model.switch.student = False
        options, sigma = self.teacher_options, sigma.clamp(min=LEAST_SIGMA)
        scale = 1.0 if self.run.guidance not in (CFG, PROBABILISTIC) else self.run.scale
        if self.run.guidance == PROBABILISTIC:
            options, _ = recording(options)
        denoised = self._call(x, sigma, options, self.conds[self.prompt], self.negative, scale)
        self.student_model.switch.student = True  # for what the backward pass computes again
        return (x - denoised) / expand_sigma(sigma, x)

    def _call(
        self, x: Tensor, sigma: Tensor, options: dict, cond: Any, negative: Any, scale: float
    ) -> Tensor:
        """Return the guider's prediction of x_0 (B, C, *S)."""
        guider = self.guider
        guider.conds, guider.cfg = {"positive": cond, NEGATIVE: negative}, scale
        return self.layout.unfold(guider(self.layout.fold(x), sigma, options, self.run.seed))


class Draws:
    """Random numbers of one iteration: the same for the same seed, whatever ran before."""

    def __init__(self, seed: int, iteration: int, device: torch.device):
        key = zlib.crc32(f"{seed} {iteration}".encode())
        self.generator, self.device = torch.Generator().manual_seed(key), device

    def normal(self, *shape: int) -> Tensor:
        """Draw from N(0, 1)."""
        return torch.randn(shape, generator=self.generator).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Draw from [0, 1)."""
        return torch.rand(shape, generator=self.generator).to(self.device)

    def index(self, count: int) -> int:
        """Draw one of `count`."""
        return int(torch.randint(count, (1,), generator=self.generator))


class Training(comfy.samplers.Sampler):
    """Train a student; `sample` is the whole run, or what is left of one.

    Args:
        prompts: number of prompts of the guider.
        report: called after each iteration as report(training, loss).
        save: called as save(training) when a file is due, and when the run ends in whatever way.
        preview: called as preview(training, calls), and returns what ComfyUI's bar shows, or None.
        head: to begin with; a new one if None.
        restore: puts the state of an earlier run into this one; None if there is none.
    """

    def __init__(
        self,
        student: Student,
        run: TrainSettings,
        kind: HeadKind,
        prompts: int,
        save: Callable[[Training], None],
        report: Callable[[Training, float], None],
        preview: Callable[[Training, Calls], Any],
        head=None,
        restore: Callable[[Training], None] | None = None,
    ):
        self.student, self.run, self.kind, self.prompts = student, run, kind, prompts
        self.save, self.report, self.preview = save, report, preview
        self.head, self.restore = head, restore
        self.iteration, self.losses, self.lowest, self.stopped = 0, [], math.inf, ""
        self.good: tuple[dict[str, Tensor], int] | None = None  # what a run that diverges goes
        # back to: values that a loss has judged, and their iteration
        self.skipped = 0  # steps in a row whose gradients were not finite

    def sample(
        self,
        guider,
        sigmas: Tensor,
        extra_args: dict,
        callback,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Run; the signature is that of ComfyUI's samplers."""
        with learning():
            conds = dict(guider.conds)
            self._start(noise.device)
            calls = Calls(self.student, guider, extra_args["model_options"], conds, self.run)
            try:
                self._loop(calls, self.student.base.layout.unfold(noise).shape, noise.device)
            finally:
                guider.conds = conds
                self.student.switch.student = False
        return torch.zeros_like(noise)

    def _start(self, device: torch.device) -> None:
        """Make the head, the optimizer and the average, or take those of an earlier run."""
        run = self.run
        generator = torch.Generator().manual_seed(run.seed % 2**63)
        self.student.start(self.kind, generator, device, self.head)
        self.parameters = self.student.parameters()
        self.optimizer = make_optimizer(run.optimizer, self.parameters, run.learning_rate)
        self.average = PowerAverage(self.parameters) if run.ema else None
        if self.restore is not None:
            self.restore(self)
        self.watch = LossWatch(self.losses, self.lowest)

    def _loop(self, calls: Calls, shape: torch.Size, device: torch.device) -> None:
        run, bar = self.run, comfy.utils.ProgressBar(self.run.iterations)
        try:
            while self.iteration < run.iterations and not self.stopped:
                loss = self._iterate(calls, shape, device)
                # the teacher's share of the way, and with it the loss's meaning, falls to 0
                self.stopped = self.watch.problem(loss, changing=self.iteration < run.decay)
                if self.stopped:
                    break
                self._remember()
                self._step()
                if self.stopped:
                    break
                picture = None
                if run.preview_every and self.iteration % run.preview_every == 0:
                    with torch.no_grad():
                        picture = self.preview(self, calls)
                bar.update_absolute(self.iteration, run.iterations, picture)
                self.report(self, loss)
                if run.checkpoint_every and self.iteration % run.checkpoint_every == 0:
                    self._write()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            self.save(self)

    def _remember(self) -> None:
        """Keep what is trained, now and then, where the loss that it had is one to go back to."""
        due = self.good is None or self.iteration % REMEMBERED == 0
        if due and self.watch.is_settled:
            values = {name: value.clone() for name, value in self.result()[0].items()}
            self.good = values, self.iteration

    def _write(self) -> None:
        """Write a file while the run goes on, whether that succeeds or not."""
        try:
            self.save(self)
        except WriteError as error:
            notice(f"not saved yet: {error}")

    def _iterate(self, calls: Calls, shape: torch.Size, device: torch.device) -> float:
        """Return the loss of one iteration, its gradients summed over the segments."""
        run, total = self.run, 0.0
        draws = Draws(run.seed, self.iteration, device)
        calls.prompt = prompt_key(draws.index(self.prompts))
        noise = draws.normal(*shape)
        ratio = max(0.0, 1 - self.iteration / run.decay) if run.decay else 0.0
        self.optimizer.zero_grad(set_to_none=True)
        losses = imitate(
            calls.student,
            calls.teacher,
            noise,
            run.steps,
            run.imitation(),
            lambda count: draws.uniform(shape[0], count),
            final_step_size=FINAL_STEP_SIZE,
            teacher_ratio=ratio,
        )
        for loss in losses:
            (SCALE * loss).backward()
            total += float(loss.detach())
            comfy.model_management.throw_exception_if_processing_interrupted()
        return total

    def _step(self) -> None:
        """Step the optimizer and the average; gradients that are not finite are skipped."""
        run = self.run
        for value in self.parameters.values():
            if value.grad is not None:
                value.grad.div_(SCALE)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), MOST_NORM)
        self.skipped = 0 if bool(norm.isfinite()) else self.skipped + 1
        if self.skipped == MOST_SKIPPED:
            self.stopped = f"the gradients of {MOST_SKIPPED} iterations in a row were not finite"
            return
        if not self.skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = warmed_up(run.learning_rate, self.iteration, run.warmup)
            self.optimizer.step()
        self.iteration += 1
        if self.average is not None:
            self.average.update(self.parameters, max(1, self.iteration - run.warmup))

    def result(self) -> tuple[dict[str, Tensor], int]:
        """Return what is trained, on the CPU, by its names in the file, and its iteration.

        Of a run that was stopped by its loss or its gradients, it is the last good state.
        """
        if self.stopped and self.good is not None:
            return self.good
        if self.average is not None:
            return self.average.values, self.iteration
        return {name: on_cpu(value) for name, value in self.parameters.items()}, self.iteration
