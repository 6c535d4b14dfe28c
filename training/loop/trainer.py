"""Run a training loop: one process or many, checkpoints, exact resume, averaged weights.

A subclass of `Trainer` provides the model, the batches and the losses. A run writes
OUT/model.safetensors: the averaged weights, which load anywhere, and, under names that begin with
`training.`, all that is needed to resume to the very losses of a run that was never stopped.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from gmflow_core.files.atomic import remove_leftovers
from gmflow_core.files.checkpoint import (
    load_checkpoint,
    load_training_state,
    read_metadata,
    save_checkpoint,
)
from gmflow_core.files.errors import is_out_of_memory, quoted, reading
from training.common.devices import keep_freed_memory, on_cpu, training_attention
from training.common.processes import kept_work, stop_signals, together
from training.loop import checks
from training.loop.checks import ADVICE, check_facts, check_network, check_settings, check_state
from training.loop.config import TrainerConfig, memory_advice
from training.loop.curves import Curves, mean_losses
from training.loop.optimizer import lr_factor, new_schedule
from training.loop.sharding import check_accelerate, check_same_step, distribute_like, local, whole
from training.loop.skipped_steps import SkippedSteps, not_finite
from training.loop.training_state import pack_state, unpack_state
from training.loop.validation import Validation
from training.loop.wandb_run import WandbRun


class Trainer:
    """A run: everything that a checkpoint has to hold, and the loop.

    A subclass sets the class attributes below and implements `new_model`, `backward` and `decay`;
    it may override `objective`, `blocks`, `new_optimizer`, `draw_picture`, `draw_samples`,
    `extra_state`, `load_extra_state` and `data`, and set `validation`.

    Raises:
        ValueError: the settings do not fit the run found in OUT, the processes, or accelerate.
    """

    module = ""  # as in python -m MODULE
    free_to_change = frozenset(  # settings in which a resumed run may differ from its beginning
        {
            "out",
            "iterations",
            "precision",
            "device",
            "shard",
            "checkpoint_every",
            "log_every",
            "picture_every",
            "wandb",
            "restart",
        }
    )
    validation: Validation | None = None
    clip: float = math.inf  # largest norm of the gradient

    def __init__(self, config: TrainerConfig):
        self.config = config
        # no mixed precision, as `autocast` covers the network alone
        self.accelerator = Accelerator(cpu=on_cpu(config.device), mixed_precision="no")
        check_accelerate(self.accelerator)
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        self.path = config.out / "model.safetensors"
        torch.manual_seed(config.seed)
        self.model = self.new_model().to(self.accelerator.device)
        self.prepared = self.prepare()
        self.optimizer = self.new_optimizer()  # after `prepare`, which may replace the parameters
        self.step = 0
        self.skipped = SkippedSteps()
        self.starts: list[dict] = []  # each command of this run, and the iteration it began at
        self.seconds = 0.0  # training time, over all starts
        self.figures: dict[str, float] = {}  # of the last pictures and of the last validation
        self.average = [p.detach().clone() for p in self.model.parameters()] if config.ema else None
        with together(self.accelerator.state):
            found = self.path.exists() and not config.restart
            if not found and not config.restart:
                checks.check_no_weights(config.out)
            if self.accelerator.is_main_process:
                for folder in config.out.glob("*/"):  # of killed processes; OUT's are gone already
                    remove_leftovers(folder)
        if found:
            self.resume()
        self.schedule = new_schedule(self.optimizer, config, self.step)
        check_same_step(self.accelerator, self.step, config.out)
        command = f"python -m {self.module} " + shlex.join(sys.argv[1:])
        if not self.starts or self.starts[-1]["command"] != command:
            self.starts.append({"command": command, "step": self.step})

    # Parts that a subclass provides

    def new_model(self) -> nn.Module:
        """Create a model of `gmflow_core.models`, with fresh weights."""
        raise NotImplementedError

    def objective(self) -> nn.Module:
        """Return the module to wrap in DDP or FSDP: the model, or one that holds it."""
        return self.model

    def blocks(self) -> Iterable[nn.Module]:
        """Return the modules whose weights FSDP gathers together."""
        return ()

    def new_optimizer(self) -> torch.optim.Optimizer:
        """Create the optimizer of the model's parameters."""
        raise NotImplementedError

    def backward(self) -> dict[str, Tensor]:
        """Compute the gradients of iteration `self.step`; return its losses, "loss" first."""
        raise NotImplementedError

    def decay(self, step: int) -> float:
        """Return the decay of the averaged weights at iteration `step`, counted from 1."""
        raise NotImplementedError

    def draw_picture(self, model: nn.Module) -> Tensor | None:
        """Draw a picture of samples, (H, W, 3) in [0, 1], in the main process; None draws none."""
        return None

    def draw_samples(self, model: nn.Module, images: range) -> Tensor:
        """Draw samples (n, C, h, w) of these numbers for `validation`, each from its own seed."""
        raise NotImplementedError

    def extra_state(self) -> dict[str, Tensor]:
        """Return further tensors that a checkpoint has to hold."""
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Load what `extra_state` returned."""

    def data(self) -> dict[str, Any]:
        """Return the description of the model's samples for the checkpoint's metadata."""
        return {}

    # The loop

    def run(self) -> None:
        """Train to the last iteration, with logs, checkpoints and pictures on the way.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM came; the iteration under way is done and saved.
            FloatingPointError: as `count_skipped`.
        """
        config, main = self.config, self.accelerator.is_main_process
        with together(self.accelerator.state):
            curves = self.new_curves() if main else None
        settings = {"disable": not main, "unit": "it", "dynamic_ncols": True}
        bar = tqdm(total=config.iterations, initial=self.step, **settings)
        pending: list[dict[str, Tensor]] = []  # losses since the last point of the curve
        # several processes would stop at different iterations: signals kill them, and they resume
        # from their last checkpoint
        alone = self.accelerator.num_processes == 1
        try:
            with stop_signals() if alone else nullcontext(threading.Event()) as stopped:
                while self.step < config.iterations and not stopped.is_set():
                    started = time.perf_counter()
                    pending.append(self.iterate())
                    bar.update()
                    last = self.step == config.iterations
                    log = last or self.step % config.log_every == 0
                    if log:
                        self.count_skipped()
                        means = mean_losses(self.accelerator, pending)
                        pending.clear()
                    self.seconds += time.perf_counter() - started
                    if log:
                        bar.set_postfix(loss=f"{means['loss']:.4f}", skipped=self.skipped.total)
                        self.log(curves, means)
                    try:  # before the checkpoint, after which a killed run would not draw it
                        self.look(curves, last)
                    finally:
                        if last or self.step % config.checkpoint_every == 0:
                            self.save()
                if stopped.is_set():
                    self.save()
        finally:
            bar.close()
            if curves:
                curves.close()
        if stopped.is_set():
            raise KeyboardInterrupt(f"stopped at iteration {self.step}")

    def new_curves(self) -> Curves:
        """Open the logs of this start: TensorBoard's, and with --wandb a run of wandb."""
        config, step = self.config, self.step + 1
        run = WandbRun(config.out, self.settings(), step) if config.wandb else None
        return Curves(config.out, step, run)

    def look(self, curves: Curves | None, last: bool) -> None:
        """Draw a picture of samples and validate them, whichever is due at this iteration.

        Both are due after the last one too; pictures only if the run is as long as their interval.
        """
        every = self.config.picture_every
        picture = self.step % every == 0 or (last and every <= self.config.iterations)
        check = self.validation is not None and (last or self.step % self.validation.every == 0)
        if not picture and not check:
            return
        model, self.figures = self.looked_at(), {}
        if picture:
            self.add_picture(curves, model)
        if check:
            self.figures |= self.validation.figures(model, self.draw_samples)
        if curves and self.figures:
            curves.numbers(self.figures, self.step)

    def looked_at(self) -> nn.Module:
        """Return the model that pictures and validation sample."""
        return self.sampling_model()

    def add_picture(self, curves: Curves | None, model: nn.Module) -> None:
        """Draw a picture of samples."""
        with together(self.accelerator.state):
            picture = self.draw_picture(model) if curves else None
            if picture is not None:
                curves.picture("samples", picture, self.step)

    def log(self, curves: Curves | None, means: dict[str, float]) -> None:
        """Add a point to the curves of TensorBoard."""
        if curves:
            lr = self.config.lr * lr_factor(self.config, self.step - 1)
            points = {**means, "learning_rate": lr, "skipped_steps": self.skipped.total}
            curves.numbers(points, self.step)

    def iterate(self) -> dict[str, Tensor]:
        """Run one iteration; return its losses, not yet averaged over the processes.

        Without a finite gradient the weights stay as they are; their average still moves towards
        them. `count_skipped` finds such steps at the next log or checkpoint, because reading the
        flag here would force a GPU sync (8-bit and sharded optimizers need that sync).
        """
        self.optimizer.zero_grad()
        tokens = getattr(self.model.config, "tokens", 0)  # networks of points have none
        with training_attention(self.accelerator.device, self.config.precision, tokens):
            losses = self.backward()
        self.update(self.clip_gradient().isfinite())
        self.schedule.step()
        self.step += 1
        return losses

    def clip_gradient(self) -> Tensor:
        """Scale the gradient down to the norm `clip` if it is larger; return its norm before."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
        if self.clip < math.inf:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        return norm

    def update(self, finite: Tensor) -> None:
        """Step the optimizer if the gradient is finite, and update the averaged weights.

        Args:
            finite: bool, on the device.
        """
        self.skipped.add(finite)
        in_kernel = self.optimizer.defaults.get("fused") and not self.config.shard
        if in_kernel and self.accelerator.device.type in ("cpu", "cuda"):
            # GradScaler's protocol: the fused kernel skips the step itself, without a sync
            self.optimizer.found_inf = (~finite).float()
            self.optimizer.step()
        elif finite:
            self.optimizer.step()
        if self.average is not None:
            pairs = zip(self.average, self.model.parameters(), strict=True)
            average, current = zip(*((local(a), local(p.detach())) for a, p in pairs), strict=True)
            # AveragedModel would give the step as a GPU tensor, but the decay needs its value
            get_ema_multi_avg_fn(self.decay(self.step + 1))(average, current, None)

    def count_skipped(self) -> None:
        """Count the steps without a finite gradient; this forces a GPU sync.

        Raises:
            FloatingPointError: `MAX_IN_A_ROW` steps in a row had none, or no step of a whole run.
        """
        if self.skipped.count() or self.skipped.total >= self.step == self.config.iterations:
            raise not_finite(self.step, self.path)

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context of the network: matrix products in the user's precision."""
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=enabled)

    # Several processes

    def prepare(self) -> nn.Module:
        """Wrap the objective for several processes: in DDP, or with --shard in FSDP 2."""
        objective = self.objective()
        if not self.config.shard:
            return self.accelerator.prepare(objective)
        if self.accelerator.num_processes == 1:
            raise ValueError(
                "--shard divides the weights among processes, and there is one; start several with "
                "torchrun"
            )
        for block in self.blocks():
            fully_shard(block)
        return fully_shard(objective)

    def gradient_of_piece(self, last: bool):
        """Return the context of a piece's backward pass.

        Gradients of pieces are added up in each process, and over the processes with the last one.
        """
        if self.config.shard:
            self.prepared.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(self.prepared)

    # State

    def sampling_model(self) -> nn.Module:
        """Return a copy of the model with the averaged weights, in evaluation mode.

        In a run without averages it has the weights themselves. All processes call it together.
        """
        names = [name for name, _ in self.model.named_parameters()]
        weights = list(self.model.parameters()) if self.average is None else self.average
        tensors = {**self.model.state_dict(), **dict(zip(names, weights, strict=True))}
        with torch.device("meta"):
            model = type(self.model)(self.model.config)
        model.load_state_dict({name: whole(t.detach()) for name, t in tensors.items()}, assign=True)
        return model.eval().requires_grad_(False)

    def settings(self) -> dict[str, Any]:
        """Return the configuration as JSON holds it."""
        values = dataclasses.asdict(self.config)
        return {
            k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
            for k, v in values.items()
        }

    def facts(self) -> dict[str, Any]:
        """Return how the model was made, for the checkpoint's metadata."""
        return {
            "command": self.starts[-1]["command"],
            "starts": self.starts,
            "config": self.settings(),
            "step": self.step,
            "skipped_steps": self.skipped.total,
            "seconds": round(self.seconds, 1),
            "figures": checks.known_figures(self.figures),
            "torch": torch.__version__,
        }

    def save(self) -> None:
        """Write the checkpoint: all processes gather it, the main one writes.

        If the weights are not finite nothing is written, so that the last good state stays.
        """
        self.count_skipped()
        if self.skipped.in_a_row and not all(
            local(p.detach()).isfinite().all() for p in self.model.parameters()
        ):
            return
        state = {
            "step": torch.tensor(self.step),
            "skipped": torch.tensor(self.skipped.total),
            **self.extra_state(),
            **pack_state(self.model, self.optimizer),
        }
        sampling, facts = self.sampling_model(), self.facts()
        with together(self.accelerator.state):
            if self.accelerator.is_main_process:
                save_checkpoint(sampling, self.path, facts=facts, state=state, data=self.data())
        kept_work.set()

    def resume(self) -> None:
        """Load the checkpoint in OUT.

        Raises:
            ValueError: it belongs to a run with other settings or another network, holds no
                training state, or was edited or damaged.
        """
        metadata, state = read_metadata(self.path), load_training_state(self.path)
        facts = metadata["training"]
        if "step" not in state or "config" not in facts:
            raise ValueError(
                f"{self.path} holds weights only; give another --out, or --restart to overwrite it"
            )
        mine = {k: v for k, v in self.settings().items() if k not in self.free_to_change}
        check_network(metadata, self.model, self.data_name(), self.path)
        check_settings(facts["config"], mine, self.path)
        check_facts(facts, state, self.path)
        check_state(state, self.model, self.optimizer, self.extra_state(), self.path)
        unpack_state(state, self.model, self.optimizer)
        if self.average is not None:
            averaged = dict(load_checkpoint(self.path)[0].named_parameters())
            for (name, _), mine in zip(self.model.named_parameters(), self.average, strict=True):
                local(mine).copy_(local(distribute_like(averaged[name].data, mine)))
        with reading(self.path, ADVICE, "holds a training state that cannot be loaded"):
            self.load_extra_state(state)
        self.step, self.skipped.total = int(state["step"]), int(state["skipped"])
        self.seconds, self.starts = facts["seconds"], facts.get("starts", [])
        self.figures = checks.known_figures(facts.get("figures"))
        if self.accelerator.is_main_process:
            print(f"going on from iteration {self.step} of {self.path}")
            before, now = facts["config"].get("iterations"), self.config.iterations
            if self.config.lr_schedule == "cosine" and before != now:
                print(
                    f"note: the learning rate followed a cosine over {quoted(before)} iterations "
                    f"until now, and will over {now} from here"
                )

    def data_name(self) -> str:
        """Return where the data lie, for a message."""
        return ""


AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def train(new_trainer: Callable[[Any], AnyTrainer], config: TrainerConfig) -> AnyTrainer:
    """Create a trainer of these settings, run it, and return it.

    Raises:
        ValueError: as the trainer, or the device is out of memory.
    """
    if config.restart:  # until then a checkpoint in OUT is another run's
        kept_work.clear()
    try:
        trainer = new_trainer(config)
        trainer.run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        why = f"{error or 'out of memory'}; the batch does not fit this device's memory"
        raise ValueError(f"{why}: {memory_advice(config)}") from error
    return trainer
